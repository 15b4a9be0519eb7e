"""What every loss must do."""

import math
from dataclasses import replace

import pytest
import torch
from contracts.loss_cases import (
    CASES,
    EXPERTS,
    LENGTH,
    SAMPLES,
    TOKENS,
    Rich,
    RichExperts,
    make,
    record,
    without_samples,
)
from torch import nn

from moeroute import losses
from moeroute.routers import All, TopK, TopKSoftmax

OF_DEPTH = {
    "DepthFocalLoss",
    "DistilLoss",
    "ExitLoss",
    "ForecastLoss",
    "ForetoldChangeLoss",
    "GuideLoss",
    "MembershipLoss",
    "SkipShareLoss",
    "SparsityTargetLoss",
}
"""Their records are of other layers: see tests of dr_llm, duo_llm, early_exit,
mixture_of_depths and unit_losses."""
every_loss = pytest.mark.parametrize("name", CASES)
of_logits = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.reads != "parameters"]
)


def of(name, *arguments, **fields):
    """A record that the loss can read."""
    return record(*arguments, pairs=name == "SamePairLoss", **fields)


def balanced() -> torch.Tensor:
    """Logits whose two best rotate through the experts, the same way in every sample."""
    pairs = torch.eye(EXPERTS).add(torch.eye(EXPERTS).roll(1, 0))
    return pairs.repeat(SAMPLES, 1) * 1e-4


def test_the_suite_knows_every_loss():
    public = {name for name in losses.__all__ if name.endswith("Loss")}
    assert set(CASES) | OF_DEPTH == public


@every_loss
def test_value_at_perfect_balance(name):
    loss = make(name)(of(name, balanced()))
    assert loss.item() == pytest.approx(CASES[name].at_balance, abs=4e-3)


@every_loss
@pytest.mark.parametrize("select", [TopK(1, normalize=False), TopKSoftmax(2), All()], ids=repr)
def test_scalar_finite_and_bounded(name, select):
    loss = make(name)(of(name, 3 * torch.randn(TOKENS, EXPERTS), select=select))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert CASES[name].least <= loss < math.inf


@of_logits
def test_gradient_reaches_the_logits_and_agrees_with_finite_differences(name):
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    parts = Rich(), RichExperts()
    keys = torch.randn(SAMPLES, EXPERTS, dtype=torch.float64)
    fields = {"sharpness": 1.0} if name == "LocalityLoss" else {}

    def loss(tensor):
        known = of(name, tensor, parts=parts)
        if name == "SamePairLoss":  # its keys are another router's
            known = replace(known, routing=replace(known.routing, momentum_features=keys))
        return make(name, **fields)(known)

    assert torch.autograd.gradcheck(loss, (logits,), atol=1e-5)
    loss(logits).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.reads == "parameters"])
def test_gradient_reaches_the_parameters(name):
    router, experts = Rich(), RichExperts()
    with torch.no_grad():
        for parameter in (*router.parameters(), *experts.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    make(name)(of(name, torch.randn(TOKENS, EXPERTS), parts=(router, experts))).backward()
    reached = {key for key, value in router.named_parameters() if value.grad is not None}
    reached |= {key for key, value in experts.named_parameters() if value.grad is not None}
    assert (
        reached
        == {
            "ERCLoss": {"score.weight", "up_proj"},
            "OrthogonalityLoss": {"score.weight"},
            "PreserveLoss": {"up_proj"},
        }[name]
    )


@every_loss
def test_padding_does_not_matter_even_if_it_is_nan(name):
    logits, parts = torch.randn(TOKENS, EXPERTS), (Rich(), RichExperts())
    mask = torch.arange(TOKENS) % LENGTH > 1
    poisoned = torch.where(mask[:, None], logits, torch.nan).requires_grad_()
    selection = TopKSoftmax(2)
    masked = make(name)(of(name, poisoned, mask, selection, parts))
    torch.testing.assert_close(masked, make(name)(of(name, logits, mask, selection, parts)))
    if not CASES[name].ordered:
        kept = make(name)(of(name, logits[mask], None, selection, parts))
        torch.testing.assert_close(masked, kept)
    if CASES[name].reads == "parameters":
        return
    masked.backward()
    assert poisoned.grad[mask].isfinite().all()
    if CASES[name].reads == "logits":  # the others pass through a softmax of NaN padding
        assert torch.count_nonzero(poisoned.grad[~mask]) == 0


@of_logits
@pytest.mark.parametrize("tokens", [0, 5, TOKENS])
def test_no_real_tokens_cost_nothing(name, tokens):
    if name == "SamePairLoss":
        pytest.skip("compares samples, whose features the router made")
    logits = torch.randn(tokens, EXPERTS, requires_grad=True)
    loss = make(name)(of(name, logits, torch.zeros(tokens, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()
    assert make(name)(of(name, logits[:0])).item() == 0


@every_loss
def test_order_of_samples_does_not_matter_nor_of_tokens_where_samples_do_not(name):
    logits, parts = torch.randn(TOKENS, EXPERTS), (Rich(), RichExperts())
    swapped = logits.reshape(2, 2, LENGTH, EXPERTS).flip(0).reshape(TOKENS, EXPERTS)
    expected = make(name)(of(name, logits, parts=parts))
    torch.testing.assert_close(make(name)(of(name, swapped, parts=parts)), expected)
    if not CASES[name].ordered:
        shuffled = logits[torch.randperm(TOKENS)]
        torch.testing.assert_close(make(name)(of(name, shuffled, parts=parts)), expected)


@every_loss
def test_autocast_changes_nothing(name):
    one = of(name, torch.randn(TOKENS, EXPERTS))
    expected = make(name)(one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(make(name)(one), expected, rtol=1e-6, atol=1e-6)


@every_loss
def test_losses_are_frozen_compare_by_value_and_trace(name):
    assert make(name, weight=0.5) == make(name, weight=0.5) != make(name, weight=0.25)
    with pytest.raises(AttributeError):
        make(name).weight = 2.0
    with pytest.raises(TypeError):
        getattr(losses, name)(0.5)
    logits, parts = torch.randn(TOKENS, EXPERTS), (Rich(), RichExperts())
    compiled = torch.compile(
        lambda z: make(name)(of(name, z, parts=parts)), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(logits), make(name)(of(name, logits, parts=parts)))


@pytest.mark.parametrize(
    "name", ["ChunkSparsityLoss", "LocalityLoss", "SequenceBalanceLoss", "TaskContrastLoss"]
)
def test_losses_over_samples_need_to_know_them(name):
    with pytest.raises(ValueError, match=rf"layers.0.mlp: {name} needs"):
        make(name)(without_samples(of(name, torch.randn(TOKENS, EXPERTS))))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ActiveWeightLoss", "steers its density"),
        ("ERCLoss", "one row an expert"),
        ("OrthogonalityLoss", "one row an expert"),
        ("SamePairLoss", "compares samples"),
        ("TaskContrastLoss", "task_embeddings"),
    ],
)
def test_what_a_router_does_not_give_is_named(name, what):
    known = replace(of(name, torch.randn(TOKENS, EXPERTS)), router=nn.Identity())
    with pytest.raises(ValueError, match=rf"layers.0.mlp: .*{what}"):
        make(name)(known)
    if name == "ERCLoss":
        with pytest.raises(ValueError, match=r"gate_weights\(\)"):
            make(name)(replace(known, router=Rich(), experts=nn.Identity()))
