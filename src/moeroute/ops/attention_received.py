"""How much attention tokens receive, from a few queries.

Axes: B batch, S tokens of the call, Q queries of the attention, N chosen queries, C keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeroute.depth_types import AttentionSeen
from moeroute.ops.chosen_tokens import chosen_tokens

QUERIES_AT_ONCE = 64


@torch.no_grad()
def attention_received(
    before: Tensor,
    seen: AttentionSeen,
    *,
    ran: Tensor,
    counted: Tensor,
    prompt: Tensor,
    num_queries: int,
) -> Tensor:
    """The importance of every token after one more attention was seen.

        of a prompt token: mean, over those of the prompt's last queries that may see it, of what
            they attend to it
        of a later token: what its own query attends to itself

    Attention is softmax(q . k) averaged over heads. A token that no such query sees keeps the
    importance that it had. What an attention adds besides (sinks, biases of positions) is left out.

    Args:
        before: (B, S) float32, the importance so far.
        seen: Of the layer; its queries are those of the tokens that ran it, in order.
        ran: (B, S) bool, the tokens that ran the layer; all, or as `chosen_tokens` gathers them.
        counted: (B, S) bool, those of them whose queries count.
        prompt: (B, S) bool, the tokens of the prompt; if there are any, the call is the first of
            its cache and key i is token i's.
        num_queries: How many of a prompt's last queries are looked at.

    Returns:
        (B, S) float32.
    """
    if seen.query.shape[2] == ran.shape[1] and bool(ran.all()):
        index = torch.arange(ran.shape[1], device=ran.device).expand_as(ran)
    else:
        index = chosen_tokens(ran)[0]  # (B, Q)
    asks = counted.gather(1, index)
    of_prompt = prompt.gather(1, index)
    importance = _from_last_queries(before, seen, asks & of_prompt, num_queries)
    return _from_own_query(importance, seen, asks & ~of_prompt, index)


def _from_last_queries(before: Tensor, seen: AttentionSeen, asks: Tensor, count: int) -> Tensor:
    window = asks & (asks.flip(1).cumsum(1).flip(1) <= count)
    places, real = chosen_tokens(window)  # (B, N)
    if not places.shape[1]:
        return before
    probs, visible = attention_probs(seen, places)
    tokens = before.shape[1]
    looks = (visible & real[..., None])[..., :tokens]
    times = looks.sum(1)  # (B, S)
    mean = (probs[..., :tokens] * looks).sum(1) / times.clamp(min=1)
    return torch.where(times > 0, mean, before)


def _from_own_query(before: Tensor, seen: AttentionSeen, asks: Tensor, index: Tensor) -> Tensor:
    places, real = chosen_tokens(asks)
    importance = before
    for begin in range(0, places.shape[1], QUERIES_AT_ONCE):
        some = places[:, begin : begin + QUERIES_AT_ONCE]
        known = real[:, begin : begin + QUERIES_AT_ONCE]
        probs, visible = attention_probs(seen, some)
        own = visible.shape[-1] - 1 - visible.flip(-1).to(torch.int8).argmax(-1, keepdim=True)
        values = probs.gather(-1, own)[..., 0]
        tokens = index.gather(1, some)
        values = torch.where(known, values, importance.gather(1, tokens))
        importance = importance.scatter(1, tokens, values)
    return importance


def attention_probs(seen: AttentionSeen, places: Tensor) -> tuple[Tensor, Tensor]:
    """What some queries attend to.

    Args:
        seen: Of the layer.
        places: (B, N) places among its queries.

    Returns:
        (B, N, C) float32 probabilities, mean over heads, and the (B, N, C) bool mask of the keys
        that a query may see.
    """
    batch, heads, _, width = seen.query.shape
    shared = seen.key.shape[1]
    query = _rows(seen.query, places)  # (B, heads, N, D)
    grouped = query.reshape(batch, shared, -1, width)
    scores = (grouped @ seen.key.transpose(2, 3)).float() * seen.scaling
    scores = scores.reshape(batch, heads, places.shape[1], -1)
    if seen.softcap is not None:
        scores = seen.softcap * torch.tanh(scores / seen.softcap)
    if seen.mask is None:
        keys, queries = scores.shape[-1], seen.query.shape[2]
        own = (keys - queries + places)[:, None, :, None]
        allowed = torch.arange(keys, device=places.device) <= own
        scores = scores.masked_fill(~allowed, -torch.inf)
    else:
        rows = _rows(seen.mask.expand(batch, *seen.mask.shape[1:]), places)
        if rows.dtype == torch.bool:
            allowed = rows
            scores = scores.masked_fill(~rows, torch.finfo(torch.float32).min)
        else:
            allowed = rows > torch.finfo(rows.dtype).min / 2
            scores = scores + rows
    return scores.softmax(-1).mean(1), allowed.any(1)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """(B, heads, N, ...) of (B, heads, Q, W) at (B, N) places."""
    picked = places[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
    return values.gather(2, picked)
