"""Vector addition, the first kernel: many programs, each of which adds one block of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.spec import Spec

BLOCK = 1024


def reference(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of any shape."""
    return x + y


@jit
def _add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    # program 0 adds numbers 0 .. BLOCK - 1, program 1 the next BLOCK, and so on
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n  # the last block may reach beyond the end
    x = tl.load(x_ptr + place, mask=inside)
    y = tl.load(y_ptr + place, mask=inside)
    tl.store(out_ptr + place, x + y, mask=inside)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        _add[(triton.cdiv(x.numel(), BLOCK),)](x, y, out, x.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y for two tensors of one shape and dtype, whatever their strides.

    Raises ValueError when shapes or dtypes differ, and as `kernels.runtime.check` does.
    """
    check(x, y)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} {y.dtype} must be alike: "
            "this kernel does not broadcast"
        )
    return _Add.apply(x, y)


def cost(numbers: int, itemsize: int = 4) -> Cost:
    """One addition for each number; two reads and one write.

    >>> cost(1000)
    Cost(flops=1000, bytes=12000)
    """
    return Cost(flops=numbers, bytes=3 * numbers * itemsize)


def specs() -> list[Spec]:
    """Both types that the first lesson looks at."""
    return [
        Spec(
            f"add {short}",
            _add,
            {"x_ptr": f"*{short}", "y_ptr": f"*{short}", "out_ptr": f"*{short}", "n": "i32"},
            {"BLOCK": BLOCK},
        )
        for short in ("fp32", "bf16")
    ]
