"""A router of depth that reads a prompt in windows.

Axes: B batch, S sequence, H hidden, W windows, A actions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.depth_types import DepthOutput
from moeroute.ops.windows import window_means
from moeroute.routers.scores import linear_logits
from moeroute.types import RouterInput

RUN = 1
PURE_ROUTER = -0.5


class PromptWindowRouter(nn.Module):
    """One action a sequence: the mean, over windows of the prompt, of an MLP's logits.

        m_w    = mean of the w-th window of the real prompt tokens
        logits = mean_w W2 gelu(W1 m_w + b1) + b2

    The logits are averaged, not the windows. Linears are Xavier-uniform at first, biases zero.

    Args:
        in_features: H.
        bottleneck: Width between the two linears.
        num_windows: W; a shorter prompt has a window a token.
        num_actions: A, at least 2.
        penalty: See `blended`; PURE_ROUTER asks the router alone.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (B, A) float32.
        num_executions: (B,) int64.

    Raises:
        ValueError: A size is below its least; in forward, a sequence without a real token.
    """

    def __init__(
        self,
        in_features: int,
        *,
        bottleneck: int = 128,
        num_windows: int = 8,
        num_actions: int = 3,
        penalty: float = PURE_ROUTER,
    ) -> None:
        super().__init__()
        least = {"in_features": 1, "bottleneck": 1, "num_windows": 1, "num_actions": 2}
        given = (in_features, bottleneck, num_windows, num_actions)
        for (name, low), value in zip(least.items(), given, strict=True):
            if value < low:
                raise ValueError(f"{name}={value} is below {low}")
        self.in_features = in_features
        self.num_windows = num_windows
        self.num_actions = num_actions
        self.penalty = penalty
        self.down = nn.Linear(in_features, bottleneck)
        self.up = nn.Linear(bottleneck, num_actions)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Xavier-uniform, biases zero."""
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Decide for each sequence."""
        means, used = window_means(
            router_input.hidden_states.unflatten(0, router_input.sequence_shape),
            prompt_tokens(router_input),
            self.num_windows,
        )
        if not bool(used[:, 0].all()):
            row = int((~used[:, 0]).nonzero()[0])
            raise ValueError(
                f"sequence {row} has no real prompt token, so that nothing can be decided from it; "
                "check attention_mask and prompt_lengths"
            )
        hidden = linear_logits(means.flatten(0, 1), self.down.weight, self.down.bias, None)
        hidden = functional.gelu(hidden, approximate="tanh")
        each = linear_logits(hidden, self.up.weight, self.up.bias, None).unflatten(0, used.shape)
        known = used.to(each.dtype)[..., None]
        logits = (each * known).sum(1) / known.sum(1)  # (B, A)
        chosen = blended(logits.softmax(-1), self.penalty).argmax(-1)
        return DepthOutput(router_logits=logits, num_executions=chosen)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_windows={self.num_windows}, num_actions={self.num_actions}"


def prompt_tokens(router_input: RouterInput) -> Tensor:
    """(B, S) bool: the real tokens that a decision about the whole sequence may look at."""
    shape, mask = router_input.sequence_shape, router_input.token_mask
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=router_input.hidden_states.device)
    real = mask.reshape(shape)
    lengths = router_input.prompt_lengths
    if lengths is None:
        return real
    return real & (real.cumsum(1) <= lengths.to(real.device)[:, None])


def blended(probs: Tensor, penalty: float) -> Tensor:
    """A router's probabilities mixed with those of one fixed action, to save or spend layers.

        -1.0 .. -0.5   from skip to the router
        -0.5 ..  0.5   from the router to run
         0.5 ..  1.0   from run to repeat

    Args:
        probs: (B, 3) or more actions.
        penalty: In [-1, 1].

    Raises:
        ValueError: The penalty is outside.
    """
    if not -1.0 <= penalty <= 1.0:
        raise ValueError(f"the penalty {penalty} is outside [-1, 1]")
    if penalty == PURE_ROUTER:
        return probs
    fixed = torch.eye(probs.shape[-1], device=probs.device, dtype=probs.dtype)
    if penalty < PURE_ROUTER:
        share = (penalty + 1.0) / 0.5
        return (1 - share) * fixed[0] + share * probs
    if penalty <= -PURE_ROUTER:
        share = penalty + 0.5
        return (1 - share) * probs + share * fixed[RUN]
    share = (penalty - 0.5) / 0.5
    return ((1 - share) * fixed[RUN] + share * fixed[RUN + 1]).expand_as(probs)
