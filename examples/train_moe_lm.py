"""Train a small MoE language model on real text, with any router and any loss by name.

    python examples/train_moe_lm.py --router switch
    python examples/train_moe_lm.py --router rmoe --fields '{"top_k": 2}' --loss ZLoss=0.001
    python examples/train_moe_lm.py --router dense

The text is the demo's: prose and Python source of the running Python. Routing is watched while it
trains; at the end the checkpoint is saved, loaded again and looked at on held-out text. Defaults
take minutes on a CPU; --hidden-size, --layers, --steps and --batch-size make it as large as a GPU
holds.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from demo_model import BaseSettings, heldout_loss, pack, train_tokenizer, warm_cosine
from demo_report import console, progress_bar
from demo_text import standard_library_texts
from moe_lm import PLAIN, MoELM, MoELMConfig, method_of
from torch import Tensor

import moeroute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained and how; sizes in features, lengths in tokens, batches in rows.

    Attributes:
        model: Settings of `MoELMConfig`.
        steps: Optimizer steps.
        batch_size: Rows a step.
        learning_rate: The peak.
        seed: Of weights and order.
        log_every: Steps between two looks at the routing; 0 for none.
    """

    model: dict[str, Any]
    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 2e-3
    seed: int = 0
    log_every: int = 0


@dataclass
class Outcome:
    """What one run ends with: nats per held-out token, and its routing."""

    loss: float = math.nan
    parameters: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    routing: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Of the held-out text."""
        return math.exp(self.loss)


def main() -> None:
    """Train one model and say what came out."""
    options = parse()
    rows = text_rows(options.out, quick=options.quick)
    recipe = recipe_of(options, int(rows["vocabulary"]))
    model, outcome = train(recipe, rows["train"], rows["heldout"])
    folder = options.out / options.router
    model.save_pretrained(folder)
    again = MoELM.from_pretrained(folder).to(DEVICE)
    reloaded = heldout_loss(again, rows["heldout"])
    console.print(
        f"perplexity {outcome.perplexity:.2f}, {outcome.parameters:,} parameters, "
        f"{outcome.seconds:.0f} s; saved in {folder}, loaded again: loss {reloaded:.4f} "
        f"(before {outcome.loss:.4f})",
        highlight=False,
    )
    if options.router != PLAIN:
        with moeroute.track_routing(again, coupling=True) as stats:
            heldout_loss(again, rows["heldout"])
        print(stats.summary())
        if stats.layers:
            stats.plot(folder / "routing.png")


def parse() -> argparse.Namespace:
    """Options; `--quick` is for seeing that it runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--router", default="switch", help='a registered method, or "dense" (%(default)s)')
    add("--fields", type=json.loads, default={}, help="the method's fields, as JSON")
    add("--loss", action="append", default=[], metavar="NAME=WEIGHT", help="of moeroute.losses")
    add("--hidden-size", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=8, help="experts a layer (%(default)s)")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/moe_lm"), help="where everything is written")
    add("--quick", action="store_true", help="a few steps of a tiny model")
    options = parser.parse_args()
    if options.quick:
        options.hidden_size, options.layers, options.experts, options.steps = 32, 2, 4, 4
    options.losses = dict(read_loss(parser, text) for text in options.loss)
    try:
        slots(options.router, options.fields)
    except (TypeError, ValueError) as error:
        parser.error(f"--router {options.router}: {error}")
    return options


def read_loss(parser: argparse.ArgumentParser, text: str) -> tuple[str, float]:
    """`ZLoss=0.001` as a name and a weight; ends the program if there is no such loss."""
    name, _, weight = text.partition("=")
    known = [each for each in dir(moeroute.losses) if each.endswith("Loss")]
    if name not in known:
        parser.error(f"no loss {name!r}; use NAME=WEIGHT with one of {', '.join(known)}")
    try:
        return name, float(weight)
    except ValueError:
        parser.error(f"--loss {text}: give a weight, as in {name}=0.01")


