"""The comparison runs from end to end on a tiny model, and its arms are of equal size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "compare_mixtures.py"
pytestmark = [pytest.mark.hf, pytest.mark.slow]


def test_two_arms(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *("--quick", "--methods", "smora,phatgoose", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"plain LoRA", "smora", "phatgoose"}
    (plain,) = results["plain LoRA"]
    for name in ("smora", "phatgoose"):
        (run,) = results[name]
        assert run["parameters"] == pytest.approx(plain["parameters"], rel=0.15)
        assert all(0 < loss < 10 for loss in run["losses"])
        assert run["step"] > 0
        assert run["usage"][0] >= 1
        assert name in done.stdout
    assert plain["usage"] is None


def test_an_unknown_arm_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--methods", "smorra"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no arm 'smorra'" in done.stderr
