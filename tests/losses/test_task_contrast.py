"""The contrast of a sample's routing with its task's embedding."""

import math

import pytest
import torch

from moeroute.losses import TaskContrastLoss
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.task_aware import TaskAwareRouter
from moeroute.types import RouterInput, RouterOutput, RoutingRecord

TASKS, EXPERTS = 3, 4


def router_of(embeddings=None):
    router = TaskAwareRouter(ComposedRouter(LinearScore(5, EXPERTS), TopK(2)), num_tasks=TASKS)
    if embeddings is not None:
        router.task_embeddings.data = embeddings
    return router


def record_of(logits, task_ids, shape, router=None, mask=None):
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=torch.ones(len(logits), 1),
        selected_experts=torch.zeros(len(logits), 1, dtype=torch.int64),
    )
    return RoutingRecord(
        site="q_proj",
        layer_index=0,
        routing=routing,
        token_mask=mask,
        sequence_shape=shape,
        task_ids=None if task_ids is None else torch.tensor(task_ids),
        router=router_of() if router is None else router,
    )


def test_equals_the_equation():
    logits, task_ids = torch.randn(6, EXPERTS), [2, 0]
    router, expected = router_of(), 0.0
    for sample, task in enumerate(task_ids):
        feature = logits[3 * sample : 3 * sample + 3].mean(0)
        scores = torch.stack(
            [torch.cosine_similarity(feature, own, dim=0) for own in router.task_embeddings]
        )
        expected = expected - torch.log_softmax(scores / 0.2, 0)[task] / 2
    loss = TaskContrastLoss(temperature=0.2)(record_of(logits, task_ids, (2, 3), router))
    torch.testing.assert_close(loss, expected)


def test_near_zero_at_perfect_alignment_and_log_of_tasks_without_any():
    embeddings = torch.eye(TASKS, EXPERTS)
    aligned = record_of(5 * embeddings[[2, 0, 1]], [2, 0, 1], (3, 1), router_of(embeddings))
    assert TaskContrastLoss()(aligned) < 1e-5
    wrong = record_of(5 * embeddings[[2, 0, 1]], [0, 1, 2], (3, 1), router_of(embeddings))
    assert TaskContrastLoss()(wrong) > 10
    alike = record_of(torch.randn(3, EXPERTS), [0, 1, 2], (3, 1), router_of(torch.ones(3, 4)))
    torch.testing.assert_close(TaskContrastLoss()(alike), torch.tensor(math.log(TASKS)))


def test_renaming_tasks_with_their_embeddings_changes_nothing():
    logits, task_ids, order = torch.randn(6, EXPERTS), torch.tensor([2, 0]), torch.tensor([1, 2, 0])
    router = router_of()
    first = TaskContrastLoss()(record_of(logits, task_ids.tolist(), (2, 3), router))
    renamed = router_of(router.task_embeddings.detach()[order])
    new_ids = torch.argsort(order)[task_ids].tolist()
    torch.testing.assert_close(
        TaskContrastLoss()(record_of(logits, new_ids, (2, 3), renamed)), first
    )


def test_padding_and_samples_of_padding_are_left_out():
    logits, router = torch.randn(9, EXPERTS), router_of()
    expected = TaskContrastLoss()(record_of(logits[:6], [2, 0], (2, 3), router))
    grid = logits.view(3, 3, EXPERTS)
    padded = torch.full((3, 5, EXPERTS), float("nan"))
    padded[:2, :3] = grid[:2]
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:2, :3] = True
    padded = padded.flatten(0, 1).requires_grad_()
    loss = TaskContrastLoss()(record_of(padded, [2, 0, 1], (3, 5), router, mask.flatten()))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(padded.grad).all()
    assert torch.isfinite(router.task_embeddings.grad).all()


def test_the_gradient_reaches_logits_and_embeddings():
    logits, router = torch.randn(6, EXPERTS, requires_grad=True), router_of()
    TaskContrastLoss()(record_of(logits, [2, 0], (2, 3), router)).backward()
    assert logits.grad.abs().sum() > 0
    assert router.task_embeddings.grad.abs().sum() > 0


def test_no_samples():
    loss = TaskContrastLoss()(record_of(torch.zeros(0, EXPERTS), [], (0, 3)))
    assert loss == 0


def test_what_it_needs():
    with pytest.raises(ValueError, match="needs task_ids"):
        TaskContrastLoss()(record_of(torch.randn(6, EXPERTS), None, (2, 3)))
    plain = ComposedRouter(LinearScore(5, EXPERTS), TopK(2))
    with pytest.raises(ValueError, match="task_embeddings"):
        TaskContrastLoss()(record_of(torch.randn(6, EXPERTS), [0, 1], (2, 3), plain))


def test_the_router_asks_for_tasks_in_training_alone():
    router = router_of()
    tokens = torch.randn(6, 5)
    router.eval()(RouterInput(hidden_states=tokens, sequence_shape=(2, 3)))
    with pytest.raises(ValueError, match="got no task_ids"):
        router.train()(RouterInput(hidden_states=tokens, sequence_shape=(2, 3)))
    ids = torch.tensor([0, TASKS])
    with pytest.raises(ValueError, match="knows 3 tasks"):
        router(RouterInput(hidden_states=tokens, sequence_shape=(2, 3), task_ids=ids))
    with pytest.raises(ValueError, match="at least one task"):
        TaskAwareRouter(ComposedRouter(LinearScore(5, EXPERTS), TopK(2)), num_tasks=0)
