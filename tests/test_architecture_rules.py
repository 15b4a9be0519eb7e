"""Each rule of `architecture_rules` catches a planted violation and lets a near miss pass."""

from pathlib import Path
from types import SimpleNamespace

import architecture_rules as rules
import pytest


def planted(folder: Path, **sources: str) -> list[Path]:
    """Write the sources as files of these names."""
    paths = [folder / f"{name}.py" for name in sources]
    for path, source in zip(paths, sources.values(), strict=True):
        path.write_text(source)
    return paths


def code_lines(count: int) -> str:
    return "\n".join(f"    x = {index}" for index in range(count)) + "\n"


def test_python_files_skips_what_is_not_there(tmp_path: Path):
    (path,) = planted(tmp_path, there="")
    assert rules.python_files(tmp_path, tmp_path / "missing") == [path]


def test_long_files(tmp_path: Path):
    paths = planted(tmp_path, long="# a\n" * 4, fits="# a\n" * 3)
    assert rules.long_files(paths, 3) == [f"{paths[0]}:4: 4 lines, at most 3"]


def test_long_functions(tmp_path: Path):
    docstring = '    """One.\n\n    Two.\n    """\n'
    paths = planted(
        tmp_path,
        long="def f():\n" + code_lines(3),
        inner="class C:\n  async def f():\n    " + code_lines(3).lstrip(),
        fits="@d\n@d\ndef f():\n" + docstring + code_lines(2),
    )
    assert rules.long_functions(paths, 3) == [
        f"{paths[0]}:1: f has 4 lines, at most 3",
        f"{paths[1]}:2: f has 4 lines, at most 3",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "def f(x, top_k): ...",
        "def f(x, *, num_experts=8): ...",
        "f = lambda num_experts_per_tok: 0",
        "class C:\n    top_k: int = 2",
    ],
)
def test_walking_arguments(source: str, tmp_path: Path):
    assert len(rules.walking_arguments(planted(tmp_path, bad=source))) == 1


def test_walking_arguments_lets_values_pass(tmp_path: Path):
    source = "def f(weight):\n    num_experts = weight.shape[0]\n    return g(top_k=num_experts)"
    assert rules.walking_arguments(planted(tmp_path, good=source)) == []


@pytest.mark.parametrize("source", ["hasattr(x, name)", "y = getattr(x, 'weight', None)"])
def test_attribute_probes(source: str, tmp_path: Path):
    assert len(rules.attribute_probes(planted(tmp_path, bad=source))) == 1


def test_attribute_probes_lets_a_computed_name_pass(tmp_path: Path):
    assert rules.attribute_probes(planted(tmp_path, good="y = getattr(x, name)")) == []


@pytest.mark.parametrize(
    "source",
    [
        "SEEN = []\ndef f(x):\n    SEEN.append(x)",
        "SEEN: dict[str, int] = {}\ndef f(x):\n    SEEN[x] = 1",
        "SEEN = defaultdict(int)\ndef f(x):\n    SEEN[x] += 1",
        "SEEN = [x for x in y]\nSEEN += [1]",
        "SEEN = {}\ndef f(x):\n    del SEEN[x]",
        "count = 0\ndef f():\n    global count\n    count += 1",
    ],
)
def test_mutated_globals(source: str, tmp_path: Path):
    assert len(rules.mutated_globals(planted(tmp_path, bad=source))) == 1


@pytest.mark.parametrize(
    "user",
    ["from table import ROWS\nROWS.update(a=1)", "import table\ntable.ROWS['a'] = 1"],
)
def test_mutated_globals_of_another_file(user: str, tmp_path: Path):
    table, other = planted(tmp_path, table="ROWS = {}", user=user)
    assert rules.mutated_globals([table, other]) == [
        f"{other}:2: {user.splitlines()[1].partition('[')[0].removesuffix('.update(a=1)')} "
        "is changed after import"
    ]


def test_mutated_globals_lets_local_and_own_containers_pass(tmp_path: Path):
    source = (
        "ROWS = {'a': 1}\n__all__ = ['f']\n__all__ += ['g']\n"
        "def f(self):\n    rows = dict(ROWS)\n    rows['b'] = 2\n    self.ROWS['c'] = 3\n"
    )
    assert rules.mutated_globals(planted(tmp_path, good=source)) == []


