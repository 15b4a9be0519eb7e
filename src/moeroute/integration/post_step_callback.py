"""`PostStepCallback`: state that learns without a gradient, moved by transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from moeroute.layers.post_step import post_step

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class PostStepCallback(TrainerCallback):
    """Calls `moeroute.post_step(model)` after every optimizer step of Trainer.

    With gradient accumulation that is once an accumulated batch; under data parallelism every rank
    calls it, and what was counted is summed over them.

    A model without such state is left as it is.

    Example:
        >>> Trainer(model, arguments, callbacks=[moeroute.PostStepCallback()], ...)
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the state."""
        post_step(kwargs["model"])
