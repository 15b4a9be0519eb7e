"""Which experts may run as one fused op: a table of known gates, each proven before it is trusted.

A gate is known by the name of the function behind the class's `_apply_gate` and by its activation.
The first time it is met, the function is compared with the fused op on a probe that reaches past
every clamp; a gate that differs (another release of transformers, an edited subclass) takes the
unfused route, which calls the module's own function.
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


class FusedGate(NamedTuple):
    """How the fused op is called for an experts class.

    Attributes:
        activation: Key of the ops' table of activations.
        interleaved: Whether gate and up columns alternate.
        alpha_attribute: Attribute of the experts module that holds alpha; "" for none.
        limit_attribute: Attribute of the experts module that holds the clamp; "" for none.
    """

    activation: str
    interleaved: bool = False
    alpha_attribute: str = ""
    limit_attribute: str = ""


class _KnownGate(NamedTuple):
    """One row of the table.

    Attributes:
        activation: Key of the ops' table; "{}" stands for the name of act_fn.
        acts: Names that `act_fn` may have; empty if the gate does not read act_fn.
        alpha_attribute: As in `FusedGate`.
        limit_attribute: As in `FusedGate`.
    """

    activation: str
    acts: tuple[str, ...] = ()
    alpha_attribute: str = ""
    limit_attribute: str = ""


_MODELS = "transformers.models"
KNOWN_GATES: Mapping[str, _KnownGate] = MappingProxyType(
    {
        "transformers.integrations.moe._default_apply_gate": _KnownGate(
            "{}_glu", acts=("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
        ),
        f"{_MODELS}.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _KnownGate(
            "clamped_silu_glu", acts=("silu",), limit_attribute="limit"
        ),
        f"{_MODELS}.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _KnownGate(
            "clamped_silu_glu", limit_attribute="swiglu_limit"
        ),
        f"{_MODELS}.hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _KnownGate(
            "clamped_silu_glu", limit_attribute="swiglu_limit"
        ),
        f"{_MODELS}.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": _KnownGate(
            "gpt_oss_glu", alpha_attribute="alpha", limit_attribute="limit"
        ),
        (
            f"{_MODELS}.openai_privacy_filter.modeling_openai_privacy_filter"
            ".OpenAIPrivacyFilterExperts._apply_gate"
        ): _KnownGate("gpt_oss_glu", alpha_attribute="alpha", limit_attribute="limit"),
        f"{_MODELS}.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": (
            _KnownGate(
                "gpt_oss_glu", alpha_attribute="swiglu_alpha", limit_attribute="swiglu_limit"
            )
        ),
    }
)
UNGATED_ACTS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

ACT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "transformers.activations.SiLUActivation": "silu",
        "transformers.activations.ReLUSquaredActivation": "relu2",
        "torch.nn.modules.activation.SiLU": "silu",
        "torch.nn.modules.activation.ReLU": "relu",
        "torch.nn.modules.activation.Sigmoid": "sigmoid",
        "torch.nn.functional.silu": "silu",
        "torch.nn.functional.relu": "relu",
    }
)
ACTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
    }
)


def act_name(act: object) -> str | None:
    """The ops' name of an activation, or None if it is another or does more than that.

    Args:
        act: What an experts module holds as `act_fn`: a module or a function.
    """
    if isinstance(act, nn.Module):
        if act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act):
            return None
        if _qualified_name(type(act)) in _GELU_CLASSES:
            return _gelu_name(vars(act).get("act"))
        if type(act) is nn.GELU:
            return "gelu_tanh" if act.approximate == "tanh" else "gelu"
        return ACT_NAMES.get(_qualified_name(type(act)))
    return _gelu_name(act) or ACT_NAMES.get(_qualified_name(act))


_GELU_CLASSES = ("transformers.activations.GELUActivation", "transformers.activations.GELUTanh")


def _gelu_name(act: object) -> str | None:
    if act is F.gelu:
        return "gelu"
    if isinstance(act, functools.partial) and act.func is F.gelu and not act.args:
        return {"tanh": "gelu_tanh", "none": "gelu"}.get(act.keywords.get("approximate", "none"))
    return None


def _qualified_name(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


@torch.compiler.assume_constant_result
def fused_gate(module: nn.Module) -> tuple[str, bool, str, str] | None:
    """How the fused op stands for a module's gate, as the fields of a `FusedGate`.

    Decided by the class, its activation and the values of alpha and limit; a constant for a
    compiled graph, so changing `act_fn` under a compiled model needs a new compilation.

    Args:
        module: A decorated experts module.

    Returns:
        The fields, or None if the unfused route has to be taken.
    """
    if not getattr(module, "has_gate", True):
        act = act_name(getattr(module, "act_fn", None))
        return (act, False, "", "") if act in UNGATED_ACTS else None
    if "_apply_gate" in vars(module):
        return None
    function = getattr(type(module), "_apply_gate", None)
    row = KNOWN_GATES.get(_qualified_name(function))
    if function is None or row is None:
        return None
    act = act_name(getattr(module, "act_fn", None)) if row.acts else ""
    if act is None or (row.acts and act not in row.acts):
        return None
    interleaved = not getattr(module, "is_concatenated", True)
    fused = (row.activation.format(act), interleaved, row.alpha_attribute, row.limit_attribute)
    numbers = {name: getattr(module, name, None) for name in fused[2:] if name}
    if not all(isinstance(value, int | float) for value in numbers.values()):
        return None
    proven = _agrees(function, FusedGate(*fused), act, tuple(numbers.items()))
    return fused if proven else None


@functools.lru_cache(maxsize=256)
def _agrees(
    function: Callable[[Any, Tensor], Tensor],
    fused: FusedGate,
    act: str,
    numbers: tuple[tuple[str, float], ...],
) -> bool:
    """Compare a gate with the fused op, in float64, on values that reach past the clamps."""
    values = dict(numbers)
    options: dict[str, Any] = {
        key: float(values[name])
        for key, name in (("alpha", fused.alpha_attribute), ("limit", fused.limit_attribute))
        if name
    }
    limit = abs(options.get("limit", 0.0))
    reach = PROBE_REACH if limit == float("inf") else max(PROBE_REACH, 2 * limit)
    width = 2 * PROBE_WIDTH
    with _disable_current_modes(), torch.no_grad():
        steps = torch.arange(width * width, dtype=torch.float64, device="cpu").view(width, width)
        scale = (reach / PROBE_LEAST) ** (steps[0, :, None] / (width - 1)) * PROBE_LEAST
        pre = torch.sin(steps * steps) * scale
        stand_in = SimpleNamespace(act_fn=ACTS.get(act), **values)
        try:
            expected = function(stand_in, pre)
        except AttributeError:  # it reads more of the module than the table knows
            return False
        eye = torch.eye(width, dtype=torch.float64, device="cpu")
        ids = torch.zeros((width, 1), dtype=torch.int64, device="cpu")
        ones = torch.ones((width, 1), dtype=torch.float64, device="cpu")
        down = eye[None, :, :PROBE_WIDTH]  # the activated columns, then zeros
        found = routed_mlp(
            pre,
            eye[None],
            down,
            ids,
            ones,
            activation=fused.activation,
            interleaved=fused.interleaved,
            **options,
        )
    if not isinstance(expected, Tensor) or expected.shape != (width, PROBE_WIDTH):
        return False
    return torch.allclose(found[:, :PROBE_WIDTH], expected, rtol=1e-9, atol=1e-9)
