"""What the ops ask of their arguments, and how autocast changes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeroute_kernels.activations import ACTIVATIONS


def autocast_to_match(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast floating tensors (not float64) to the autocast dtype of the first one's device.

    Without autocast the tensors come back as they are. None stays None.
    """
    first = tensors[0]
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in tensors
    )


def require_one_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise a ValueError that names the tensors if their dtypes differ; None is skipped."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: dtypes differ ({seen}); cast them to one, or use torch.autocast")


def check_activation(gate_up: Tensor, down: Tensor, activation: str) -> None:
    """Raise a ValueError unless the activation exists and the two weights fit it."""
    if activation not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"routed_mlp: unknown activation {activation!r}; use one of {known}")
    if gate_up.ndim != 3 or down.ndim != 3 or gate_up.shape[0] != down.shape[0]:
        raise ValueError(
            f"routed_mlp: gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} do not fit; "
            "give (E, 2I, H) or (E, I, H), and (E, H, I)"
        )
    factor = 2 if ACTIVATIONS[activation].gated else 1
    if gate_up.shape[1] != factor * down.shape[2]:
        raise ValueError(
            f"routed_mlp: activation {activation!r} takes gate_up of {factor} * I rows per expert, "
            f"but gate_up is {tuple(gate_up.shape)} and down {tuple(down.shape)}"
        )


def check_shapes(
    x: Tensor, gate_up: Tensor, down: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> None:
    """Raise a ValueError unless tokens, weights and routing fit each other."""
    if x.ndim != 2 or x.shape[1] != gate_up.shape[2] or x.shape[1] != down.shape[1]:
        raise ValueError(
            f"routed_mlp: x {tuple(x.shape)} does not fit gate_up {tuple(gate_up.shape)} and down "
            f"{tuple(down.shape)}; x is (T, H), gate_up ends in H, down is (E, H, I)"
        )
    if selected_experts.ndim != 2 or selected_experts.shape[0] != x.shape[0]:
        raise ValueError(
            f"routed_mlp: selected_experts {tuple(selected_experts.shape)} must be (T, K) with "
            f"T={x.shape[0]}"
        )
    if selected_experts.is_floating_point() or selected_experts.dtype == torch.bool:
        raise ValueError(
            f"routed_mlp: selected_experts is {selected_experts.dtype}; they must be integers, "
            "the ids of experts"
        )
    if routing_weights.shape != selected_experts.shape:
        raise ValueError(
            f"routed_mlp: routing_weights {tuple(routing_weights.shape)} and selected_experts "
            f"{tuple(selected_experts.shape)} differ; both are (T, K)"
        )


def check_biases(
    gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None
) -> None:
    """Raise a ValueError unless the biases that are there fit the weights."""
    pairs = (("gate_up", gate_up_bias, gate_up), ("down", down_bias, down))
    for name, bias, weight in pairs:
        if bias is not None and bias.shape != weight.shape[:2]:
            raise ValueError(
                f"routed_mlp: {name}_bias {tuple(bias.shape)} must be {tuple(weight.shape[:2])}, "
                f"one value per row of {name} {tuple(weight.shape)}"
            )
