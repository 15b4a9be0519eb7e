"""GroupLimited: a token's experts lie in its best groups."""

import pytest
import torch
from integration import tiny_models

import moeroute
from moeroute.methods import GroupLimited
from moeroute.types import RouterInput


def route(method, logits):
    router = method.router(logits.shape[1], logits.shape[1])
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(logits.shape[1]))
    return router(RouterInput(hidden_states=logits, sequence_shape=(1, logits.shape[0])))


@pytest.mark.parametrize(("size", "group"), [(1, 0), (2, 1)])
def test_a_group_counts_by_its_best_or_by_the_sum_of_its_two_best(size, group):
    logits = torch.log(torch.tensor([[0.4, 0.05, 0.3, 0.25]]))  # sums 0.45 and 0.55
    method = GroupLimited(num_groups=2, top_k_groups=1, group_score_size=size, top_k=2)
    chosen = set(route(method, logits).selected_experts[0].tolist())
    assert chosen == {2 * group, 2 * group + 1}


def test_no_token_leaves_its_groups():
    method = GroupLimited(num_groups=4, top_k_groups=2, top_k=3)
    chosen = route(method, torch.randn(200, 8)).selected_experts
    assert max(len(set(row)) for row in (chosen // 2).tolist()) == 2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma4"])
def test_one_group_keeps_the_checkpoints_routing(family):
    model, ids = tiny_models.build(family), tiny_models.token_ids()
    expected = model(ids).logits
    wrapped = moeroute.wrap_model(model, GroupLimited(num_groups=1)).eval()
    torch.testing.assert_close(wrapped(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="top_k_groups=3"):
        GroupLimited(num_groups=2, top_k_groups=3)
    with pytest.raises(ValueError, match="group_score_size=0"):
        GroupLimited(group_score_size=0)
    with pytest.raises(ValueError, match="num_groups=3 does not divide num_experts=4"):
        moeroute.wrap_model(tiny_models.build("mixtral"), GroupLimited(num_groups=3))
    with pytest.raises(ValueError, match="top_k=2 exceeds the 1 experts"):
        moeroute.wrap_model(tiny_models.build("mixtral"), GroupLimited(num_groups=4))
