"""A router of depth without parameters: tokens that hardly move any more stop.

Axes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthOutput
from moeroute.types import RouterInput

TINY = 1e-12


class NormHaltingRouter(nn.Module):
    """Stops a token once a layer moved it by less than a part of its norm.

        halt after layer l where |h_l - h_{l-1}| < threshold * |h_{l-1}|

    A token that has stopped skips all later layers.

    Args:
        threshold: 0 never stops, infinity stops after the first layer.
        first_layer: Layers before this one always run.
        layer_index: Of this router's layer.

    Shapes:
        hidden_states: (T, H); state: (T, H + 1), the hidden states and whether the token stopped.
        num_executions: (B, S) in {0, 1}.

    Raises:
        ValueError: threshold is below 0.
    """

    num_actions = 2

    def __init__(self, *, threshold: float, first_layer: int = 1, layer_index: int = 0) -> None:
        super().__init__()
        if not threshold >= 0.0:
            raise ValueError(f"threshold={threshold} is below 0; 0 never stops a token")
        self.threshold = threshold
        self.first_layer = first_layer
        self.layer_index = layer_index

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Decide for each token."""
        hidden = router_input.hidden_states.detach().float()
        halted = torch.zeros_like(hidden[:, 0], dtype=torch.bool)
        before = router_input.state
        if before is not None and self.layer_index >= self.first_layer:
            halted = before[:, -1] > 0
            moved = (hidden - before[:, :-1]).norm(dim=-1)
            halted = halted | (moved < self.threshold * before[:, :-1].norm(dim=-1).clamp(min=TINY))
        return self._answer(router_input, hidden, halted)

    def _answer(self, router_input: RouterInput, hidden: Tensor, halted: Tensor) -> DepthOutput:
        runs = (~halted).reshape(router_input.sequence_shape)
        certain = torch.where(runs, 1.0, -1.0)
        return DepthOutput(
            router_logits=torch.stack([-certain, certain], -1),
            num_executions=runs.long(),
            state=torch.cat([hidden, halted[:, None].float()], -1),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"threshold={self.threshold:g}"
