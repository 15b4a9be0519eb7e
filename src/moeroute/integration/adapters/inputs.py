"""How a caller's words about each sample reach the routers: task ids, embeddings."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.root_hooks import take_samples
from moeroute.layers.routed import routing_passes
from moeroute.routing_pass import SampleInputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import PeftModel


@contextmanager
def routing_inputs(
    model: nn.Module,
    *,
    task_ids: Tensor | None = None,
    sample_embeddings: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    depth_labels: Tensor | None = None,
) -> Iterator[None]:
    """Tell routers about the samples of every call inside the block.

    For `generate`, and wherever the batch cannot carry them; else give them to the model's forward
    by name: `model(input_ids=..., task_ids=...)`. Beams repeat each sample's row. With activation
    checkpointing run `backward` before the next forward.

    Args:
        model: A wrapped model.
        task_ids: (B,) integers, for methods that route by task.
        sample_embeddings: (B, D), for methods that route by what the sample is about.
        prompt_lengths: (B,) integers, the real tokens of each sequence that a decision about its
            depth may look at; without them everything before the labels, or all there is.
        depth_labels: (B, L) integers, how often each decoder layer is to run, for training.

    Raises:
        ValueError: The model holds no routed layer, or a tensor has another rank.
    """
    for name, value, ndim in (
        ("task_ids", task_ids, 1),
        ("sample_embeddings", sample_embeddings, 2),
        ("prompt_lengths", prompt_lengths, 1),
        ("depth_labels", depth_labels, 2),
    ):
        if value is not None and value.ndim != ndim:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; give one row a sample, {ndim}-D"
            )
    passes = routing_passes(model)
    if not passes:
        raise ValueError(
            f"{type(model).__name__} holds no routed layer; wrap it with moeroute.wrap_model first"
        )
    samples = SampleInputs(
        task_ids=task_ids,
        embeddings=sample_embeddings,
        prompt_lengths=prompt_lengths,
        depth_labels=depth_labels,
    )
    with ExitStack() as stack:
        for routing_pass in passes:
            stack.enter_context(routing_pass.standing(samples))
        yield


class TakeSamples:
    """Forward pre-hook of a PeftModel, which drops such keywords on the way to its base model."""

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Announce to the base model's pass what PEFT would not hand on."""
        kwargs = dict(kwargs)
        samples = take_samples(kwargs)
        if samples is not None:
            for routing_pass in routing_passes(model):
                routing_pass.announce(samples)
        return args, kwargs


def accept_routing_inputs(model: PeftModel) -> PeftModel:
    """Let a PeftModel's forward take `task_ids` and `sample_embeddings`; twice does no harm.

    `wrap_model` does this; a model that `PeftModel.from_pretrained` made needs it where PEFT has a
    class for the task (task_type="CAUSAL_LM"), which drops both.

    Args:
        model: A PeftModel that holds a moeroute adapter.
    """
    if not any(isinstance(hook, TakeSamples) for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(TakeSamples(), with_kwargs=True)
    return model


def expert_ids(model: PeftModel, names: Sequence[str], *, adapter_name: str = "default") -> Tensor:
    """The task ids of samples that belong to adapters, by the names that `mix_adapters` was given.

    Args:
        model: What `mix_adapters` returned, or what PEFT loaded of it.
        names: One adapter's name a sample.
        adapter_name: The mixture's name.

    Returns:
        (B,) int64.

    Raises:
        ValueError: The mixture has no adapter of such a name, or is none of existing adapters.
    """
    method = model.peft_config[adapter_name].build_method()  # pyright: ignore[reportAttributeAccessIssue]
    known = [expert.name for expert in getattr(method, "experts", ())]
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(
            f"{type(method).__name__} mixes {known or 'no adapters that exist'}, so no sample "
            f"belongs to {strange[0]!r}"
        )
    return torch.tensor([known.index(name) for name in names], dtype=torch.int64)
