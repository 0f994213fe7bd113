"""Is this machine ready for the course? Every problem comes with the line that fixes it.

    python -m minillm.teach.doctor

Three steps, so that each can be tested without the machine it is about: `probe` looks at this
machine, `examine` turns what it saw into findings, `report` prints them. Environment variables
are read by the caller and passed in: `doctor(os.environ)`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minillm.paths import ROOT
from minillm.teach import CallableModule

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
TRITON_FOR = {(2, 11): (3, 6), (2, 13): (3, 7)}  # each PyTorch is built against one Triton
SMALLEST_RAM = 4.0  # GB; the lectures peak below 2, JupyterLab and a browser want the rest
SMALLEST_DISK = 2.0  # GB left, for downloads, shards and checkpoints
PACKAGES = ("numpy", "einops", "matplotlib", "tqdm", "pandas", "regex")
TOOLS = ("tiktoken", "safetensors", "tyro", "cloudpickle", "psutil")
JUPYTER = ("jupyterlab", "ipykernel", "ipywidgets", "nbclient", "nbgrader")


@dataclass(frozen=True)
class Machine:
    """What was seen. Versions are strings as packages give them, None where something is absent."""

    python: tuple[int, int, int]
    system: str
    architecture: str
    cores: int
    ram_gb: float | None
    disk_gb: float
    torch: str | None
    gpu: str | None
    triton: str | None
    packages: Mapping[str, str | None] = field(default_factory=dict)
    chromium: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One line of the report. A finding with a `fix` is a problem, and that line solves it."""

    name: str
    value: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        """True unless there is something to fix."""
        return not self.fix


def probe(environ: Mapping[str, str] | None = None, root: Path = ROOT) -> Machine:
    """Look at this machine. Imports PyTorch if it is there, but not Triton."""
    return Machine(
        python=sys.version_info[:3],
        system=platform.system(),
        architecture=platform.machine(),
        cores=_cores(),
        ram_gb=_ram_gb(),
        disk_gb=shutil.disk_usage(root).free / 1e9,
        torch=_version("torch"),
        gpu=_gpu(),
        triton=_version("triton"),
        packages={name: _version(name) for name in (*PACKAGES, *TOOLS, *JUPYTER)},
        chromium=next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None),
        environ=dict(environ or {}),
    )


def examine(machine: Machine, pins: Mapping[str, str] | None = None) -> list[Finding]:
    """Findings about a machine, in order of printing. `pins`: package -> wanted version."""
    pins = pins or {}
    return [
        _python(machine),
        _torch(machine, pins),
        _processors(machine),
        _memory(machine),
        Finding("GPU", machine.gpu or "none (every lecture runs without one)"),
        _triton(machine, pins),
        _disk(machine),
        _group("packages", PACKAGES, machine, pins),
        _group("tools", TOOLS, machine, pins),
        _group("Jupyter", JUPYTER, machine, pins),
        Finding("Chromium", machine.chromium or "none (only the browser test would use it)"),
    ]


def triton_mode(machine: Machine) -> str:
    """How Triton kernels run here: "GPU", "interpreter" or "absent".

    The interpreter runs kernels on the CPU, slowly and exactly; `TRITON_INTERPRET=1` asks for it
    on a machine with a GPU too.
    """
    if machine.triton is None:
        return "absent"
    asked = machine.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
    return "GPU" if machine.gpu and "Metal" not in machine.gpu and not asked else "interpreter"


def report(findings: Sequence[Finding]) -> str:
    """The findings as text: one line each, the fix below what needs one, and a verdict."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        mark = "ok " if finding.ok else "FIX"
        lines.append(f"{mark} {finding.name:<{width}}  {finding.value}")
        if not finding.ok:
            lines.append(f"    {'':<{width}}  -> {finding.fix}")
    problems = sum(not finding.ok for finding in findings)
    verdict = "This machine is ready." if not problems else f"To fix: {problems}."
    return "\n".join([*lines, verdict])


def doctor(environ: Mapping[str, str] | None = None, root: Path = ROOT) -> list[Finding]:
    """Print how ready this machine is, and return the findings.

    `environ` holds environment variables, usually `os.environ`; without it none are considered.
    """
    findings = examine(probe(environ, root), read_pins(root / "requirements.txt"))
    print(report(findings))
    return findings


def read_pins(path: Path) -> dict[str, str]:
    """name -> version of each `name==version` line of a requirements file; {} if there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, flags=re.MULTILINE))


