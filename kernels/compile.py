"""Compile every kernel for four GPUs without having one, and read off what it would need there.

    python -m kernels.compile [--only rms_norm] [--target sm_90] [--json report.json]

The compiler only works in a process where Triton's interpreter was never chosen. `report` and
`source` therefore start one of their own, so that a notebook which interprets kernels can ask.
Triton keeps what it compiled: the second report is a matter of seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import Any

import kernels
from kernels import runtime
from kernels.spec import TARGETS, Spec

ROOT = str(Path(kernels.__path__[0]).parent)

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one program may take, which the compiler does not check.

Sources: NVIDIA, CUDA C++ Programming Guide, table of compute capabilities, 2025; AMD, CDNA 3
Instruction Set Architecture, 2025 ("local data share").
"""

MATRIX = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "v_mfma": r"\bv_s?mfma",
}
"""Instructions that multiply small matrices on units of their own, and how to find them."""

EXACT = re.compile(r"^(?!.*inputPrecision).*xf32> \* tensor<\S+xf32>")
"""A product of float32 tiles in full precision, in Triton's intermediate code."""

KINDS = dict.fromkeys(TARGETS[:3], ("ttir", "ttgir", "llir", "ptx", "sass"))
KINDS["gfx942"] = ("ttir", "ttgir", "llir", "amdgcn")
"""The stages that a kernel goes through on its way to machine code."""


@dataclass(frozen=True)
class Report:
    """What one kernel needs on one target."""

    kernel: str
    target: str
    warps: int
    """of 32 threads, on gfx942 of 64"""
    registers: int = 0
    """of 32 bits, in each thread"""
    spills: int = 0
    """bytes in each thread that found no register and live in main memory"""
    shared: int = 0
    """bytes of shared memory in each program (block of threads)"""
    limit: int = 0
    """bytes of shared memory that the target has for one program"""
    matrix: tuple[str, ...] = ()
    """matrix instructions in the assembly, of "mma.sync", "wgmma", "tcgen05.mma" and "v_mfma" """
    dots: bool = False
    """whether the kernel multiplies blocks (tl.dot), and so could use such instructions"""
    narrowed: bool = False
    """whether exact float32 products ("ieee") became tf32 ones: Triton 3.7 does that on sm_100 when
    an operand was loaded with fewer bits, and the other loses 13 of its own"""
    seconds: float = 0.0
    """to compile, or to find in Triton's cache"""
    error: str = ""
    """why it does not compile; then the numbers are 0"""

    def __str__(self) -> str:
        start = f"{self.kernel:<43} {self.target:<7} {self.warps:>2} warps"
        if self.error:
            return f"{start}  {self.error}"
        return (
            f"{start} {self.registers:>4} registers {self.spills:>6} B spilled "
            f"{self.shared:>7} B shared  {', '.join(self.matrix) or '-':<13} {self.seconds:6.2f} s"
        )


def found(names: Sequence[str] | None = None) -> dict[str, list[Spec]]:
    """Kernel file -> its specs, by walking the package: whatever has a function `specs`.

    With `names`, only of these files; a kernel's name begins with its file's.
    """
    wanted = None if names is None else {name.partition(" ")[0] for name in names}
    files = {}
    for name in sorted(m.name for m in pkgutil.iter_modules(kernels.__path__)):
        if name != "compile" and (wanted is None or name in wanted):
            module = importlib.import_module(f"kernels.{name}")
            if hasattr(module, "specs"):
                files[name] = module.specs()
    return files


def choose(names: Sequence[str] | None, targets: Sequence[str]) -> list[tuple[Spec, str]]:
    """The specs of these files or of these full names (all without any), with each target.

    Raises ValueError for names and targets that do not exist, and when nothing is left to do.
    """
    specs = [spec for listed in found(names).values() for spec in listed]
    for name in names or ():
        if not any(name in (spec.name, spec.name.partition(" ")[0]) for spec in specs):
            known = ", ".join(spec.name for listed in found().values() for spec in listed)
            raise ValueError(f"no kernel (or file, the first word) is called {name!r}: {known}")
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"target {min(unknown)!r} must be one of {', '.join(TARGETS)}")
    chosen = [
        (spec, target)
        for spec in specs
        for target in targets
        if target in spec.targets
        and (names is None or {spec.name, spec.name.partition(" ")[0]} & set(names))
    ]
    if not chosen:
        raise ValueError(f"none of {names} is meant for {', '.join(targets)}")
    return chosen


def report(
    names: Sequence[str] | None = None,
    targets: Sequence[str] = TARGETS,
    progress: Callable[[str], Any] | None = None,
) -> list[Report]:
    """Compile in a process of its own; one row for each kernel and target, in the files' order.

    `names`: kernel files ("rms_norm") or single kernels ("add fp32"); None for all. `progress`
    (such as `print`) gets each row's text when it is done. Raises ValueError for unknown names or
    targets, RuntimeError where Triton is missing or its process dies.
    """
    choose(names, targets)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        _run([*_words(names, targets), "--json", str(path)], progress)
        rows = json.loads(path.read_text())
    return [Report(**row | {"matrix": tuple(row["matrix"])}) for row in rows]


