"""Makes sure that a feed-forward block computes what its parts say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moeroute.layers.lora_ffn import feed_forward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeroute.types import Site

TOLERANCE = 0.02


def check_feed_forward(sites: Sequence[Site]) -> None:
    """Make sure that a block's own forward is what its parts say, once a class.

    Raises:
        ValueError: A class does something else, so that a fresh mixture would not equal the base.
    """
    seen: set[type[nn.Module]] = set()
    for site in sites:
        weight = next(site.module.parameters(), None)
        if type(site.module) in seen or weight is None or weight.device.type == "meta":
            continue
        seen.add(type(site.module))
        _check_no_dropout(site)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        probe = torch.linspace(-1, 1, 2 * site.in_features, device=weight.device, dtype=dtype)
        probe = probe.view(1, 2, site.in_features)
        was_training = site.module.training
        site.module.train()  # it drops nothing; in eval some quantised linears repack their weights
        with torch.no_grad():
            expected, ours = site.module(probe), feed_forward(site.module, site.parts, probe)
        site.module.train(was_training)
        if (
            not isinstance(expected, torch.Tensor)
            or (expected - ours).norm() > TOLERANCE * expected.norm()
        ):
            raise ValueError(
                f"{site.name}: {type(site.module).__name__} does not compute act(gate(x)) * up(x) "
                "and down; a mixture over it would not start from the base model. Leave it out of "
                "target_modules"
            )


def _check_no_dropout(site: Site) -> None:
    for name, module in site.module.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{site.name}.{name} drops out with p={module.p} in training, which a mixture over "
                "this block would skip; load the model with that dropout at 0"
            )
