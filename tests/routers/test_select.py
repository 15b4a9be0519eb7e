import pytest
import torch

from moeroute.routers import (
    All,
    ComposedRouter,
    GroupTopK,
    LinearScore,
    SelectionBias,
    TopK,
    TopKSoftmax,
    sigmoid_probs,
)

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, -1.0, 5.0, 4.0], [2.0, 0.0, 1.0, -1.0]])


def test_top_k_by_hand():
    selection = TopK(2)(LOGITS)
    assert selection.selected_experts.tolist() == [[1, 2], [2, 3], [0, 2]]
    even = 1 / (1 + torch.e**-1)
    expected = torch.tensor([[even, 1 - even]]).expand(3, 2)
    torch.testing.assert_close(selection.routing_weights, expected)


def test_top_k_without_normalisation_keeps_probabilities():
    weights = TopK(2, normalize=False)(LOGITS).routing_weights
    torch.testing.assert_close(weights, LOGITS.softmax(-1).topk(2).values)


def test_top_k_with_bias_eps_and_scaling():
    bias = SelectionBias(4)
    bias.e_score_correction_bias += torch.tensor([9.0, 0.0, 0.0, 0.0])
    select = TopK(
        1, probs=sigmoid_probs, normalize_eps=1.0, routed_scaling_factor=3.0, selection_bias=bias
    )
    selection = select(LOGITS)
    assert selection.selected_experts.flatten().tolist() == [0, 0, 0]
    score = LOGITS[:, :1].sigmoid()
    torch.testing.assert_close(selection.routing_weights, 3.0 * score / (score + 1.0))


def test_softmax_of_the_chosen_equals_normalised_softmax():
    mine, other = TopKSoftmax(3)(LOGITS), TopK(3)(LOGITS)
    assert torch.equal(mine.selected_experts, other.selected_experts)
    torch.testing.assert_close(mine.routing_weights, other.routing_weights)


def test_group_top_k_by_hand():
    # groups {0, 1} and {2, 3}; sums of two 0.9 + 0.1, 0.6 + 0.6: the second wins without the best
    probs = torch.tensor([[0.9, 0.1, 0.6, 0.6]])
    select = GroupTopK(2, num_groups=2, top_k_groups=1, probs=lambda logits: logits)
    selection = select(probs)
    assert sorted(selection.selected_experts[0].tolist()) == [2, 3]
    torch.testing.assert_close(selection.routing_weights, torch.tensor([[0.5, 0.5]]))


def test_groups_of_one_expert():
    select = GroupTopK(2, num_groups=4, top_k_groups=2)
    select.check(4)
    assert sorted(select(LOGITS).selected_experts[1].tolist()) == [2, 3]


def test_all_weighs_everyone():
    selection = All()(LOGITS)
    assert selection.selected_experts.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(selection.routing_weights, LOGITS.softmax(-1))


@pytest.mark.parametrize(
    ("select", "told"),
    [
        (lambda: TopK(0), "top_k=0"),
        (lambda: TopKSoftmax(-1), "top_k=-1"),
        (lambda: GroupTopK(0, num_groups=2, top_k_groups=1), "top_k=0"),
        (lambda: GroupTopK(2, num_groups=2, top_k_groups=3), "top_k_groups=3"),
        (lambda: GroupTopK(2, num_groups=2, top_k_groups=0), "top_k_groups=0"),
    ],
)
def test_impossible_selections(select, told):
    with pytest.raises(ValueError, match=told):
        select()


@pytest.mark.parametrize(
    ("select", "told"),
    [
        (TopK(9), "top_k=9 exceeds the 8 experts"),
        (TopKSoftmax(9), "top_k=9 exceeds the 8 experts"),
        (GroupTopK(2, num_groups=3, top_k_groups=1), "num_groups=3 does not divide num_experts=8"),
        (GroupTopK(5, num_groups=4, top_k_groups=2), "top_k=5 exceeds the 4 experts"),
        (TopK(2, selection_bias=SelectionBias(7)), "bias has 7 experts"),
    ],
)
def test_selections_that_do_not_fit_the_router(select, told):
    with pytest.raises(ValueError, match=told):
        ComposedRouter(LinearScore(4, 8), select)
