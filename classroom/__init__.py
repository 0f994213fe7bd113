"""The classroom: execute lectures, hand out copies, release assignments and grade them."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds `minillm` and, in a clone, `chapters`."""


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
