import math

import pytest
import torch

from moeroute.losses import ZLoss
from moeroute.types import RouterOutput, RoutingRecord


def record(logits, mask=None):
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=torch.ones(logits.shape[0], 1),
        selected_experts=torch.zeros(logits.shape[0], 1, dtype=torch.int64),
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, token_mask=mask)


def test_zero_logits_cost_the_square_of_log_e():
    assert ZLoss()(record(torch.zeros(5, 8))).item() == pytest.approx(math.log(8) ** 2)
    assert ZLoss()(record(torch.full((5, 8), -math.log(8)))).item() == pytest.approx(0, abs=1e-10)


def test_gradient_is_two_logsumexp_softmax_over_tokens():
    logits = torch.randn(6, 4, requires_grad=True)
    ZLoss()(record(logits)).backward()
    data = logits.detach()
    expected = 2 * data.logsumexp(1, keepdim=True) * data.softmax(1) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_padding_is_not_in_the_mean():
    logits = torch.randn(6, 4)
    mask = torch.tensor([True, True, False, True, False, False])
    assert ZLoss()(record(logits, mask)) == ZLoss()(record(logits[mask]))
