"""Which experts may run as one fused op: a table of known gates, each proven before it is trusted.

A gate is known by the name of the function behind the class's `_apply_gate` and by its activation.
The first time it is met, the function is compared with the fused op on a probe that reaches past
every clamp; a gate that differs (another release of transformers, an edited subclass) takes the
unfused route, which calls the module's own function.

Under torch.compile the decision is a constant of the class, the activation and the numbers, so that
the layers of a model share one compiled graph.
"""

from __future__ import annotations

import functools
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from moeroute.ops.expert_mm import routed_mlp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROBE_WIDTH = 8
PROBE_LEAST = 0.1
PROBE_REACH = 1000.0
DEFAULT_ALPHA = 1.702
NO_LIMIT = float("inf")


class FusedGate(NamedTuple):
    """How the fused op is called for an experts module.

    Attributes:
        activation: Key of the ops' table of activations.
        interleaved: Whether gate and up columns alternate.
        alpha: Slope inside the sigmoid; the op's default where the gate has none.
        limit: Clamp; infinite where the gate has none.
    """

    activation: str
    interleaved: bool = False
    alpha: float = DEFAULT_ALPHA
    limit: float = NO_LIMIT


class _KnownGate(NamedTuple):
    """One row of the table.

    Attributes:
        activation: Key of the ops' table; "{}" stands for the name of act_fn.
        acts: Names that `act_fn` may have; empty if the gate does not read act_fn.
        alpha: Attribute of the experts module that holds alpha; "" for none.
        limit: Attribute of the experts module that holds the clamp; "" for none.
    """

    activation: str
    acts: tuple[str, ...] = ()
    alpha: str = ""
    limit: str = ""


_MODELS = "transformers.models"
KNOWN_GATES: Mapping[str, _KnownGate] = MappingProxyType(
    {
        "transformers.integrations.moe._default_apply_gate": _KnownGate(
            "{}_glu", acts=("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
        ),
        f"{_MODELS}.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _KnownGate(
            "clamped_silu_glu", acts=("silu",), limit="limit"
        ),
        f"{_MODELS}.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _KnownGate(
            "clamped_silu_glu", limit="swiglu_limit"
        ),
        f"{_MODELS}.hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _KnownGate(
            "clamped_silu_glu", limit="swiglu_limit"
        ),
        f"{_MODELS}.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": _KnownGate(
            "gpt_oss_glu", alpha="alpha", limit="limit"
        ),
        (
            f"{_MODELS}.openai_privacy_filter.modeling_openai_privacy_filter"
            ".OpenAIPrivacyFilterExperts._apply_gate"
        ): _KnownGate("gpt_oss_glu", alpha="alpha", limit="limit"),
        f"{_MODELS}.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": (
            _KnownGate("gpt_oss_glu", alpha="swiglu_alpha", limit="swiglu_limit")
        ),
    }
)
UNGATED_ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

ACT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "transformers.activations.SiLUActivation": "silu",
        "transformers.activations.GELUActivation": "gelu",
        "transformers.activations.GELUTanh": "gelu_tanh",
        "transformers.activations.NewGELUActivation": "gelu_tanh",
        "transformers.activations.ReLUSquaredActivation": "relu2",
        "torch.nn.modules.activation.SiLU": "silu",
        "torch.nn.modules.activation.ReLU": "relu",
        "torch.nn.modules.activation.Sigmoid": "sigmoid",
        "torch.nn.functional.silu": "silu",
        "torch.nn.functional.relu": "relu",
    }
)
"""Class or function -> the ops' name of the activation; another way to write the same formula
counts as the same."""

ACTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
    }
)


