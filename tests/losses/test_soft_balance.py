"""The load of a soft mixture is that of its top-k."""

import torch

from moeroute.losses import BalanceLoss, SoftBalanceLoss
from moeroute.routers import All, TopK
from moeroute.types import RouterOutput, RoutingRecord

TOKENS, EXPERTS = 24, 6


def record(logits, select, mask=None):
    selection = select(logits)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=selection.routing_weights,
        selected_experts=selection.selected_experts,
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, token_mask=mask)


def test_it_is_the_balance_loss_of_the_sparse_mixture():
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    soft = SoftBalanceLoss(top_k=2)(record(logits, All()))
    sparse = BalanceLoss()(record(logits, TopK(2, normalize=True)))
    torch.testing.assert_close(soft, sparse)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (soft, sparse)))
    assert soft != BalanceLoss()(record(logits, All()))


def test_absent_experts_carry_no_load():
    logits = torch.randn(TOKENS, EXPERTS)
    logits[:, 2:] = -torch.inf
    loss = SoftBalanceLoss(top_k=4)(record(logits, All()))
    torch.testing.assert_close(loss, torch.tensor(EXPERTS / 2))


def test_padding_is_left_out():
    logits, mask = torch.randn(TOKENS, EXPERTS), torch.arange(TOKENS) < 20
    expected = SoftBalanceLoss(top_k=2)(record(logits[:20], All()))
    logits[20:] = torch.nan
    torch.testing.assert_close(SoftBalanceLoss(top_k=2)(record(logits, All(), mask)), expected)


def test_more_slots_than_experts_are_all_of_them():
    loss = SoftBalanceLoss(top_k=9)(record(torch.randn(TOKENS, EXPERTS), All()))
    torch.testing.assert_close(loss, torch.tensor(1.0))
