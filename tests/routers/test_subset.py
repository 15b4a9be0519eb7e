"""A router that draws its experts."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeroute.ops.subsets import subset_log_prob
from moeroute.routers.granularity import PerSequence
from moeroute.routers.scores import LinearScore
from moeroute.routers.subset import SubsetOutput, SubsetRouter
from moeroute.types import Router, RouterInput


def build(top_k=2, **fields):
    router = SubsetRouter(LinearScore(4, 5, init_std=0.5), top_k, **fields)
    assert isinstance(router, Router)
    return router


def given(batch=3, length=4, mask=None, tokens=None):
    tokens = torch.randn(batch * length, 4) if tokens is None else tokens
    return RouterInput(hidden_states=tokens, sequence_shape=(batch, length), token_mask=mask)


def test_training_draws_and_knows_how_likely_the_draw_was():
    router, router_input = build(), given()
    routing = router(router_input)
    again = router(router_input)
    assert isinstance(routing, SubsetOutput)
    assert not torch.equal(again.selected_experts, routing.selected_experts)
    expected = subset_log_prob(routing.router_logits, routing.selected_experts)
    assert torch.equal(routing.log_prob, expected)
    assert (routing.routing_weights == 1).all()
    assert not routing.routing_weights.requires_grad


def test_eval_takes_the_most_likely_subset_every_time():
    router, router_input = build().eval(), given()
    routing = router(router_input)
    assert not isinstance(routing, SubsetOutput)
    order = torch.softmax(routing.router_logits, -1).argsort(descending=True)
    assert torch.equal(routing.selected_experts, order[:, :2])
    assert torch.equal(router(router_input).selected_experts, routing.selected_experts)


def test_no_collapse_to_one_expert():
    """The effective number of experts, (sum w)^2 / sum w^2, is exactly k."""
    for top_k in (1, 2, 5):
        weights = build(top_k)(given()).routing_weights
        assert ((weights.sum(1) ** 2 / weights.square().sum(1)) == top_k).all()


@pytest.mark.parametrize("detached", [True, False])
def test_where_the_gradient_of_the_log_probability_ends(detached):
    tokens = torch.randn(12, 4, requires_grad=True)
    router = build(detach_input=detached)
    router(given(tokens=tokens)).log_prob.sum().backward()
    assert router.score.weight.grad.abs().sum() > 0
    assert (tokens.grad is None) == detached


def test_one_draw_a_sample():
    router = PerSequence(build())
    routing = router(given())
    assert routing.log_prob.shape == (3,)
    chosen = routing.selected_experts.unflatten(0, (3, 4))
    assert (chosen == chosen[:, :1]).all()
    firsts = {tuple(router(given()).selected_experts[0].tolist()) for _ in range(20)}
    assert len(firsts) > 1


def test_nan_in_padding_reaches_no_gradient():
    mask = torch.arange(12) % 3 > 0
    tokens = torch.randn(12, 4).masked_fill(~mask.unsqueeze(1), float("nan"))
    router = build()
    log_prob = router(given(mask=mask, tokens=tokens)).log_prob
    log_prob[mask].sum().backward()
    assert router.score.weight.grad.isfinite().all()
    assert log_prob.isfinite().all()


def test_a_recomputation_draws_the_same_subset():
    router, seen = build(), []

    def run(tokens):
        routing = router(given(tokens=tokens))
        seen.append(routing.selected_experts)
        return routing.log_prob * tokens.sum(1)

    tokens = torch.randn(12, 4, requires_grad=True)
    out = checkpoint(run, tokens, use_reentrant=False)
    torch.randn(7)  # somebody else draws in between
    out.sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_computes_in_float32_under_autocast_and_takes_no_tokens():
    router = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(given(tokens=torch.randn(12, 4).bfloat16()))
    assert routing.router_logits.dtype == routing.log_prob.dtype == torch.float32
    assert router(given(0, 4)).log_prob.shape == (0,)


def test_bad_sizes():
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"top_k={top_k} is outside 1..5"):
            build(top_k)
