"""Experts as stacked parameters, in Hugging Face's names and layouts.

Axes: E experts, H hidden, I intermediate, T tokens, K slots per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeroute.ops.expert_mm import ACTIVATIONS, routed_mlp
from moeroute.types import RouterOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertActivation:
    """An activation with constants of its own.

    Args:
        name: A row of `moeroute_kernels.activations.ACTIVATIONS`.
        alpha: Slope inside the sigmoid of "gpt_oss_glu" (`swiglu_alpha` of a config); no other
            activation reads it.
        limit: Clamp of "gpt_oss_glu" and "clamped_silu_glu" (`swiglu_limit`); no other activation
            reads it.
    """

    name: str
    alpha: float = 1.702
    limit: float = math.inf


class SwiGLUExperts(nn.Module):
    """E gated feed-forward blocks over one routing.

        y[t] = sum_k w[t, k] down_e(act(gate_e(x[t])) * up_e(x[t])),  e = ids[t, k]

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: Adds `gate_up_proj_bias` and `down_proj_bias`.
        transposed: Stores the weights input-first, as gpt-oss does.
        interleaved: Gate and up rows alternate instead of following each other, as in gpt-oss.
        activation: A gated row of `moeroute_kernels.activations.ACTIVATIONS`, by name or with its
            constants.

    Shapes:
        gate_up_proj: (E, 2I, H), transposed (E, H, 2I); gate_up_proj_bias: (E, 2I).
        down_proj: (E, H, I), transposed (E, I, H); down_proj_bias: (E, H).
        tokens: (T, H) in the weights' dtype, or any under autocast; the output has its shape.

    Raises:
        ValueError: A size is below 1, or the activation is unknown or not gated.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
        activation: str | ExpertActivation = "silu_glu",
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, hidden_size, intermediate_size)
        self.activation = _known(activation, gated=True)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.transposed = transposed
        self.interleaved = interleaved
        up_rows, shape = 2 * intermediate_size, _transposed_shape if transposed else _plain_shape
        self.gate_up_proj = nn.Parameter(torch.empty(shape(num_experts, up_rows, hidden_size)))
        self.down_proj = nn.Parameter(
            torch.empty(shape(num_experts, hidden_size, intermediate_size))
        )
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, up_rows)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(their inputs), as in `nn.Linear`; biases zero."""
        _reset(self.gate_up_proj, self.gate_up_proj_bias, self.hidden_size)
        _reset(self.down_proj, self.down_proj_bias, self.intermediate_size)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts, one row a token; zero where all slots are empty."""
        return routed_mlp(
            tokens,
            self.gate_up_proj.transpose(1, 2) if self.transposed else self.gate_up_proj,
            self.down_proj.transpose(1, 2) if self.transposed else self.down_proj,
            routing.selected_experts,
            routing.routing_weights,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation.name,
            interleaved=self.interleaved,
            alpha=self.activation.alpha,
            limit=self.activation.limit,
        )

    def gate_weights(self) -> Tensor:
        """(E, I, H), the half of the first matrices that the activation reads."""
        weights = self.gate_up_proj.transpose(1, 2) if self.transposed else self.gate_up_proj
        return weights[:, ::2] if self.interleaved else weights[:, : self.intermediate_size]

    def extra_repr(self) -> str:
        """Sizes and layout, for `print(model)`."""
        layout = [name for name in ("transposed", "interleaved") if self.__dict__[name]]
        return ", ".join([_sizes(self), f"bias={self.down_proj_bias is not None}", *layout])


class MLPExperts(nn.Module):
    """E plain feed-forward blocks over one routing.

        y[t] = sum_k w[t, k] down_e(act(up_e(x[t]))),  e = ids[t, k]

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: Adds `up_proj_bias` and `down_proj_bias`.
        transposed: Stores the weights input-first.
        activation: An ungated row of `moeroute_kernels.activations.ACTIVATIONS`: "silu", "gelu",
            "gelu_tanh", "relu" or "relu2".

    Shapes:
        up_proj: (E, I, H), transposed (E, H, I); up_proj_bias: (E, I).
        down_proj: (E, H, I), transposed (E, I, H); down_proj_bias: (E, H).
        tokens: (T, H) in the weights' dtype, or any under autocast; the output has its shape.

    Raises:
        ValueError: A size is below 1, or the activation is unknown or gated.
    """

    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, hidden_size, intermediate_size)
        self.activation = _known(activation, gated=False)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.transposed = transposed
        shape = _transposed_shape if transposed else _plain_shape
        self.up_proj = nn.Parameter(torch.empty(shape(num_experts, intermediate_size, hidden_size)))
        self.down_proj = nn.Parameter(
            torch.empty(shape(num_experts, hidden_size, intermediate_size))
        )
        up_bias = torch.empty(num_experts, intermediate_size)
        self.up_proj_bias = nn.Parameter(up_bias) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1/sqrt(their inputs), as in `nn.Linear`; biases zero."""
        _reset(self.up_proj, self.up_proj_bias, self.hidden_size)
        _reset(self.down_proj, self.down_proj_bias, self.intermediate_size)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts, one row a token; zero where all slots are empty."""
        return routed_mlp(
            tokens,
            self.up_proj.transpose(1, 2) if self.transposed else self.up_proj,
            self.down_proj.transpose(1, 2) if self.transposed else self.down_proj,
            routing.selected_experts,
            routing.routing_weights,
            gate_up_bias=self.up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation.name,
        )

    def gate_weights(self) -> Tensor:
        """(E, I, H), the first matrices."""
        return self.up_proj.transpose(1, 2) if self.transposed else self.up_proj

    def extra_repr(self) -> str:
        """Sizes and layout, for `print(model)`."""
        layout = ["transposed"] if self.transposed else []
        return ", ".join([_sizes(self), f"bias={self.down_proj_bias is not None}", *layout])


def _plain_shape(experts: int, out_features: int, in_features: int) -> tuple[int, int, int]:
    return experts, out_features, in_features


def _transposed_shape(experts: int, out_features: int, in_features: int) -> tuple[int, int, int]:
    return experts, in_features, out_features


def _reset(weight: nn.Parameter, bias: nn.Parameter | None, in_features: int) -> None:
    bound = 1.0 / math.sqrt(in_features)
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.zeros_(bias)


def _sizes(experts: SwiGLUExperts | MLPExperts) -> str:
    return (
        f"num_experts={experts.num_experts}, hidden_size={experts.hidden_size}, "
        f"intermediate_size={experts.intermediate_size}, activation={experts.activation.name}"
    )


def _check_sizes(num_experts: int, hidden_size: int, intermediate_size: int) -> None:
    sizes = {
        "num_experts": num_experts,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; experts need at least one of each")


def _known(activation: str | ExpertActivation, *, gated: bool) -> ExpertActivation:
    if isinstance(activation, str):
        activation = ExpertActivation(name=activation)
    fitting = sorted(name for name, row in ACTIVATIONS.items() if row.gated == gated)
    if activation.name not in fitting:
        kind = "gated" if gated else "ungated"
        raise ValueError(
            f"activation={activation.name!r} is no {kind} activation; use one of "
            f"{', '.join(fitting)}"
        )
    return activation
