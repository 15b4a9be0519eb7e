"""A bias that decides who is chosen but not how much: balance without a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SelectionBias(nn.Module):
    """One number an expert, added to probabilities for choosing only.

        b_e <- b_e + update_rate * sign(mean(c) - c_e),  c_e = tokens of expert e, once a step

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024,
    arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    The bias is a persistent buffer, not a parameter: no gradient and no weight decay reach it. It
    stays float32 when the model is cast (`.to(torch.bfloat16)`, `.half()`), because a step of 1e-3
    is lost in bfloat16. Nothing updates it by itself: forward never changes it.

    Args:
        num_experts: E, at least 1.
        update_rate: Step of one update, in units of probability.

    Shapes:
        e_score_correction_bias: (E,) float32, zero at first; the name that checkpoints use.

    Raises:
        ValueError: num_experts is below 1.

    Example:
        >>> counts = tokens_per_expert(routing.selected_experts, 8)  # summed over ranks if several
        >>> router.select.selection_bias.update(counts)  # after optimizer.step()
    """

    e_score_correction_bias: Tensor

    def __init__(self, num_experts: int, *, update_rate: float = 1e-3) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} is below 1; a bias needs an expert")
        self.update_rate = update_rate
        zeros = torch.zeros(num_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", zeros)

    def forward(self, router_probs: Tensor) -> Tensor:
        """(T, E) probabilities to (T, E) choosing scores."""
        return router_probs + self.e_score_correction_bias

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor) -> None:
        """Lower the bias of experts above the mean load and raise it below; call once a step.

        Args:
            tokens_per_expert: (E,) counts over everything since the last update: all ranks, all
                accumulated batches, no padding.

        Raises:
            ValueError: The counts have another shape.
        """
        if tokens_per_expert.shape != self.e_score_correction_bias.shape:
            raise ValueError(
                f"tokens_per_expert is {tuple(tokens_per_expert.shape)} but the bias is "
                f"{tuple(self.e_score_correction_bias.shape)}; give one count an expert"
            )
        counts = tokens_per_expert.to(self.e_score_correction_bias)
        self.e_score_correction_bias += self.update_rate * torch.sign(counts.mean() - counts)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        size = self.e_score_correction_bias.shape[0]
        return f"num_experts={size}, update_rate={self.update_rate:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != kept.dtype:
            self.e_score_correction_bias = kept.to(moved.device)
        return self
