"""How the contract suite builds each method small, and which of its tests cannot apply to it.

A new method is a row here only if it is an exception: others are built from `SMALL`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import Trainer

import moeroute
import moeroute.depth
from moeroute.methods.existing import LoRAExpert

ADDED: Mapping[str, Any] = MappingProxyType({"num_experts": 4, "intermediate_size": 6})
ADAPTERS = tuple(
    name
    for name in moeroute.list_methods()
    if moeroute.get_method(name).site_kind not in ("gate", "decoder_layer")
)
"""The methods that add something to a dense model; those at gates and layers have other suites."""
SMALL: Mapping[str, Any] = MappingProxyType({"r": 3, "num_experts": 4})
NUM_EXPERTS, RANK = 4, 3
NUM_TASKS = 5


def permute_experts(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A parameter of a mixture of stacked banks with its experts in another order."""
    if key.endswith("lora_a"):
        return parameter.unflatten(0, (NUM_EXPERTS, RANK))[order].flatten(0, 1)
    if key.endswith("lora_b"):
        return parameter.unflatten(1, (NUM_EXPERTS, RANK))[:, order].flatten(1)
    return parameter[order]


def permute_heads(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """As `permute_experts` for experts that share A."""
    return parameter if key.endswith("lora_a") else permute_experts(key, parameter, order)


def permute_above_threshold(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """As `permute_experts` beside a threshold that belongs to no expert."""
    return parameter if ".threshold." in key else permute_experts(key, parameter, order)


def loss_of_output(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the model says its loss is."""
    return model(**batch).loss


def permute_skills(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where a table holds a logit a task, head and expert."""
    if key.endswith("task_table.weight"):
        return parameter.unflatten(1, (-1, NUM_EXPERTS))[:, :, order].flatten(1)
    return permute_experts(key, parameter, order)


def permute_moelora(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where tasks have embeddings, which know no experts."""
    if key.endswith("task_table.weight"):
        return parameter
    return permute_experts(key, parameter, order)


def permute_head(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where a head gives each of several places a logit an expert."""
    if ".inner." in key:
        return parameter
    if ".out." in key:
        return parameter.unflatten(0, (-1, NUM_EXPERTS))[:, order].flatten(0, 1)
    return permute_experts(key, parameter, order)


def permute_kernels(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The experts of one kernel size in another order: those of another size are other experts."""
    if ".kernels." in key:
        return parameter.flip(0)
    if ".meta_" in key:
        return parameter
    order = torch.tensor([1, 0, 3, 2])
    return parameter[:, order] if key.endswith("task_embeddings") else parameter[order]


def permute_hashed(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where a table names experts."""
    if key.endswith("table"):
        return torch.argsort(order)[parameter]
    return permute_experts(key, parameter, order)


def permute_computing(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where other experts come after the four, and stay in their place."""
    if ".experts.experts." in key:
        return parameter[order]
    if key.endswith("score.weight"):
        return torch.cat([parameter[order], parameter[NUM_EXPERTS:]])
    return parameter


def permute_chunks(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where a selection steers a loss by numbers that are of no expert."""
    steers = "router.select." in key and ".select.select." not in key
    return parameter if steers else permute_experts(key, parameter, order)


def permute_slots(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where experts have slots, on the second axis."""
    if key.endswith("scale"):
        return parameter
    return parameter[:, order] if key.endswith("phi") else parameter[order]


def permute_mlp_gates(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The same where gates are networks: their inner units are no experts."""
    return parameter if key.endswith(".inner.weight") else permute_experts(key, parameter, order)


def seeded_loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a method that draws in training, with the same draw at every call."""
    torch.manual_seed(11)
    return model(**batch).loss


def loss_of_draws(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The policy gradient loss, of the same draws at every call."""
    torch.manual_seed(11)
    return moeroute.policy_gradient_loss(model, lambda: model(**batch).loss)


class DrawingTrainer(moeroute.PolicyGradientMixin, Trainer):
    """Trains routers that draw."""


@dataclass(frozen=True, kw_only=True)
class MethodCase:
    """One method in the suite.

    Attributes:
        fields: Of the small method.
        second: Fields that another small method of the kind has.
        embedding_dim: Width of the embeddings of samples that its routers need; 0 for none.
        prepare: What a fresh model needs before its routers can work.
        by_task: Whether its routers or losses need task_ids.
        num_tasks: How many task ids it knows.
        trains: Whether it has parameters.
        loss_of: (model, batch) to the loss that the method trains on, the same at every call.
        trainer: What makes a Trainer that trains all of the method.
        first_pass: How many numbers a first pass says of each token, if there is one.
        waits: Whether its experts are frozen and do nothing until adapters fill them.
        learning_rate: At which a few steps lower the loss.
        permute: (key, parameter, order) to the parameter with its experts in another order.
        exceptions: Name of a test of the suite -> why it cannot hold for this method.
    """

    fields: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    second: Mapping[str, Any] = field(default_factory=lambda: {"r": 2})
    by_task: bool = False
    embedding_dim: int = 0
    prepare: Callable[[torch.nn.Module], None] = lambda model: None
    num_tasks: int = NUM_TASKS
    trains: bool = True
    loss_of: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] = loss_of_output
    trainer: Callable[..., Trainer] = Trainer
    first_pass: int = 0
    waits: bool = False
    learning_rate: float = 0.01
    permute: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor] = permute_experts
    exceptions: Mapping[str, str] = field(default_factory=dict)


def give_instructions(model: torch.nn.Module) -> None:
    """Give the four experts of `EXISTING` an embedding each."""
    moeroute.layers.set_instruction_embeddings(
        model, {name: torch.eye(6)[row] for row, name in enumerate(EXPERT_NAMES)}
    )


def small_blocks_first(model: torch.nn.Module) -> None:
    """Bring a model of blocks of several widths to its first stage of training."""
    moeroute.depth.train_only(model, "small")


EXPERT_NAMES = ("math", "code", "law", "art")
LLAMA_SITES = tuple(
    f"model.layers.{layer}.{part}_proj"
    for layer in range(2)
    for part in (
        *(f"self_attn.{letter}" for letter in "qkvo"),
        *(f"mlp.{word}" for word in ("gate", "up", "down")),
    )
)
EXISTING: Mapping[str, Any] = MappingProxyType(
    {
        "sites": LLAMA_SITES,
        "experts": tuple(
            LoRAExpert(
                name=name,
                ranks=(RANK,) * len(LLAMA_SITES),
                scalings=(2.0,) * len(LLAMA_SITES),
            )
            for name in EXPERT_NAMES
        ),
    }
)
"""What `mix_adapters` fills in for four adapters of every linear of the suite's model."""

NEEDS_ADAPTERS = {
    "test_defaults_build_on_any_model_that_has_the_site": "it mixes adapters that exist",
}
NOTHING_TRAINS = "it trains nothing"
UNTRAINED = NEEDS_ADAPTERS | {
    test: NOTHING_TRAINS
    for test in (
        "test_base_is_frozen_and_everything_added_trains",
        "test_gradient_checkpointing_changes_no_gradient",
        "test_compiled_training_step_gives_the_same_gradients",
        "test_autocast_agrees_with_full_precision",
        "test_low_precision_base_keeps_its_adapter_in_float32",
        "test_trains_with_trainer_and_resumes_with_the_same_losses",
    )
}

CASES: Mapping[str, MethodCase] = MappingProxyType(
    {
        "adamole": MethodCase(permute=permute_above_threshold),
        "arrow": MethodCase(
            fields={"top_k": 2, **EXISTING},
            second={"top_k": 1},
            trains=False,
            exceptions=UNTRAINED,
        ),
        "glider": MethodCase(
            fields={"top_k": 2, "instruction_dim": 6, "gamma": 1.0, "beta": 2.0, **EXISTING},
            second={"top_k": 1, "gamma": 0.0, "beta": 0.0},
            by_task=True,
            embedding_dim=6,
            prepare=give_instructions,
            waits=True,
            exceptions=NEEDS_ADAPTERS,
        ),
        "blockffn": MethodCase(
            fields=ADDED,
            second={"num_experts": 2},
            permute=permute_chunks,
            trainer=partial(Trainer, callbacks=[moeroute.PostStepCallback()]),
        ),
        "expert_choice": MethodCase(
            fields=ADDED,
            second={"num_experts": 2},
            trainer=partial(Trainer, callbacks=[moeroute.PostStepCallback()]),
        ),
        "hash_layers": MethodCase(
            fields=ADDED | {"table_size": 50}, second={"num_experts": 2}, permute=permute_hashed
        ),
        "remix": MethodCase(loss_of=loss_of_draws, trainer=DrawingTrainer),
        "hydralora": MethodCase(permute=permute_heads),
        "loramoe": MethodCase(by_task=True, num_tasks=2),
        "smora": MethodCase(
            fields={"r": NUM_EXPERTS * RANK, "rank_partition": RANK, "top_k": 2 * RANK},
            second={"r": 2 * RANK},
            trainer=partial(Trainer, callbacks=[moeroute.PostStepCallback()]),
        ),
        "ept": MethodCase(
            fields={"num_tasks": NUM_TASKS, "r": RANK, "kernel_sizes": (3, 3, 4, 4)},
            by_task=True,
            permute=permute_kernels,
        ),
        "mhr": MethodCase(
            fields={"num_tasks": NUM_TASKS, "heads": 2, **SMALL},
            by_task=True,
            loss_of=seeded_loss,
            permute=permute_skills,
        ),
        "moelora": MethodCase(
            fields={"num_tasks": NUM_TASKS, "r": NUM_EXPERTS * RANK, "num_experts": NUM_EXPERTS},
            second={"r": 2 * NUM_EXPERTS},
            by_task=True,
            permute=permute_moelora,
        ),
        "poly": MethodCase(
            fields={"num_tasks": NUM_TASKS, **SMALL},
            by_task=True,
            loss_of=seeded_loss,
            permute=permute_skills,
        ),
        "duo_llm": MethodCase(
            fields={"small_intermediate_size": 8, "bypass": True},
            second={"small_intermediate_size": 4, "bypass": True},
            prepare=small_blocks_first,
            trainer=partial(Trainer, callbacks=[moeroute.PostStepCallback()]),
            exceptions={
                "test_permuting_experts_leaves_the_output_unchanged": "widths have their places",
                "test_compiles_without_graph_breaks": "it reads how many tokens take a block",
            },
        ),
        "null_experts": MethodCase(
            fields=ADDED | {"gating_residual": False, "top_k": 3},
            second={"num_experts": 3},
            permute=permute_computing,
        ),
        "soft_moe": MethodCase(
            fields=ADDED | {"slots_per_expert": 2},
            second={"slots_per_expert": 1},
            permute=permute_slots,
            exceptions={
                "test_generate_with_a_cache_equals_without": "its tokens see later ones",
            },
        ),
        "t2mir": MethodCase(
            fields=ADDED | {"contrast_loss_coef": 0.0},
            second={"num_experts": 2},
            loss_of=seeded_loss,
            permute=permute_mlp_gates,
            exceptions={
                "test_defaults_build_on_any_model_that_has_the_site": "its loss needs pairs",
            },
        ),
        "union_of_experts": MethodCase(
            fields={"num_experts": 4, "top_k": 4, "capacity": 1.0},
            second={"num_experts": 2, "top_k": 2},
            learning_rate=0.3,
            exceptions={
                "test_permuting_experts_leaves_the_output_unchanged": "slices have their places",
            },
        ),
        "phatgoose": MethodCase(
            fields={"top_k": 2, **EXISTING},
            second={"top_k": 1},
            by_task=True,
            waits=True,
            exceptions=NEEDS_ADAPTERS,
        ),
        "xlora": MethodCase(
            fields={"layerwise": True, "head_depth": 2, "head_width": 8, "head_dropout": 0.0}
            | EXISTING,
            second={"top_k": 1},
            first_pass=NUM_EXPERTS * len(LLAMA_SITES),
            waits=True,
            permute=permute_head,
            exceptions=NEEDS_ADAPTERS,
        ),
    }
)


def case_of(name: str) -> MethodCase:
    """The case of a registered method."""
    return CASES.get(name, MethodCase())


def skip_exceptions(name: str, test: str) -> None:
    """Skip a test that the method's paper rules out, with the reason."""
    reason = case_of(name).exceptions.get(test.partition("[")[0])
    if reason:
        pytest.skip(f"{name}: {reason}")


def small(name: str, **fields: Any) -> moeroute.types.Method:
    """A small method."""
    return moeroute.get_method(name)(**{**case_of(name).fields, **fields})


def with_tasks(name: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with what the method's routers need to know of its samples."""
    case, samples = case_of(name), batch["input_ids"].shape[0]
    known = {}
    if case.by_task:
        known["task_ids"] = torch.arange(samples) % case.num_tasks
    if case.embedding_dim:
        generator = torch.Generator().manual_seed(4)
        known["sample_embeddings"] = torch.randn(samples, case.embedding_dim, generator=generator)
    return {**batch, **known}
