import pytest
import torch

from moeroute.losses import ImportanceLoss
from moeroute.types import RouterOutput, RoutingRecord


def record(weights, ids, size):
    routing = RouterOutput(
        router_logits=torch.zeros(ids.shape[0], size), routing_weights=weights, selected_experts=ids
    )
    return RoutingRecord(site="", layer_index=0, routing=routing)


def test_by_hand():
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    ids = torch.tensor([[0, 1], [0, 2]])
    # importance 1.3, 0.3, 0.4; mean 2/3, population variance 0.20222
    loss = ImportanceLoss()(record(weights, ids, 3))
    assert loss.item() == pytest.approx(0.2022222 / (4 / 9), rel=1e-5)


def test_collapse_is_experts_minus_one_and_empty_slots_do_not_count():
    weights = torch.tensor([[1.0, 9.0], [1.0, float("nan")]])
    ids = torch.tensor([[1, 4], [1, -1]])
    assert ImportanceLoss()(record(weights, ids, 4)).item() == pytest.approx(3, rel=1e-5)


def test_gradient_moves_weight_to_the_poor():
    weights = torch.tensor([[0.7, 0.3]], requires_grad=True)
    ImportanceLoss()(record(weights, torch.tensor([[0, 1]]), 2)).backward()
    assert weights.grad[0, 0] > 0 > weights.grad[0, 1]
