"""The arguments of a decoder layer's call, cut to some of its sequences or tokens.

Axes: B batch, S tokens of the call, K chosen tokens a sequence, C keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

MASK = "attention_mask"
MASK_NDIM = 4


def of_rows(arguments: Mapping[str, Any], index: Tensor, batch: int) -> dict[str, Any]:
    """The arguments for some sequences: every tensor with a batch axis is cut to them.

    Raises:
        ValueError: The mask is a block mask, which has no rows to take, or a tensor mixes the
            sequences with something else in its first axis.
    """
    mask = arguments.get(MASK)
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}, which cannot be cut to the sequences that "
            'run a layer; load the model with attn_implementation="sdpa" or "eager"'
        )

    def cut(value: Tensor) -> Tensor:
        if value.ndim < 2 or value.shape[0] == 1:
            return value
        unclear = value.shape[0] != batch or (value.ndim == 2 and value.is_floating_point())
        if unclear:
            raise ValueError(
                f"the layer is called with a tensor of shape {tuple(value.shape)} that cannot be "
                f"cut to some of {batch} sequences; let all sequences of a batch take the same "
                "actions"
            )
        return value.index_select(0, index)

    return {name: _each(value, cut) for name, value in arguments.items()}


def of_tokens(arguments: Mapping[str, Any], index: Tensor, tokens: int) -> dict[str, Any]:
    """The arguments for some tokens of every sequence, the mask left out.

    Args:
        arguments: By name.
        index: (B, K) positions in this call.
        tokens: S.
    """
    batch = index.shape[0]

    def cut(value: Tensor) -> Tensor:
        if value.ndim < 2 or value.shape[1] != tokens or value.shape[0] not in (1, batch):
            return value
        return take_tokens(value.expand(batch, *value.shape[1:]), index)

    rest = {name: value for name, value in arguments.items() if name != MASK}
    return {name: _each(value, cut) for name, value in rest.items()}


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """(B, S, ...) at (B, K) positions."""
    shape = (*index.shape, *values.shape[2:])
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(shape))


def full_mask(mask: Any, hidden_states: Tensor) -> Tensor:
    """The mask of a call as a tensor (B or 1, 1, S, C); None stands for a causal one.

    Raises:
        ValueError: It is of a kind that cannot be cut to tokens.
    """
    tokens = hidden_states.shape[1]
    if mask is None:
        square = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden_states.device)
        return square.tril()[None, None]
    if not isinstance(mask, Tensor) or mask.ndim != MASK_NDIM:
        raise ValueError(
            "depth by token cuts the attention mask to the tokens that run a layer, and this "
            "attention has none of four axes; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    return mask


def mask_of_tokens(mask: Tensor, index: Tensor, real: Tensor, seen: Tensor | None) -> Tensor:
    """The mask of some tokens.

    Args:
        mask: (B or 1, 1, S, C), bool (True attends) or added to the scores.
        index: (B, K) positions in this call.
        real: (B, K) bool; where it is False the token only fills up and may attend to anything.
        seen: (B, 1, C) bool, False hides a key from every token; None hides none.

    Returns:
        (B, 1, K, C).
    """
    batch, columns = index.shape[0], mask.shape[-1]
    mask = mask.expand(batch, *mask.shape[1:])
    picked = index[:, None, :, None].expand(-1, mask.shape[1], -1, columns)
    mask = mask.gather(2, picked)
    hidden = None if seen is None else ~seen[:, :, None, :]
    filling = ~real[:, None, :, None]
    if mask.dtype == torch.bool:
        mask = mask if hidden is None else mask & ~hidden
        return mask | filling
    if hidden is not None:
        mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return mask.masked_fill(filling, 0.0)


def _each(value: Any, cut: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return cut(value)
    if isinstance(value, tuple | list):
        return type(value)(_each(item, cut) for item in value)
    if isinstance(value, Mapping) and type(value) is dict:
        return {name: _each(item, cut) for name, item in value.items()}
    return value
