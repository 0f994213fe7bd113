"""Softmax over the last axis: exp(x) / Σ exp(x), each number read once and written once."""

# n rows, d width; a program takes a tile of rows

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.spec import Spec

WIDEST = 32_768
"""Forward, a program holds rows up to here in its registers; backward, with two of them, half as
wide ones. At 65,536 the registers of a whole multiprocessor do not hold a row (compiled for sm_90,
144 bytes a thread spill), so wider rows come in a loop of blocks."""
LOOP = 16384


def reference(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x) over the last axis: x [..., d] -> [..., d], computed in float32 at least.

    -inf gives 0. A row of nothing but -inf, a query that may attend to nothing, gives zeros, and
    its gradient is zero, where the formula would say 0 / 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    empty = wide.isneginf().all(-1, keepdim=True)
    return wide.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(x.dtype)


@jit
def _forward(x_ptr, y_ptr, n, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    place = rows[:, None] * d + cols[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN
    e = tl.exp(x - top[:, None])
    total = tl.sum(e, axis=1)
    share = tl.where(total == 0, 0.0, 1 / total)
    tl.store(y_ptr + place, e * share[:, None], mask=inside)


@jit
def online(x, top, total):
    """Take a tile x [rows, block] into each row's maximum and Σ exp(x - maximum).

    What was summed so far was measured from a lower maximum: one factor mends that. Exact in any
    order of blocks.

    Source: Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018.
    """
    higher = tl.maximum(top, tl.max(x, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
    return higher, total


@jit
def _forward_wide(x_ptr, y_ptr, d, BLOCK: tl.constexpr):
    x_ptr += tl.program_id(0).to(tl.int64) * d
    y_ptr += tl.program_id(0).to(tl.int64) * d
    cols = tl.arange(0, BLOCK)[None, :]
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, d, BLOCK):
        x = tl.load(x_ptr + start + cols, mask=start + cols < d, other=float("-inf"))
        top, total = online(x.to(tl.float32), top, total)
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.where(total == 0, 0.0, 1 / total)
    # backwards through the row: what was read last is still in the cache
    for done in range(0, d, BLOCK):
        start = (d - 1) // BLOCK * BLOCK - done
        inside = start + cols < d
        x = tl.load(x_ptr + start + cols, mask=inside).to(tl.float32)
        tl.store(y_ptr + start + cols, tl.exp(x - top[:, None]) * share[:, None], mask=inside)


@jit
def _backward(y_ptr, dy_ptr, dx_ptr, n, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    place = rows[:, None] * d + cols[None, :]
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(y * dy, axis=1)  # weighted by y, which sums to one
    tl.store(dx_ptr + place, y * (dy - mean[:, None]), mask=inside)


@jit
def _backward_wide(y_ptr, dy_ptr, dx_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * d
    cols = tl.arange(0, BLOCK)
    mean = 0.0
    for start in range(0, d, BLOCK):
        inside = start + cols < d
        y = tl.load(y_ptr + row + start + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row + start + cols, mask=inside, other=0.0).to(tl.float32)
        mean += tl.sum(y * dy, axis=0)
    for done in range(0, d, BLOCK):
        start = (d - 1) // BLOCK * BLOCK - done
        inside = start + cols < d
        y = tl.load(y_ptr + row + start + cols, mask=inside).to(tl.float32)
        dy = tl.load(dy_ptr + row + start + cols, mask=inside).to(tl.float32)
        tl.store(dx_ptr + row + start + cols, y * (dy - mean), mask=inside)


def tile(n: int, width: int, device: torch.device, widest: int = WIDEST) -> dict[str, int]:
    """ROWS, BLOCK and num_warps for n rows of this width: short rows share a program.

    16 numbers a thread keep enough of them on the way from memory. The interpreter pays for each
    operation of each program more than for the numbers, and gets larger tiles.
    """
    block = min(triton.next_power_of_2(width), widest)
    rows = (2**12 if device.type == "cuda" else 2**16) // block
    rows = max(1, min(rows, triton.next_power_of_2(n)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(rows * block // 512, 4), 16)}


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x, d = x.contiguous(), x.shape[-1]
        y, n = torch.empty_like(x), x.numel() // d
        if d > WIDEST:
            _forward_wide[(n,)](x, y, d, BLOCK=LOOP, num_warps=16)
        else:
            size = tile(n, d, x.device)
            _forward[(triton.cdiv(n, size["ROWS"]),)](x, y, n, d, **size)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dy, dx, d = dy.contiguous(), torch.empty_like(y), y.shape[-1]
        n = y.numel() // d
        if d > WIDEST // 2:
            _backward_wide[(n,)](y, dy, dx, d, BLOCK=LOOP, num_warps=16)
        else:
            size = tile(n, d, y.device)
            _backward[(triton.cdiv(n, size["ROWS"]),)](y, dy, dx, n, d, **size)
        return dx


def softmax(x: Tensor) -> Tensor:
    """`reference` over the last axis of x [..., d], float32, float16 or bfloat16.

    Rows up to `WIDEST` are held by one program, and read and written once; wider ones are read
    twice. Raises ValueError when there is no axis or it is empty, and as `kernels.runtime.check`
    does.
    """
    check(x, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"softmax needs numbers to go over, x is {tuple(x.shape)}")
    return _Softmax.apply(x)


def cost(
    rows: int, width: int, itemsize: int = 4, fused: bool = True, backward: bool = False
) -> Cost:
    """FLOPs and bytes that have to move; with `fused=False`, of one operation after the other.

    Fused, forward reads x and writes y; backward reads y and dy and writes dx, 3 numbers instead of
    2 (the loop of blocks reads twice, the second time from the cache). One after the other, forward
    is

        maximum (reads x), subtract (reads x, writes), exp (reads, writes), sum (reads), divide
        (reads, writes): 8 numbers for each of x, and 4 for each row

    and backward y·dy (reads both, writes), sum (reads), subtract (reads, writes), multiply (reads
    both, writes): 9, and 2 for each row.

    >>> cost(rows=1, width=1000).bytes, cost(rows=1, width=1000, fused=False).bytes
    (8000, 32016)
    """
    if fused:
        passes, each_row = 2 + backward, 0
    else:
        passes, each_row = (9, 2) if backward else (8, 4)
    moved = (passes * width + each_row) * rows * itemsize
    return Cost(flops=(4 if backward else 5) * rows * width, bytes=moved)


def specs() -> list[Spec]:
    """Rows of 4,096 in bf16, the widest that one program holds, and the loop of blocks."""
    forward = {"x_ptr": "*bf16", "y_ptr": "*bf16", "d": "i32"}
    backward = {"y_ptr": "*bf16", "dy_ptr": "*bf16", "dx_ptr": "*bf16", "d": "i32"}
    found = []
    for way, kernel, loop, types, widest in (
        ("forward", _forward, _forward_wide, forward, WIDEST),
        ("backward", _backward, _backward_wide, backward, WIDEST // 2),
    ):
        for d, warps in ((4096, 8), (widest, 16)):
            size = {"ROWS": 1, "BLOCK": d}
            found += [Spec(f"softmax {way} {d} bf16", kernel, types | {"n": "i32"}, size, warps)]
        found += [Spec(f"softmax {way} loop bf16", loop, types, {"BLOCK": LOOP}, 16)]
    return found
