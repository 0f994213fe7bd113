"""Each kernel against PyTorch (eager, compiled, cuBLAS, SDPA's back ends) and Liger-Kernel.

    python tests/benchmarks/kernels.py [--only softmax attention] [--runs 50] [--quick]

Needs a GPU and says so where there is none. Each figure is the median of many runs, each of which
finds the cache cold: between two of them a buffer larger than it is overwritten. Then the device
idles for a millisecond, so that the host is done launching before the clock starts. A figure's
share is that of a roofline measured on the same machine: the bandwidth of a large device-to-device
copy, or the best large matrix product of the type. Nothing is timed before its numbers are those of
the judge. Writes assets/benchmarks/kernels.json; with --only, these kernels' rows in it.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import tyro
from _races import TABLE, Race, Setting
from _record import ROOT, record
from tqdm import tqdm

from kernels import runtime


def leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in a fixed order."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [x for part in result for x in leaves(part)]


def distance(result: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest number of each tensor; NaN counts as inf."""
    mine, theirs = leaves(result), leaves(wanted)
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        return float("inf")
    worst = 0.0
    for x, y in zip(mine, theirs, strict=True):
        size = y.float().abs().max().clamp(min=1e-30)
        off = ((x.float() - y.float()).abs().max() / size).item()
        worst = max(worst, off if off == off else float("inf"))
    return worst


def judged(race: Race) -> dict[str, str]:
    """Call each contestant once; what is wrong with whom. Ours and the judge have to be right."""
    problems, wanted = {}, race.contestants[race.judge]()
    wanted = [x.clone() for x in leaves(wanted)]
    for name, call in race.contestants.items():
        if name == race.judge:
            continue
        try:
            result = call()
        except Exception as problem:  # a back end that this GPU or this size does not have
            if name == "ours":
                raise
            problems[name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        off = 0.0 if name in race.unlike else distance(result, wanted)
        if off > race.tolerance:
            problems[name] = f"off by {off:.2g}, allowed {race.tolerance}"
    if "ours" in problems:
        raise ValueError(f"ours is wrong: {problems['ours']}")
    return problems


def timed(call: Callable[[], Any], runs: int, flush: torch.Tensor) -> dict[str, float]:
    """Milliseconds (median, and the middle 60 %) and MB that were allocated beyond the inputs."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    extra = torch.cuda.max_memory_allocated() - before
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return {
        "ms": statistics.median(times),
        "low": times[runs // 5],
        "high": times[-1 - runs // 5],
        "extra_mb": extra / 1e6,
    }


def rooflines(runs: int, flush: torch.Tensor) -> dict[str, float]:
    """GB/s of a copy of 2 GiB (read and written), TFLOP/s of the best product of each type."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    ms = timed(partial(torch.empty_like(source).copy_, source), runs, flush)["ms"]
    found = {"copy": 2 * source.numel() / ms / 1e6}
    torch.backends.cuda.matmul.allow_tf32 = True
    one = torch.ones((), device="cuda")
    products = {
        "bf16": (torch.bfloat16, torch.mm),
        "tf32": (torch.float32, torch.mm),
        "int8": (torch.int8, torch._int_mm),
        "fp8": (
            torch.float8_e4m3fn,
            lambda a, b: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16),
        ),
    }
    for name, (dtype, product) in products.items():
        rates = []
        for n in (4096, 8192, 16_384):
            a, b = ((torch.randn(n, n, device="cuda") * 4).to(dtype) for _ in range(2))
            try:
                ms = timed(partial(product, a, b.T), runs, flush)["ms"]
            except (RuntimeError, ValueError) as problem:  # this GPU has no such unit
                print(f"{name}: {problem}")
                break
            rates.append(2 * n**3 / ms / 1e9)
        if rates:
            found[name] = max(rates)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


