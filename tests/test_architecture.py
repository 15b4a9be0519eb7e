"""The rules of `architecture_rules` hold in this tree."""

from pathlib import Path

import architecture_rules as rules
import pytest

from moeroute.methods import get_method, list_methods

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "moeroute"
KERNELS = ROOT / "kernels" / "moeroute_kernels"
DEVICE_CODE = KERNELS / "_triton"
METHOD_FILES = SRC / "methods"
SHARED_BY_METHODS = ("checks", "existing", "ffn_parts", "gate_parts", "parts", "registry")

LIBRARY = rules.python_files(SRC, KERNELS)
SCRIPTS = rules.python_files(ROOT / "examples", ROOT / "benchmarks")


def outside(folder: Path, paths: list[Path]) -> list[Path]:
    return [path for path in paths if not path.is_relative_to(folder)]


def test_the_library_is_found():
    assert SRC / "types.py" in LIBRARY
    assert KERNELS / "__init__.py" in LIBRARY


def test_files_are_short():
    assert rules.long_files([*LIBRARY, *SCRIPTS], 300) == []


def test_functions_are_short():
    assert rules.long_functions([*outside(DEVICE_CODE, LIBRARY), *SCRIPTS], 60) == []
    assert rules.long_functions(rules.python_files(DEVICE_CODE), 150) == []


def test_ops_read_sizes_from_shapes():
    assert rules.walking_arguments(rules.python_files(SRC / "ops", KERNELS)) == []


def test_attributes_are_declared_not_probed():
    assert rules.attribute_probes(outside(SRC / "integration", LIBRARY)) == []


def test_only_the_registry_changes_a_module_level_container():
    registry = METHOD_FILES / "registry.py"
    assert rules.mutated_globals(path for path in LIBRARY if path != registry) == []


def test_concrete_modules_are_final():
    assert rules.subclassed_modules(LIBRARY) == []


def test_types_stand_on_nothing():
    assert rules.imports_below([SRC / "types.py"], "moeroute") == []


def test_triton_stays_in_its_folder():
    assert rules.imports_below(outside(DEVICE_CODE, LIBRARY), "triton") == []


def test_the_folder_of_the_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_methods_do_not_know_each_other():
    assert rules.sibling_imports(METHOD_FILES, SHARED_BY_METHODS) == []


@pytest.mark.parametrize("name", list_methods())
def test_one_paper_one_file_one_row(name: str):
    source, test = METHOD_FILES / f"{name}.py", ROOT / "tests" / "methods" / f"test_{name}.py"
    assert rules.method_faults(name, get_method(name), source, test) == []
