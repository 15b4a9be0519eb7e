"""Hooks on a model's root: they open and close the pass, and bring its losses into output.loss.

Ours stands in for transformers' own balance loss. With `output_router_logits` a model adds
`router_aux_loss_coef` times its balance loss to the loss; in training that term is taken out again
where every gate's method charges a balance loss of its own, which knows the true ids and the
padding. `output.aux_loss` still reports theirs. In evaluation, and where a method has no balance
loss (its coefficient is 0, or balance comes from a bias), theirs stays.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.first_pass import KeepFirstCache, RunFirstPass
from moeroute.integration.depth.exits import OpenExits
from moeroute.integration.gates import HOST_NAME
from moeroute.layers.routed import losses_lost_their_graph
from moeroute.losses.balance import BalanceLoss
from moeroute.losses.distil import DistilLoss
from moeroute.losses.early_exit import own_share
from moeroute.losses.forecast import ForecastLoss
from moeroute.losses.global_balance import GlobalBalanceLoss
from moeroute.losses.sequence_balance import SequenceBalanceLoss
from moeroute.losses.total import total_loss
from moeroute.routing_pass import RoutingPass, SampleInputs
from moeroute.types import RoutingRecord

BALANCES = (BalanceLoss, GlobalBalanceLoss, SequenceBalanceLoss)
TEACHING = (DistilLoss, ForecastLoss)
"""Losses that need no labels: of parts that learn what others answer."""
IGNORE_INDEX = -100


class OpenPass:
    """Forward pre-hook of the root."""

    def __init__(self, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass

    def __call__(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open the pass with what this call says, and keep from the root what is not for it."""
        kwargs = dict(kwargs)
        samples = take_samples(kwargs)
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = token_ids if token_ids is not None else kwargs.get("inputs_embeds")
        mask = token_mask(kwargs.get("attention_mask"), tokens)
        self.routing_pass.begin(
            token_ids=token_ids if isinstance(token_ids, Tensor) else None,
            token_mask=mask,
            batch_shape=(tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None,
            samples=samples,
            unsupervised=tokens_before_labels(kwargs.get("labels"), mask),
            cache=kwargs.get("past_key_values"),
            remembers=not root.training,
        )
        if self.routing_pass.samples.depth_labels is not None and not root.training:
            warnings.warn(
                "depth_labels are executed and learned in training alone, but the model is in eval "
                "mode: call model.train(), or use moeroute.force_depth to execute them",
                stacklevel=2,
            )
        return args, kwargs


class ClosePass:
    """Forward hook of the root."""

    def __init__(self, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass

    def __call__(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Close the pass; in training, add the weighted auxiliary losses to the loss.

        Raises:
            RuntimeError: The losses have no graph, so that routers would silently not learn from
                them.
        """
        self.routing_pass.end(cache=getattr(output, "past_key_values", None))
        if not (root.training and torch.is_grad_enabled()):
            return None
        records = tuple(record for record in self.routing_pass.records.values() if record.losses)
        if not records:
            return None
        if losses_lost_their_graph(records):
            raise RuntimeError(
                f"the auxiliary losses of {len(records)} routed layers (first: {records[0].site}) "
                "have no gradient: reentrant activation checkpointing runs the layers without a "
                'graph. Use gradient_checkpointing_kwargs={"use_reentrant": False}, or set the '
                "loss weights to 0"
            )
        loss = read_loss(output)
        if loss is None:
            return self._alone(output) if self._is_all_there_is(records) else None
        total = total_loss(self.routing_pass.read()).total
        loss = own_share(records) * (loss - own_balance_term(root, output, records))
        return write_loss(output, loss + (total * loss_share(kwargs)).to(loss))

    def _is_all_there_is(self, records: tuple[RoutingRecord, ...]) -> bool:
        """True if nothing is learnt but depth labels, or what parts of the model answer."""
        if self.routing_pass.samples.depth_labels is not None:
            return True
        return all(isinstance(loss, TEACHING) for record in records for loss in record.losses)

    def _alone(self, output: Any) -> Any:
        """The output with the auxiliary losses for its loss; a tuple has had none in front."""
        total = total_loss(self.routing_pass.read()).total
        return (total, *output) if isinstance(output, tuple) else write_loss(output, total)


def own_balance_term(
    root: nn.Module, output: Any, records: tuple[RoutingRecord, ...]
) -> Tensor | float:
    """What transformers has added to the loss for the balance of gates whose methods charge it.

    Args:
        root: The transformers model.
        output: What it returned, with `loss`.
        records: Those of this forward that have losses.

    Warns:
        UserWarning: Only some of the gates have a balance loss of their own: both are charged.
    """
    aux_loss, logits = read_balance(output)
    coefficient = router_aux_loss_coef(root)
    if not isinstance(aux_loss, Tensor) or not coefficient:
        return 0.0
    balanced = {
        record.site
        for record in records
        if HOST_NAME in root.get_submodule(record.site)._modules
        and any(isinstance(loss, BALANCES) for loss in record.losses)
    }
    if not balanced:
        return 0.0
    if logits is not None and len(balanced) < len(logits):
        warnings.warn(
            f"{len(balanced)} of {len(logits)} gates have a balance loss of their own, and the "
            "model charges one over all of them as well: those count twice. Set "
            "output_router_logits=False, or router_aux_loss_coef=0 in the model or the method",
            stacklevel=2,
        )
        return 0.0
    return coefficient * aux_loss


def router_aux_loss_coef(root: nn.Module) -> float:
    """The weight that a transformers model gives its own balance loss; 0 if it has none."""
    own = getattr(root, "router_aux_loss_coef", None)
    config = getattr(root, "config", None)
    text = getattr(config, "text_config", config)
    return own if own is not None else getattr(text, "router_aux_loss_coef", None) or 0.0


def connect(root: nn.Module) -> RoutingPass:
    """Put both hooks on the root, once, and return its pass."""
    for hook in root._forward_pre_hooks.values():
        if isinstance(hook, OpenPass):
            return hook.routing_pass
    routing_pass = RoutingPass(rooted=True)
    root.register_forward_pre_hook(OpenPass(routing_pass), with_kwargs=True)
    root.register_forward_hook(ClosePass(routing_pass), with_kwargs=True)
    return routing_pass


def disconnect(root: nn.Module) -> None:
    """Take both hooks off again, and those of a first pass and of exits."""
    ours = (OpenPass, ClosePass, RunFirstPass, KeepFirstCache, OpenExits)
    for hooks, with_kwargs in (
        (root._forward_pre_hooks, root._forward_pre_hooks_with_kwargs),
        (root._forward_hooks, root._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, ours)]:
            del hooks[key]
            with_kwargs.pop(key, None)


SAMPLE_NAMES = {
    "task_ids": "task_ids",
    "sample_embeddings": "embeddings",
    "prompt_lengths": "prompt_lengths",
    "depth_labels": "depth_labels",
}
"""Keyword of a call -> field of `SampleInputs`."""


def take_samples(kwargs: dict[str, Any]) -> SampleInputs | None:
    """Take what a call says of its samples out of its keywords; None if it says nothing."""
    taken = {field: kwargs.pop(name, None) for name, field in SAMPLE_NAMES.items()}
    if all(value is None for value in taken.values()):
        return None
    return SampleInputs(**taken)


def tokens_before_labels(labels: Any, mask: Tensor | None) -> Tensor | None:
    """(B,) real tokens before the first label of each sequence, all of them where it is the first.

    What is to be predicted is no part of a prompt; a text that is all label is read whole.
    """
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    real = torch.ones_like(labels) if mask is None else mask.to(labels.dtype)
    before = ((labels != IGNORE_INDEX).cumsum(1) == 0) & (real != 0)
    lengths = before.sum(1)
    return torch.where(lengths == 0, real.sum(1), lengths)


def token_mask(attention_mask: Any, tokens: Tensor | None) -> Tensor | None:
    """(B, S) bool mask of this call's tokens; a longer one (with a cache) is cut to its end."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or tokens is None:
        return None
    return attention_mask[:, -tokens.shape[1] :].to(torch.bool)


def loss_share(kwargs: dict[str, Any]) -> Tensor | float:
    """This call's share of the step's tokens: local label tokens / num_items_in_batch.

    Trainer sums the losses of a step's accumulation calls without dividing, because each is already
    a sum over `num_items_in_batch`; an auxiliary loss that is a mean over the call would count once
    a call.
    """
    num_items = kwargs.get("num_items_in_batch")
    if num_items is None:
        return 1.0
    shifted = kwargs.get("shift_labels")
    labels = shifted if shifted is not None else kwargs["labels"][..., 1:]
    counted = (labels != IGNORE_INDEX).sum()
    if isinstance(num_items, Tensor):
        return counted / num_items.to(counted.device).clamp(min=1)
    return counted / max(num_items, 1)


def read_loss(output: Any) -> Tensor | None:
    """The loss of a ModelOutput, a dict or a tuple; None if there is none."""
    if isinstance(output, dict):
        return output.get("loss")
    if isinstance(output, tuple):
        first = output[0] if output else None
        return first if isinstance(first, Tensor) and first.ndim == 0 else None
    return getattr(output, "loss", None)


def read_balance(output: Any) -> tuple[Tensor | None, Any]:
    """(aux_loss, router_logits) of a ModelOutput, a dict or a tuple of one, in its order."""
    if isinstance(output, dict):
        return output.get("aux_loss"), output.get("router_logits")
    if not isinstance(output, tuple) or len(output) < 3 or not isinstance(output[1], Tensor):
        return None, None
    return (output[1], output[-1]) if output[1].ndim == 0 else (None, None)


def write_loss(output: Any, loss: Tensor) -> Any:
    """The output with another loss."""
    if isinstance(output, dict):
        output["loss"] = loss
        return output
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output
