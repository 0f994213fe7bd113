"""LayerNorm: (x - mean) / sqrt(var + eps) · weight + bias, over the last axis, in one pass."""

# n rows, d width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.runtime import check, jit, programs, tl, triton
from kernels.spec import Spec

WIDEST = 65_536
"""A row should fit one program's registers: above 8,192 the backward pass spills some of them."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias: x [..., d], weight and bias [d] -> [..., d].

    The variance is the mean of (x - mean)². Statistics in float32 at least.
    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = centered * rstd * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


@jit
def _forward(x_ptr, w_ptr, b_ptr, y_ptr, stats_ptr, d, eps, BIAS: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, B)
    inside = cols < d
    x = tl.load(x_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    # mean(x²) - mean² would lose the variance of a row like 10,000 + noise, and one float32 has
    # not digits enough for its mean: the second part is the mean of what the first one left.
    mean = tl.sum(x, axis=0) / d
    centered = tl.where(inside, x - mean, 0.0)
    rest = tl.sum(centered, axis=0) / d
    centered = tl.where(inside, centered - rest, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=0) / d + eps)
    tl.store(stats_ptr + 3 * row, mean)
    tl.store(stats_ptr + 3 * row + 1, rest)
    tl.store(stats_ptr + 3 * row + 2, rstd)
    y = centered * rstd * w
    if BIAS:
        y += tl.load(b_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + cols, y, mask=inside)


@jit
def _backward(
    x_ptr,
    w_ptr,
    stats_ptr,
    dy_ptr,
    dx_ptr,
    dwb_ptr,
    n,
    d,
    rows,
    BIAS: tl.constexpr,
    B: tl.constexpr,
):
    # Each program takes `rows` rows and sums its shares of the gradients of weight and bias in
    # registers; the shares, one row for each program, are added up outside, in a fixed order.
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, B)
    inside = cols < d
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([B], tl.float32)
    db = tl.zeros([B], tl.float32)
    for row in range(program * rows, tl.minimum(program * rows + rows, n)):
        x = tl.load(x_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + 3 * row)
        rest = tl.load(stats_ptr + 3 * row + 1)
        rstd = tl.load(stats_ptr + 3 * row + 2)
        xhat = (x - mean - rest) * rstd  # not 0 beyond the row, but dy is, and so each product
        dw += dy * xhat
        db += dy
        wdy = w * dy
        along = tl.sum(wdy * xhat, axis=0) / d
        dx = rstd * (wdy - tl.sum(wdy, axis=0) / d - xhat * along)
        tl.store(dx_ptr + row * d + cols, dx, mask=inside)
    tl.store(dwb_ptr + 2 * program * d + cols, dw, mask=inside)
    if BIAS:
        tl.store(dwb_ptr + (2 * program + 1) * d + cols, db, mask=inside)


def _settings(d: int, bias: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(d)
    return {"BIAS": bias, "B": block, "num_warps": min(max(block // 256, 4), 16)}


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        d = x.shape[-1]
        x, weight = x.contiguous(), weight.contiguous()
        b = weight if bias is None else bias.contiguous()  # without a bias: a pointer not read
        y, n = torch.empty_like(x), x.numel() // d
        stats = torch.empty(n, 3, device=x.device, dtype=torch.float32)
        _forward[(n,)](x, weight, b, y, stats, d, eps, **_settings(d, bias is not None))
        ctx.save_for_backward(x, weight, stats)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, stats = ctx.saved_tensors
        d, n, dx, bias = x.shape[-1], len(stats), torch.empty_like(x), ctx.bias_dtype is not None
        rows = max(1, triton.cdiv(n, programs(x.device)))
        parts = triton.cdiv(n, rows)
        shares = torch.zeros(parts, 2, d, device=x.device, dtype=torch.float32)
        arguments = x, weight, stats, dy.contiguous(), dx, shares, n, d, rows
        _backward[(len(shares),)](*arguments, **_settings(d, bias))
        dw, db = shares.sum(0)
        return dx, dw.to(weight.dtype), db.to(ctx.bias_dtype) if bias else None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`reference`, forward and backward: each reads its inputs once and writes its results once.

    x [..., d] of float32, float16 or bfloat16, weight and bias [d]. Raises ValueError when the
    width does not fit, and as `kernels.runtime.check` does.
    """
    check(x, weight, bias, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    shapes = {tuple(v.shape) for v in (weight, bias) if v is not None}
    if x.ndim == 0 or shapes != {tuple(x.shape[-1:])} or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(
            f"x {tuple(x.shape)} needs weight and bias of its last axis, at most {WIDEST} wide; "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    return _LayerNorm.apply(x, weight, bias, eps)


def cost(rows: int, width: int, itemsize: int = 4, backward: bool = False) -> Cost:
    """Bytes that have to move, and FLOPs, of one pass; those of weight, bias and statistics too.

    >>> cost(rows=2, width=8).bytes  # x, weight, bias read; y and three statistics a row written
    216
    """
    numbers = rows * width
    if backward:  # the weight is read, its gradient and the bias's are written
        return Cost(15 * numbers, (3 * numbers + 3 * width) * itemsize + 12 * rows)
    return Cost(9 * numbers, (2 * numbers + 2 * width) * itemsize + 12 * rows)


def specs() -> list[Spec]:
    """Rows of 4,096 in bf16."""
    forward = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "y_ptr"), "*bf16")
    forward |= {"stats_ptr": "*fp32", "d": "i32", "eps": "fp32"}
    backward = dict.fromkeys(("x_ptr", "w_ptr", "dy_ptr", "dx_ptr"), "*bf16")
    backward |= {"stats_ptr": "*fp32", "dwb_ptr": "*fp32", "n": "i32", "d": "i32", "rows": "i32"}
    constants = _settings(4096, bias=True)
    warps = constants.pop("num_warps")
    return [
        Spec("layer_norm forward bf16", _forward, forward, constants, warps),
        Spec("layer_norm backward bf16", _backward, backward, constants, warps),
    ]
