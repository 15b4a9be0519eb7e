"""One wheel from two roots, exact versions within their bounds, commands that set themselves up."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT_BY_TORCH = ("nvidia-", "cuda-")


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name: Version(version) for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


class TestWheel:
    def test_holds_both_packages_and_nothing_else(self, wheel: zipfile.ZipFile):
        names = wheel.namelist()
        tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
        assert tops == {"moeroute", "moeroute_kernels"}
        assert {"moeroute/py.typed", "moeroute_kernels/py.typed"} <= set(names)

    def test_holds_every_module_of_the_tree(self, wheel: zipfile.ZipFile):
        for folder in (ROOT / "src", ROOT / "kernels"):
            modules = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
            assert modules
            assert modules <= set(wheel.namelist())

    def test_carries_its_licence(self, wheel: zipfile.ZipFile):
        (name,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
        text = wheel.read(name).decode()
        assert "Apache License" in text
        assert "END OF TERMS AND CONDITIONS" in text
        assert metadata(wheel)["License-Expression"] == "Apache-2.0"

    def test_announces_python_extras_and_command(self, wheel: zipfile.ZipFile):
        about = metadata(wheel)
        assert about["Requires-Python"] == ">=3.11"
        assert set(about.get_all("Provides-Extra", [])) == {"triton", "plot", "dev"}
        (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "moeroute = moeroute.cli:app" in wheel.read(name).decode()

    def test_triton_is_for_linux_alone(self, wheel: zipfile.ZipFile):
        lines = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
        markers = [line.marker for line in lines if line.name == "triton"]
        assert markers
        for marker in markers:
            assert marker is not None
            extra = str(marker).rpartition("extra == ")[2].strip('"')
            assert marker.evaluate({"platform_system": "Linux", "extra": extra})
            assert not marker.evaluate({"platform_system": "Darwin", "extra": extra})
            assert not marker.evaluate({"platform_system": "Linux", "extra": ""})


class TestConstraints:
    def test_every_direct_dependency_is_pinned_within_its_bounds(self):
        extras = PROJECT["optional-dependencies"].values()
        direct = [Requirement(line) for line in sum(extras, PROJECT["dependencies"])]
        wanted = {normal(line.name): line for line in direct if line.name != PROJECT["name"]}
        assert set(wanted) <= set(pins())
        for name, line in wanted.items():
            assert line.specifier.contains(pins()[name]), line

    def test_pins_fit_every_machine(self):
        """No local version, which one index alone has, and nothing that torch's build brings."""
        names = list(pins())
        assert names == sorted({normal(name) for name in names})
        assert {name for name, version in pins().items() if version.local} == set()
        assert [name for name in names if name.startswith(BROUGHT_BY_TORCH)] == []

    def test_nothing_that_a_pinned_package_needs_is_left_open(self):
        """Walk the installed packages that have their pinned version."""
        todo, seen = [("moeroute", frozenset({"dev"}))], set()
        while todo:
            name, extras = todo.pop()
            if (name, extras) in seen:
                continue
            seen.add((name, extras))
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if wanted(needed, extras) and is_installed_as_pinned(needed.name):
                    todo.append((normal(needed.name), frozenset(needed.extras)))
                elif wanted(needed, extras) and normal(needed.name) != "moeroute":
                    assert is_pinned_or_brought(needed.name), f"{name} needs {needed.name}"
        assert len(seen) > 5


def wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def is_pinned_or_brought(name: str) -> bool:
    return normal(name) in pins() or normal(name).startswith(BROUGHT_BY_TORCH)


def is_installed_as_pinned(name: str) -> bool:
    if normal(name) == "moeroute":
        return True
    try:
        installed = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
    return Version(installed.public) == pins().get(normal(name))


class TestCommands:
    @pytest.mark.parametrize(
        ("target", "command"),
        [
            ("demo", "examples/finetune_mixlora.py"),
            ("test", "-m pytest"),
            ("lint", "lint-imports"),
            ("bench", "-m benchmarks.run"),
        ],
    )
    def test_each_target_makes_the_environment_first(
        self, target: str, command: str, tmp_path: Path
    ):
        plan = dry_run(target, tmp_path)
        assert "-m venv --clear .venv" in plan
        assert "--constraint constraints.txt torch --editable '.[dev]'" in plan
        assert plan.index("--editable") < plan.index(command)

    def test_a_finished_environment_is_kept_until_what_it_holds_changes(self, tmp_path: Path):
        fresh_copy(tmp_path)
        ready = tmp_path / ".venv" / ".ready"
        ready.parent.mkdir()
        ready.touch()
        assert "pip install" not in make("test", tmp_path)
        later = ready.stat().st_mtime + 10
        os.utime(tmp_path / "constraints.txt", (later, later))
        assert "pip install" in make("test", tmp_path)

    def test_an_environment_cut_short_is_made_again(self, tmp_path: Path):
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        assert "pip install" in dry_run("test", tmp_path)

    def test_an_old_python_is_refused_with_a_way_out(self, tmp_path: Path):
        fresh_copy(tmp_path)
        old = tmp_path / "old-python"
        old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.9.1;; *) exit 1;; esac\n')
        old.chmod(0o755)
        done = subprocess.run(
            ["make", ".venv", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert "Python 3.9.1; moeroute needs Python 3.11 or newer" in done.stderr
        assert not (tmp_path / ".venv").exists()

    @pytest.mark.parametrize(("failing", "expected"), [("", 0), ("lint", 1), ("test", 1)])
    def test_the_gate_runs_lint_and_tests_and_fails_if_either_fails(
        self, failing: str, expected: int, tmp_path: Path
    ):
        (tmp_path / ".ci").mkdir()
        shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
        (tmp_path / "Makefile").write_text(
            "lint test:\n\t@echo ran $@\n\t@test $@ != '" + failing + "'\n"
        )
        done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True)
        assert done.returncode == expected
        assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
            "ran lint",
            "ran test",
        ]


def test_an_installed_package_called_kernels_is_not_hidden(tmp_path: Path):
    """`kernels` is an import package of Hugging Face; our folder of that name must lose to it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path.append({str(tmp_path)!r})\n"
        "import kernels; print(kernels.get_kernel)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "theirs"


def fresh_copy(folder: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)


def dry_run(target: str, folder: Path) -> str:
    fresh_copy(folder)
    return make(target, folder)


def make(target: str, folder: Path) -> str:
    """What make would do in this folder, on one line, without doing it."""
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return re.sub(r"\s*\\\n\s*", " ", done.stdout)
