"""How much each decoder layer changes its input: which layers can go, without any training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeroute.integration.depth.decoder_layers import decoder_layers, layer_facts


@torch.no_grad()
def block_influence(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """One minus the mean cosine between what goes into a layer and what comes out.

        BI_l = 1 - mean over real tokens of cos(h_{l-1}, h_l)

    Source: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, Men et
    al., 2024, arXiv 2403.03853, equation 1. The layers of least influence are the first to go:
    `force_depth(model, actions)` with 0 for them is its static pruning.

    Args:
        model: A decoder of transformers, in the mode in which it is to be measured.
        batches: Keywords of its forward, (B, S) tensors; at least one. `attention_mask` leaves
            padding out.

    Returns:
        (L,) float64 in [0, 2].

    Raises:
        ValueError: There is no batch, or the model has no decoder layers that can be found.
    """
    if not batches:
        raise ValueError("there are no batches, so no layer's influence can be measured")
    layers = [decoder_layers(model)[name] for name in layer_facts(model)]
    sums = torch.zeros(len(layers), dtype=torch.float64)
    tokens, real = 0, torch.ones(1, 1, dtype=torch.bool)

    def watch(place: int) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            cosines = torch.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[place] += (cosines * real.to(cosines.device)).sum().cpu()

        return after

    hooks = [
        layer.register_forward_hook(watch(place), with_kwargs=True)
        for place, layer in enumerate(layers)
    ]
    try:
        for batch in batches:
            ids = batch.get("input_ids", next(iter(batch.values())))
            real = batch.get("attention_mask", torch.ones(ids.shape[:2])).bool()
            tokens += int(real.sum())
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return 1.0 - sums / max(tokens, 1)