def recipe_of(options: argparse.Namespace, vocabulary: int) -> Recipe:
    """The recipe that the options ask for."""
    model = model_settings(options.hidden_size, options.layers, options.experts, vocabulary)
    model |= {"router": options.router, "router_fields": options.fields, "losses": options.losses}
    model["experts_per_token"] = slots(options.router, options.fields)
    return Recipe(
        model=model,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        log_every=max(options.steps // 5, 1),
    )


def slots(router: str, fields: dict[str, Any]) -> int:
    """The experts that a token passes; 2 for methods whose number is not fixed."""
    if router == PLAIN:
        return 1
    method: Any = method_of(router, fields)
    return (method.top_k if "top_k" in vars(method) else None) or 2


def model_settings(hidden_size: int, layers: int, experts: int, vocabulary: int) -> dict[str, Any]:
    """Sizes of a model whose tokens pass experts twice as wide as the model, together."""
    heads = max(hidden_size // 32, 1)
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": experts,
        "active_size": 2 * hidden_size,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": hidden_size**-0.5,
    }


def text_rows(folder: Path, *, quick: bool) -> dict[str, Tensor]:
    """Both kinds of text as token rows (rows, tokens), kept for the next run."""
    kept = folder / ("rows-quick.pt" if quick else "rows.pt")
    if kept.is_file():
        return torch.load(kept)
    folder.mkdir(parents=True, exist_ok=True)
    prose, code = standard_library_texts(every=8 if quick else 1)
    settings = BaseSettings(vocab_size=384 if quick else 2048)
    texts = [*prose.train, *code.train]
    tokenizer = train_tokenizer(iter(texts), settings)
    heldout = [pack(tokenizer, split.heldout, settings.sequence_length) for split in (prose, code)]
    rows = {
        "train": pack(tokenizer, texts, settings.sequence_length),
        "heldout": torch.cat([part[: 4 if quick else 64] for part in heldout]),
        "vocabulary": torch.tensor(len(tokenizer)),
    }
    torch.save(rows, kept)
    return rows


def train(recipe: Recipe, rows: Tensor, heldout: Tensor) -> tuple[MoELM, Outcome]:
    """One run: AdamW, one warm-up, one cosine, rows in a seeded random order."""
    torch.manual_seed(recipe.seed)
    model = MoELM(MoELMConfig(**recipe.model)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine((step + 1) / recipe.steps)
    )
    order = torch.Generator().manual_seed(recipe.seed)
    outcome = Outcome(parameters=sum(parameter.numel() for parameter in model.parameters()))
    start = time.perf_counter()
    model.train()
    with progress_bar(recipe.model["router"], recipe.steps) as advance:
        for step in range(recipe.steps):
            chosen = torch.randint(len(rows), (recipe.batch_size,), generator=order)
            batch = rows[chosen].to(DEVICE)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            moeroute.post_step(model)
            advance(f"loss {loss.item():.3f}")
            if recipe.log_every and (step + 1) % recipe.log_every == 0:
                note(model, step + 1, loss.item(), batch)
    outcome.seconds = time.perf_counter() - start
    outcome.loss = heldout_loss(model, heldout)
    if recipe.model["router"] != PLAIN:
        outcome.parts = {
            name: part.item() for name, part in moeroute.aux_losses(model).parts.items()
        }
        outcome.routing = routing_of(model, heldout)
    return model, outcome


def note(model: MoELM, step: int, loss: float, batch: Tensor) -> None:
    """Print how the model routes now."""
    figures = {} if model.config.router == PLAIN else routing_of(model, batch)
    told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    console.print(f"step {step}: perplexity {math.exp(loss):.1f}  {told}", highlight=False)


def routing_of(model: MoELM, rows: Tensor) -> dict[str, float]:
    """Means over layers of what `track_routing` measures on rows of tokens."""
    with moeroute.track_routing(model, coupling=True) as stats:
        heldout_loss(model, rows)
    layers = stats.layers
    if not layers:  # every token mixes into every slot: nothing is chosen
        return {}
    figures = {
        "experts a token": fmean(layer.slots_per_token for layer in layers),
        "load cv": fmean(layer.cv for layer in layers),
        "dead": float(sum(len(layer.dead_experts) for layer in layers)),
    }
    gauges = [layer.gauge for layer in layers if layer.gauge]
    if gauges:
        figures["epsilon"] = fmean(gauge.epsilon for gauge in gauges)
        figures["coupling"] = fmean(gauge.loss for gauge in gauges)
    return figures


if __name__ == "__main__":
    main()
