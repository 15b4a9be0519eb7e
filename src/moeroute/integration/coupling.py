"""The coupling of routers and experts (ERC) over whole models, checkpoints included.

Source: Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss, 2025, arXiv
2512.23447. See `moeroute.losses.ERCLoss` for layers of one's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.gate_host import gate_host
from moeroute.integration.adapters.root_hooks import loss_share, read_loss, write_loss
from moeroute.integration.experts_function import expert_weights
from moeroute.integration.experts_report import is_dispatched
from moeroute.integration.gates import gate_family, known_gates
from moeroute.layers.moe import MoELayer
from moeroute.layers.routed import routed_layers
from moeroute.losses.coupling import HasGateWeights, router_rows
from moeroute.ops import coupling

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Coupled(NamedTuple):
    """A router and its experts.

    Attributes:
        name: The layer's full module name; its class where the layer is the model.
        rows: (E, H) of the router, read anew at each call.
        gate_weights: (E, D, H) of the experts, likewise.
    """

    name: str
    rows: Callable[[], Tensor]
    gate_weights: Callable[[], Tensor]


def coupling_loss(model: nn.Module, *, alpha: float = 1.0, noise: bool = True) -> Tensor:
    """The ERC loss of a model, the mean over its MoE layers; no token is needed.

    For loops of one's own: `loss = model(**batch).loss + moeroute.coupling_loss(model)`. The
    gradient reaches the rows of linear routers and the first matrices of the experts, where they
    train.

    Args:
        model: Built of `MoELayer`s, or a MoE checkpoint of transformers, wrapped or not.
        alpha: How much less an expert must answer to another's proxy; the paper's: 1 for 64
            experts, 0.5 for 256.
        noise: Whether proxies are drawn around the rows, the same on all ranks.

    Returns:
        Scalar float32, or float64.

    Raises:
        ValueError: The model has no layer with a linear router and readable experts.
        TypeError: The experts' weights are quantised.
    """
    losses = []
    for layer in _found(model):
        rows = layer.rows()
        draw = coupling.draw_proxies(rows) if noise else None
        losses.append(coupling.coupling_loss(rows, layer.gate_weights(), alpha=alpha, draw=draw))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def add_coupling_loss(
    model: nn.Module, *, weight: float = 1.0, alpha: float = 1.0, noise: bool = True
) -> RemovableHandle:
    """Let a model's `loss` hold the ERC loss in training, as `Trainer` and plain loops use it.

    Args:
        model: As for `coupling_loss`.
        weight: Coefficient; the paper's is 1.
        alpha: As there.
        noise: As there.

    Returns:
        A handle; its `remove()` ends it.

    Raises:
        ValueError: As there.

    Example:
        >>> moeroute.add_coupling_loss(model)
        >>> Trainer(model, arguments, train_dataset=rows).train()
    """
    _found(model)
    return model.register_forward_hook(_AddLoss(weight, alpha, noise=noise), with_kwargs=True)


@dataclass(frozen=True, slots=True)
class CouplingGauge:
    """How specialised one layer is.

    Attributes:
        epsilon: Mean over experts of half the distance to the nearest other row, relative to the
            row: 0 for equal rows, 0.71 for orthogonal ones of one length.
        loss: The ERC loss without noise at alpha 1; 0 where each expert answers most to its own
            row, and each row is answered most by its own expert.
    """

    epsilon: float
    loss: float


@torch.no_grad()
def coupling_gauges(model: nn.Module) -> dict[str, CouplingGauge]:
    """The gauge of every layer that has one, by full module name; quantised experts have none."""
    gauges = {}
    for layer in coupled_layers(model):
        try:
            rows, weights = layer.rows(), layer.gate_weights()
        except TypeError:
            continue
        gauges[layer.name] = CouplingGauge(
            epsilon=coupling.specialization(rows).mean().item(),
            loss=coupling.coupling_loss(rows, weights).item(),
        )
    return gauges


def coupled_layers(model: nn.Module) -> Iterator[Coupled]:
    """The layers whose router has a row an expert and whose experts show their first matrices."""
    for name, layer in routed_layers(model):
        experts = layer.experts if isinstance(layer, MoELayer) else None
        if isinstance(experts, HasGateWeights) and _fits(layer.router, experts.gate_weights()):
            shown = name or type(layer).__name__
            yield Coupled(shown, _rows_of(layer.router), experts.gate_weights)
    for name, gate in model.named_modules():
        block_name = name.rpartition(".")[0]
        experts = getattr(model.get_submodule(block_name), "experts", None) if name else None
        if gate_family(gate) is None or not isinstance(experts, nn.Module):
            continue
        if is_dispatched(experts) and _gate_fits(gate, experts):
            yield Coupled(name, _rows_of_gate(gate), _gates_of(experts))


def _found(model: nn.Module) -> list[Coupled]:
    layers = list(coupled_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with a linear router and readable experts, so "
            "there is nothing to couple. Layers of moeroute need a LinearScore and experts with "
            f"gate_weights(); gates of checkpoints that are known: {known_gates()}"
        )
    return layers


def _rows_of(router: nn.Module) -> Callable[[], Tensor]:
    return lambda: router_rows(router, "")


def _fits(router: nn.Module, weights: Tensor) -> bool:
    try:
        rows = router_rows(router, "")
    except ValueError:
        return False
    return rows.shape == (weights.shape[0], weights.shape[2])


def _gate_fits(gate: Any, experts: Any) -> bool:
    """Whether the router that answers here, an adapter's or the checkpoint's own, has such rows."""
    host = gate_host(gate)
    active: Any = None if host is None else host.active_module()
    if active is None:
        return True
    own = attrgetter(_weight_name(gate))(gate)
    try:
        return router_rows(active.router, "").shape == own.shape
    except ValueError:
        return False


def _weight_name(gate: nn.Module) -> str:
    family = gate_family(gate)
    assert family is not None
    return family.weight


def _rows_of_gate(gate: Any) -> Callable[[], Tensor]:
    def rows() -> Tensor:
        host = gate_host(gate)
        active: Any = None if host is None else host.active_module()
        if active is not None:
            return router_rows(active.router, "")
        return attrgetter(_weight_name(gate))(gate)

    return rows


def _gates_of(experts: Any) -> Callable[[], Tensor]:
    def gates() -> Tensor:
        first = expert_weights(experts).first  # (E, 2 D, H), or (E, D, H)
        if not getattr(experts, "has_gate", True):
            return first
        if getattr(experts, "is_concatenated", True):
            return first[:, : first.shape[1] // 2]
        return first[:, ::2]

    return gates


class _AddLoss:
    """Forward hook of the model."""

    def __init__(self, weight: float, alpha: float, *, noise: bool) -> None:
        self.weight, self.alpha, self.noise = weight, alpha, noise

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """In training, add the weighted loss."""
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = read_loss(output)
        if loss is None:
            warnings.warn(
                "the coupling loss reached no loss: this training forward returned none. Pass "
                "labels, or remove the handle and add moeroute.coupling_loss(model) yourself",
                stacklevel=2,
            )
            return None
        extra = coupling_loss(model, alpha=self.alpha, noise=self.noise)
        return write_loss(output, loss + (self.weight * extra * loss_share(kwargs)).to(loss))
