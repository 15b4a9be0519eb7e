"""Checks of hyperparameters that several methods have; they run when a method is made."""

from __future__ import annotations

from typing import Protocol


class LoRAFields(Protocol):
    """The fields that every mixture of LoRA has."""

    @property
    def r(self) -> int:
        """Rank of one expert."""
        ...

    @property
    def lora_dropout(self) -> float:
        """Dropout on the experts' input."""
        ...

    @property
    def num_experts(self) -> int:
        """Experts per site."""
        ...

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the balance loss."""
        ...


def check_lora_fields(method: LoRAFields) -> None:
    """Raise ValueError naming the field, the value seen and what is allowed."""
    name = type(method).__name__
    for field, value in (("r", method.r), ("num_experts", method.num_experts)):
        if value < 1:
            raise ValueError(f"{name}: {field}={value} is below 1; set {field} to at least 1")
    if not 0.0 <= method.lora_dropout < 1.0:
        raise ValueError(f"{name}: lora_dropout={method.lora_dropout} is outside [0, 1)")
    if method.router_aux_loss_coef < 0.0:
        raise ValueError(
            f"{name}: router_aux_loss_coef={method.router_aux_loss_coef} would reward imbalance; "
            "use 0 or more"
        )


def check_top_k(method: LoRAFields, slots: int) -> None:
    """Raise ValueError unless 1 <= slots <= num_experts."""
    if not 1 <= slots <= method.num_experts:
        raise ValueError(
            f"{type(method).__name__}: top_k={slots} is outside 1..{method.num_experts} "
            f"(num_experts={method.num_experts}); lower top_k or raise num_experts"
        )
