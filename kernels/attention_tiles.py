"""What the forward and the backward kernels of attention share: tiles, masks and settings."""

# b batch, h query heads, g key/value heads, t queries, s keys, d head width
# n queries and m keys of all packed sequences; inside kernels m is a query's place and n a key's

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dropout import check_seed, philox_uniform
from kernels.runtime import check, jit, tl, triton
from kernels.spec import TARGETS, Spec

WIDEST = 256
"""A tile of whole rows has to fit one program's registers."""


@jit
def tile(base, first, stride, length, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
         INSIDE: tl.constexpr):  # fmt: skip
    """ROWS rows from `first` on, of a matrix `length` rows long and D wide; zeros beyond it.

    INSIDE: all rows are known to exist. The first row's place is a 64-bit number, since tensors
    can have more than 2³¹ numbers; the distances from it are of 32 bits, and the same in each turn
    of a loop.
    """
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    place = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if INSIDE and COLS == D:
        x = tl.load(place)
    elif INSIDE:
        x = tl.load(place, mask=(cols < D)[None, :], other=0.0)
    else:
        there = (first + rows < length)[:, None] & (cols < D)[None, :]
        x = tl.load(place, mask=there, other=0.0)
    return x


@jit
def put(base, first, stride, length, x, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store what `tile` would load."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    place = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(place, x, mask=(first + rows < length)[:, None] & (cols < D)[None, :])


@jit
def task(longest, heads, BLOCK: tl.constexpr):
    """What this program works on: a tile's number, how many there are, a head and a sequence."""
    tiles, program = tl.cdiv(longest, BLOCK), tl.program_id(0)
    head = (program // tiles % heads).to(tl.int64)
    return program % tiles, tiles, head, (program // tiles // heads).to(tl.int64)


@jit
def sequence(offsets, z, length):
    """First row and number of rows of sequence z, which may be packed with others."""
    start = 0
    if offsets is not None:
        start = tl.load(offsets + z)
        length = tl.load(offsets + z + 1) - start
        start = start.to(tl.int64)
    return start, length


@jit
def span(first, length, low, high, ROWS: tl.constexpr, COLS: tl.constexpr, LOW: tl.constexpr,
         HIGH: tl.constexpr):  # fmt: skip
    """Which of `length` columns a tile of ROWS rows from `first` on has to visit, by COLS at once.

    Row r sees the columns r + low ... r + high; without LOW or HIGH there is no such bound. Four
    edges: in tiles from the first to the second, and from the third to the fourth, some pairs are
    hidden; from the second to the third all are visible.
    """
    start, full, last, end = 0, 0, length, length
    if HIGH:
        last = tl.minimum(first + high + 1, length)
        end = tl.maximum(tl.minimum(first + ROWS + high, length), 0)
    if LOW:
        start = tl.maximum(first + low, 0) // COLS * COLS
        full = tl.cdiv(tl.maximum(first + ROWS - 1 + low, 0), COLS) * COLS
        full = tl.minimum(full, tl.cdiv(end, COLS) * COLS)
    return start, full, tl.maximum(tl.maximum(last, 0) // COLS * COLS, full), end


@jit
def visible(m, n, ahead, s, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query m sees key n; query 0 stands at key `ahead`. WINDOW 0: there is none."""
    seen = n < s
    if CAUSAL:
        seen = seen & (n <= m + ahead)
    if WINDOW:
        seen = seen & (n > m + ahead - WINDOW)
    return seen


@jit
def keep(row, n, seed, DROPOUT: tl.constexpr):
    """Whether dropout keeps the weight of key n in this row of the whole tensor."""
    return tl.rand(seed, (row.to(tl.int64) << 32) + n) >= DROPOUT


def fitting(configs: list, arguments: dict, **constants: Any) -> list:
    """Which of a kernel's configurations are worth trying for tensors of this type and width.

    float32 is multiplied at full precision, number by number and not by matrix units, and wants a
    small tile, or its products fill no registers but main memory; for the other types wide heads
    leave less room.
    """
    wide = constants["WIDTH"]
    size = {c: c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] * wide for c in configs}
    if arguments["q_ptr"].dtype == torch.float32:
        return [max((c for c in configs if size[c] <= min(2**17, 2**10 * wide)), key=size.get)]
    return [c for c in configs if 2**18 <= size[c] <= 2**21] or configs[:1]


class Rule(NamedTuple):
    """Everything about an attention but its tensors."""

    causal: bool
    window: int
    """0: none"""
    scale: float
    dropout: float
    seed: int
    offsets: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    """of packed sequences; then the tensors are one example, [1, h, n, d] and [1, g, m, d]"""
    sequences: int = 0
    longest: tuple[int, int] = (0, 0)
    """queries and keys of the longest sequence"""

    def numbers(self, q: Tensor, k: Tensor) -> tuple:
        """Arguments of every kernel: sizes, scale and seed."""
        heads, t = q.shape[1:3]
        return heads, heads // k.shape[1], t, k.shape[2], *self.longest, self.scale, self.seed

    def grid(self, axis: int, heads: int) -> Callable[[dict[str, int]], tuple[int]]:
        """One program for each tile of queries (axis 0) or of keys (1), head and sequence."""
        block, longest = ("BLOCK_M", "BLOCK_N")[axis], self.longest[axis]
        return lambda meta: (triton.cdiv(longest, meta[block]) * heads * self.sequences,)

    def constants(self, q: Tensor) -> dict[str, bool | int | float]:
        """What every kernel is compiled for."""
        return {
            "D": q.shape[3],
            "WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
            "CAUSAL": self.causal,
            "WINDOW": self.window,
            "DROPOUT": self.dropout,
        }


def rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
    seed: int | None,
    offsets: tuple[Tensor, Tensor] | None = None,
) -> Rule:
    """The settings, checked together with the tensors [b, h, t, d] and [b, g, s, d].

    Raises ValueError where something does not fit, and as `kernels.runtime.check` does.
    """
    check(q, k, v, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape:
        raise ValueError(f"attention needs q [b, h, t, d] and k, v [b, g, s, d]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"batch and head width of q, k and v must agree; got {shapes}")
    if not 0 < q.shape[3] <= WIDEST:
        raise ValueError(f"head width {q.shape[3]} must be between 1 and {WIDEST}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"one dtype for all, not q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"window={window} must be at least 1 (a token sees itself) and needs causal=True; "
            f"got causal={causal}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be positive and finite")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    if dropout:
        check_seed(seed)  # which refuses None by name
    found = Rule(causal, window or 0, scale, float(dropout), seed if dropout else 0)
    if offsets is None:
        return found._replace(sequences=len(q), longest=(q.shape[2], k.shape[2]))
    longest = tuple(
        _longest(name, starts, x.shape[2])
        for name, starts, x in zip(("offsets_q", "offsets_k"), offsets, (q, k), strict=True)
    )
    if len(offsets[0]) != len(offsets[1]):
        raise ValueError(f"offsets of {len(offsets[0]) - 1} and {len(offsets[1]) - 1} sequences")
    moved = tuple(x.to(q.device, torch.int32) for x in offsets)
    return found._replace(offsets=moved, sequences=len(moved[0]) - 1, longest=longest)


def _longest(name: str, offsets: Tensor, rows: int) -> int:
    """Length of the longest sequence; no kernel may follow offsets out of the tensor."""
    if offsets.ndim != 1 or len(offsets) == 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be [sequences + 1] of int32 or int64, got {tuple(offsets.shape)} "
            f"{offsets.dtype}"
        )
    steps = offsets.cpu().long()
    lengths = steps.diff()
    if steps[0] != 0 or steps[-1] != rows or (lengths < 0).any():
        raise ValueError(f"{name} must rise from 0 to {rows} rows, got {steps.tolist()[:20]}")
    return int(lengths.max()) if len(lengths) else 0


def mask(
    t: int, s: int, causal: bool, window: int = 0, device: torch.device | None = None
) -> Tensor:
    """What `visible` computes, for all pairs: [t, s], True = may attend.

    >>> mask(2, 4, causal=True, window=2).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    seen = torch.ones(t, s, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(s - t)
    return seen.triu(s - t - window + 1) if window else seen


def kept(dropout: float, seed: int, rows: Tensor, keys: int) -> Tensor:
    """What `keep` computes, as a factor: 0, or 1 / (1 - dropout); [..., keys] of float32.

    The counter of a random number is 2³² · row + key; `rows` [...] are numbered over batch, heads
    and queries, in this order (packed: over heads and all queries), keys within their sequence.
    """
    counters = (rows[..., None] << 32) + torch.arange(keys, device=rows.device)
    limit = torch.tensor(dropout, dtype=torch.float32, device=rows.device)
    return (philox_uniform(seed, counters) >= limit) / (1 - dropout)


def pairs(t: int, s: int, causal: bool = False, window: int | None = None) -> int:
    """How many of t · s pairs of a query and a key the mask leaves.

    >>> pairs(4, 4), pairs(4, 4, causal=True), pairs(4, 4, causal=True, window=2)
    (16, 10, 7)
    """
    if not causal:
        return t * s

    def up_to(n: int) -> int:  # pairs of the first n places with what lies behind them
        n = max(n, 0)
        seen = min(n, window or n)
        return seen * (seen + 1) // 2 + (n - seen) * seen

    return up_to(s) - up_to(s - t)


def spec(name: str, kernel: Any, pointers: str, strides: str, width: int, tiles: tuple[int, ...],
         targets: tuple[str, ...] = TARGETS) -> Spec:  # fmt: skip
    """A causal kernel in bf16; `tiles`: warps, stages, BLOCK_M and BLOCK_N."""
    warps, stages, rows, columns = tiles
    numbers = ["heads", "group", "t", "s", "longest_q", "longest_k", "seed"]
    numbers += [f"stride_{x}{axis}" for x in strides for axis in "bht"]
    types = dict.fromkeys(numbers, "i32") | {"scale": "fp32"}
    types |= {f"{x}_ptr": "*fp32" if x in ("lse", "d") else "*bf16" for x in pointers.split()}
    constants = {"offsets_q": None, "offsets_k": None, "D": width, "WIDTH": width, "CAUSAL": True}
    constants |= {"WINDOW": 0, "DROPOUT": 0.0, "BLOCK_M": rows, "BLOCK_N": columns}
    name += f" bf16 {width}" + (f" on {targets[0]}" if len(targets) == 1 else "")
    return Spec(name, kernel, types, constants, warps, stages, targets)


def readable(x: Tensor) -> Tensor:
    """x, or a copy of it where the numbers of one row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty(x: Tensor) -> Tensor:
    """For results of x's shape [b, h, t, d]: in memory [b, t, h, d], as the next layer reads it."""
    b, h, t, d = x.shape
    return torch.empty(b, t, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
