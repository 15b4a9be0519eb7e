"""Rules of the house that no linter has, as functions from source files to a list of violations.

A violation reads `path:line: what is wrong`. Nothing is imported: the files are parsed.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

WALKING_ARGUMENTS = frozenset({"top_k", "num_experts", "num_experts_per_tok"})
CONTAINER_CALLS = frozenset(
    ["list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"]
)
CONTAINER_NODES = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTATORS = frozenset(
    ["append", "appendleft", "extend", "insert", "remove", "pop", "popleft", "popitem", "clear"]
    + ["add", "discard", "update", "setdefault", "sort", "reverse"]
)
METHOD_HEADINGS = ("Source", "Args", "Shapes", "Raises", "Trains")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: Path) -> list[Path]:
    """Every Python file below the folders that exist, in order of path."""
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def long_files(paths: Iterable[Path], limit: int) -> list[str]:
    """Files of more than `limit` lines, blank lines, comments and docstrings included."""
    counted = ((path, len(path.read_text().splitlines())) for path in paths)
    return [
        f"{path}:{lines}: {lines} lines, at most {limit}"
        for path, lines in counted
        if lines > limit
    ]


def long_functions(paths: Iterable[Path], limit: int) -> list[str]:
    """Functions of more than `limit` lines from `def` on; decorators and the docstring are free."""
    found = []
    for path, node in _nodes(paths):
        if isinstance(node, Function):
            lines = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
            if lines > limit:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {limit}"
                )
    return found


def walking_arguments(paths: Iterable[Path]) -> list[str]:
    """Parameters that should have become a shape by now, in functions, lambdas and class fields."""
    found = []
    for path, node in _nodes(paths):
        if isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        if name in WALKING_ARGUMENTS:
            found.append(f"{path}:{node.lineno}: {name} is a parameter here; read it from a shape")
    return found


def attribute_probes(paths: Iterable[Path]) -> list[str]:
    """Calls of `hasattr`, and of `getattr` with a literal name."""
    found = []
    for path, node in _nodes(paths):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        literal = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
        if node.func.id == "hasattr" or (node.func.id == "getattr" and literal):
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)}; declare it in a type")
    return found


def mutated_globals(paths: Iterable[Path]) -> list[str]:
    """Module-level lists, dicts and sets that some function or module changes, and `global`."""
    trees = {path: ast.parse(path.read_text()) for path in paths}
    containers = {path: _module_containers(tree) for path, tree in trees.items()}
    anywhere = frozenset[str]().union(*containers.values())
    found = []
    for path, tree in trees.items():
        imported = set(_imported_names(tree))
        names = containers[path] | (imported & anywhere)
        for node in ast.walk(tree):
            changed = _changed_name(node) or ""
            root, last = changed.partition(".")[0], changed.rpartition(".")[2]
            elsewhere = root != changed and root in imported and last in anywhere
            if isinstance(node, ast.Global):
                found.append(f"{path}:{node.lineno}: global {', '.join(node.names)}")
            elif isinstance(node, ast.expr | ast.stmt) and (changed in names or elsewhere):
                found.append(f"{path}:{node.lineno}: {changed} is changed after import")
    return found


def subclassed_modules(paths: Iterable[Path]) -> list[str]:
    """Classes that derive from a concrete `nn.Module` of ours; abstract bases and protocols may."""
    classes = [(path, node) for path, node in _nodes(paths) if isinstance(node, ast.ClassDef)]
    modules = {"Module"}
    while True:
        grown = modules | {node.name for _, node in classes if modules & _bases(node)}
        if grown == modules:
            break
        modules = grown
    concrete = {node.name for _, node in classes if node.name in modules and not _is_abstract(node)}
    return [
        f"{path}:{node.lineno}: {node.name} derives from the concrete {', '.join(sorted(wrong))}"
        for path, node in classes
        if (wrong := concrete & _bases(node))
    ]


def imports_below(paths: Iterable[Path], package: str) -> list[str]:
    """Imports of `package` or of anything below it, those for type checking included."""
    found = []
    for path, node in _nodes(paths):
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        found += [
            f"{path}:{node.lineno}: imports {module}"
            for module in modules
            if module == package or module.startswith(package + ".")
        ]
    return found


def sibling_imports(folder: Path, shared: Iterable[str]) -> list[str]:
    """Imports between the files of a folder of `moeroute`; the stems in `shared` are for all."""
    stems = {path.stem for path in python_files(folder)} - {"__init__", *shared}
    return [
        fault
        for stem in sorted(stems)
        for other in sorted(stems - {stem})
        for fault in imports_below([folder / f"{stem}.py"], f"moeroute.{folder.name}.{other}")
    ]


def method_faults(name: str, method: type, source: Path, test: Path) -> list[str]:
    """What is missing of one row of the table: its paper, its documentation, its file, its test."""
    found = [f"{path}: no such file" for path in (source, test) if not path.is_file()]
    paper = vars(method).get("paper")
    if paper is None:
        found.append(f"{name}: {method.__name__} names no paper")
    else:
        if not paper.title.strip():
            found.append(f"{name}: the paper has no title")
        if not re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv):
            found.append(f"{name}: {paper.arxiv!r} is no arXiv id")
        elif paper.year - 2000 - int(paper.arxiv[:2]) not in (0, 1):
            found.append(f"{name}: {paper.arxiv} is not of the year {paper.year}")
    text = (method.__doc__ or "") + (source.read_text() if source.is_file() else "")
    return found + [
        f"{name}: the docstring has no `{heading}:`"
        for heading in METHOD_HEADINGS
        if not re.search(rf"^ *{heading}:", text, re.MULTILINE)
    ]


def _nodes(paths: Iterable[Path]) -> Iterator[tuple[Path, ast.AST]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def _docstring_lines(node: Function) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def _module_containers(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        value = node.value
        called = value.func if isinstance(value, ast.Call) else None
        if isinstance(value, CONTAINER_NODES) or (called and _last_name(called) in CONTAINER_CALLS):
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names - {"__all__"}


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in node.names:
                yield name.asname or name.name.partition(".")[0]


def _changed_name(node: ast.AST) -> str | None:
    """The dotted name of the container that this node changes in place, if it does."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func.value) if node.func.attr in MUTATORS else None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return ast.unparse(node.value)
    if isinstance(node, ast.AugAssign):
        return ast.unparse(node.target)
    return None


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _bases(node: ast.ClassDef) -> set[str]:
    return {_last_name(base).partition("[")[0] for base in node.bases}


def _is_abstract(node: ast.ClassDef) -> bool:
    decorators = {
        _last_name(decorator)
        for member in node.body
        if isinstance(member, Function)
        for decorator in member.decorator_list
    }
    return bool({"ABC", "Protocol"} & _bases(node)) or "abstractmethod" in decorators
