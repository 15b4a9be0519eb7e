import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moeroute.losses import BalanceLoss
from moeroute.routers import TopK, normalized_sigmoid_probs
from moeroute.types import RouterOutput, RoutingRecord

TOKENS, EXPERTS = 40, 8


def record(logits, top_k=2, mask=None, ids=None):
    selection = TopK(top_k)(logits)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=selection.routing_weights,
        selected_experts=selection.selected_experts if ids is None else ids,
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, token_mask=mask)


@pytest.mark.hf
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_loss_is_top_k_times_ours(top_k, masked):
    mine = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    other = mine.detach().clone().requires_grad_()
    mask = torch.arange(TOKENS) % 10 < 7 if masked else None
    ours = BalanceLoss()(record(mine, top_k, mask))
    attention_mask = None if mask is None else mask.reshape(4, 10)
    theirs = load_balancing_loss_func((other,), EXPERTS, top_k, attention_mask)
    torch.testing.assert_close(ours * top_k, theirs)
    (ours * top_k).backward()
    theirs.backward()
    torch.testing.assert_close(mine.grad, other.grad)


def test_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])
    loss = BalanceLoss()(record(probs.log(), top_k=2))
    # the tokens choose 0 and 1, and 0 and 2: loads of a half, a quarter, a quarter
    assert loss.item() == pytest.approx(3 * (0.5 * 0.6 + 0.25 * 0.15 + 0.25 * 0.25))


def test_collapse_and_balance():
    spread = torch.arange(TOKENS) % EXPERTS
    ids = torch.stack([spread, (spread + 1) % EXPERTS], 1)
    assert BalanceLoss()(record(torch.zeros(TOKENS, EXPERTS), ids=ids)).item() == pytest.approx(1)
    collapsed = torch.full((TOKENS, EXPERTS), -50.0)
    collapsed[:, :2] = 0
    assert BalanceLoss()(record(collapsed)).item() == pytest.approx(EXPERTS / 2)


def test_a_step_down_the_gradient_relieves_the_fullest_expert():
    logits = torch.randn(TOKENS, EXPERTS)
    logits[:, 3] += 2
    logits.requires_grad_()
    BalanceLoss()(record(logits)).backward()
    assert (logits.grad[:, 3] > 0).all()


def test_empty_slots_do_not_dilute_the_load():
    ids = torch.tensor([[0, 2], [1, 2]])  # two experts, id 2 is nobody
    loss = BalanceLoss()(record(torch.zeros(2, 2), ids=ids))
    assert loss.item() == pytest.approx(1)


def test_sigmoid_routers_normalise():
    loss = BalanceLoss(probs=normalized_sigmoid_probs)
    spread = torch.arange(TOKENS)[:, None] % EXPERTS
    even = record(torch.full((TOKENS, EXPERTS), 1.7), top_k=1, ids=spread)
    assert loss(even).item() == pytest.approx(1)
    assert repr(loss) == "BalanceLoss(weight=0.01)"
