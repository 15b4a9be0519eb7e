"""Routers that decide once a sample or once a task."""

import pytest
import torch

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.granularity import PerSequence, TaskScore
from moeroute.routers.samples import sample_means
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import All, TopK
from moeroute.types import RouterInput


def tokens_of(batch=2, length=3, mask=None, **inputs):
    return RouterInput(
        hidden_states=torch.randn(batch * length, 4),
        sequence_shape=(batch, length),
        token_mask=mask,
        **inputs,
    )


def test_means_are_over_real_tokens():
    mask = torch.tensor([True, True, False, True, False, False])
    router_input = tokens_of(mask=mask)
    rows = router_input.hidden_states
    torch.testing.assert_close(sample_means(router_input), torch.stack([rows[:2].mean(0), rows[3]]))
    nothing = tokens_of(mask=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(sample_means(nothing), torch.zeros(2, 4))


def test_one_routing_a_sequence():
    router = PerSequence(ComposedRouter(LinearScore(4, 5), TopK(2)))
    routing = router(tokens_of())
    assert routing.router_logits.shape == (6, 5)
    assert torch.equal(routing.selected_experts[0], routing.selected_experts[2])
    assert torch.equal(routing.routing_weights[3], routing.routing_weights[5])
    assert not torch.equal(routing.router_logits[0], routing.router_logits[3])


def test_the_prompt_decides_for_the_whole_generation():
    router, memory = PerSequence(ComposedRouter(LinearScore(4, 5), TopK(2))), {}
    first = router(tokens_of(memory=memory))
    later = router(tokens_of(length=1, memory=memory))
    assert torch.equal(later.router_logits, first.router_logits[::3])
    with pytest.raises(ValueError, match="filled with 2 samples but this call has 3"):
        router(tokens_of(batch=3, length=1, memory=memory))


@pytest.mark.parametrize("embedding_dim", [None, 3])
def test_tokens_of_a_task_share_their_logits(embedding_dim):
    score = TaskScore(4, 5, embedding_dim=embedding_dim)
    router = ComposedRouter(score, All())
    routing = router(tokens_of(batch=3, length=2, task_ids=torch.tensor([1, 3, 1])))
    logits = routing.router_logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[4])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, "got no task_ids"),
        (torch.tensor([0, 4]), r"0\.\.4 but it knows 4 tasks"),
        (torch.tensor([-1, 0]), r"-1\.\.0 but it knows"),
        (torch.tensor([0.0, 1.0]), "one integer"),
        (torch.tensor([[0], [1]]), "one integer"),
    ],
)
def test_bad_task_ids(task_ids, message):
    with pytest.raises(ValueError, match=message):
        TaskScore(4, 5)(tokens_of(task_ids=task_ids))


@pytest.mark.parametrize("sizes", [(0, 5, None), (4, 0, None), (4, 5, 0)])
def test_sizes_below_one(sizes):
    tasks, experts, width = sizes
    with pytest.raises(ValueError, match="at least 1"):
        TaskScore(tasks, experts, embedding_dim=width)


def test_an_embedded_task_is_scored_in_float32_under_autocast():
    score = TaskScore(4, 5, embedding_dim=3)
    router_input = tokens_of(task_ids=torch.tensor([1, 3]))
    expected = score(router_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(router_input), expected)
