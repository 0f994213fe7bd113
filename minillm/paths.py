"""Where the course's files are, in a clone and in an installed package, and how one is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_HERE = Path(__file__).resolve().parent

ROOT = _HERE.parent  # the repository, when `minillm` is used from a clone
ASSETS = next((p for p in (_HERE / "assets", ROOT / "assets") if p.is_dir()), ROOT / "assets")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it there: readers see the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
