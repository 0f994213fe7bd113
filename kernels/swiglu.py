"""Gated linear units: act(gate) · up, number by number. SwiGLU and GEGLU are the best known."""

# n rows, d width

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.spec import Spec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
}


def reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up for two tensors of one shape, in float32 at least, rounded once at the end.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


@jit
def _activate(x, ACTIVATION: tl.constexpr):
    # act(x) and act'(x) of one of ACTIVATIONS. Triton's sigmoid goes to 0 and 1 without NaN, and
    # 1/2 (1 + tanh u) is sigmoid(2u), without the difference of two nearly equal numbers. erf is
    # tl.math.erf, which is compiled for every target and interpreted too; what libdevice has gives
    # nothing in the interpreter.
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        y = x * sigmoid
        slope = sigmoid + y * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        normal = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)  # Φ(x)
        y = x * normal
        slope = normal + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))  # Φ(x) + x φ(x)
    elif ACTIVATION == "gelu_tanh":
        two_u = 1.5957691216057308 * x * (1 + 0.044715 * x * x)  # 2 √(2/π) (x + 0.044715 x³)
        sigmoid = tl.sigmoid(two_u)
        y = x * sigmoid
        slope = sigmoid + y * (1 - sigmoid) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
        slope = y * (1 - y)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x <= 0, 0.0, x)  # asked this way round, NaN stays NaN
        slope = tl.where(x <= 0, 0.0, 1.0)
    return y, slope


@jit
def _places(d, BLOCK: tl.constexpr):
    # rows are cut into blocks, one for each program: which row, and which numbers of it
    blocks = tl.cdiv(d, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, cols, cols < d


@jit
def _forward(
    gate_ptr, up_ptr, out_ptr, d, gate_step, up_step,  # steps from one row to the next
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols, inside = _places(d, BLOCK)
    gate = tl.load(gate_ptr + row * gate_step + cols, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_step + cols, mask=inside).to(tl.float32)
    y, _ = _activate(gate, ACTIVATION)
    tl.store(out_ptr + row * d + cols, y * up, mask=inside)


@jit
def _backward(
    gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, d, gate_step, up_step,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the activation is computed again: cheaper than a third tensor kept, written and read
    row, cols, inside = _places(d, BLOCK)
    gate = tl.load(gate_ptr + row * gate_step + cols, mask=inside).to(tl.float32)
    up = tl.load(up_ptr + row * up_step + cols, mask=inside).to(tl.float32)
    dout = tl.load(dout_ptr + row * d + cols, mask=inside).to(tl.float32)
    y, slope = _activate(gate, ACTIVATION)
    tl.store(dgate_ptr + row * d + cols, dout * up * slope, mask=inside)
    tl.store(dup_ptr + row * d + cols, dout * y, mask=inside)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Each as [n, d] with numbers side by side: one long row where that takes no copy of any.

    The halves of a fused projection, `x.chunk(2, -1)`, are rows with gaps: no copy either.
    """
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    rows = [x.flatten(0, -2) if x.ndim > 1 else x[None] for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in rows]


def _launch(kernel: Any, ins: list[Tensor], others: list[Tensor], activation: str) -> None:
    n, d = ins[0].shape
    # on a GPU 8 numbers for each of 128 threads; the interpreter takes as long for a single one
    block = min(triton.next_power_of_2(max(d, 1)), 1024 if ins[0].is_cuda else 65_536)
    if n * d:
        grid, steps = (n * triton.cdiv(d, block),), [x.stride(0) for x in ins]
        kernel[grid](*ins, *others, d, *steps, ACTIVATION=activation, BLOCK=block)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.activation, shape = activation, gate.shape
        gate, up = _rows(gate, up)
        out = torch.empty(shape, device=gate.device, dtype=gate.dtype)
        _launch(_forward, [gate, up], [out], activation)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grads = [torch.empty(dout.shape, device=gate.device, dtype=gate.dtype) for _ in "gu"]
        _launch(_backward, [gate, up], [dout.contiguous(), *grads], ctx.activation)
        return *grads, None


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`reference`, forward and backward in one pass each; only gate and up are kept for it.

    Two tensors of one shape and dtype (float32, float16 or bfloat16), whatever their strides;
    copied only where rows are not dense or not evenly spaced. `activation` is "silu" (SwiGLU),
    "gelu" (GEGLU, with erf), "gelu_tanh", "sigmoid" (the first GLU) or "relu" (ReGLU). Raises
    ValueError for another, for shapes or dtypes that differ, and as `kernels.runtime.check` does.
    """
    check(gate, up, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be "
            "alike: this kernel does not broadcast"
        )
    return _GLU.apply(gate, up, activation)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, see `glu`."""
    return glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up with the exact gelu, x Φ(x), see `glu`."""
    return glu(gate, up, "gelu")


def cost(numbers: int, itemsize: int = 4, backward: bool = False) -> Cost:
    """Bytes that have to move, and FLOPs of SwiGLU, for tensors of so many numbers.

    Forward: gate and up read, one result written; exp, 1 + ., 1 / ., and two products. Backward:
    gate, up and the result's gradient read, two gradients written; with the activation again, its
    slope (three operations) and three products, 10 in all.

    >>> cost(1000, itemsize=2)
    Cost(flops=5000, bytes=6000)
    >>> cost(1000, itemsize=2, backward=True)
    Cost(flops=10000, bytes=10000)
    """
    return Cost((10 if backward else 5) * numbers, (5 if backward else 3) * numbers * itemsize)


def specs() -> list[Spec]:
    """SwiGLU both ways, and the activation with an error function."""
    found = []
    for activation in ("silu", "gelu"):
        for name, kernel in (("forward", _forward), ("backward", _backward)):
            others = ("out",) if kernel is _forward else ("dout", "dgate", "dup")
            types = {f"{x}_ptr": "*bf16" for x in ("gate", "up", *others)}
            types |= {"d": "i32", "gate_step": "i32", "up_step": "i32"}
            constants = {"ACTIVATION": activation, "BLOCK": 1024}
            found.append(Spec(f"swiglu {activation} {name} bf16", kernel, types, constants))
    return found
