"""Real text without a network: the documentation and the source code of the running interpreter.

Both corpora are lists of documents in an order that depends on nothing but the interpreter, so two
runs on one machine see the same text. Another Python version ships other words: nothing that is
stored (an output, a recorded loss, a test) may depend on them.
"""

from __future__ import annotations

import ast
import functools
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from minillm.data.download import download

__all__ = ["download", "pydocs", "stdlib", "tiny_shakespeare", "tinystories"]

# Tests are full of planted errors and generated tables, installed packages are not the standard
# library, pydoc_data is the text of `pydocs` written as Python, and the last two hold this
# machine's own build paths and settings.
_LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
)
_LEFT_OUT_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


def stdlib(root: Path | None = None) -> list[str]:
    """The source code of the standard library: one document a file, sorted by path.

    About 11 MB in 730 files for CPython 3.11. Tests, installed packages and files without text are
    left out. Nothing is imported or executed.

    Args:
        root: the library's folder; that of the running interpreter if not given.

    Raises:
        ValueError: no Python source under ``root`` (some minimal systems ship only bytecode).
    """
    return list(_sources(_library(root)).values())


def pydocs(root: Path | None = None) -> list[str]:
    """The Python language reference and the standard library's docstrings: English text.

    First the topics that ``help()`` knows (the chapters of the language reference, one document
    each, by title), then one document a module: its docstring, followed by every class and
    function that has one, under its signature. Sources are parsed, never imported, so that no
    module's side effects happen. 2.7 MB for CPython 3.11.

    Args:
        root: the library's folder; that of the running interpreter if not given.

    Raises:
        ValueError: no Python source under ``root``.

    >>> any("import statement" in document for document in pydocs())
    True
    """
    modules = _docstrings(_library(root))
    return [*_topics(), *modules]


def tiny_shakespeare(folder: Path | None = None) -> list[str]:
    """The speeches of Tiny Shakespeare (1.1 MB), one document each; downloaded on first use."""
    text = download("tiny_shakespeare", folder).read_text(encoding="utf-8")
    return [speech.strip() for speech in text.split("\n\n") if speech.strip()]


def tinystories(folder: Path | None = None) -> list[str]:
    """The validation set of TinyStories (22 MB), one document a story; downloaded on first use."""
    text = download("tinystories", folder).read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


def _library(root: Path | None) -> Path:
    return Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])


def _sources(root: Path) -> dict[str, str]:
    """Path below ``root`` (with forward slashes) -> text, sorted by path."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if _LEFT_OUT_FOLDERS.isdisjoint(parts[:-1]) and not path.name.startswith(_LEFT_OUT_FILES):
            found["/".join(parts)] = path
    documents = {}
    for name in sorted(found):
        with tokenize.open(found[name]) as file:  # honors the file's own `coding:` line
            text = file.read()
        if text.strip():
            documents[name] = text
    if not documents:
        raise ValueError(f"no Python source files under {root}: the standard library's are needed")
    return documents


def _topics() -> list[str]:
    from pydoc_data.topics import topics  # a plain dictionary of texts, half a megabyte

    return [topics[title].strip() + "\n" for title in sorted(topics)]


# Parsing 11 MB takes seconds and every chapter asks for the same text: keep the last answer.
@functools.lru_cache(maxsize=1)
def _docstrings(root: Path) -> tuple[str, ...]:
    documents = []
    for path, source in _sources(root).items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold escapes that newer Pythons report
            entries = list(_entries(ast.parse(source), module))
        if entries:
            documents.append("\n\n".join(entries) + "\n")
    return tuple(documents)


def _entries(node: ast.AST, name: str) -> Iterator[str]:
    """A heading and a docstring for ``node`` and for everything defined in it, top to bottom."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented):
        text = ast.get_docstring(node)
        if text and text.strip():
            arguments = getattr(node, "args", None)
            heading = name if arguments is None else f"{name}({ast.unparse(arguments)})"
            yield f"{heading}\n\n{text.strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented[1:]):
            yield from _entries(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.ExceptHandler)):  # definitions under `if` and `try`
            yield from _entries(child, name)
