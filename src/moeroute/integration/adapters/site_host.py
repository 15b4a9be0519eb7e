"""The one PEFT layer of moeroute: a frozen base and, by adapter name, what a method built."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeroute.integration.adapters.hosting import (
    SITE_PREFIX,
    active_module,
    add_module,
    check_one_active,
)
from moeroute.routing_pass import RoutingPass


class SiteHost(nn.Module, BaseTunerLayer):
    """Stands in a targeted module's place and lets the active adapter answer for it.

    A parameter of adapter NAME is called `<module>.moeroute_site.NAME.<parameter>`, which is what
    PEFT and transformers expect: one component bears the prefix and the adapter's name follows it.

    Args:
        base_layer: The frozen module that stood here.
        routing_pass: The wrapped model's pass, given to every routed layer added here.
    """

    adapter_layer_names = (SITE_PREFIX,)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, routing_pass: RoutingPass) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moeroute_site = nn.ModuleDict()
        self.routing_pass = routing_pass
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.kwargs: dict[str, Any] = {}

    def add(self, adapter_name: str, module: nn.Module) -> None:
        """Host `module` under an adapter's name."""
        add_module(self, adapter_name, module)
        exact = [
            (owner, key, value)
            for owner in module.modules()
            for key, value in owner.named_buffers(recurse=False)
        ]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for owner, key, value in exact:  # PEFT widens parameters again after this cast, not buffers
            setattr(owner, key, value.to(owner.get_buffer(key).device))

    def set_adapter(
        self,
        adapter_names: str | list[str],
        inference_mode: bool = False,  # noqa: FBT001
    ) -> None:
        """Make one adapter active; several at once are undefined for a mixture.

        Raises:
            ValueError: More than one of this site's adapters is named.
        """
        names = check_one_active(self, adapter_names)
        super().set_adapter(names, inference_mode=inference_mode)

    def active_module(self) -> nn.Module | None:
        """What answers here now; None if the base does."""
        return active_module(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Answer for the base module.

        Raises:
            TypeError: The caller passes more than one tensor; such a module cannot be hosted.
        """
        module = self.active_module()
        if module is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        if args or kwargs:
            raise TypeError(
                f"{type(self.base_layer).__name__} is called with {len(args) + 1} positional "
                "arguments and "
                f"keywords {sorted(kwargs)}; a mixture answers for modules of one tensor only. "
                "Leave this module out of target_modules"
            )
        return module(hidden_states, self.base_layer)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: FBT001
        adapter_names: list[str] | None = None,
    ) -> None:
        """Refuse: a mixture has no single weight matrix.

        Raises:
            ValueError: Always.
        """
        raise ValueError(MERGE_IS_UNDEFINED)

    def unmerge(self) -> None:
        """Do nothing: nothing was ever merged."""

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Read device and dtype off the first parameter: an MLP has no weight of its own."""
        for parameter in base_layer.parameters():
            return parameter.device, parameter.dtype if parameter.is_floating_point() else None
        return None, None


MERGE_IS_UNDEFINED = (
    "merging is undefined for a mixture whose weights depend on the token: no single matrix equals "
    "it. "
    "Keep the adapter (save_pretrained, PeftModel.from_pretrained), or drop it with "
    "moeroute.unwrap_model(model) to get the base model back"
)
