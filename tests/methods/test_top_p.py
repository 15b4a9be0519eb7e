"""Top-p's own properties; all else is in the contract suite."""

import pytest
import torch

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import TopP
from moeroute.types import RouterInput


def test_a_sure_token_has_one_expert_and_an_unsure_one_many():
    router = TopP(top_p=0.5).router(4, 4)
    with torch.no_grad():
        router.score.weight.copy_(4 * torch.eye(4))
    tokens = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0.0, 0, 0, 0]])
    routing = router(RouterInput(hidden_states=tokens, sequence_shape=(1, 3)))
    assert (routing.selected_experts < 4).sum(1).tolist() == [1, 2, 2]
    probs = router.score(RouterInput(hidden_states=tokens, sequence_shape=(1, 3))).softmax(1)
    torch.testing.assert_close(routing.routing_weights[0, 0], probs[0, 0])


def test_the_losses_make_the_router_sure_and_the_load_even():
    torch.manual_seed(0)
    method = TopP(entropy_loss_coef=0.5)
    layer = MoELayer(
        router=method.router(6, 4), experts=SwiGLUExperts(4, 6, 5), losses=method.losses()
    )
    layer(torch.randn(30, 6))
    report = moeroute.aux_losses(layer)
    assert set(report.parts) == {"BalanceLoss", "EntropyLoss"}
    assert report.parts["EntropyLoss"].item() == pytest.approx(1.0, abs=0.01)
    assert TopP(entropy_loss_coef=0, router_aux_loss_coef=0).losses() == ()


@pytest.mark.parametrize("fields", [{"top_p": 1.5}, {"max_slots": 0}, {"entropy_loss_coef": -1.0}])
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}="):
        TopP(**fields)
