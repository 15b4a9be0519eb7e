"""A router of depth without parameters that leaves out the tokens of least importance.

Axes: T tokens, B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.depth_types import PrunedTokens
from moeroute.routers.token_importance import Importance, importance_of
from moeroute.types import RouterInput


class LeastImportantRouter(nn.Module):
    """A rule without parameters: of each prompt the tokens of highest rank run.

    round((1 - s) n) of a prompt's n real tokens run, its first and its last among them. A later
    token runs if it would have been one of those.

    Args:
        sparsity: s, in [0, 1]; 0 lets every token run.

    Shapes:
        state: (T, 1) the importance of each token; without it every token runs.
        router_logits: (B, S, 2), 0 for what is done and -inf for the other.
        num_executions: (B, S) in {0, 1}.

    Raises:
        ValueError: sparsity is outside [0, 1].
    """

    num_actions = 2

    def __init__(self, *, sparsity: float = 0.0) -> None:
        super().__init__()
        self.sparsity = checked(sparsity)

    def forward(self, router_input: RouterInput) -> PrunedTokens:
        """Decide for each token."""
        known = importance_of(router_input, self.sparsity)
        guide = guide_of(known, is_open=not self.sparsity or router_input.state is None)
        certain = torch.zeros(*guide.shape, self.num_actions, device=guide.device)
        return PrunedTokens(
            router_logits=certain.scatter(-1, 1 - guide[..., None], -torch.inf),
            num_executions=with_padding(guide > 0, known).long(),
            prompt=known.prompt,
            guide=guide,
            guide_share=certain.new_zeros(()),
            sparsity=self.sparsity,
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"sparsity={self.sparsity:g}"


def checked(sparsity: float) -> float:
    """A share of tokens, or ValueError."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity={sparsity} is outside [0, 1]; it is a share of the tokens")
    return float(sparsity)


def guide_of(known: Importance, *, is_open: bool) -> Tensor:
    """(B, S) int64, what the rule does."""
    return torch.ones_like(known.least).long() if is_open else (~known.least).long()


def with_padding(runs: Tensor, known: Importance) -> Tensor:
    """Padding runs where every real token does, so that nothing is gathered, and else nowhere."""
    everything = (runs | ~known.real).all()
    return (runs & known.real) | (~known.real & everything)