def test_subclassed_modules(tmp_path: Path):
    paths = planted(
        tmp_path,
        base="class Layer(nn.Module):\n    pass",
        bad="class Wider(layers.Layer):\n    pass",
    )
    assert rules.subclassed_modules(paths) == [
        f"{paths[1]}:1: Wider derives from the concrete Layer"
    ]


@pytest.mark.parametrize(
    "base",
    [
        "class Base(nn.Module, ABC):\n    pass",
        "class Base(nn.Module):\n    @abc.abstractmethod\n    def f(self): ...",
        "class Base(Protocol[T]):\n    pass",
        "class Base:\n    pass",
    ],
)
def test_subclassed_modules_lets_abstract_bases_and_records_pass(base: str, tmp_path: Path):
    source = base + "\nclass Final(Base, nn.Module):\n    pass"
    assert rules.subclassed_modules(planted(tmp_path, good=source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import triton",
        "import triton.language as tl",
        "from triton import jit",
        "def f():\n    from triton.language import dot",
        "if TYPE_CHECKING:\n    import triton",
    ],
)
def test_imports_below(source: str, tmp_path: Path):
    assert len(rules.imports_below(planted(tmp_path, bad=source), "triton")) == 1


def test_imports_below_lets_other_names_pass(tmp_path: Path):
    source = "import tritonish\nfrom a.triton import b\nfrom moeroute_kernels import triton"
    assert rules.imports_below(planted(tmp_path, good=source), "triton") == []


def test_sibling_imports(tmp_path: Path):
    folder = tmp_path / "methods"
    folder.mkdir()
    (bad, *_) = planted(
        folder,
        adamole="from moeroute.methods.mixlora import MixLoRA",
        mixlora="from moeroute.methods.base import Paper\nfrom moeroute.layers import LoRABank",
        base="",
        registry="from moeroute.methods.adamole import AdaMoLE",
    )
    assert rules.sibling_imports(folder, ("base", "registry")) == [
        f"{bad}:1: imports moeroute.methods.mixlora.MixLoRA"
    ]


class GoodMethod:
    """Rows of LoRA.

    Source: A paper.
    Args:
        r: Rank.
    Shapes:
        hidden_states: (T, H).
    Raises:
        ValueError: r is 0.
    Trains: router.
    """

    paper = SimpleNamespace(title="A paper", arxiv="2404.15159", year=2024)


def test_method_faults_lets_a_documented_method_pass(tmp_path: Path):
    source, test = planted(tmp_path, good="", test_good="")
    assert rules.method_faults("good", GoodMethod, source, test) == []


@pytest.mark.parametrize(
    ("paper", "fault"),
    [
        (None, "good: GoodMethod names no paper"),
        (SimpleNamespace(title=" ", arxiv="2404.15159", year=2024), "good: the paper has no title"),
        (SimpleNamespace(title="A", arxiv="tbd", year=2024), "good: 'tbd' is no arXiv id"),
        (
            SimpleNamespace(title="A", arxiv="2404.15159", year=2019),
            "good: 2404.15159 is not of the year 2019",
        ),
    ],
)
def test_method_faults_of_the_paper(
    paper: SimpleNamespace | None, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, test = planted(tmp_path, good="", test_good="")
    monkeypatch.setattr(GoodMethod, "paper", paper)
    assert rules.method_faults("good", GoodMethod, source, test) == [fault]


def test_method_faults_of_the_docstring_and_the_files(tmp_path: Path):
    (source,) = planted(tmp_path, bad="")
    bad = type("Bad", (), {"paper": GoodMethod.paper, "__doc__": "Args: none. Shapes: none."})
    assert rules.method_faults("bad", bad, source, tmp_path / "test_bad.py") == [
        f"{tmp_path / 'test_bad.py'}: no such file",
        "bad: the docstring has no `Source:`",
        "bad: the docstring has no `Shapes:`",
        "bad: the docstring has no `Raises:`",
        "bad: the docstring has no `Trains:`",
    ]
