"""Experts as stacked parameters, in Hugging Face's layout and names.

Axes: E experts, H hidden, I intermediate, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.expert_mm import routed_mlp
from moeroute.types import RouterOutput

INIT_STD = 0.02


class SwiGLUExperts(nn.Module):
    """E gated feed-forward blocks: down(act(gate(x)) * up(x)).

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: Adds `gate_up_proj_bias` and `down_proj_bias`.
        transposed: Stores the weights input-first, as gpt-oss does.
        interleaved: Gate and up rows alternate instead of following each other, as in gpt-oss.
        activation: A gated row of `moeroute_kernels`: "silu_glu", "gelu_glu", "gelu_tanh_glu",
            "relu_glu", "clamped_silu_glu" or "gpt_oss_glu".
        alpha: Slope of gpt-oss's sigmoid.
        limit: Clamp of the clamped activations.

    Shapes:
        gate_up_proj: (E, 2I, H), transposed (E, H, 2I); gate_up_proj_bias: (E, 2I).
        down_proj: (E, H, I), transposed (E, I, H); down_proj_bias: (E, H).
        Weights are normal with a standard deviation of 0.02, biases zero.

    Raises:
        ValueError: A size is below 1.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(  # noqa: PLR0913
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
        activation: str = "silu_glu",
        alpha: float = 1.702,
        limit: float = float("inf"),
    ) -> None:
        super().__init__()
        _check_sizes(num_experts, hidden_size, intermediate_size)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.transposed = transposed
        self.interleaved = interleaved
        self.activation = activation
        self.alpha = alpha
        self.limit = limit
        outer = 2 * intermediate_size
        self.gate_up_proj = _weight(num_experts, outer, hidden_size, transposed=transposed)
        self.down_proj = _weight(num_experts, hidden_size, intermediate_size, transposed=transposed)
        self.gate_up_proj_bias = _bias(num_experts, outer) if bias else None
        self.down_proj_bias = _bias(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, biases zero."""
        _reset(self)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts: (T, H) to (T, H) in the tokens' dtype."""
        gate_up, down = self.gate_up_proj, self.down_proj
        return routed_mlp(
            tokens,
            gate_up.transpose(1, 2) if self.transposed else gate_up,
            down.transpose(1, 2) if self.transposed else down,
            routing.selected_experts,
            routing.routing_weights,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
            interleaved=self.interleaved,
            alpha=self.alpha,
            limit=self.limit,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, {self.activation}"


class MLPExperts(nn.Module):
    """E plain feed-forward blocks: down(act(up(x))).

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        bias: Adds `up_proj_bias` and `down_proj_bias`.
        transposed: Stores the weights input-first.
        activation: An ungated row of `moeroute_kernels`: "silu", "gelu", "gelu_tanh", "relu" or
            "relu2".

    Shapes:
        up_proj: (E, I, H), transposed (E, H, I); up_proj_bias: (E, I).
        down_proj: (E, H, I), transposed (E, I, H); down_proj_bias: (E, H).
        Weights are normal with a standard deviation of 0.02, biases zero.

    Raises:
        ValueError: A size is below 1.
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
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.transposed = transposed
        self.activation = activation
        self.up_proj = _weight(num_experts, intermediate_size, hidden_size, transposed=transposed)
        self.down_proj = _weight(num_experts, hidden_size, intermediate_size, transposed=transposed)
        self.up_proj_bias = _bias(num_experts, intermediate_size) if bias else None
        self.down_proj_bias = _bias(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, biases zero."""
        _reset(self)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts: (T, H) to (T, H) in the tokens' dtype."""
        up, down = self.up_proj, self.down_proj
        return routed_mlp(
            tokens,
            up.transpose(1, 2) if self.transposed else up,
            down.transpose(1, 2) if self.transposed else down,
            routing.selected_experts,
            routing.routing_weights,
            gate_up_bias=self.up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, {self.activation}"


def _weight(experts: int, out_features: int, in_features: int, *, transposed: bool) -> nn.Parameter:
    sizes = (in_features, out_features) if transposed else (out_features, in_features)
    return nn.Parameter(torch.empty(experts, *sizes))


def _bias(experts: int, features: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(experts, features))


def _reset(experts: nn.Module) -> None:
    for name, parameter in experts.named_parameters(recurse=False):
        if name.endswith("_bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=INIT_STD)


def _check_sizes(num_experts: int, hidden_size: int, intermediate_size: int) -> None:
    sizes = {
        "num_experts": num_experts,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; experts need at least one of each")
