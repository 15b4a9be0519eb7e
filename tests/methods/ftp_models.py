"""Models whose tokens are pruned, and the same densely, with loops, from attention maps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from integration.depth.depth_models import FAMILIES, tiny
from torch import Tensor

import moeroute
from moeroute.layers.routed import routing_passes
from moeroute.methods import FTP
from moeroute.routers.token_pruning import FactorRouter

SPARSITY = (0.0, 0.5, 0.4)
FAMILIES_WATCHED = tuple(name for name in FAMILIES if name not in ("gpt2", "gptj"))


def static(family: str = "llama", sparsity: Any = SPARSITY, **changes: Any) -> Any:
    """A model in eval mode whose tokens are pruned by the rule."""
    return pruned(tiny(family, **changes), FTP(sparsity=sparsity, router="static"))


def learned(family: str = "llama", sparsity: Any = SPARSITY, **fields: Any) -> Any:
    """A model in eval mode whose routers have something to say of each token."""
    model = pruned(tiny(family), FTP(sparsity=sparsity, **fields))
    torch.manual_seed(7)
    with torch.no_grad():
        for router in routers(model):
            router.up.weight.normal_()
            router.down.bias.uniform_(-1.0, 0.0)
            router.up.bias.zero_()
    return model


def pruned(base: Any, method: FTP) -> Any:
    """Wrapped, in eval mode."""
    return moeroute.wrap_model(base, method).eval()


def routers(model: Any) -> list[FactorRouter]:
    """In order."""
    return [module for module in model.modules() if isinstance(module, FactorRouter)]


def records(model: Any) -> list[Any]:
    """Of the last forward, a layer each."""
    return list(routing_passes(model)[0].records.values())


def executed(model: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    """(L, B, S) which tokens run."""
    with moeroute.track_routing(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
        return torch.stack([record.depth.num_executions.bool() for record in records(model)])


def differs(kept: Tensor, mask: Tensor) -> bool:
    """Whether some real tokens run, of (L, B, S), and others do not."""
    return 0.1 < kept[:, mask.bool()].float().mean().item() < 0.95


@contextmanager
def densely_pruned(
    base: Any, sparsity: Sequence[float], mask: Tensor, lengths: Sequence[int], queries: int = 8
) -> Iterator[list[Tensor]]:
    """Run every layer for all tokens, and take what the rule leaves out back; eager attention.

    Yields:
        What each layer kept, (B, S) bool, once the model was called.
    """
    kept: list[Tensor] = []
    maps: list[Tensor] = []
    importance = torch.zeros(mask.shape)

    def attended(module: Any, args: Any, output: Any) -> None:
        maps.append(output[1].mean(1))

    def after(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            keep = torch.ones(mask.shape, dtype=torch.bool)
            for row in range(mask.shape[0]):
                real = mask[row].nonzero().flatten().tolist()
                prompt, later = real[: lengths[row]], real[lengths[row] :]
                keep[row] = mask[row].bool()
                if sparsity[layer]:
                    _leave_out(keep[row], importance[row], prompt, later, sparsity[layer])
                _look(importance[row], maps[layer][row], keep[row], prompt, later, queries)
            kept.append(keep)
            before = args[0] if args else kwargs["hidden_states"]
            states = output if isinstance(output, Tensor) else output[0]
            states = torch.where(keep[..., None] | (mask == 0)[..., None], states, before)
            return states if isinstance(output, Tensor) else (states, *output[1:])

        return hook

    layers = base.base_model.layers
    hooks = []
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None) or layer.attention
        hooks.append(attention.register_forward_hook(attended))
        hooks.append(layer.register_forward_hook(after(index), with_kwargs=True))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _leave_out(
    keep: Tensor, importance: Tensor, prompt: list[int], later: list[int], sparsity: float
) -> None:
    """Set what the rule leaves out to False."""
    free = sorted(prompt[1:-1], key=lambda token: importance[token].item())
    stay = max(round((1 - sparsity) * len(prompt)), min(2, len(prompt)))
    gone = len(prompt) - stay
    for token in free[:gone]:
        keep[token] = False
    for token in later:
        keep[token] = sum(bool(importance[token] > importance[other]) for other in free) >= gone


def _look(
    importance: Tensor,
    attention: Tensor,
    keep: Tensor,
    prompt: list[int],
    later: list[int],
    queries: int,
) -> None:
    """Update the importance by the queries of tokens that ran."""
    window = [token for token in prompt if keep[token]][-queries:]
    for token in prompt:
        seen = [attention[query, token] for query in window if attention[query, token] > 0]
        if seen:
            importance[token] = torch.stack(seen).mean()
    for token in later:
        if keep[token]:
            importance[token] = attention[token, token]
