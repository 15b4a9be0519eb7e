"""Switch: the weight is the highest probability, and the router alone sees the jitter."""

import pytest
import torch
from integration import tiny_models

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import Switch
from moeroute.types import RouterInput


def given(tokens):
    return RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0]))


def test_the_weight_is_the_highest_probability_with_a_gradient():
    router = Switch().router(6, 4).eval()
    routing = router(given(torch.randn(9, 6)))
    probs, best = routing.router_logits.softmax(-1).max(-1)
    assert torch.equal(routing.selected_experts[:, 0], best)
    torch.testing.assert_close(routing.routing_weights[:, 0], probs)
    routing.routing_weights.sum().backward()
    assert router.score.score.weight.grad.abs().sum() > 0


def test_the_router_is_shaken_in_training_only_and_within_bounds():
    router = Switch(router_jitter_noise=0.1).router(6, 4)
    with torch.no_grad():
        router.score.score.weight.copy_(torch.eye(4, 6))
    tokens = torch.randn(50, 6)
    shaken = router(given(tokens)).router_logits / tokens[:, :4]
    assert shaken.min() >= 0.9 - 1e-6
    assert shaken.max() <= 1.1 + 1e-6
    assert shaken.std() > 0.02
    torch.testing.assert_close(router.eval()(given(tokens)).router_logits, tokens[:, :4])


def test_a_fresh_method_keeps_the_checkpoints_first_expert():
    model, ids = tiny_models.build("mixtral"), tiny_models.token_ids()
    own = model(ids, output_router_logits=True).router_logits[0]
    wrapped = moeroute.wrap_model(model, Switch()).eval()
    with moeroute.track_routing(wrapped) as stats:
        wrapped(ids)
    expected = own.argmax(-1).bincount(minlength=tiny_models.NUM_EXPERTS)
    assert torch.equal(stats.layers[0].counts, expected)


def test_it_stands_in_a_layer_of_ones_own():
    method = Switch(router_z_loss_coef=0.001)
    layer = MoELayer(
        router=method.router(6, 4), experts=SwiGLUExperts(4, 6, 8), losses=method.losses()
    )
    layer(torch.randn(2, 3, 6)).sum().backward()
    assert moeroute.aux_losses(layer).parts.keys() == {"BalanceLoss", "ZLoss"}


@pytest.mark.parametrize(
    "fields", [{"top_k": 0}, {"router_jitter_noise": 1.0}, {"router_aux_loss_coef": -1.0}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Switch(**fields)
