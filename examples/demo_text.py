"""Two kinds of text that every Python carries, English prose and Python code, split by file.

Prose: the language reference behind `help()` (`pydoc_data.topics`), the docstrings of the standard
library and its licence, without doctests and listings. Code: the standard library's modules with
docstrings and comments removed, in the layout of `ast.unparse`.

A module (or a help topic) is held out if the SHA-256 of its name ends in one of `HELDOUT_DIGITS`;
then both its docstrings and its code are held out. What is repeated between files (paragraphs of
prose, top-level statements of code, from `REPEAT_LENGTH` on) stays in training alone. Parts of such
statements still recur: in CPython 3.11 and 3.12, 3% (code) and 4% (prose) of the held-out windows
of twelve words occur in the training text.
"""

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELDOUT_DIGITS = "0"  # one hexadecimal digit of sixteen: about 6% of the files
REPEAT_LENGTH = 80  # characters; shorter pieces (an import, a usual phrase) may repeat
LEFT_OUT = {  # tests, third-party and generated folders, tables
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"),
    *("lib2to3", "pydoc_data", "turtledemo", "encodings"),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents nobody trains on."""

    train: list[str]
    heldout: list[str]


def standard_library_texts(every: int = 1) -> tuple[Split, Split]:
    """Prose and code of the running Python, each split into training and held-out documents.

    Args:
        every: Read one module in so many.

    Returns:
        Prose, code.
    """
    prose = [(f"topic {name}", text.split("\n\n")) for name, text in sorted(topics.items())]
    code = []
    root = Path(sysconfig.get_path("stdlib"))
    for path in [root / "LICENSE.txt", *sorted(root.rglob("*.py"))[::every]]:
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or name.parts[0].startswith("config-") or not path.is_file():
            continue
        if path.suffix == ".txt":
            prose.append((name.as_posix(), path.read_text(encoding="utf-8").split("\n\n")))
            continue
        paragraphs, statements = read_module(path)
        prose.append((name.as_posix(), paragraphs))
        code.append((name.as_posix(), statements))
    prose = [(name, [p for p in paragraphs if is_prose(p)]) for name, paragraphs in prose]
    return split_by_name(prose, "\n\n"), split_by_name(code, "\n")


def read_module(path: Path) -> tuple[list[str], list[str]]:
    """The paragraphs of a module's docstrings, and its top-level statements without them."""
    tree = ast.parse(path.read_bytes())
    paragraphs: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
            paragraphs += docstring.split("\n\n")
            node.body = node.body[1:] or [ast.Pass()]
    return paragraphs, [ast.unparse(statement) for statement in tree.body]


def is_prose(paragraph: str) -> bool:
    """True for running text: mostly letters and spaces, no doctest, at least five words."""
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    words = len(paragraph.split())
    return words >= 5 and ">>>" not in paragraph and letters >= 0.9 * len(paragraph)


def split_by_name(documents: list[tuple[str, list[str]]], joiner: str) -> Split:
    """Hold documents out by the hash of their name; drop repeats, keeping those in training."""
    documents = sorted(documents, key=lambda document: (is_held_out(document[0]), document[0]))
    seen: set[str] = set()
    split = Split(train=[], heldout=[])
    for name, pieces in documents:
        fresh = [piece for piece in pieces if piece not in seen or len(piece) < REPEAT_LENGTH]
        seen.update(pieces)
        if fresh:
            (split.heldout if is_held_out(name) else split.train).append(joiner.join(fresh))
    return split


def is_held_out(name: str) -> bool:
    """True for about one name in sixteen, the same ones on every machine."""
    return hashlib.sha256(name.encode()).hexdigest()[-1] in HELDOUT_DIGITS


def split_files(paths: list[Path]) -> Split:
    """Texts of your own: the last tenth of every file is held out."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    cuts = [len(text) - len(text) // 10 for text in texts]
    return Split(
        train=[text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        heldout=[text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )
