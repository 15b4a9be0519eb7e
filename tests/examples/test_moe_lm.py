"""The example's language model trains with any router, is saved, and is compared."""

import json
import os
import re
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
    return tmp_path_factory.mktemp("moe_lm")


@pytest.mark.parametrize(
    ("router", "more"),
    [
        ("dense", []),
        ("switch", ["--fields", '{"top_k": 2}', "--loss", "ERCLoss=1", "--loss", "ZLoss=0.001"]),
        ("rmoe", []),
        ("null_experts", ["--loss", "VarianceLoss=0.001"]),
        ("hash_layers", []),
        ("blockffn", []),
        ("soft_moe", []),
    ],
)
def test_a_router_by_name(folder: Path, router: str, more: list[str]) -> None:
    done = run("train_moe_lm.py", "--quick", "--out", str(folder), "--router", router, *more)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    before, after = re.search(r"again: loss ([\d.]+) \(before ([\d.]+)\)", told).groups()
    assert before == after
    saved = json.loads((folder / router / "config.json").read_text())
    assert saved["router"] == router
    routed = router not in ("dense", "soft_moe")
    assert (folder / router / "routing.png").is_file() == routed
    assert ("Routing of MoELM" in told) == (router != "dense")
    if router == "switch":
        assert "epsilon" in told


def test_two_arms(folder: Path) -> None:
    done = run(
        "compare_routers.py",
        "--quick",
        "--out",
        str(folder),
        "--arms",
        "linear, top 2;cosine, top 2",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == {"linear, top 2", "cosine, top 2"}
    for (outcome,) in results.values():
        assert 0 < outcome["loss"] < 7
        assert outcome["routing"]["experts a token"] == 2.0
    assert "epsilon" in results["linear, top 2"][0]["routing"]
    assert "beyond" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "what"),
    [
        ("train_moe_lm.py", ["--loss", "ZLos=1"], "no loss 'ZLos'"),
        ("train_moe_lm.py", ["--loss", "ZLoss"], "give a weight"),
        ("train_moe_lm.py", ["--router", "swich"], "switch"),
        ("train_moe_lm.py", ["--router", "molora"], "made for adapters"),
        ("train_moe_lm.py", ["--fields", '{"top_kk": 2}'], "top_kk"),
        ("compare_routers.py", ["--arms", "swich"], "no arm 'swich'"),
    ],
)
def test_what_is_not_known_is_named(script: str, arguments: list[str], what: str) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    assert what in done.stderr
