"""A task whose questions are of graded depth, and a small decoder trained on it and on real text.

A question is a letter, some functions that map letters to letters, and "=": "cABA=" asks for
A(B(A(c))), read from the left. Each function is a fixed permutation that the model must learn; each
one more is one step more to compute.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import warm_cosine
from demo_report import progress_bar
from demo_text import standard_library_texts
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from moeroute.depth import Question

LETTERS, FUNCTIONS = "abcdefgh", "ABCD"
TEXT_EVERY = 4
"""One step of so many is on real text."""


@dataclass(frozen=True)
class TaskSettings:
    """Sizes of the task and of the decoder; lengths in tokens, batches in rows."""

    most_functions: int = 7
    hidden_size: int = 96
    num_layers: int = 8
    steps: int = 1500
    batch_size: int = 128
    text_length: int = 64
    learning_rate: float = 1.5e-3
    seed: int = 0


class Task:
    """Questions of one seed: the functions, and which questions are held out."""

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        chance = random.Random(settings.seed)
        self.tables = {
            name: dict(zip(LETTERS, chance.sample(LETTERS, len(LETTERS)), strict=True))
            for name in FUNCTIONS
        }
        self.tokenizer = ByT5Tokenizer()

    def draw(self, chance: random.Random, count: int, level: int | None = None) -> list[str]:
        """Some questions of one level (number of functions), or of all."""
        found = []
        for _ in range(count):
            size = level or chance.randint(1, self.settings.most_functions)
            names = "".join(chance.choice(FUNCTIONS) for _ in range(size))
            found.append(f"{chance.choice(LETTERS)}{names}=")
        return found

    def answer(self, question: str) -> str:
        """Apply the functions from the left."""
        letter = question[0]
        for name in question[1:-1]:
            letter = self.tables[name][letter]
        return letter

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of bytes."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def questions(self, texts: list[str]) -> list[Question]:
        """Questions with their answers."""
        return [
            Question(prompt=self.encode(text), answer=self.encode(self.answer(text)))
            for text in texts
        ]

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        """Ids and mask padded on the left, and the (B,) ids of the answers."""
        rows = [self.encode(text) for text in texts]
        size = max(map(len, rows))
        ids = torch.tensor([(0,) * (size - len(row)) + row for row in rows])
        answers = torch.tensor([self.encode(self.answer(text))[0] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "answers": answers}


def text_rows(task: Task) -> tuple[Tensor, Tensor]:
    """Rows of real prose, to train on and held out: (rows, tokens)."""
    prose, _ = standard_library_texts(every=16)
    size = task.settings.text_length

    def rows(texts: Any, most: int) -> Tensor:
        ids = [token for text in texts for token in task.encode(text)][: most * size]
        return torch.tensor(ids[: len(ids) // size * size]).reshape(-1, size)

    return rows(prose.train, 4000), rows(prose.heldout, 64)


def make_decoder(task: Task, out: Path) -> Path:
    """Train the decoder, save it with its tokenizer; where it is."""
    settings = task.settings
    torch.manual_seed(settings.seed)
    chance = random.Random(settings.seed + 1)
    size = settings.hidden_size
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(task.tokenizer),
            hidden_size=size,
            intermediate_size=8 * size // 3,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=max(size // 24, 1),
            pad_token_id=0,
        )
    )
    text, _ = text_rows(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine((step + 1) / settings.steps)
    )
    start = time.perf_counter()
    with progress_bar("decoder", settings.steps) as advance:
        for step in range(settings.steps):
            if step % TEXT_EVERY == TEXT_EVERY - 1:
                rows = text[torch.randint(len(text), (settings.batch_size // 8,))]
                loss = model(input_ids=rows, labels=rows).loss
            else:
                batch = task.batch(task.draw(chance, settings.batch_size))
                answers = batch.pop("answers")
                loss = cross_entropy(model(**batch).logits[:, -1], answers)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    model.eval().save_pretrained(out)
    task.tokenizer.save_pretrained(out)
    return out
