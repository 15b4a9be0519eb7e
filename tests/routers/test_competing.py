"""Selections in which tokens compete: experts that choose, capacities, balanced plans."""

import pytest
import torch

from moeroute import routers
from moeroute.routers import Capacity, ExpertChoice, SinkhornTopK, TopK, TopP
from moeroute.routers.sinkhorn import sinkhorn_plan
from moeroute.types import RouterInput, RouterOutput, RoutingRecord

TOKENS, EXPERTS = 32, 4


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(TOKENS, EXPERTS)


def loads(selection):
    return torch.bincount(selection.selected_experts.flatten(), minlength=EXPERTS + 1)[:EXPERTS]


def dense(selection, size=EXPERTS):
    table = torch.zeros(selection.selected_experts.shape[0], size + 1)
    return table.scatter_add(1, selection.selected_experts, selection.routing_weights)[:, :size]


def expert_choice_reference(z, capacity, mask):
    p = z.softmax(-1) * mask[:, None]
    chosen = p.topk(min(capacity, p.shape[0]), 0).indices
    return torch.zeros_like(p).scatter(0, chosen, p.gather(0, chosen))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5, 9.0])
def test_each_expert_takes_its_tokens_of_highest_probability(logits, factor):
    selection = ExpertChoice(EXPERTS, capacity_factor=factor)(logits)
    capacity = min(int(factor * TOKENS / EXPERTS), TOKENS)
    expected = expert_choice_reference(logits, capacity, torch.ones(TOKENS))
    torch.testing.assert_close(dense(selection), expected)
    assert loads(selection).tolist() == [capacity] * EXPERTS
    assert selection.max_assignments >= loads(selection).sum()


def test_padding_counts_for_no_capacity_and_is_never_chosen(logits):
    mask = torch.arange(TOKENS) < 20
    selection = ExpertChoice(EXPERTS, capacity_factor=2.0).among(logits, mask)
    assert (selection.selected_experts[20:] == EXPERTS).all()
    assert loads(selection).tolist() == [10] * EXPERTS


