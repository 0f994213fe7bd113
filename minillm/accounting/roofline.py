"""Time: a device is either computing or moving bytes; the slower of the two decides.

Source: Williams, Waterman and Patterson, Roofline: An Insightful Visual Performance Model for
Multicore Architectures, 2009.
"""

# b batch, m, k, n sides of a product [m, k] times [k, n]

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass

from minillm.accounting import flops, memory, parameters
from minillm.config import ModelConfig
from minillm.paths import ASSETS


@dataclass(frozen=True)
class Hardware:
    """What a device can do at best."""

    name: str
    flops: float
    """FLOP/s of dense matrix products in the format that training uses (16 bits on a GPU)"""
    bandwidth: float
    """bytes/s between memory and processor, reads and writes together"""
    memory: float
    """bytes"""

    @property
    def balance(self) -> float:
        """FLOPs per byte from which on computing takes longer than moving."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class Work:
    """FLOPs to do and bytes to read and write for them. Several in a row: add them."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def compute_seconds(self, hardware: Hardware) -> float:
        """Time for the arithmetic alone."""
        return self.flops / hardware.flops

    def memory_seconds(self, hardware: Hardware) -> float:
        """Time for the bytes alone."""
        return self.bytes / hardware.bandwidth

    def seconds(self, hardware: Hardware) -> float:
        """The larger of the two: both happen at the same time, at best."""
        return max(self.compute_seconds(hardware), self.memory_seconds(hardware))

    def bound(self, hardware: Hardware) -> str:
        """Which of the two it is: "compute" or "memory"."""
        return "compute" if self.intensity >= hardware.balance else "memory"

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def published() -> dict[str, Hardware]:
    """The GPUs of assets/data/gpus.csv: peak of dense 16-bit products, bandwidth and memory."""
    with (ASSETS / "data" / "gpus.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        row["gpu"]: Hardware(
            row["gpu"],
            flops=float(row["tflops_16bit"]) * 1e12,
            bandwidth=float(row["bandwidth_gb_s"]) * 1e9,
            memory=float(row["memory_gb"]) * 1e9,
        )
        for row in rows
    }


HARDWARE = published()


def matmul(m: int, k: int, n: int, batch: int = 1, itemsize: int = 2) -> Work:
    """`batch` products of [m, k] and [k, n]: 2 b m k n FLOPs; reads both, writes [m, n], once each.

    >>> scores = matmul(4096, 2048, 4096)
    >>> a100 = Hardware("A100, rounded", flops=312e12, bandwidth=2e12, memory=80e9)
    >>> round(scores.compute_seconds(a100) * 1e6), round(scores.memory_seconds(a100) * 1e6, 1)
    (220, 33.6)
    """
    if min(m, k, n, batch) < 1:
        raise ValueError(f"m={m}, k={k}, n={n} and batch={batch} must be at least 1")
    return Work(2.0 * batch * m * k * n, float(batch * (m * k + k * n + m * n) * itemsize))


def decoding(cfg: ModelConfig, batch: int, context: int, itemsize: int = 2) -> Work:
    """One new token for each of `batch` rows: every matrix is read once, every row's cache once.

    The token table is read only where rows are picked, unless it is the output matrix too.
    """
    count = parameters.count(cfg)
    weights = count.total - (0 if cfg.tie_embeddings else count.tokens) - count.positions
    cache = memory.kv_cache(cfg, batch, min(context, cfg.window or context), itemsize)
    return Work(flops.decode(cfg, batch, context).total, weights * itemsize + cache)


def mfu(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilization: what training needs over what the device could do.

    `flops_per_token` is 6N, or `flops.training` over its tokens; never with recomputation, which
    is work but no progress. Source: Chowdhery et al., PaLM: Scaling Language Modeling with
    Pathways, 2022, appendix B.

    >>> round(mfu(6 * 65.2e9, 380, 312e12), 3)
    0.476
    """
    if min(flops_per_token, tokens_per_second, peak) <= 0:
        raise ValueError(
            f"flops_per_token={flops_per_token}, tokens_per_second={tokens_per_second} and "
            f"peak={peak} must be positive"
        )
    return flops_per_token * tokens_per_second / peak


def training_seconds(
    n: float, tokens: float, devices: int, hardware: Hardware, utilization: float
) -> float:
    """Time for 6 N D FLOPs on `devices` devices at a model FLOPs utilization in (0, 1].

    >>> days = training_seconds(100e9, 1e12, 100, HARDWARE["A100"], 1.0) / 86400
    >>> round(days)
    223
    """
    if not 0 < utilization <= 1 or devices < 1:
        raise ValueError(
            f"utilization={utilization} must be in (0, 1] and devices={devices} at least 1"
        )
    return flops.six_n_d(n, tokens) / (devices * hardware.flops * utilization)


def best_rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    """Highest `amount` per second of calls of `work`, repeated for about `seconds`.

    The best, not the mean: other programs only ever make a call slower.
    """
    work()  # the first call allocates
    best, end = 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        work()
        best = max(best, amount / (time.perf_counter() - start))
    return best


def this_cpu(seconds: float = 1.0, itemsize: int = 4) -> Hardware:
    """This machine, measured: its best matrix product and its best copy of memory.

    `itemsize` 4 multiplies float32, 2 bfloat16. Uses as many threads as PyTorch does, and takes
    about `seconds`. Raises ValueError for another `itemsize`.
    """
    import psutil
    import torch  # all else in accounting works from a config alone

    if itemsize not in (2, 4):
        raise ValueError(f"itemsize={itemsize} must be 2 (bfloat16) or 4 (float32)")
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16

    def product(n: int) -> float:
        a, out = torch.ones(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)
        return best_rate(lambda: torch.mm(a, a, out=out), matmul(n, n, n).flops, seconds / 4)

    source = torch.ones(1 << 25)  # 128 MiB: beyond the caches
    target = torch.empty_like(source)
    copy = best_rate(lambda: target.copy_(source), 2.0 * source.nbytes, seconds / 4)
    best = max(product(n) for n in (256, 512, 1024))  # which, depends on caches and threads
    return Hardware("this CPU", best, copy, float(psutil.virtual_memory().total))
