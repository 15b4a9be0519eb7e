"""One router ahead of all layers, that reads token ids and not hidden states.

Axes: B samples, S tokens of a sample, T = B * S, E experts.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from moeroute.ops.debug import check_router_logits
from moeroute.routers.causal_gate import PreGate
from moeroute.routers.select import Select, choose
from moeroute.types import RouterInput, RouterOutput

IDS, REAL = "pre_gate_ids", "pre_gate_real"


class PreGateRouter(nn.Module):
    """The router of a layer that follows one gate for all layers.

    The first layer asks the gate and hands its logits on; the others take them. So all layers of a
    forward route a token alike, and the routing of a whole text is known before the model runs:
    call the gate alone. While text is generated with a cache the ids so far are remembered, and
    the gate runs over all of them for each new token; beams must not be reordered.

    One layer owns the gate, so that a state dict holds it once, and the others refer to it.

    Args:
        gate: Of all layers.
        select: Logits to who and how much; the paper's is the best expert with a weight of 1, which
            leaves the gate without a gradient but by distillation.
        owns_gate: Whether the gate is part of this router's parameters.

    Shapes:
        router_logits, state: (T, E) float32.

    Raises:
        ValueError: The selection does not fit; in forward, no token ids, or a state of other
            tokens.
    """

    select: Select

    def __init__(self, gate: PreGate, select: Select, *, owns_gate: bool = True) -> None:
        super().__init__()
        select.check(gate.num_experts)
        self.num_experts = gate.num_experts
        self.select = select
        self._gate = (gate,)  # a tuple keeps it from being a submodule
        if owns_gate:
            self.gate = gate

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens, and hand the logits on."""
        logits = self._logits(router_input)
        check_router_logits(logits)
        selection = choose(self.select, logits, router_input.token_mask)
        return RouterOutput(
            router_logits=logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
            state=logits,
        )

    def _logits(self, router_input: RouterInput) -> Tensor:
        tokens, handed = router_input.hidden_states, router_input.state
        if handed is not None:
            if handed.shape != (tokens.shape[0], self.num_experts):
                raise ValueError(
                    f"the layer before handed on logits of {tuple(handed.shape)}, but this one has "
                    f"{tokens.shape[0]} tokens and {self.num_experts} experts: layers that share a "
                    "gate see the same tokens"
                )
            return handed.to(tokens.device)
        if router_input.token_ids is None:
            raise ValueError(
                "a gate ahead of all layers reads token ids but got none: call the model with "
                "input_ids, not inputs_embeds, after moeroute.connect_layers(model)"
            )
        shape = router_input.sequence_shape
        ids = router_input.token_ids.reshape(shape)
        mask = router_input.token_mask
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.reshape(shape)
        if router_input.memory is not None:
            ids, real = _remembered(router_input.memory, ids, real)
        logits = self._gate[0](ids, real.to(torch.bool))[:, ids.shape[1] - shape[1] :]
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return logits.flatten(0, 1).to(wide)


def _remembered(
    memory: MutableMapping[str, Tensor], ids: Tensor, real: Tensor
) -> tuple[Tensor, Tensor]:
    """All ids so far, and which are real; kept for the next call."""
    if IDS in memory:
        ids, real = torch.cat([memory[IDS], ids], 1), torch.cat([memory[REAL], real], 1)
    memory[IDS], memory[REAL] = ids, real
    return ids, real
