"""A bias that decides who is chosen but not how much: balance without a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeroute.ops.exact import uncast
from moeroute.ops.load import tokens_per_expert
from moeroute.ops.probs import TINY
from moeroute.ops.ranks import sum_over_ranks
from moeroute.types import RoutingRecord

FORWARDS_WITHOUT_A_STEP = 100


class SelectionBias(nn.Module):
    """One number an expert, added to probabilities for choosing only.

        b_e <- b_e + update_rate * u((mean(c) - c_e) / mean(c)),  c_e = tokens of expert e, a step
        u = sign, or with proportional the value itself

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024,
    arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    The bias is a persistent buffer, not a parameter: no gradient and no weight decay reach it. It
    stays float32 when the model is cast (`.to(torch.bfloat16)`, `.half()`), because a step of 1e-3
    is lost in bfloat16.

    Forward never changes it. A routed layer shows it every training forward, whose real tokens it
    counts; `moeroute.post_step(model)` then moves it once an optimizer step by the counts of all
    accumulated batches and ranks. The counts of an unfinished step are no buffer, because DDP
    overwrites the buffers of every rank with those of the first.

    Args:
        num_experts: E, at least 1.
        update_rate: Step of one update, in units of probability; 0 keeps the bias as it is.
        proportional: Move by the share that an expert is off the mean, not by its sign: smaller
            steps near balance, larger ones at an expert that takes all. Algorithm 1's variant, but
            relative to the mean (our own reading), so that the rate means the same at any batch.

    Shapes:
        e_score_correction_bias: (E,) float32, zero at first; the name that checkpoints use.

    Raises:
        ValueError: num_experts is below 1.

    Warns:
        UserWarning: After 100 training forwards without a step, once.

    Example:
        >>> model(**batch).loss.backward()
        >>> optimizer.step()
        >>> moeroute.post_step(model)
    """

    e_score_correction_bias: Tensor

    def __init__(
        self, num_experts: int, *, update_rate: float = 1e-3, proportional: bool = False
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} is below 1; a bias needs an expert")
        self.update_rate = update_rate
        self.proportional = proportional
        zeros = torch.zeros(num_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", zeros)
        self._counts: Tensor | None = None
        self._forwards = 0

    def forward(self, router_probs: Tensor) -> Tensor:
        """(T, E) probabilities to (T, E) choosing scores."""
        return router_probs + self.e_score_correction_bias

    def observe(self, record: RoutingRecord) -> None:
        """Count the real tokens of one training forward by expert."""
        if not self.update_rate:
            return
        size = self.e_score_correction_bias.shape[0]
        counts = tokens_per_expert(record.routing.selected_experts, size, record.token_mask)
        waiting = self._counts
        self._counts = counts if waiting is None else waiting.to(counts.device) + counts
        if not torch.compiler.is_compiling():  # a number that changes would compile anew each time
            self._forwards += 1
            if self._forwards == FORWARDS_WITHOUT_A_STEP:
                _warn_of_no_step()

    def post_step(self) -> None:
        """Move by everything counted since the last step, over all ranks; forget the counts."""
        if not self.update_rate:
            return
        counts = self._counts
        if counts is None:  # other ranks may have counted
            counts = torch.zeros_like(self.e_score_correction_bias, dtype=torch.int64)
        self.update(sum_over_ranks(counts.to(self.e_score_correction_bias.device)))

    @torch.no_grad()
    def update(self, tokens_per_expert: Tensor) -> None:
        """Lower the bias of experts above the mean load and raise it below.

        For those who count themselves; what `observe` has counted is forgotten.

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
        step = counts.mean() - counts
        step = step / counts.mean().clamp(min=TINY) if self.proportional else torch.sign(step)
        self.e_score_correction_bias += self.update_rate * step
        self._counts, self._forwards = None, 0

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        size = self.e_score_correction_bias.shape[0]
        return (
            f"num_experts={size}, update_rate={self.update_rate:g}, "
            f"proportional={self.proportional}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        self.e_score_correction_bias = uncast(kept, self.e_score_correction_bias)
        return self


def _warn_of_no_step() -> None:
    warnings.warn(
        f"{FORWARDS_WITHOUT_A_STEP} training forwards were counted and nothing has moved a "
        "selection bias by them. Call moeroute.post_step(model) after every optimizer.step(), or "
        "add moeroute.PostStepCallback() to Trainer's callbacks; SelectionBias(update_rate=0) "
        "keeps the bias as it is",
        stacklevel=2,
    )
