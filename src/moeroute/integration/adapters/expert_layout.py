"""PEFT's LoRA on stacked experts as LoRA on the modules of each expert by itself.

PEFT keeps one pair for a whole stack: A (E * r, in) by expert, B (out, r * E) by rank; the pair of
the second stack stands at the experts, that of the first one `base_layer` deeper. On disk most
families name each expert's matrices instead, `mlp.experts.3.gate_proj` and so on, and so do servers
that load LoRA by those names.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from moeroute.integration.adapters.merged import MergedLoRA

GATE_UP, DOWN = "gate_up_proj", "down_proj"
ON_DISK = {"mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"}
INNER = ".base_layer"
A, B = ".lora_A.weight", ".lora_B.weight"


def per_expert_lora(
    config: LoraConfig, tensors: Mapping[str, Tensor], model_type: str
) -> MergedLoRA:
    """Take a LoRA on stacked experts apart, exactly.

    gate_proj and up_proj of an expert get the same A, and each its half of the rows of B. The names
    are those of checkpoint files of the Qwen2-MoE kind (Qwen3-MoE, OLMoE, DeepSeek, GLM4-MoE), by
    which vLLM looks for the LoRA of experts. The values have been compared with PEFT's number by
    number; the files have not been run in vLLM.

    Args:
        config: PEFT's config, with target_parameters.
        tensors: The adapter file.
        model_type: The base's, as transformers names it.

    Returns:
        The LoRA; it does not load on transformers' stacked experts.

    Raises:
        ValueError: The family names its experts otherwise, other parameters than the two stacks are
            adapted, or ranks differ by module.
    """
    _check(config, model_type)
    names = {target.rpartition(".")[2] for target in config.target_parameters or ()}
    found: dict[str, Tensor] = {}
    for key, lora_a in tensors.items():
        place, suffix, _ = key.partition(A)
        if not suffix:
            continue
        lora_b = tensors[place + B]
        if not place.removesuffix(INNER).endswith(".experts"):
            found[key], found[place + B] = lora_a, lora_b
            continue
        is_first = place.endswith(INNER) or names == {GATE_UP}
        found |= _split(place.removesuffix(INNER), lora_a, lora_b, config.r, is_first=is_first)
    modules = {key.removesuffix(A).rpartition(".")[2] for key in found if key.endswith(A)}
    return MergedLoRA(
        strategy="per expert",
        config=LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            target_modules=sorted(modules),
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            revision=config.revision,
        ),
        tensors=found,
        error=None,
    )


def _split(
    experts: str, lora_a: Tensor, lora_b: Tensor, rank: int, *, is_first: bool
) -> dict[str, Tensor]:
    """One stack's pair as pairs of each expert's modules."""
    by_expert = lora_a.unflatten(0, (-1, rank))  # (E, r, in)
    size = by_expert.shape[0]
    parts = lora_b.unflatten(1, (rank, size)).permute(2, 0, 1)  # (E, out, r)
    halves = (
        zip(("gate_proj", "up_proj"), parts.chunk(2, dim=1), strict=True)
        if is_first
        else [(DOWN, parts)]
    )
    found = {}
    for module, part in halves:
        for expert in range(size):
            place = f"{experts}.{expert}.{module}"
            found[place + A] = by_expert[expert].clone()
            found[place + B] = part[expert].contiguous()
    return found


def _check(config: LoraConfig, model_type: str) -> None:
    converters = get_checkpoint_conversion_mapping(model_type) or []
    if not any(set(getattr(c, "source_patterns", ())) == ON_DISK for c in converters):
        raise ValueError(
            f"{model_type} does not name its experts mlp.experts.0.gate_proj, ... on disk; the "
            "per-expert layout is known for that kind of checkpoint only. Merge the adapter "
            "(merge_and_unload) and serve the merged model"
        )
    others = [
        name
        for name in config.target_parameters or ()
        if not f".{name}".endswith((f".experts.{GATE_UP}", f".experts.{DOWN}"))
    ]
    if others:
        raise ValueError(
            f"target_parameters={others} have no per-expert layout, only experts.{GATE_UP} and "
            f"experts.{DOWN} have one"
        )
    if config.rank_pattern or config.alpha_pattern or config.modules_to_save:
        raise ValueError(
            "an adapter with rank_pattern, alpha_pattern or modules_to_save has no per-expert "
            "layout; train with one rank, or merge it (merge_and_unload)"
        )
