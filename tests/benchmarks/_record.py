"""What every benchmark shares: the course on the path, and one form for what was measured.

`make bench` runs each script of this folder whose name does not start with an underscore.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def machine(packages: tuple[str, ...]) -> dict[str, object]:
    """What a number can only be compared within."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
    }


def record(name: str, result: dict[str, object], packages: tuple[str, ...], quick: bool) -> None:
    """Write assets/benchmarks/`name`.json; a quick run is not worth recording."""
    if quick:
        print("quick run: nothing recorded")
        return
    target = ROOT / "assets" / "benchmarks" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(packages), "result": result}, indent=2)
    target.write_text(text + "\n", encoding="utf-8")
