"""Every MoE family of the installed transformers against its own eager experts."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from integration import tiny_models
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from moeroute.integration.expert_gates import fused_gate
from moeroute.integration.experts_report import experts_report
from moeroute.integration.families import EXPERTS_OUTSIDE_REGISTRY

pytestmark = pytest.mark.hf

LOGITS = 1e-5
GRADIENTS = 1e-4
VISIBLE = 1e-3

NOT_BUILT: dict[str, str] = {}
"""Families of the registry that no tiny config was found for, with the reason."""

BUILT = tuple(name for name in tiny_models.registry_families() if name not in NOT_BUILT)
README = Path(__file__).parents[2] / "README.md"
MARKERS = ("<!-- families:begin -->", "<!-- families:end -->")


@dataclass(frozen=True)
class Measured:
    """What one family showed."""

    experts_class: str
    layout: str
    route: str
    num_modules: int
    num_calls: int
    logits: float
    gradients: float
    effect: float


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """Register a wrapper that notes the class of every module it is called for."""
    plain = ExpertsInterface._global_mapping["moeroute"]
    calls: list[str] = []

    def counting(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append(type(self).__name__)
        return plain(self, *args)

    ExpertsInterface.register("moeroute", counting)
    try:
        yield calls
    finally:
        ExpertsInterface.register("moeroute", plain)


def run(model: nn.Module, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (or last states) and the gradient of every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad(set_to_none=True)
    with tiny_models.quiet_transformers():
        out = model(input_ids=tiny_models.token_ids(), use_cache=False)[0]
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), found


def effect_of_experts(model: nn.Module, expected: torch.Tensor) -> float:
    """How far the answer moves when the routed experts answer zero: errors must be visible."""
    handles = [
        experts.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        for experts in tiny_models.experts_of(model)
    ]
    with torch.no_grad(), tiny_models.quiet_transformers():
        out = model(input_ids=tiny_models.token_ids(), use_cache=False)[0]
    for handle in handles:
        handle.remove()
    return (out - expected).abs().max().item()


@cache
def measure(family: str) -> Measured:
    """Build, run both ways forward and backward, and compare; once a family and process."""
    model = tiny_models.build(family)
    experts = list(tiny_models.experts_of(model))
    expected, expected_gradients = run(model, "eager")
    effect = effect_of_experts(model, expected)
    with counted_calls() as calls:
        found, found_gradients = run(model, "moeroute")
    assert found_gradients.keys() == expected_gradients.keys()
    return Measured(
        experts_class=type(experts[0]).__name__,
        layout=layout_of(experts[0]),
        route=route_of(experts[0]),
        num_modules=len(experts),
        num_calls=len(calls),
        logits=(found - expected).abs().max().item(),
        gradients=relative_error(found_gradients, expected_gradients),
        effect=effect,
    )


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The worst tensor: its largest error over its largest entry.

    A tensor whose gradient is below 1e-4 of the model's largest is measured against that floor: it
    is noise in eager itself.
    """
    floor = 1e-4 * max(gradient.abs().max().item() for gradient in expected.values())
    return max(
        (found[name] - gradient).abs().max().item() / max(gradient.abs().max().item(), floor)
        for name, gradient in expected.items()
    )


def layout_of(experts: nn.Module) -> str:
    """The flags that differ from the usual ones."""
    words = {
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "bias": experts.has_bias,
        "no gate": not experts.has_gate,
        "post-expert norm": experts.has_post_expert_norm,
    }
    return ", ".join(word for word, given in words.items() if given)


def route_of(experts: nn.Module) -> str:
    """Whether the fused op runs, with which activation, or the module's own gate."""
    fused = fused_gate(experts)
    if fused is None or experts.has_post_expert_norm:
        return "grouped products, own gate"
    return f"fused, `{fused.activation}`"


@pytest.mark.parametrize("family", BUILT)
def test_logits_and_gradients_equal_eager(family):
    measured = measure(family)
    assert measured.num_calls >= 1
    assert measured.logits <= LOGITS
    assert measured.gradients <= GRADIENTS
    assert measured.effect >= VISIBLE


def test_families_without_a_tiny_model_are_the_documented_ones():
    assert set(NOT_BUILT) <= set(tiny_models.registry_families())
    assert len(BUILT) >= 58


def test_families_outside_the_registry_are_the_documented_ones():
    found = tiny_models.outside_families()
    assert found.keys() == EXPERTS_OUTSIDE_REGISTRY.keys()
    for family, classes in EXPERTS_OUTSIDE_REGISTRY.items():
        assert set(classes) <= set(found[family])


def test_report_sees_every_experts_module():
    model = tiny_models.build("mixtral")
    report = experts_report(model)
    assert report.dispatched == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert report.ignored == ()
    assert report.fp8 == ()


def table() -> str:
    """The compatibility table, in Markdown."""
    rows = [
        "| family | experts class | layout | how moeroute computes it |",
        "|---|---|---|---|",
    ]
    for family in tiny_models.registry_families():
        if family in NOT_BUILT:
            rows.append(f"| {family} | | | not tested: {NOT_BUILT[family]} |")
            continue
        seen = measure(family)
        rows.append(f"| {family} | `{seen.experts_class}` | {seen.layout} | {seen.route} |")
    for family, classes in sorted(EXPERTS_OUTSIDE_REGISTRY.items()):
        names = ", ".join(f"`{name}`" for name in classes)
        rows.append(
            f"| {family} | {names} | | not at all: outside the registry, a warning says so |"
        )
    return "\n".join(rows)


def test_readme_holds_the_table_that_was_found():
    text = README.read_text()
    begin, end = MARKERS
    if os.environ.get("MOEROUTE_WRITE_README") == "1":
        block = f"{begin}\n{table()}\n{end}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub(lambda _: block, text) if begin in text else f"{text}\n{block}\n"
        README.write_text(text)
    found = text.partition(begin)[2].partition(end)[0].strip()
    assert found == table(), "run this test with MOEROUTE_WRITE_README=1 and commit README.md"