def source(name: str, target: str, kind: str = "ptx") -> str:
    """What the compiler makes of one kernel: `kind` as in KINDS, from Triton's own to machine code.

    Debugging notes (lines and paths of the source) are left out. Raises ValueError when the name
    is not that of one kernel, or the target has no such stage; else as `report`.
    """
    chosen = choose([name], [target])
    if len(chosen) != 1:
        raise ValueError(f"{name!r} holds several kernels: {', '.join(s.name for s, _ in chosen)}")
    if kind not in KINDS[target]:
        raise ValueError(f"{target} is compiled through {', '.join(KINDS[target])}, not {kind!r}")
    return _run([*_words([name], [target]), "--show", kind])


def _words(names: Sequence[str] | None, targets: Sequence[str]) -> list[str]:
    given = [("--only", name) for name in names or ()] + [("--target", t) for t in targets]
    return [word for pair in given for word in pair]


def _run(words: Sequence[str], progress: Callable[[str], Any] | None = None) -> str:
    """This file's command line, where Triton compiles; what it prints, also line by line."""
    if runtime.MODE == "absent":
        raise RuntimeError("nothing can be compiled: Triton is not installed (it needs Linux)")
    command = [sys.executable, "-u", "-P", "-W", "ignore", "-m", "kernels.compile", *words]
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_DISABLE_LINE_INFO": "1",  # else a comment more makes another program of it
        "PYTHONPATH": os.pathsep.join([ROOT, *filter(None, sys.path)]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env={**os.environ, **settings}, **pipes) as process:
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                if progress:
                    progress(line.rstrip("\n"))
        except BaseException:
            process.kill()  # an interrupted cell does not wait for the rest
            raise
    if process.returncode:
        raise RuntimeError(f"compiling ended with {process.returncode}:\n{''.join(lines[-30:])}")
    return "".join(lines)


def compiled(spec: Spec, target: str) -> Any:
    """Triton's compiled kernel; only where it is neither interpreted nor absent.

    Constants that the spec leaves out come from the first of the kernel's configurations.
    """
    triton, kernel, constants = runtime.triton, spec.kernel, dict(spec.constants)
    while not isinstance(kernel, triton.JITFunction):
        first = kernel.chosen if hasattr(kernel, "chosen") else kernel.configs[0]
        kernel, constants = kernel.fn, first.kwargs | constants
    defaults = {p.name: p.default for p in kernel.params if p.default is not Parameter.empty}
    constants = {n: v for n, v in (defaults | constants).items() if n not in spec.types}
    if wrong := set(kernel.arg_names) ^ {*spec.types, *constants}:
        raise ValueError(
            f"{spec.name}: {', '.join(sorted(wrong))}: each argument of the kernel needs a type or "
            "a value, and nothing else does"
        )
    signature = {name: spec.types.get(name, "constexpr") for name in kernel.arg_names}
    round_numbers = [i for i, kind in enumerate(signature.values()) if kind[0] in "*i"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in round_numbers}
    gpu = ("hip", target, 64) if target == "gfx942" else ("cuda", int(target[3:]), 32)
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=triton.backends.compiler.GPUTarget(*gpu),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )


def examine(spec: Spec, target: str) -> Report:
    """Compile one kernel for one target in this process and read the result."""
    start = time.perf_counter()
    row = Report(spec.name, target, spec.num_warps, limit=SHARED_LIMIT[target])
    try:
        kernel = compiled(spec, target)
    except Exception as problem:  # of the front end, a pass or the assembler: a row like others
        return replace(row, error=f"{type(problem).__name__}: {problem}".strip()[:1000])
    seconds = round(time.perf_counter() - start, 2)
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    dots = re.findall(r"tt\.dot .*", kernel.asm["ttir"])
    return replace(
        row,
        **_resources(kernel.asm),
        shared=kernel.metadata.shared,
        matrix=tuple(name for name, pattern in MATRIX.items() if re.search(pattern, text)),
        dots=bool(dots),
        narrowed=any(map(EXACT.search, dots)) and bool(re.search(r"tf32|_xf32", text)),
        seconds=seconds,
    )


def _resources(asm: dict[str, Any]) -> dict[str, int]:
    """Registers and spilled bytes, from the binary (NVIDIA) or the assembly's last lines (AMD)."""
    if "amdgcn" in asm:
        registers, spilled = re.findall(r"\.vgpr_(?:spill_)?count: +(\d+)", asm["amdgcn"])
        return {"registers": int(registers), "spills": 4 * int(spilled)}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = runtime.triton.knobs.nvidia.cuobjdump.path  # NVIDIA's own, it comes with Triton
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "spills": int(stack)}


def _code(spec: Spec, target: str, kind: str) -> str:
    """One stage, without the notes on where in the source each operation stands."""
    text = re.sub(r"^#loc.*\n", "", compiled(spec, target).asm[kind], flags=re.MULTILINE)
    return re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__)
    parser.add_argument("--only", action="append", help="a kernel file or kernel; may be repeated")
    parser.add_argument("--target", action="append", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--show", help="print one kernel's code at this stage: ttir ... ptx, sass")
    options = parser.parse_args(arguments)
    try:
        chosen = choose(options.only, options.target or TARGETS)
    except ValueError as problem:
        parser.error(str(problem))
    if options.show and len(chosen) != 1:
        parser.error(f"--show takes one kernel and one target, not {len(chosen)} pairs")
    if runtime.MODE not in ("compiler", "gpu"):
        _run(sys.argv[1:] if arguments is None else arguments, print)
    elif options.show:
        print(_code(*chosen[0], options.show), end="")
    else:
        # threads suffice: the compiler is C++ and lets others run, the assembler is a process
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = [print(row) or row for row in pool.map(examine, *zip(*chosen, strict=True))]
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
