"""The cross-entropy of what a model would say after some of its layers.

    CE_e = mean over targets of -log softmax(head(norm(h_e)))[target]
    J    = sum_e w_e CE_e + w_L CE_L,  weights of the exits that are on, normalised to sum 1

Source: LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, Elhoushi et al.,
2024, arXiv 2404.16710, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from moeroute.depth_types import DepthRecord
from moeroute.types import RoutingRecord

IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitRecord(DepthRecord):
    """What a decoder layer did, and the states that would leave the model before it.

    Attributes:
        states: (N, H) of the tokens that have a target.
        targets: (N,) int64, the token after each.
        read_out: (N, H) to (N, V), the model's final norm and output embedding.
    """

    states: Tensor
    targets: Tensor
    read_out: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitLoss:
    """Teaches a model to predict the next token after `exit_layer` of its layers.

    The logits are computed in the backward pass again, so that those of one exit are alive at a
    time. 0 without targets. Where `labels` are given to a wrapped model, its own loss keeps what
    the weights of all exit losses leave of 1.

    Args:
        exit_layer: Layers that have run.
        weight: Its part of the whole loss, in [0, 1).

    Shapes:
        The loss is a float32 scalar.

    Raises:
        ValueError: The layer keeps no states of an exit.
        RuntimeError: The states have no graph (reentrant activation checkpointing).
    """

    exit_layer: int
    weight: float = 0.1

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one exit: a scalar, unweighted."""
        if not isinstance(record, ExitRecord):
            raise ValueError(
                f"{record.site}: ExitLoss needs the states of an exit, which EarlyExitLayer keeps"
            )
        states = record.states
        _check_graph(record)
        if not states.shape[0]:
            return states.sum().float()
        return checkpoint(
            _cross_entropy, record.read_out, states, record.targets, use_reentrant=False
        )


def exit_scales(num_layers: int, loss_scale: float) -> list[float]:
    """The unnormalised weight of the output of every layer, the last one's for the model's own.

        e(l) = s (0 + 1 + ... + l),  e(L - 1) = L - 1 + s (0 + 1 + ... + (L - 2))

    Args:
        num_layers: L.
        loss_scale: s.
    """
    scales = [loss_scale * layer * (layer + 1) / 2 for layer in range(num_layers)]
    last = num_layers - 1
    scales[last] = last + loss_scale * (last - 1) * last / 2
    return scales


def exit_weights(num_layers: int, loss_scale: float, exits: Sequence[int]) -> dict[int, float]:
    """The weights of some exits beside that of the whole model, normalised to sum 1 with it.

    Args:
        num_layers: L.
        loss_scale: Of `exit_scales`.
        exits: The exits that are on: numbers of layers that have run, each below L.

    Returns:
        Exit -> weight; the model's own loss keeps the rest.
    """
    scales = exit_scales(num_layers, loss_scale)
    total = scales[-1] + sum(scales[exit_layer - 1] for exit_layer in exits)
    return {exit_layer: scales[exit_layer - 1] / total for exit_layer in exits}


def own_share(records: Sequence[RoutingRecord]) -> float:
    """What exit losses leave of 1 for the model's own loss; 1 where there are none."""
    exits = (loss for record in records for loss in record.losses if isinstance(loss, ExitLoss))
    return 1.0 - sum(loss.weight for loss in exits)


def _cross_entropy(read_out: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    logits = read_out(states).float()
    return cross_entropy(logits, targets.to(logits.device))


def _check_graph(record: ExitRecord) -> None:
    if not torch.is_grad_enabled() or record.states.requires_grad or record.experts is None:
        return
    if any(parameter.requires_grad for parameter in record.experts.parameters()):
        raise RuntimeError(
            f"{record.site}: the states of the exit have no gradient: reentrant activation "
            "checkpointing runs the layers without a graph. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
