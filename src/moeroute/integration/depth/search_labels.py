"""Searches, question by question, how often each layer should run: the labels of depth routers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeroute.integration.depth.answers import Question, exact_match
from moeroute.integration.depth.decoder_layers import layer_facts
from moeroute.integration.depth.force import force_depth
from moeroute.integration.depth.host import depth_hosts
from moeroute.ops.layer_paths import actions_of_path
from moeroute.search.layer_tree import SearchSettings, search_path

Score = Callable[[nn.Module, Question], float]
LOG, TENSORS, SUMMARY = "search.jsonl", "labels.safetensors", "search.json"


@dataclass(frozen=True, slots=True)
class DepthLabels:
    """What the search found.

    Attributes:
        labels: (N, L) int64, how often each layer runs; all 1 where nothing better was found.
        kept: (N,) bool, the questions that teach something: right where the plain model is wrong,
            or as right with fewer layers.
        rewards: (N,) float32 of the labels.
        plain_rewards: (N,) float32 of the plain model.
    """

    labels: Tensor
    kept: Tensor
    rewards: Tensor
    plain_rewards: Tensor

    @classmethod
    def load(cls, folder: str | Path) -> DepthLabels:
        """Read what `search_labels` has written.

        Raises:
            FileNotFoundError: The search has not ended.
        """
        path = Path(folder) / TENSORS
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the search has not ended. Call search_labels with the same "
                "arguments and folder again, it goes on where it stopped"
            )
        found = load_file(path)
        return cls(found["labels"], found["kept"].bool(), found["rewards"], found["plain_rewards"])


def search_labels(
    model: nn.Module,
    questions: Sequence[Question],
    folder: str | Path,
    *,
    score: Score = exact_match,
    settings: SearchSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> DepthLabels:
    """Search a path through the layers for every question; resumable, the same for the same seed.

    Args:
        model: A decoder of transformers; it is put into eval mode for the search and is unchanged
            after it.
        questions: What is asked.
        folder: Gets search.jsonl (a line a question, as soon as it is done), and at the end
            labels.safetensors and search.json. A search that was cut short goes on there.
        score: How right the model is under the actions that are tried; 1 is right by default.
        settings: How to search; for graded scores set `solved=None`.
        seed: Question i is searched with seed + i.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: There is no question; the model is no decoder, or a layer keeps a state that
            cannot be skipped; the budget cannot be met; the folder holds another search.

    Example:
        >>> found = search_labels(model, questions, "labels")
        >>> rows = [i for i, kept in enumerate(found.kept) if kept]
    """
    if not questions:
        raise ValueError("there are no questions, so nothing can be searched")
    settings = settings or SearchSettings()
    layers = len(layer_facts(model))
    settings.check(layers)
    about = {"layers": layers, "seed": seed, "score": _name(score), **asdict(settings)}
    log = _Log(Path(folder), {**about, "questions": len(questions), "first": _print(questions[0])})
    was_training = model.training
    model.eval()
    try:
        with force_depth(model, [2] * layers):  # each layer must be one that can change depth
            places = range(log.done, len(questions))
            title = "searching paths"
            for index in track(places, title, disable=not show_progress):
                log.add(_search(model, questions[index], layers, score, settings, seed + index))
    finally:
        model.train(was_training)
    return log.finish()


def _search(
    model: nn.Module,
    question: Question,
    layers: int,
    score: Score,
    settings: SearchSettings,
    seed: int,
) -> dict[str, Any]:
    """One line of the log."""
    hosts = [host for _, host in depth_hosts(model)]

    def reward(path: tuple[int, ...]) -> float:
        actions = actions_of_path(path, layers)
        for host in hosts:
            host.forced = (actions[host.facts.position],)
        return score(model, question)

    found = search_path(layers, reward, settings, seed=seed)
    path = found.path if found.path is not None else tuple(range(layers))
    return {
        "actions": actions_of_path(path, layers),
        "kept": found.is_useful,
        "reward": found.reward,
        "plain_reward": found.plain_reward,
        "simulations": found.simulations,
    }


class _Log:
    """The lines that are done, on disk."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.lines: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        if self.path.is_file():
            self._resume()
        else:
            self.path.write_text(json.dumps(about) + "\n")

    @property
    def done(self) -> int:
        """Questions that are done."""
        return len(self.lines)

    def _resume(self) -> None:
        whole = [
            line for line in self.path.read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]
        known = json.loads(whole[0]) if whole else self.about
        wanted = json.loads(json.dumps(self.about))
        if known != wanted:
            other = ", ".join(key for key in wanted if known.get(key) != wanted[key])
            raise ValueError(
                f"{self.path} holds a search that differs in {other}; give another folder, or "
                "delete this one to begin anew"
            )
        self.lines = [json.loads(line) for line in whole[1:]]
        self.path.write_text("".join(whole) or json.dumps(self.about) + "\n")  # half a line goes

    def add(self, line: dict[str, Any]) -> None:
        """Write one question's result."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self) -> DepthLabels:
        """Write the tensors and the summary."""
        kept = torch.tensor([line["kept"] for line in self.lines])
        found = DepthLabels(
            labels=torch.tensor([line["actions"] for line in self.lines]),
            kept=kept,
            rewards=torch.tensor([line["reward"] for line in self.lines], dtype=torch.float32),
            plain_rewards=torch.tensor(
                [line["plain_reward"] for line in self.lines], dtype=torch.float32
            ),
        )
        tensors = {**asdict(found), "kept": kept.to(torch.uint8)}
        save_file(tensors, self.folder / TENSORS)
        summary = {
            **self.about,
            "kept": int(kept.sum()),
            "mean_layers": found.labels.sum(1).float().mean().item(),
            "simulations": sum(line["simulations"] for line in self.lines),
        }
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        return found


def _name(score: Score) -> str:
    return getattr(score, "__name__", type(score).__name__)


def _print(question: Question) -> list[int]:
    return [*question.prompt, -1, *question.answer]
