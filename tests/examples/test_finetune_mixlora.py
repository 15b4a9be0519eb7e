"""The demo from end to end on a tiny model, each step in processes of its own as in a full run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_mixlora.py"
pytestmark = [pytest.mark.hf, pytest.mark.slow]


def run_demo(out: Path, *arguments: str) -> str:
    """Run the script with `--quick`; its output."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "110", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the printed text of one run."""
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out)


def row(printed: str, label: str) -> list[str]:
    """The cells of the results table's row that begins with `label`."""
    (line,) = [line for line in printed.splitlines() if label in line and "│" in line]
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_the_arms_are_of_equal_size(demo: tuple[Path, str]) -> None:
    lora, mixture = (int(cell.replace(",", "")) for cell in row(demo[1], "trainable parameters"))
    assert abs(lora - mixture) <= 0.02 * mixture


def test_both_arms_start_from_the_same_model_and_learn(demo: tuple[Path, str]) -> None:
    before = row(demo[1], "held-out Python, before")
    after = row(demo[1], "held-out Python, after")
    assert before[0] == before[1]
    assert all(float(b) > float(a) for b, a in zip(before, after, strict=True))


def test_the_saved_mixture_gives_the_same_logits_in_a_new_process(demo: tuple[Path, str]) -> None:
    lines = [line for line in demo[1].splitlines() if "logits differ by at most" in line]
    assert len(lines) == 2
    assert all(float(line.rsplit(" ", 1)[1]) <= 1e-6 for line in lines)


def test_it_leaves_adapters_figures_and_pictures(demo: tuple[Path, str]) -> None:
    out = demo[0]
    config = json.loads((out / "mixlora" / "adapter_config.json").read_text())
    assert config["method"] == "mixlora"
    assert (out / "mixlora" / "adapter_model.safetensors").is_file()
    assert (out / "lora" / "adapter_model.safetensors").is_file()
    figures = json.loads((out / "results.json").read_text())
    assert [arm["name"] for arm in figures] == ["LoRA", "MixLoRA"]
    for picture in ("routing-target.png", "routing-prose.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_and_texts_of_ones_own(demo: tuple[Path, str], tmp_path: Path) -> None:
    (base,) = demo[0].glob("base-*")
    made = base.stat().st_mtime_ns
    text = tmp_path / "poem.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall,\n" for n in range(2000)))
    printed = run_demo(tmp_path / "out", "--model", str(base), "--text", str(text))
    assert "held-out your text, after" in printed
    assert not list((tmp_path / "out").glob("base-*"))
    assert base.stat().st_mtime_ns == made
