"""Models of small and big blocks whose routers choose all of them."""

from contextlib import contextmanager

import torch
from integration.depth.depth_models import tiny

import moeroute
from moeroute.depth import Width
from moeroute.integration.depth.force_widths import width_layers
from moeroute.layers.routed import routing_passes
from moeroute.methods import DuoLLM


def duo(family="llama", seed=5, scale=1.0, **fields):
    """A model in eval mode, with routers of wide weights and small blocks of some size."""
    settings = {"bypass": True, "small_intermediate_size": 6, **fields}
    model = moeroute.wrap_model(tiny(family), DuoLLM(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in width_layers(model):
            layer.router.score.weight.normal_(std=scale)
            for weight in layer.small.parameters():
                weight.normal_(std=0.3)
    return model


def records(model):
    """Those of the last pass, layer by layer."""
    return list(routing_passes(model)[0].records.values())


def widths_of(model, ids, mask):
    """(L, B, S) widths that routers choose in one call."""
    with torch.no_grad(), moeroute.track_routing(model):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    chosen = [record.routing.selected_experts.reshape(ids.shape) for record in records(model)]
    return torch.stack(chosen)


def blocks(model):
    """(big, small) of every layer."""
    hosts = [layer.mlp for layer in model.get_base_model().model.layers]
    return [(host.base_layer, host.active_module().small) for host in hosts]


@contextmanager
def rows(model):
    """Counts the rows that each block is run on: a list of [big, small] a layer."""
    counts = [[0, 0] for _ in blocks(model)]
    hooks = []
    for count, pair in zip(counts, blocks(model), strict=True):
        for place, block in enumerate(pair):

            def watch(_, args, *, count=count, place=place):
                count[place] += args[0][..., 0].numel()

            hooks.append(block.register_forward_pre_hook(watch))
    yield counts
    for hook in hooks:
        hook.remove()


def dense(model, widths):
    """A forward hook a layer that computes both blocks and takes one by (L, B, S) widths."""

    def answer(big, small, of):
        def hook(_, args, out):
            u, of_tokens = args[0], of[..., None]
            picked = torch.where(of_tokens == Width.SMALL, small(u), torch.zeros_like(u))
            return torch.where(of_tokens == Width.BIG, big(u), picked)

        return hook

    base = model.get_base_model().model.layers
    return [
        layer.mlp.register_forward_hook(answer(*pair, of))
        for layer, pair, of in zip(base, blocks(model), widths, strict=True)
    ]
