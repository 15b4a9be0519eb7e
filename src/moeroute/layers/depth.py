"""A decoder layer that each sequence skips, runs once or runs several times."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.layers.depth_record import depth_record
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from moeroute.depth_types import DecoderCall, DepthOutput
    from moeroute.types import AuxLoss


class DepthLayer(nn.Module):
    """Decides for each sequence how often a decoder layer runs, once for a whole generation.

        y = B(B(...(x)))  with n applications of the layer B,  n = 0: y = x

    The router sees the prompt on the first call with a cache; the decision stays with the cache.
    Without a cache every call decides, from the first `prompt_lengths` tokens of each sequence. A
    prompt that is fed in chunks is decided from its first chunk.

    In training with labels the labelled action is executed and the router's logits are kept for the
    losses.

    Args:
        router: A `moeroute.depth_types.DepthRouter` that answers for sequences.
        losses: What this layer asks to be charged in training.
        site: Full module name of the decoder layer.
        layer_index: Its place among the decoder layers.
        num_layers: How many of them there are.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the output has its shape.

    Raises:
        ValueError: The labels are of another number of layers, or of actions that the router does
            not know.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
        num_layers: int = 0,
    ) -> None:
        super().__init__()
        self.router = router
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.num_layers = num_layers
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        """Answer in place of the decoder layer."""
        actions = call.decided
        if actions is None:
            depth, labels = self._route(hidden_states)
            executions = depth.num_executions if labels is None else labels
            actions = tuple(executions.tolist())
            call.decide(actions, from_tokens=labels is None)
            self._keep(hidden_states, actions, depth, labels)
        else:
            self._keep(hidden_states, actions, None, None)
        return run_actions(hidden_states, call, actions)

    def _route(self, hidden_states: Tensor) -> tuple[DepthOutput, Tensor | None]:
        router_input = self.routing_pass.router_input(hidden_states.detach(), self.site)
        depth = self.router(router_input)
        if depth.routing_weights is not None or depth.num_executions.ndim != 1:
            raise ValueError(
                f"{type(self.router).__name__} answers token by token; DepthLayer needs one "
                "decision a sequence"
            )
        labels = self._labels(hidden_states.shape[0], depth.router_logits.shape[-1])
        return depth, None if labels is None else labels.to(hidden_states.device)

    def _labels(self, batch: int, actions: int) -> Tensor | None:
        given = self.routing_pass.samples.depth_labels
        if given is None or not self.training:
            return None
        if given.shape[1] != self.num_layers:
            raise ValueError(
                f"depth_labels speak of {given.shape[1]} layers but the model has "
                f"{self.num_layers}; search labels on this model"
            )
        labels = self.routing_pass.depth_labels(self.layer_index, batch)
        if labels is not None and not bool(((labels >= 0) & (labels < actions)).all()):
            raise ValueError(
                f"depth_labels of layer {self.layer_index} hold {sorted(set(labels.tolist()))}; "
                f"this router knows the actions 0 to {actions - 1}"
            )
        return labels

    def _keep(
        self,
        hidden_states: Tensor,
        actions: tuple[int, ...],
        depth: DepthOutput | None,
        labels: Tensor | None,
    ) -> None:
        losses = self.losses if self.training and labels is not None else ()
        if self.routing_pass.wants(charged=bool(losses)):
            record = depth_record(
                self.routing_pass,
                hidden_states,
                torch.tensor(actions, device=hidden_states.device),
                site=self.site,
                layer_index=self.layer_index,
                depth=depth,
            )
            record = replace(record, labels=labels, router=self.router, losses=losses)
            self.routing_pass.keep(record, charged=bool(losses))


def run_actions(hidden_states: Tensor, call: DecoderCall, actions: tuple[int, ...]) -> Tensor:
    """Apply a decoder layer to each of (B, S, H) sequences as often as (B,) actions say."""
    if not any(actions):  # also where there is no sequence
        call.skip(hidden_states)
        return hidden_states
    for visit in range(max(actions)):
        rows = tuple(row for row, times in enumerate(actions) if times > visit)
        hidden_states = call.run_sequences(hidden_states, rows, visit)
    return hidden_states
