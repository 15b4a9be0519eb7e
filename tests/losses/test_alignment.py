"""Routing manifold alignment."""

import pytest
import torch
from integration import tiny_models

from moeroute.losses import alignment_loss, routing_vectors, solved_neighbors


def test_the_last_real_token_of_either_padding():
    logits = [torch.randn(2 * 4, 3, requires_grad=True) for _ in range(6)]
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    vectors = routing_vectors(logits, mask, num_layers=5)
    expected = torch.stack(
        [torch.cat([layer.softmax(-1)[row] for layer in logits[1:]]) for row in (1, 7)]
    )
    torch.testing.assert_close(vectors, expected)
    vectors.square().sum().backward()
    assert logits[0].grad is None
    assert set(logits[3].grad.abs().sum(-1).nonzero().flatten().tolist()) == {1, 7}


def test_a_constant_on_all_logits_changes_nothing():
    logits, mask = torch.randn(8, 3), torch.ones(2, 4)
    same = routing_vectors([logits + 7.0], mask)
    torch.testing.assert_close(same, routing_vectors([logits], mask))


class TestNeighbors:
    points = torch.tensor([[0.0], [1.0], [3.0], [3.5], [50.0]])

    def test_nearest_solved_others(self):
        solved = torch.tensor([True, False, True, True, True])
        near = solved_neighbors(self.points, solved, count=2)
        assert near.ids.sort(-1).values.tolist() == [[2, 3], [0, 2], [0, 3], [0, 2], [2, 3]]
        torch.testing.assert_close(near.weights.sum(-1), torch.ones(5))
        assert not (near.ids == 1).any()

    def test_weights_are_the_papers(self):
        near = solved_neighbors(self.points, torch.ones(5), count=2, sigma=2.0)
        distances = (self.points[near.ids] - self.points[:, None]).abs().squeeze(-1)
        similarity = torch.exp(-distances.square() / 8)
        expected = similarity / similarity.sum(-1, keepdim=True)
        torch.testing.assert_close(near.weights[:4], expected[:4])

    def test_too_few_and_none(self):
        some = solved_neighbors(self.points, torch.tensor([1, 0, 0, 0, 0]), count=3)
        assert some.weights.sum(-1).tolist() == [0, 1, 1, 1, 1]
        assert some.ids[2].tolist() == [0, 2, 2]
        none = solved_neighbors(self.points, torch.zeros(5))
        assert none.weights.sum() == 0
        with pytest.raises(ValueError, match="count=0"):
            solved_neighbors(self.points, torch.ones(5), count=0)


def test_zero_only_where_the_neighbors_are_routed_alike():
    vectors = torch.rand(3, 4, requires_grad=True)
    targets = vectors.detach()[:, None].repeat(1, 2, 1)
    weights = torch.full((3, 2), 0.5)
    assert alignment_loss(vectors, targets, weights).item() == 0
    targets[1, 0] += 1.0
    assert alignment_loss(vectors, targets, weights).item() == pytest.approx(4 * 0.5 / 3)
    one = alignment_loss(vectors[:1], targets[1:2, :1], torch.ones(1, 1))
    assert one.item() == pytest.approx((vectors[0] - targets[1, 0]).square().sum().item())
    with pytest.raises(ValueError, match="do not fit"):
        alignment_loss(vectors, targets, weights[:2])


def test_training_the_routers_of_a_checkpoint_brings_them_together():
    model = tiny_models.build("mixtral").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate" in name and "gate_up" not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids, mask = tiny_models.token_ids(), torch.ones_like(tiny_models.token_ids())

    def vectors():
        return routing_vectors(model(input_ids=ids, output_router_logits=True).router_logits, mask)

    kept = vectors().detach()
    near = solved_neighbors(torch.randn(len(ids), 3), torch.ones(len(ids)), count=1)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    before = alignment_loss(vectors(), kept[near.ids], near.weights)
    for _ in range(10):
        optimizer.zero_grad()
        alignment_loss(vectors(), kept[near.ids], near.weights).backward()
        optimizer.step()
    assert alignment_loss(vectors(), kept[near.ids], near.weights) < 0.7 * before
    with pytest.raises(ValueError, match="has 4 rows"):
        routing_vectors([torch.zeros(4, 2)], mask)
    with pytest.raises(ValueError, match="output_router_logits=True"):
        routing_vectors([], mask)