def test_thresholds_follow_the_cut_offs_once_a_step(logits):
    select = ExpertChoice(EXPERTS, capacity_factor=1.0, momentum=0.5)
    chosen = select(logits)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=chosen.routing_weights,
        selected_experts=chosen.selected_experts,
    )
    for _ in range(2):
        select.observe(RoutingRecord(site="", layer_index=0, routing=routing))
    assert (select.thresholds == 0.25).all()
    select.post_step()
    cut = logits.softmax(1).sort(0, descending=True).values[TOKENS // EXPERTS - 1]
    torch.testing.assert_close(select.thresholds, 0.125 + 0.5 * cut)
    before = select.thresholds.clone()
    select.post_step()  # nothing was seen
    assert torch.equal(select.thresholds, before)
    select.thresholds.copy_(cut)
    assert torch.equal(loads(select.eval()(logits)), loads(chosen))  # the same tokens, one by one
    one_by_one = torch.cat([select(row[None]).selected_experts for row in logits])
    assert torch.equal(one_by_one, select(logits).selected_experts)


def drop_reference(ids, capacity):
    """First come, first served; second choices after all first choices."""
    kept, used = torch.zeros_like(ids, dtype=torch.bool), [0] * EXPERTS
    for slot in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = ids[token, slot]
            kept[token, slot] = used[expert] < capacity
            used[expert] += 1
    return kept


@pytest.mark.parametrize("factor", [0.3, 0.625, 1.0, 99.0])
def test_dropping_by_position(logits, factor):
    inner = TopK(2)
    free = inner(logits)
    limited = Capacity(inner, capacity_factor=factor)(logits)
    capacity = -(-int(TOKENS * 2 * factor * 1000) // (EXPERTS * 1000))
    kept = drop_reference(free.selected_experts, capacity)
    assert torch.equal(limited.selected_experts < EXPERTS, kept)
    assert torch.equal(limited.routing_weights, free.routing_weights * kept)
    assert kept.all() == (factor == 99.0)
    assert (loads(limited) <= capacity).all()


def test_by_weight_the_heaviest_stay(logits):
    free = TopK(2)(logits)
    limited = Capacity(TopK(2), capacity_factor=0.5, priority="weight")(logits)
    assert (loads(limited) <= 8).all()
    for expert in range(EXPERTS):
        weights = free.routing_weights[free.selected_experts == expert]
        stay = limited.routing_weights[limited.selected_experts == expert]
        torch.testing.assert_close(
            stay.sort(descending=True).values, weights.sort(descending=True).values[:8]
        )


@pytest.mark.parametrize("top_k", [1, 2])
def test_rerouting_fills_every_place(logits, top_k):
    logits[:, 0] += 3  # most tokens want one expert
    select = Capacity(TopK(top_k), capacity_factor=1.0, overflow="reroute", rounds=EXPERTS)
    chosen = select(logits).selected_experts
    assert (loads(select(logits)) <= TOKENS * top_k // EXPERTS).all()
    filled = chosen[chosen < EXPERTS]
    assert len(filled) >= TOKENS * top_k - (0 if top_k == 1 else EXPERTS)
    for row in chosen.tolist():
        assert len(set(row) - {EXPERTS}) == len([expert for expert in row if expert < EXPERTS])
    dropped = Capacity(TopK(top_k), capacity_factor=1.0)(logits).selected_experts
    assert ((dropped == chosen) | (dropped == EXPERTS)).all()  # who had a place keeps it


def test_a_rerouted_slot_weighs_the_new_experts_probability():
    logits = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    select = Capacity(
        TopK(1, normalize=False, routed_scaling_factor=2.0),
        capacity_factor=1.0,
        overflow="reroute",
        rounds=3,
    )
    selection = select(logits)
    assert selection.selected_experts.tolist() == [[0], [2], [1]]
    expected = 2 * logits.softmax(1).gather(1, selection.selected_experts)
    torch.testing.assert_close(selection.routing_weights, expected)


def test_padding_takes_no_place():
    logits = torch.tensor([[9.0, 0.0]] * 4)
    mask = torch.tensor([False, False, True, True])
    selection = Capacity(TopK(1), capacity_factor=1.0).among(logits, mask)
    assert selection.selected_experts.tolist() == [[2], [2], [0], [2]]


def test_a_limit_on_a_selection_that_has_empty_slots(logits):
    free = TopP(0.6)(logits)
    limited = Capacity(TopP(0.6), capacity_factor=0.2)(logits)
    assert (loads(limited) <= 7).all()
    assert (limited.selected_experts[free.selected_experts == EXPERTS] == EXPERTS).all()


def test_capacities_that_cannot_be():
    with pytest.raises(ValueError, match="capacity of 0"):
        Capacity(TopK(1), capacity_factor=0.0)
    with pytest.raises(ValueError, match="'rereoute' is unknown"):
        Capacity(TopK(1), capacity_factor=1.0, overflow="rereoute")
    with pytest.raises(ValueError, match="capacity_factor=0"):
        ExpertChoice(4, capacity_factor=0.0)
    with pytest.raises(ValueError, match="top_k=5 exceeds"):
        Capacity(TopK(5), capacity_factor=1.0).check(4)


def test_the_plan_is_balanced_and_padding_has_no_part(logits):
    plan = sinkhorn_plan(logits)
    torch.testing.assert_close(plan.sum(0), torch.full((EXPERTS,), 1 / EXPERTS))
    torch.testing.assert_close(plan.sum(1), torch.full((TOKENS,), 1 / TOKENS), rtol=1e-2, atol=0)
    mask = torch.arange(TOKENS) < 20
    torch.testing.assert_close(sinkhorn_plan(logits, mask)[:20], sinkhorn_plan(logits[:20]))
    assert torch.isfinite(sinkhorn_plan(1e4 * logits)).all()


def test_sinkhorn_balances_in_training_and_listens_in_eval(logits):
    logits[:, 0] += 3
    select = SinkhornTopK(1)
    likes = logits.argmax(1)
    assert loads(select(logits)).max() < 0.6 * torch.bincount(likes).max()
    assert torch.equal(select.eval()(logits).selected_experts[:, 0], likes)
    torch.testing.assert_close(select(logits).routing_weights[:, 0], torch.sigmoid(logits.amax(1)))


def test_base_gives_every_expert_as_many_tokens():
    torch.manual_seed(0)
    router = routers.base_router(6, EXPERTS)
    tokens = torch.randn(TOKENS, 6) + 2
    routing = router(RouterInput(hidden_states=tokens, sequence_shape=(1, TOKENS)))
    assert loads(routing).tolist() == [TOKENS // EXPERTS] * EXPERTS
    routing.routing_weights.sum().backward()
    assert router.score.weight.grad.abs().sum() > 0


def test_a_batch_of_padding_moves_no_threshold(logits):
    select = ExpertChoice(EXPERTS)
    nobody = torch.zeros(TOKENS, dtype=torch.bool)
    chosen = select.among(logits, nobody)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=chosen.routing_weights,
        selected_experts=chosen.selected_experts,
    )
    select.observe(RoutingRecord(site="", layer_index=0, routing=routing, token_mask=nobody))
    select.post_step()
    assert (select.thresholds == 0.25).all()
