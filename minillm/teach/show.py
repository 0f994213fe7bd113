"""Show the source of what a lecture uses, so that there is no second copy of it on the page.

What is stored in a notebook, and what a strict comparison of stored outputs sees:

- `text/plain` holds the file and the source, without the line number: it changes exactly when the
  shown code changes, and then the page is out of date and should be executed again.
- `text/html` holds the highlighted source with file and line. The line moves whenever something
  above it is edited, and the markup depends on the version of Pygments, so the block stands
  between `<!-- source -->` and `<!-- /source -->`, which `tests/nbval_sanitize.cfg` cuts out.
- `repr()`, what a plain terminal shows, has the line number too.
"""

from __future__ import annotations

import ast
import functools
import html
import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from minillm.paths import ROOT
from minillm.teach import CallableModule

# JupyterLab's own theme colors where it defines them; else mid-tones that read on white and black.
INKS = {
    "keyword": "#3f8024",
    "string": "#c0502b",
    "comment": "#5a8080",
    "number": "#3f8024",
    "def": "#4a72d8",
    "builtin": "#8a68c9",
    "meta": "#8a68c9",
}


@dataclass(frozen=True)
class Source:
    """Source code with where it came from. Displays itself highlighted in a notebook."""

    name: str
    code: str
    file: str
    line: int

    def __repr__(self) -> str:
        return f"# {self.file}, line {self.line}\n{self.code}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/plain": f"# {self.file}\n{self.code}", "text/html": self.to_html()}

    def to_html(self) -> str:
        """The highlighted source under a caption with file and line, for light and dark themes."""
        border = "1px solid rgba(128,128,128,.45)"
        caption = f"{html.escape(self.file)}, line {self.line}"
        return (
            f'<!-- source --><div style="border:{border};border-radius:6px;margin:4px 0">'
            f'<div style="font:12px sans-serif;opacity:.75;padding:4px 10px;'
            f'border-bottom:{border}">{caption}</div>'
            f'<pre style="margin:0;padding:8px 10px;overflow-x:auto;line-height:1.4;'
            f'font-family:var(--jp-code-font-family,monospace);background:none;color:inherit">'
            f"{highlight(self.code)}</pre></div><!-- /source -->"
        )


def show(obj: object, docstring: bool = True) -> Source:
    """The source of a function, method, class or module, ready to be displayed.

    Decorated functions (`functools.wraps`), `functools.partial`, bound methods, properties and
    Triton's `@jit` functions are unwrapped to what was written. `docstring=False` leaves out the
    docstrings of `obj` and of everything defined in it.

    Raises ValueError for what has no Python source: a built-in, or a plain value.

    >>> print(show(textwrap.dedent).name)
    dedent
    """
    target = unwrap(obj)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target))
    try:
        file = inspect.getsourcefile(target)
        lines, first = inspect.getsourcelines(target)
    except (TypeError, OSError) as reason:
        raise ValueError(
            f"show({name}) found no Python source: it takes a function, method, class or module "
            f"written in Python, and got a {type(obj).__name__} ({reason})"
        ) from reason
    code = textwrap.dedent("".join(lines)).rstrip() + "\n"
    if not docstring:
        code = strip_docstrings(code)
    return Source(name, code, _relative(file), max(first, 1))


def unwrap(obj: object) -> object:
    """The function or class that was written, beneath wrappers, partials, methods and `@jit`."""
    while not inspect.isclass(obj):
        if isinstance(obj, functools.partial):
            obj = obj.func
        elif isinstance(obj, property):
            obj = obj.fget
        elif isinstance(obj, (staticmethod, classmethod)) or inspect.ismethod(obj):
            obj = obj.__func__
        elif callable(getattr(obj, "__wrapped__", None)):
            obj = obj.__wrapped__
        elif not inspect.isroutine(obj) and callable(getattr(obj, "fn", None)):
            obj = obj.fn  # triton.jit, triton.autotune and triton.heuristics keep it there
        else:
            break
    return obj


def strip_docstrings(code: str) -> str:
    """Leave out every docstring in `code`; comments and layout stay as they are.

    A body that was only a docstring becomes `...`, so that the result is still Python.

    >>> print(strip_docstrings('def f(x):\\n    "Twice x."\\n    return 2 * x\\n'), end="")
    def f(x):
        return 2 * x
    """
    lines: list[str | None] = list(code.splitlines())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, owners) or ast.get_docstring(node) is None:
            continue
        doc = node.body[0]
        first, last = doc.lineno - 1, doc.end_lineno - 1
        before = code.splitlines()[first].encode()[: doc.col_offset].decode()
        if before.strip():  # def f(): "doc"
            continue
        alone = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : last + 1] = [before + "..." if alone else None] + [None] * (last - first)
        if not alone and last + 1 < len(lines) and lines[last + 1] == "":
            lines[last + 1] = None  # the blank line that set the docstring off
    return "\n".join(line for line in lines if line is not None) + "\n"


def highlight(code: str) -> str:
    """HTML of Python code, colored with inline styles. Needs Pygments; without it, plain."""
    try:
        from pygments.lexers import PythonLexer
        from pygments.token import Token
    except ImportError:
        return html.escape(code)
    kinds = (
        (Token.Comment, "comment"),
        (Token.Literal.String, "string"),
        (Token.Literal.Number, "number"),
        (Token.Keyword, "keyword"),
        (Token.Operator.Word, "keyword"),
        (Token.Name.Decorator, "meta"),
        (Token.Name.Builtin, "builtin"),
        (Token.Name.Function, "def"),
        (Token.Name.Class, "def"),
    )
    parts = []
    for token, text in PythonLexer(stripnl=False).get_tokens(code):
        kind = next((name for parent, name in kinds if token in parent), None)
        escaped = html.escape(text, quote=False)
        style = f"color:var(--jp-mirror-editor-{kind}-color,{INKS[kind]})" if kind else ""
        parts.append(f'<span style="{style}">{escaped}</span>' if kind else escaped)
    return "".join(parts)


def _relative(file: str | None) -> str:
    """The path below the course's root, or the last two parts of any other: never a home folder."""
    path = Path(file or "<input>")
    if path.resolve().is_relative_to(ROOT) and ".venv" not in path.parts:
        return path.resolve().relative_to(ROOT).as_posix()
    if path.name.isdigit() or path.name.startswith("<") or "ipykernel" in str(path):
        return "this notebook"  # cells live in throw-away files with a number for a name
    return "/".join(path.parts[-2:])


sys.modules[__name__].__class__ = CallableModule
