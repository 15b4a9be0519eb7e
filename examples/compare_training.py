"""How every arm of `compare_mixtures.py` is trained and measured: one plain loop for all."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from demo_model import warm_cosine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import moeroute
from moeroute.layers.averaged_bank import AveragedLoRABank
from moeroute.layers.routed import routing_passes
from moeroute.ops.gates import expert_table
from moeroute.types import RoutingRecord

COPIES = 2
"""Forwards per step of a router that learns by policy gradient."""


@dataclass(frozen=True)
class Domains:
    """Token rows (rows, tokens) of two domains, in the order of their task ids."""

    names: tuple[str, str]
    train: tuple[Tensor, Tensor]
    kept_back: tuple[Tensor, Tensor]
    heldout: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, path: Path) -> "Domains":
        """Read what `compare_mixtures.py` wrote."""
        return cls(**torch.load(path))


@dataclass(frozen=True)
class Recipe:
    """Steps, rows a step (half of each domain), the peak learning rate and the seed.

    Training tells the domain of each row where it is `labelled`.
    """

    steps: int
    batch_size: int
    rate: float
    seed: int
    labelled: bool = True


def batches(domains: Domains, recipe: Recipe, only: int | None = None) -> Iterator[dict]:
    """One batch a step, half of each domain or `only` one: ids, labels, the rows' domains."""
    order = torch.Generator().manual_seed(recipe.seed)
    tasks = (0, 1) if only is None else (only,)
    count = recipe.batch_size // len(tasks)
    for _ in range(recipe.steps):
        rows = [
            domains.train[task][torch.randint(len(domains.train[task]), (count,), generator=order)]
            for task in tasks
        ]
        ids = torch.cat(rows)
        batch = {"input_ids": ids, "labels": ids}
        if recipe.labelled:
            batch["task_ids"] = torch.tensor(tasks).repeat_interleave(count)
        yield batch


def loss_of(model: nn.Module, batch: dict, *, by_policy: bool) -> Tensor:
    """The training loss; a router that samples subsets needs more than one forward."""
    if by_policy:
        return moeroute.policy_gradient_loss(model, lambda: model(**batch).loss, copies=COPIES)
    return model(**batch).loss


def fit(
    model: nn.Module,
    domains: Domains,
    recipe: Recipe,
    *,
    by_policy: bool = False,
    only: int | None = None,
) -> None:
    """Train what is trainable: AdamW, one warm-up, one cosine, gradients clipped to 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return
    torch.manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine((step + 1) / recipe.steps)
    )
    model.train()
    for batch in batches(domains, recipe, only):
        loss_of(model, batch, by_policy=by_policy).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        moeroute.post_step(model)


@torch.no_grad()
def loss_on(model: nn.Module, rows: Tensor, task: int, batch_size: int = 8) -> float:
    """Mean nats per predicted token in eval mode; routers that know tasks are told this one."""
    model.eval()
    total = 0.0
    for ids in rows.split(batch_size):
        logits = model(input_ids=ids, task_ids=torch.full((len(ids),), task)).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


@dataclass
class Usage:
    """How many experts a mixture uses, from the weights of held-out tokens.

    A token uses (sum w)^2 / sum w^2 experts; a site in all uses exp(entropy of its mean weights).
    """

    per_token: list[float]
    in_all: list[float]

    def keep(self, record: RoutingRecord) -> None:
        """Add what one layer did in one forward."""
        routing = record.routing
        table = expert_table(
            routing.selected_experts, routing.routing_weights, routing.num_experts
        ).double()
        if isinstance(record.experts, AveragedLoRABank):
            table = table.unflatten(1, (record.experts.heads, -1)).mean(1)
        total = table.sum(1).clamp(min=1e-12)
        self.per_token.append((total**2 / (table**2).sum(1).clamp(min=1e-12)).mean().item())
        share = table.sum(0) / table.sum().clamp(min=1e-12)
        self.in_all.append(torch.special.entr(share).sum().exp().item())


def usage_of(model: nn.Module, rows: Tensor) -> tuple[float, float] | None:
    """Experts per token and experts in use, mean over sites; None without routed layers."""
    passes, usage = routing_passes(model), Usage([], [])
    if not passes:
        return None
    with ExitStack() as stack:
        for routing_pass in passes:
            stack.enter_context(routing_pass.listening(usage.keep))
        for task in (0, 1):
            loss_on(model, rows[task::2], task)
    count = len(usage.per_token)
    return sum(usage.per_token) / count, sum(usage.in_all) / count


def step_ratio(
    model: nn.Module,
    plain: nn.Module,
    domains: Domains,
    recipe: Recipe,
    *,
    by_policy: bool,
) -> float:
    """Seconds of one training step over those of plain LoRA: median of rounds in turns."""
    (batch,) = batches(domains, replace(recipe, steps=1))
    ratios = []
    for _ in range(3 + recipe.steps // 10):
        seconds = []
        for one, samples in ((model.train(), by_policy), (plain.train(), False)):
            start = time.perf_counter()
            loss_of(one, batch, by_policy=samples).backward()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return sorted(ratios)[len(ratios) // 2]
