"""`transfer_skills`: the skills of tasks that were trained, for a task that was not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moeroute.integration.adapters.peft_method import MoeRouteConfig
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.methods.registry import list_methods, method_field_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

SKILLED = {"num_tasks", "task_names", "freeze_skills"}


def transfer_skills(
    model: PeftModel,
    num_tasks: int = 1,
    *,
    task_names: Sequence[str] = (),
    freeze_skills: bool = True,
    adapter_name: str = "few_shot",
) -> PeftModel:
    """Add an adapter with the active one's skills and a fresh table for new tasks, and activate it.

    Few-shot transfer of Poly and MHR: with `freeze_skills` the table alone learns (MHR-z), without
    it all does. MHR-mu, the third way, is a plain LoRA that starts as the mean of the skills:
    `moeroute.merge(model, "uniform").put_on(base)`.

    Source: Multi-Head Adapter Routing for Cross-Task Generalization, Caccia et al., 2022, arXiv
    2211.03831.

    Args:
        model: A wrapped model whose active adapter is Poly's or MHR's; that adapter stays as it is.
        num_tasks: How many new tasks there are; their ids start at 0.
        task_names: Their names, in place of their number.
        freeze_skills: Whether the skills stay as they are.
        adapter_name: The new adapter's name.

    Returns:
        The model. The new adapter trains, saves and loads like any other.

    Raises:
        ValueError: The active adapter's method has no skills of tasks, or the name is taken.
    """
    source = model.active_adapters[0]
    config = model.peft_config[source]
    if not isinstance(config, MoeRouteConfig) or not _has_skills(config.method):
        able = ", ".join(name for name in list_methods() if _has_skills(name))
        raise ValueError(
            f"the active adapter {source!r} has no skills that tasks share; transfer_skills takes "
            f"adapters of {able}"
        )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model has an adapter {adapter_name!r}; pass another adapter_name to add one"
        )
    fields: dict[str, Any] = {
        "num_tasks": num_tasks,
        "task_names": tuple(task_names),
        "freeze_skills": freeze_skills,
    }
    method = replace(config.build_method(), **fields)  # type: ignore[type-var]
    new = replace(config, method=method, inference_mode=False)
    model.add_adapter(adapter_name, new)
    for host in model.modules():
        if isinstance(host, SiteHost) and source in host.moeroute_site:
            _copy_bank(host, source, adapter_name)
    model.set_adapter(adapter_name)
    return model


def _has_skills(method: str) -> bool:
    return set(method_field_names(method)) >= SKILLED


@torch.no_grad()
def _copy_bank(host: SiteHost, source: str, target: str) -> None:
    old = host.moeroute_site[source].get_submodule("bank").state_dict()
    host.moeroute_site[target].get_submodule("bank").load_state_dict(old)
