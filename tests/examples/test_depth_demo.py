"""Dr.LLM from end to end: a decoder, a search, routers, a table; and on files of one's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.hf, pytest.mark.slow]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("depth")
    done = run("depth_demo.py", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    (out / "table.txt").write_text(done.stdout)
    return out


def test_the_demo_compares_four_arms(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {
        "base",
        "Dr.LLM routers",
        "random, as many layers",
        "static, least influence",
    }
    (base,), (routed,) = results["base"], results["Dr.LLM routers"]
    (random,) = results["random, as many layers"]
    assert base["layers"] == 4
    assert 0 <= routed["layers"] <= 8
    assert random["layers"] == pytest.approx(routed["layers"])
    for (arm,) in results.values():
        assert len(arm["accuracy"]) == 3
        assert all(0 <= accuracy <= 1 for accuracy in arm["accuracy"])
        assert str(next(iter(results))) in (folder / "table.txt").read_text()


def test_a_checkpoint_and_questions_of_ones_own(folder: Path, tmp_path: Path) -> None:
    for name, letters in (("train", "abcd"), ("heldout", "efgh")):
        rows = [{"prompt": f"{letter}A=", "answer": "b"} for letter in letters]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        str(folder / "seed-0" / "decoder"),
        *("--questions", str(tmp_path / "train.jsonl")),
        *("--heldout", str(tmp_path / "heldout.jsonl")),
        *("--out", str(tmp_path / "out"), "--epochs", "1"),
    ]
    done = run("train_depth_router.py", *arguments)
    told = " ".join(done.stdout.split())
    if "kept no question" in done.stderr:  # nothing was right under any path
        assert done.returncode == 1
        return
    assert done.returncode == 0, done.stderr
    assert "Held out: accuracy" in told
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "search" / "labels.safetensors").is_file()
