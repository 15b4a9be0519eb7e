"""The parts of the demo: the split, the rows, the kept checkpoint, the sentence."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    """Import a module that lies beside the demo script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_no_long_piece_is_on_both_sides(part) -> None:
    demo_text = part("demo_text")
    repeated, unique = "same " * 30, "only here " * 12
    held_out = next(n for n in map(str, range(99)) if demo_text.is_held_out(n))
    kept = next(n for n in map(str, range(99)) if not demo_text.is_held_out(n))
    split = demo_text.split_by_name([(held_out, [repeated, unique]), (kept, [repeated])], "\n")
    assert split.train == [repeated]
    assert split.heldout == [unique]


def test_the_split_goes_by_name(part) -> None:
    demo_text = part("demo_text")
    prose, code = demo_text.standard_library_texts()
    assert len("".join(prose.train)) > 1_000_000
    assert len("".join(code.train)) > 3_000_000
    assert not set(prose.train) & set(prose.heldout)
    assert not set(code.train) & set(code.heldout)
    assert 0.02 < len("".join(code.heldout)) / len("".join(code.train)) < 0.1
    assert not any('"""' in text and ">>>" in text for text in prose.train)


def test_code_comes_without_docstrings_and_comments(part, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""What it is.\n\nMore of it."""\ndef f():  # a comment\n    """Why."""\n')
    paragraphs, statements = part("demo_text").read_module(path)
    assert paragraphs == ["What it is.", "More of it.", "Why."]
    assert statements == ["def f():\n    pass"]


def test_own_files_are_held_out_by_their_last_tenth(part, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    split = part("demo_text").split_files([path])
    assert [len(split.train[0]), split.heldout] == [90, ["0123456789"]]


def test_rows_are_cut_after_an_end_token_each(part) -> None:
    demo_model = part("demo_model")
    settings = demo_model.BaseSettings(vocab_size=300)
    tokenizer = demo_model.train_tokenizer(iter(["ab ab ab"]), settings)
    rows = demo_model.pack(tokenizer, ["xyz", "uv"], 3)
    assert rows.shape == (2, 3)
    assert tokenizer.decode(rows.flatten()) == "xyz<|end|>uv"
    with pytest.raises(ValueError, match="fewer than one sequence"):
        demo_model.pack(tokenizer, ["xyz"], 30)


def test_a_checkpoint_is_kept_for_the_same_recipe_only(part, tmp_path: Path) -> None:
    demo_model = part("demo_model")
    settings = part("demo_setup").QUICK_BASE
    texts = ["one two three four five six seven " * 200]
    first = demo_model.make_checkpoint(tmp_path, settings, texts, [])
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert demo_model.make_checkpoint(tmp_path, settings, texts, []) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert demo_model.make_checkpoint(tmp_path, settings, texts, ["eight"]) != first
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("mixture_loss", "said"),
    [
        (2.0, "MixLoRA beats LoRA by 0.5000"),
        (3.0, "LoRA beats MixLoRA by 0.5000"),
        (2.501, "LoRA and MixLoRA are level, 0.0010"),
    ],
)
def test_the_sentence_follows_the_figures(part, mixture_loss: float, said: str) -> None:
    report = part("demo_report")
    sizes = ("trainable_parameters", "memory_before", "memory_peak", "learning_rate")
    same = {"adapter": "", **dict.fromkeys(sizes, 1)}
    lora = report.Result("LoRA", target=(3, 2.5), prose=(1, 2), tokens_per_second=10, **same)
    mixture = report.Result(
        "MixLoRA", target=(3, mixture_loss), prose=(1, 1.5), tokens_per_second=5, **same
    )
    sentence = report.verdict(lora, mixture, "Python")
    assert said in sentence
    assert "+1.0000 (LoRA) and +0.5000 (MixLoRA)" in sentence
    assert "0.50 times as fast" in sentence


def test_heldout_loss_of_an_untrained_model_is_near_uniform(part) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    rows = torch.randint(50, (5, 8))
    loss = part("demo_model").heldout_loss(LlamaForCausalLM(config), rows, batch_size=2)
    assert loss == pytest.approx(3.912, abs=0.1)


@pytest.mark.parametrize("script", ["moe_layer.py", "wrap_checkpoint.py"])
def test_the_small_examples_run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_layer_of_the_example_learns(part, capsys: pytest.CaptureFixture[str]) -> None:
    assert part("moe_layer").main(steps=300) < 0.25
