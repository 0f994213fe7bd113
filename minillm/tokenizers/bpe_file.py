"""The file a BPE tokenizer is kept in: JSON that a person can read and edit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.paths import write_atomically

FORMAT, VERSION = "minillm-bpe", 1
_ESCAPE = re.compile(rb"\\(?:(\\)|x([0-9a-f]{2})|(.?))", re.DOTALL)


def to_text(token: bytes) -> str:
    r"""A byte string as text: UTF-8 as it reads, other bytes as \xhh, a backslash as two.

    Different byte strings give different texts, and `from_text` gives the bytes back.

    >>> [to_text(token) for token in (b"the", b" \xe4\xbd\xa0", b"\xe4\xbd", b"\\n")]
    ['the', ' 你', '\\xe4\\xbd', '\\\\n']
    """
    return token.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def from_text(text: str) -> bytes:
    r"""The byte string that `to_text` wrote as `text`.

    >>> from_text("\\xe4\\xbd")
    b'\xe4\xbd'
    """

    def unescape(match: re.Match[bytes]) -> bytes:
        backslash, code, other = match.groups()
        if other is not None:
            raise ValueError(f"{text!r} has a backslash that starts neither \\\\ nor \\xhh")
        return backslash or bytes.fromhex(code.decode())

    return _ESCAPE.sub(unescape, text.encode())


def write(
    path: str | Path,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_tokens: Sequence[str],
    pattern: str,
    about: str = "",
) -> None:
    """Write a tokenizer to `path`, all or nothing: to a temporary file that is then renamed."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "about": about,
        "pattern": pattern,
        "special_tokens": list(special_tokens),
    }
    lines = [f"{_dump(key)}: {_dump(value)}" for key, value in head.items()]
    for key, rows in (
        ("vocab", [to_text(vocab[i]) for i in range(len(vocab))]),
        ("merges", [[to_text(left), to_text(right)] for left, right in merges]),
    ):
        lines.append(f"{_dump(key)}: [\n" + ",\n".join(map(_dump, rows)) + "\n]")
    write_atomically(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read(path: str | Path) -> dict[str, Any]:
    """The arguments of `BPE` from a file that `write` made.

    Raises ValueError naming the file and the fault if it is truncated, foreign, of another version
    or inconsistent in itself.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise ValueError(f"{path} is not a complete JSON file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} is not a {FORMAT} file: its format is {found!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')!r}; this code reads {VERSION}")
    for key, kind in (
        ("pattern", str),
        ("special_tokens", list),
        ("vocab", list),
        ("merges", list),
    ):
        if not isinstance(data.get(key), kind):
            raise ValueError(
                f"{path}: {key!r} must be a {kind.__name__}, not {data.get(key)!r:.40}"
            )
    for key, width in (("special_tokens", 1), ("vocab", 1), ("merges", 2)):
        for row in data[key]:
            cells = [row] if width == 1 else row
            if not isinstance(cells, list) or [type(c) for c in cells] != [str] * width:
                raise ValueError(
                    f"{path}: a row of {key!r} must be {width} string(s), not {row!r:.40}"
                )
    try:
        return {
            "vocab": {i: from_text(text) for i, text in enumerate(data["vocab"])},
            "merges": [(from_text(left), from_text(right)) for left, right in data["merges"]],
            "special_tokens": data["special_tokens"],
            "pattern": data["pattern"],
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
