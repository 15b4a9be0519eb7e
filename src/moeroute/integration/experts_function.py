"""`experts_implementation="moeroute"`: the experts of a transformers checkpoint on moeroute's ops.

transformers hands every decorated experts module to the function registered under the name in
`config._experts_implementation`; the module's flags say how its weights lie. Experts whose gate is
known and proven equal run as one fused op, everything else as two grouped products around the
module's own `_apply_gate`.

This module imports no part of transformers: it is loaded while transformers itself is being loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor
from torch.nn import functional

from moeroute.integration.expert_gates import FusedGate, fused_gate
from moeroute.ops.dispatch import combine, dispatch, plan_slots
from moeroute.ops.expert_mm import grouped_lora, grouped_mm, routed_mlp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

SECOND = "down_proj"


class ExpertLora(NamedTuple):
    """One adapter's LoRA on one stack of experts.

    Attributes:
        lora_a: (E, R, in), any floating dtype and strides.
        lora_b: (E, out, R), likewise.
        scaling: Multiplies the low-rank product.
        dropout: Probability of zeroing an element of the low-rank product's input in this call.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """The experts' parameters as (E, out, in) views, whatever the checkpoint's layout."""

    first: Tensor
    second: Tensor
    first_bias: Tensor | None
    second_bias: Tensor | None


def moeroute_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the selected experts of a decorated module; registered with transformers as "moeroute".

    Honours `has_gate`, `has_bias`, `is_transposed`, `is_concatenated`, `has_post_expert_norm`
    (applied before the routing weight) and an own `_apply_gate`. Sums a token's experts in float32.
    Traceable with `fullgraph=True`; a small number of tokens takes the ops' decode path.

    Args:
        self: The experts module.
        hidden_states: (T, H), any strides; computed in the dtype of the weights.
        top_k_index: (T, K) integers; an id outside [0, num_experts) is skipped: under expert
            parallelism it names another rank's expert.
        top_k_weights: (T, K), any floating dtype.

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        TypeError: The weights are quantised.
        ValueError: Shapes do not fit.
    """
    weights = expert_weights(self)
    tokens = hidden_states.to(weights.first.dtype)
    fused = fused_gate(self)
    if fused is None or getattr(self, "has_post_expert_norm", False):
        out = _unfused(self, tokens, weights, top_k_index, top_k_weights, {})
    else:
        out = _fused(tokens, weights, top_k_index, top_k_weights, fused)
    return out.to(hidden_states.dtype)


def experts_forward_with_lora(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    loras: Mapping[str, Sequence[ExpertLora]],
) -> Tensor:
    """Do as `moeroute_experts_forward`, with LoRA on the experts' weights, which stay factored.

        rows W_e^T + sum_a scaling_a * dropout_a(rows) A_ae^T B_ae^T

    for both products: equal to adding `scaling * B_e A_e` to each expert's matrix, without making
    anything of that size, in forward or backward. Factors are cast to the dtype of the weights.

    Args:
        self: The experts module.
        hidden_states: (T, H), as there.
        top_k_index: (T, K), as there.
        top_k_weights: (T, K), as there.
        loras: By the name of the stack (see `first_name`, and "down_proj") its adapters, which add
            up; a stack without any may be missing.

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        TypeError: The weights are quantised.
        ValueError: Shapes do not fit.
    """
    weights = expert_weights(self)
    tokens = hidden_states.to(weights.first.dtype)
    out = _unfused(self, tokens, weights, top_k_index, top_k_weights, loras)
    return out.to(hidden_states.dtype)


def _fused(
    tokens: Tensor,
    weights: _Weights,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: FusedGate,
) -> Tensor:
    return routed_mlp(
        tokens,
        weights.first,
        weights.second,
        top_k_index,
        top_k_weights,
        gate_up_bias=weights.first_bias,
        down_bias=weights.second_bias,
        activation=gate.activation,
        interleaved=gate.interleaved,
        alpha=gate.alpha,
        limit=gate.limit,
    )


def _unfused(
    self: Any,
    tokens: Tensor,
    weights: _Weights,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    loras: Mapping[str, Sequence[ExpertLora]],
) -> Tensor:
    plan = plan_slots(top_k_index, weights.first.shape[0])
    ends = plan.expert_offsets
    rows = dispatch(tokens, plan)
    pre = grouped_mm(rows, weights.first, ends, weights.first_bias)
    pre = _add_loras(pre, rows, ends, loras.get(first_name(self), ()))
    hidden = self._apply_gate(pre) if getattr(self, "has_gate", True) else self.act_fn(pre)
    out = grouped_mm(hidden, weights.second, ends, weights.second_bias)
    out = _add_loras(out, hidden, ends, loras.get(SECOND, ()))
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    return combine(out, top_k_weights, plan)


def _add_loras(base: Tensor, x: Tensor, ends: Tensor, loras: Sequence[ExpertLora]) -> Tensor:
    for lora_a, lora_b, scaling, dropout in loras:
        dropped = functional.dropout(x, dropout) if dropout else x
        base = grouped_lora(
            base, dropped, lora_a.to(x.dtype), lora_b.to(x.dtype), ends, float(scaling)
        )
    return base


def first_name(module: nn.Module) -> str:
    """The name of the experts' first stack of weights."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def expert_weights(module: Any) -> _Weights:
    """The weights of a decorated experts module as the ops take them.

    Raises:
        TypeError: They are quantised.
    """
    name = first_name(module)
    first, second = getattr(module, name), module.down_proj
    for stack, its_name in ((first, name), (second, SECOND)):
        if not isinstance(stack, Tensor):
            raise TypeError(_not_supported(module, f"{its_name} is a {type(stack).__name__}"))
        if not stack.is_floating_point() or stack.element_size() < 2:
            raise TypeError(_not_supported(module, f"{its_name} is {stack.dtype}"))
    if getattr(module, "is_transposed", False):
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    has_bias = getattr(module, "has_bias", False)
    return _Weights(
        first=first,
        second=second,
        first_bias=getattr(module, f"{name}_bias") if has_bias else None,
        second_bias=module.down_proj_bias if has_bias else None,
    )


def _not_supported(module: nn.Module, what: str) -> str:
    return (
        f"moeroute cannot compute {type(module).__name__}: {what}, and it multiplies float32, "
        "float64, bfloat16 and float16 tensors. Dequantise the "
        'checkpoint on load, or choose `model.set_experts_implementation("eager")`'
    )


def refuse_fp8_experts(self: nn.Module, *_: Any, **__: Any) -> NoReturn:
    """Stand under "moeroute" in transformers' registry for FP8 experts, and say what to do.

    Raises:
        NotImplementedError: Always; moeroute has no FP8 kernels.
    """
    raise NotImplementedError(
        f'experts_implementation="moeroute" does not support FP8 experts ({type(self).__name__}). '
        "Load the checkpoint with `quantization_config=FineGrainedFP8Config(dequantize=True)` to "
        'compute in bfloat16, or choose `model.set_experts_implementation("grouped_mm")`'
    )
