"""Teach a checkpoint how deep to be: search labels, train Dr.LLM's routers, evaluate.

    python examples/train_depth_router.py CHECKPOINT --questions train.jsonl --heldout heldout.jsonl

Each line of a questions file is {"prompt": "...", "answer": "..."}. The search goes on where it
stopped; the routers are saved as a PEFT adapter; accuracy is that of greedy answers.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import warm_cosine
from demo_report import console, progress_bar
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeroute
from moeroute.depth import DepthLabels, Question, count_actions, exact_match, search_labels
from moeroute.methods import DrLLM

ACTIONS = 3


@dataclass(frozen=True)
class RouterRecipe:
    """How routers are trained; defaults of the paper but for the size of a batch and the epochs."""

    epochs: int = 25
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    bottleneck: int = 128
    seed: int = 0


def main() -> None:
    """Search, train, evaluate, save."""
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = read_questions(options.questions, tokenizer)
    heldout = read_questions(options.heldout, tokenizer)
    base = evaluate(model, heldout)
    found = search_labels(model, asked, options.out / "search", seed=options.seed)
    routed = train_routers(
        model, asked, found, RouterRecipe(epochs=options.epochs, seed=options.seed)
    )
    routed.save_pretrained(options.out / "adapter")
    accuracy, layers = evaluate(routed, heldout)
    console.print(
        f"{int(found.kept.sum())} of {len(asked)} questions taught something. Held out: accuracy "
        f"{base[0]:.3f} -> {accuracy:.3f}, layers {base[1]:.2f} -> {layers:.2f}; routers saved in "
        f"{options.out / 'adapter'}",
        highlight=False,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="a decoder: a folder or a hub id")
    add("--questions", type=Path, required=True, help="to search and train on, JSON lines")
    add("--heldout", type=Path, required=True, help="to evaluate on, JSON lines")
    add("--out", type=Path, default=Path("runs/depth"), help="where everything is written")
    add("--epochs", type=int, default=25)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def read_questions(path: Path, tokenizer: Any) -> list[Question]:
    """Questions of a JSON-lines file, as token ids without special tokens."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return [Question(prompt=ids(row["prompt"]), answer=ids(row["answer"])) for row in rows]


def train_routers(
    model: Any, questions: Sequence[Question], found: DepthLabels, recipe: RouterRecipe
) -> Any:
    """The model with routers that learned the labels of the questions that teach something."""
    kept = found.kept.nonzero().flatten()
    if not len(kept):
        raise SystemExit("the search kept no question: nothing can be learned from it")
    torch.manual_seed(recipe.seed)
    counts = count_actions(found.labels[kept], ACTIONS)
    routed = moeroute.wrap_model(model, DrLLM(class_counts=counts, bottleneck=recipe.bottleneck))
    trained = [parameter for parameter in routed.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * -(-len(kept) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine((step + 1) / steps)
    )
    routed.train()
    with progress_bar("routers", steps) as advance:
        for _ in range(recipe.epochs):
            for chosen in kept[torch.randperm(len(kept))].split(recipe.batch_size):
                batch = padded([questions[index] for index in chosen], model.device)
                loss = routed(**batch, depth_labels=found.labels[chosen].to(model.device)).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    return routed.eval()


def padded(questions: Sequence[Question], device: Any) -> dict[str, torch.Tensor]:
    """(B, S) prompts, padded on the left."""
    size = max(len(question.prompt) for question in questions)
    fill = [size - len(question.prompt) for question in questions]
    rows = [(0,) * missing + q.prompt for missing, q in zip(fill, questions, strict=True)]
    mask = torch.arange(size, device=device) >= torch.tensor(fill, device=device)[:, None]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": mask.long()}


def evaluate(model: Any, questions: Sequence[Question]) -> tuple[float, float]:
    """Share of right answers, and layers executed a token of the prompt."""
    right, layers = 0.0, 0.0
    plain = model.config.num_hidden_layers
    for question in questions:
        lengths = torch.tensor([len(question.prompt)], device=model.device)
        if not hasattr(model, "peft_config"):
            right, layers = right + exact_match(model, question), layers + plain
            continue
        with (
            moeroute.routing_inputs(model, prompt_lengths=lengths),
            moeroute.track_routing(model, coactivation=False) as stats,
        ):
            right += exact_match(model, question)
        layers += stats.layers_executed or 0.0
    return right / len(questions), layers / len(questions)


if __name__ == "__main__":
    main()
