"""`PolicyGradientMixin`: routers that draw, trained by transformers' Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeroute.layers.policy_gradient import draws, policy_gradient_loss
from moeroute.layers.routed import routed_layers
from moeroute.losses.policy_gradient import NeedsCopies, check_copies

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class PolicyGradientMixin(_Trainer):
    """Makes a Trainer train on `moeroute.policy_gradient_loss`.

    Every batch runs `policy_gradient_copies` times in training; evaluation is Trainer's own. The
    logged loss is the mean over the copies. Gradient accumulation and `num_items_in_batch` are as
    without the mixin: each copy's loss is the same share of the step's.

    Args:
        *args: Trainer's.
        policy_gradient_copies: M, at least 2.
        **kwargs: Trainer's.

    Raises:
        ValueError: Too few copies, no router of the model draws, or label smoothing or a
            compute_loss_func would drop another auxiliary loss of the model.

    Example:
        >>> class ReMixTrainer(moeroute.PolicyGradientMixin, Trainer): ...
        >>> ReMixTrainer(model, arguments, policy_gradient_copies=4, ...).train()
    """

    def __init__(self, *args: Any, policy_gradient_copies: int = 2, **kwargs: Any) -> None:
        check_copies(policy_gradient_copies)
        self.policy_gradient_copies = policy_gradient_copies
        super().__init__(*args, **kwargs)
        model: Any = self.model
        if not any(draws(layer) for _, layer in routed_layers(model)):
            raise ValueError(
                f"{type(model).__name__} holds no router that draws its experts; leave "
                "PolicyGradientMixin out, or wrap the model with a method such as ReMix first"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            _check_nothing_is_dropped(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Trainer's loss in evaluation; in training the policy gradient loss over several copies.

        With return_outputs the outputs are those of the last copy.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs: Any = None

        def one_copy() -> Tensor:
            nonlocal outputs
            # a copy of the dict: Trainer takes the labels out of it
            loss, outputs = super(PolicyGradientMixin, self).compute_loss(
                model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            return loss

        loss = policy_gradient_loss(model, one_copy, self.policy_gradient_copies)
        return (loss, outputs) if return_outputs else loss


def _check_nothing_is_dropped(model: nn.Module) -> None:
    others = {
        type(loss).__name__
        for _, layer in routed_layers(model)
        for loss in layer.losses
        if not isinstance(loss, NeedsCopies)
    }
    if others:
        raise ValueError(
            "label smoothing and compute_loss_func make the loss from the logits, which drops the "
            f"model's {', '.join(sorted(others))}. Set label_smoothing_factor to 0 and leave "
            "compute_loss_func out, or set the weights of those losses to 0"
        )
