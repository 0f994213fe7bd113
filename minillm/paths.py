"""Where the files that come with the course are, in a clone and in an installed package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

ROOT = _HERE.parent  # the repository, when `minillm` is used from a clone
ASSETS = next((p for p in (_HERE / "assets", ROOT / "assets") if p.is_dir()), ROOT / "assets")