def fused_gate(module: nn.Module) -> FusedGate | None:
    """How the fused op stands for a module's gate, or None if the module's own has to be called.

    Args:
        module: A decorated experts module.
    """
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.Module):
        if len(act._forward_hooks) > 0 or len(act._forward_pre_hooks) > 0:
            return None  # somebody watches or changes the activation
        act = type(act)
    if not getattr(module, "has_gate", True):
        name = _ungated_name(act)
        return None if name is None else FusedGate(name)
    if "_apply_gate" in module.__dict__:
        return None
    row = _known_row(type(module), act)
    if row is None:
        return None
    activation, alpha_attribute, limit_attribute = row
    interleaved = not getattr(module, "is_concatenated", True)
    alpha: Any = getattr(module, alpha_attribute, None) if alpha_attribute else DEFAULT_ALPHA
    limit: Any = getattr(module, limit_attribute, None) if limit_attribute else NO_LIMIT
    proven = _is_proven(
        type(module), act, activation, interleaved=interleaved, alpha=alpha, limit=limit
    )
    return FusedGate(activation, interleaved, alpha, limit) if proven else None


@torch.compiler.assume_constant_result
def _ungated_name(act: object) -> str | None:
    name = ACT_NAMES.get(_qualified_name(act))
    return name if name in UNGATED_ACTS else None


@torch.compiler.assume_constant_result
def _known_row(experts_class: type[nn.Module], act: object) -> tuple[str, str, str] | None:
    row = KNOWN_GATES.get(_qualified_name(getattr(experts_class, "_apply_gate", None)))
    if row is None:
        return None
    name = ACT_NAMES.get(_qualified_name(act), "")
    if row.acts and name not in row.acts:
        return None
    return row.activation.format(name), row.alpha, row.limit


@torch.compiler.assume_constant_result
def _is_proven(
    experts_class: type[nn.Module],
    act: object,
    activation: str,
    *,
    interleaved: bool,
    alpha: object,
    limit: object,
) -> bool:
    if not isinstance(alpha, int | float) or not isinstance(limit, int | float):
        return False
    function: Any = getattr(experts_class, "_apply_gate", None)
    name = ACT_NAMES.get(_qualified_name(act), "")
    return _agrees(function, name, FusedGate(activation, interleaved, alpha, limit))


def _qualified_name(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


@functools.lru_cache(maxsize=256)
def _agrees(function: Callable[[Any, Tensor], Tensor], act: str, gate: FusedGate) -> bool:
    """Compare a gate with the fused op, in float64, on values that reach past the clamps."""
    row = KNOWN_GATES[_qualified_name(function)]
    reach = PROBE_REACH if gate.limit == NO_LIMIT else max(PROBE_REACH, 2 * abs(gate.limit))
    width = 2 * PROBE_WIDTH
    numbers = {name: value for name, value in zip(row[2:], gate[2:], strict=True) if name}
    stand_in = SimpleNamespace(act_fn=ACTS.get(act), **numbers)
    with _disable_current_modes(), torch.no_grad():
        steps = torch.arange(width * width, dtype=torch.float64, device="cpu").view(width, width)
        scale = (reach / PROBE_LEAST) ** (steps[0, :, None] / (width - 1)) * PROBE_LEAST
        pre = torch.sin(steps * steps) * scale
        try:
            expected = function(stand_in, pre)
        except AttributeError:  # it reads more of the module than the table knows
            return False
        eye = torch.eye(width, dtype=torch.float64, device="cpu")
        found = routed_mlp(
            pre,
            eye[None],
            eye[None, :, :PROBE_WIDTH],  # the activated columns, then zeros
            torch.zeros((width, 1), dtype=torch.int64, device="cpu"),
            torch.ones((width, 1), dtype=torch.float64, device="cpu"),
            activation=gate.activation,
            interleaved=gate.interleaved,
            alpha=gate.alpha,
            limit=gate.limit,
        )
        if not isinstance(expected, Tensor) or expected.shape != (width, PROBE_WIDTH):
            return False
        return torch.allclose(found[:, :PROBE_WIDTH], expected, rtol=1e-9, atol=1e-9)