@dataclass(frozen=True)
class Row:
    """One contestant of one race, as the record keeps it."""

    kernel: str
    race: str
    size: tuple[int, ...]
    who: str
    ms: float
    low: float
    high: float
    extra_mb: float
    rate: float
    """GB/s, or TFLOP/s where arithmetic is the bound"""
    share: float | None
    """of the roofline"""
    bound: str


def measure(
    names: Sequence[str], runs: int, roofs: dict[str, float], flush: torch.Tensor, on: Setting
) -> tuple[list[Row], list[str]]:
    """All contestants of these kernels, and what could not run."""
    rows, problems = [], []
    plan = [(name, size) for name in names for size in TABLE[name][1]]
    for name, size in tqdm(plan):
        torch._dynamo.reset()  # else it stops compiling after a few sizes
        for title, race in TABLE[name][0](on, *size):
            wrong = judged(race)
            problems += [f"{name} {size} {title}, {who}: {why}" for who, why in wrong.items()]
            moved = race.peak == "copy"
            for who, call in race.contestants.items():
                if who in wrong:
                    continue
                times = timed(call, runs, flush)
                amount = race.cost.bytes / 1e6 if moved else race.cost.flops / 1e9
                rate = amount / times["ms"]
                share = rate / roofs[race.peak] if race.peak in roofs else None
                row = Row(name, title, size, who, **times, rate=rate, share=share, bound=race.peak)
                rows.append(row)
                unit = "GB/s" if moved else "TFLOP/s"
                text = "" if share is None else f"{share:4.0%} of {race.peak}"
                tqdm.write(
                    f"{name:<21}{title:<20}{size!s:<32}{who:<12}{times['ms']:8.3f} ms"
                    f"{rate:9.1f} {unit:<8}{text}"
                )
        torch.cuda.empty_cache()
    return rows, problems


def merged(old: dict[str, Any] | None, new: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A record of these kernels, with an earlier one's rows of others if it is of the same kind."""
    if old is None or any(old[key] != new[key] for key in ("device", "versions", "runs")):
        return new
    rows = [row for row in old["rows"] if row["kernel"] not in names] + new["rows"]
    left = [text for text in old["left_out"] if text.partition(" ")[0] not in names]
    order = list(TABLE)
    rows.sort(key=lambda row: order.index(row["kernel"]))
    return new | {"rows": rows, "left_out": left + new["left_out"]}


def main(only: tuple[str, ...] = (), runs: int = 50, quick: bool = False) -> None:
    """Measure all kernels, or those named; a quick run is not recorded."""
    if unknown := set(only) - set(TABLE):
        raise SystemExit(f"no kernel is called {', '.join(unknown)}; there are {', '.join(TABLE)}")
    if runtime.MODE != "gpu":
        print(f"kernels are not measured: there is no GPU to run them on ({runtime.MODE})")
        return
    from torch._functorch import config

    config.donated_buffer = False  # backward is called again and again
    runs = 10 if quick else runs
    flush = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")  # larger than any cache
    roofs = rooflines(runs, flush)
    print({name: round(rate, 1) for name, rate in roofs.items()})
    names = only or tuple(TABLE)
    rows, problems = measure(names, runs, roofs, flush, Setting())
    print(*problems, sep="\n")
    device = torch.cuda.get_device_properties(0)
    packages = [n for n in ("torch", "triton", "liger_kernel") if importlib.util.find_spec(n)]
    result = {
        "device": device.name,
        "memory_gb": round(device.total_memory / 1e9, 1),
        "processors": device.multi_processor_count,
        "versions": {"cuda": torch.version.cuda} | {name: version(name) for name in packages},
        "rooflines": roofs,
        "runs": runs,
        "rows": [asdict(row) | {"size": list(row.size)} for row in rows],
        "left_out": problems,
    }
    path = ROOT / "assets" / "benchmarks" / "kernels.json"
    old = json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else None
    record("kernels", merged(old, result, names), ("torch", "triton"), quick)


if __name__ == "__main__":
    tyro.cli(main)
