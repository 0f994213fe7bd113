"""RMSNorm: x / sqrt(mean(x²) + eps) · weight, over the last axis, in one pass over memory."""

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
"""A row has to fit one program's registers."""


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight: x [..., d], weight [d] -> [..., d].

    Statistics in float32 at least. Source: Zhang and Sennrich, Root Mean Square Layer
    Normalization, 2019.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


@jit
def _forward(x_ptr, w_ptr, y_ptr, rstd_ptr, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < d
    x = tl.load(x_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / d + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + row * d + cols, x * rstd * w, mask=inside)


@jit
def _backward(x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, dw_ptr, n, d, rows, BLOCK: tl.constexpr):
    # Each program takes `rows` rows and sums its share of the weight's gradient in registers;
    # the shares, one row of dw for each program, are added up outside, in a fixed order.
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < d
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in range(program * rows, tl.minimum(program * rows + rows, n)):
        x = tl.load(x_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * d + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = x * rstd
        dw += dy * xhat
        wdy = w * dy
        dx = rstd * (wdy - xhat * (tl.sum(wdy * xhat, axis=0) / d))
        tl.store(dx_ptr + row * d + cols, dx, mask=inside)
    tl.store(dw_ptr + program * d + cols, dw, mask=inside)


def _warps(block: int) -> int:
    return min(max(block // 256, 4), 16)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        d = x.shape[-1]
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        n, block = x.numel() // d, triton.next_power_of_2(d)
        rstd = torch.empty(n, device=x.device, dtype=torch.float32)
        _forward[(n,)](x, weight, y, rstd, d, eps, BLOCK=block, num_warps=_warps(block))
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        d, n, dx = x.shape[-1], len(rstd), torch.empty_like(x)
        rows = max(1, triton.cdiv(n, programs(x.device)))
        shares = torch.zeros(triton.cdiv(n, rows), d, device=x.device, dtype=torch.float32)
        block = triton.next_power_of_2(d)
        _backward[(len(shares),)](
            *(x, weight, rstd, dy.contiguous(), dx, shares, n, d, rows),
            BLOCK=block,
            num_warps=_warps(block),
        )
        return dx, shares.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """`reference`, forward and backward: each reads its inputs once and writes its results once.

    x [..., d] of float32, float16 or bfloat16, weight [d]. Raises ValueError when the width does
    not fit, and as `kernels.runtime.check` does.
    """
    check(x, weight, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    if x.ndim == 0 or weight.shape != x.shape[-1:] or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(
            f"x {tuple(x.shape)} needs a weight of its last axis, at most {WIDEST} wide; "
            f"got {tuple(weight.shape)}"
        )
    return _RMSNorm.apply(x, weight, eps)


def cost(rows: int, width: int, itemsize: int = 4, backward: bool = False) -> Cost:
    """Bytes that have to move, and FLOPs, of one pass; the few of weight and statistics included.

    >>> cost(rows=2, width=8).bytes  # x read, y written, weight read, 1/rms written
    168
    """
    numbers = rows * width
    if backward:
        return Cost(12 * numbers, (3 * numbers + 2 * width) * itemsize + 4 * rows)
    return Cost(4 * numbers, (2 * numbers + width) * itemsize + 4 * rows)


def specs() -> list[Spec]:
    """Rows of 4,096 in bf16."""
    forward = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "rstd_ptr": "*fp32"}
    forward |= {"d": "i32", "eps": "fp32"}
    backward = {"x_ptr": "*bf16", "w_ptr": "*bf16", "rstd_ptr": "*fp32", "dy_ptr": "*bf16"}
    backward |= {"dx_ptr": "*bf16", "dw_ptr": "*fp32", "n": "i32", "d": "i32", "rows": "i32"}
    constants = {"BLOCK": 4096}
    return [
        Spec("rms_norm forward bf16", _forward, forward, constants, _warps(4096)),
        Spec("rms_norm backward bf16", _backward, backward, constants, _warps(4096)),
    ]
