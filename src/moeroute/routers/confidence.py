"""A router of depth without parameters: a token stops once the model is sure of the next one.

Axes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthOutput
from moeroute.types import RouterInput


class ConfidenceRouter(nn.Module):
    """Stops a token before a layer where its most probable successor is probable enough.

        halt before layer l where max softmax(head(norm(h_l))) >= threshold

    A token that has stopped skips all later layers. The output embedding is run, for every layer
    that may be left out, on the tokens that have not stopped.

    Source: the softmax confidence of Confident Adaptive Language Modeling, Schuster et al., 2022,
    arXiv 2207.07061; from general knowledge, and without its calibration.

    Args:
        threshold: Least probability at which a token stops; above 1 none does, at 0 all do. None
            asks for nothing and hands nothing on.
        first_exit: Layers that every token runs.
        layer_index: Of this router's layer.

    Shapes:
        hidden_states: (T, H); state: (T, 1), whether the token has stopped.
        num_executions: (B, S) in {0, 1}.

    Raises:
        ValueError: threshold is below 0, or there is no way to read tokens off hidden states.
    """

    num_actions = 2

    def __init__(
        self, *, threshold: float | None = None, first_exit: int = 1, layer_index: int = 0
    ) -> None:
        super().__init__()
        if threshold is not None and not threshold >= 0.0:
            raise ValueError(f"threshold={threshold} is below 0; it is a probability")
        self.threshold = threshold
        self.first_exit = first_exit
        self.layer_index = layer_index

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Decide for each token."""
        hidden, before = router_input.hidden_states.detach(), router_input.state
        stopped = torch.zeros_like(hidden[:, 0], dtype=torch.bool)
        if before is not None:
            stopped = before[:, 0] > 0
        if self.threshold is not None and self.layer_index >= self.first_exit:
            sure = highest_probability(router_input, hidden[~stopped]) >= self.threshold
            stopped = stopped.masked_scatter(~stopped, sure)
        runs = (~stopped).reshape(router_input.sequence_shape)
        certain = torch.where(runs, 1.0, -1.0)
        return DepthOutput(
            router_logits=torch.stack([-certain, certain], -1),
            num_executions=runs.long(),
            state=None if self.threshold is None else stopped[:, None].float(),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"threshold={self.threshold}"


def highest_probability(router_input: RouterInput, hidden: Tensor) -> Tensor:
    """(N,) float32, the probability of the most probable successor of (N, H) tokens."""
    if router_input.read_out is None:
        raise ValueError(
            "the confidence of a token needs the model's final norm and output embedding, which "
            "nobody has looked for: wrap and call the whole model, with a threshold or a "
            "loss_scale above 0"
        )
    if not hidden.shape[0]:
        return torch.zeros(0, device=hidden.device)
    logits = router_input.read_out(hidden).detach().float()
    return (logits.amax(-1) - logits.logsumexp(-1)).exp().to(hidden.device)
