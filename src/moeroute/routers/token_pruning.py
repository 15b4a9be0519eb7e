"""A trained router of depth that leaves out the tokens of least importance.

Axes: T tokens, B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import nn

from moeroute.depth_types import PrunedTokens
from moeroute.ops.gumbel import hard_gumbel_softmax
from moeroute.routers.learns import learns
from moeroute.routers.least_important import checked, guide_of, with_padding
from moeroute.routers.scores import linear_logits
from moeroute.routers.step_schedule import StepSchedule
from moeroute.routers.token_importance import importance_of
from moeroute.types import RouterInput

FACTORS, RUN = 4, 1


class FactorRouter(nn.Module):
    """Two logits a token by a small MLP over four numbers: skip the layer, or run it.

        z = M2 relu(M1 f + c1) + c2
        training: hard Gumbel-softmax of z
        evaluation, and while it is frozen: the larger of the two; a tie runs

    f: see `Importance`; the tokens themselves are not looked at. The first and the last token of a
    prompt run. M2 is zero at first and c2 says "run", so that a fresh router lets all tokens run.

    Args:
        sparsity: s, in [0, 1], one of the four; 0 lets every token run, whatever the logits.
        width: Between the two linears; 7 width + 2 parameters.
        temperature: Of the draws.
        guide_steps: Optimizer steps in which the share of the guide falls to 0.

    Shapes:
        state: (T, 1) the importance of each token; without it every token runs.
        router_logits: (B, S, 2) float32.
        num_executions: (B, S) in {0, 1}.
        routing_weights: (B, S) float32 while it learns, exactly 0 or 1, with a gradient; None else,
            and where every token runs.

    Raises:
        ValueError: A number is out of range.
    """

    num_actions = 2

    def __init__(
        self,
        *,
        sparsity: float = 0.0,
        width: int = 16,
        temperature: float = 1.0,
        guide_steps: int = 1000,
    ) -> None:
        super().__init__()
        if width < 1 or not temperature > 0.0:
            raise ValueError(f"width={width} must be at least 1, temperature={temperature} above 0")
        self.sparsity = checked(sparsity)
        self.temperature = temperature
        self.down = nn.Linear(FACTORS, width)
        self.up = nn.Linear(width, self.num_actions)
        self.schedule = StepSchedule(start=1.0, end=0.0, steps=guide_steps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M1 Kaiming-uniform, M2 and c1 zero, c2 says "run"."""
        nn.init.kaiming_uniform_(self.down.weight, nonlinearity="relu")
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        with torch.no_grad():
            self.up.bias.copy_(torch.tensor([0.0, 1.0]))

    def forward(self, router_input: RouterInput) -> PrunedTokens:
        """Decide for each token."""
        known = importance_of(router_input, self.sparsity)
        hidden = linear_logits(
            known.factors.flatten(0, 1), self.down.weight, self.down.bias, None
        ).relu()
        logits = linear_logits(hidden, self.up.weight, self.up.bias, None)
        logits = logits.unflatten(0, router_input.sequence_shape)
        skip = logits[..., 0].masked_fill(known.ends, -torch.inf)
        logits = torch.stack([skip, logits[..., RUN]], -1)
        is_open = not self.sparsity or router_input.state is None
        drawn = None
        runs = torch.ones_like(known.real)
        if not is_open and self.training and learns(self):
            drawn = hard_gumbel_softmax(logits, self.temperature)[..., RUN]
            runs = drawn.detach() > 0
        elif not is_open:
            runs = logits[..., RUN] >= logits[..., 0]
        return PrunedTokens(
            router_logits=logits,
            num_executions=with_padding(runs, known).long(),
            routing_weights=drawn,
            prompt=known.prompt,
            guide=guide_of(known, is_open=is_open),
            guide_share=self.schedule(),
            sparsity=self.sparsity,
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"sparsity={self.sparsity:g}"