def _python(machine: Machine) -> Finding:
    value = ".".join(map(str, machine.python)) + f" on {machine.system} {machine.architecture}"
    if machine.python[:2] >= OLDEST_PYTHON:
        return Finding("Python", value)
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fix = (
        f"install Python {oldest} or newer, then: make clean-env && make lab PYTHON=python{oldest}"
    )
    return Finding("Python", value, fix)


def _torch(machine: Machine, pins: Mapping[str, str]) -> Finding:
    fix = f"pip install {_pinned('torch', pins)}"
    if machine.torch is None:
        return Finding("PyTorch", "not installed", fix)
    if _numbers(machine.torch) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("PyTorch", f"{machine.torch}, older than {oldest}", fix)
    return Finding("PyTorch", machine.torch)


def _processors(machine: Machine) -> Finding:
    plural = "core" if machine.cores == 1 else "cores"
    hint = "" if machine.cores > 1 else " (two halve the waiting)"
    return Finding("processor", f"{machine.cores} {plural}{hint}")


def _memory(machine: Machine) -> Finding:
    if machine.ram_gb is None:
        return Finding("memory", "unknown", "pip install psutil")
    value = f"{machine.ram_gb:.1f} GB of RAM"
    fix = f"the course wants {SMALLEST_RAM:.0f} GB: give the container or virtual machine more"
    return Finding("memory", value, fix if machine.ram_gb < SMALLEST_RAM else "")


def _triton(machine: Machine, pins: Mapping[str, str]) -> Finding:
    mode = triton_mode(machine)
    if mode == "absent":
        if machine.system != "Linux":
            value = f"absent (Linux only; all but the kernels runs on {machine.system})"
            return Finding("Triton", value)
        return Finding("Triton", "absent", f"pip install {_pinned('triton', pins)}")
    wanted = TRITON_FOR.get(_numbers(machine.torch or "0.0"))
    if wanted and _numbers(machine.triton) != wanted:
        value = f"{machine.triton}, but PyTorch {machine.torch} goes with {wanted[0]}.{wanted[1]}"
        return Finding("Triton", value, f"pip install 'triton=={wanted[0]}.{wanted[1]}.*'")
    how = {"GPU": "kernels run on the GPU", "interpreter": "interpreter: kernels run on the CPU"}
    return Finding("Triton", f"{machine.triton}, {how[mode]}")


def _disk(machine: Machine) -> Finding:
    fix = f"free {SMALLEST_DISK:.0f} GB; `make clean` removes what the course built"
    enough = machine.disk_gb >= SMALLEST_DISK
    return Finding("disk", f"{machine.disk_gb:.0f} GB free", "" if enough else fix)


def _group(name: str, wanted: Sequence[str], machine: Machine, pins: Mapping[str, str]) -> Finding:
    missing = [package for package in wanted if machine.packages.get(package) is None]
    if missing:
        fix = "pip install " + " ".join(_pinned(package, pins) for package in missing)
        return Finding(name, f"missing: {', '.join(missing)}", fix)
    return Finding(name, ", ".join(f"{package} {machine.packages[package]}" for package in wanted))


def _pinned(package: str, pins: Mapping[str, str]) -> str:
    return f"{package}=={pins[package]}" if package in pins else package


def _numbers(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as 2.13.0+cpu; (0, 0) where there is none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_gb() -> float | None:
    if importlib.util.find_spec("psutil") is None:
        return None
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share of it
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text) if text.isdigit() else total) / 1e9


def _gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        return f"{count} × {device.name}, {device.total_memory / 1e9:.0f} GB"
    if torch.backends.mps.is_available():
        return "Apple GPU (Metal)"
    return None


if __name__ == "__main__":
    raise SystemExit(not all(finding.ok for finding in doctor(os.environ)))

sys.modules[__name__].__class__ = CallableModule
