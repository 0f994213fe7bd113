"""Matmuls with few bits: int8 times int8 (W8A8), and 4-bit weights beside wide activations (W4A16).

    W8A8: y = (x_q w_qᵀ) · x_scale · w_scale       integers all the way, scaled once at the end
    W4A16: y = x ((q - zero) · scale)ᵀ             unpacked in registers, group by group

The first halves the bytes of bf16, and matrix units multiply int8 at twice the rate. The second
reads a quarter of the weights' bytes, which counts when one token at a time is generated.

Sources: Dettmers et al., LLM.int8(), 2022; Frantar et al., GPTQ, 2022 (grid of a group); Frantar et
al., MARLIN, 2024 (unpacking between memory and matrix unit).
"""

# m rows (tokens), n outputs, k inputs: weights are [n, k], as those of torch.nn.Linear

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cost import Cost
from kernels.matmul import place
from kernels.runtime import autotune, check, config, jit, tl, triton
from kernels.spec import Spec

GROUPS = (32, 64, 128)
"""Weights of a row that share a scale and a zero point."""

WIDEST = 2**31 // 128**2 - 1
"""The longest sum of int8 products that surely fits int32."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_int8(x: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """x ≈ q · scale with q in -127 .. 127 and one scale, max|x| / 127, for each line along `axis`.

    x of any shape -> q int8 of that shape, scale float32 without `axis` (1 where all is zero). Off
    by half a step, scale / 2, at most. A line with NaN or inf gets such a scale, so that what is
    computed from it is NaN.

    >>> quantize_int8(torch.tensor([[-2.0, 0.5, 1.0]]))
    (tensor([[-127,   32,   64]], dtype=torch.int8), tensor([0.0157]))
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[axis] == 0:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be floats, at least one along {axis}")
    wide = x.detach().float()
    scale = wide.abs().amax(axis, keepdim=True) / 127
    scale = scale.where(scale != 0, 1.0)
    q = (wide / scale).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return q, scale.squeeze(axis)


def quantize_int4(w: Tensor, group: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """w [n, k] ≈ (q - zero) · scale: q and zero in 0 .. 15, a grid for each `group` along k.

    The grid spans from the smallest to the largest weight, and 0 always lies on it: off by half a
    step, scale / 2, at most. Returns q packed as uint8 [n, k / 2], scale float32 [n, k / group] and
    zero uint8 of the same shape. A byte holds weights j (low bits) and j + group / 2 (high bits) of
    its group, so that unpacking gives two tiles without moving anything between threads.

    Raises ValueError where k is no multiple of the group, or w is not finite.

    >>> packed, scale, zero = quantize_int4(torch.arange(32.0)[None] - 16, group=32)
    >>> scale.item(), zero.item(), [hex(x) for x in packed[0, :3].tolist()]
    (2.0666..., 8, ['0x80', '0x81', '0x91'])
    """
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"w {tuple(w.shape)} {w.dtype} must be a matrix [n, k] of floats")
    _fits(w.shape[1], group)
    if not w.isfinite().all():
        raise ValueError("w holds NaN or inf: no grid spans it")
    grouped = w.detach().float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (high - low) / 15
    scale = scale.where(scale != 0, 1.0)
    zero = (-low / scale).round()
    q = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
    first, second = q.chunk(2, -1)
    return (first | second << 4).flatten(1), scale, zero.to(torch.uint8)


def dequantize_int4(
    packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 128, dtype: Any = torch.float32
) -> Tensor:
    """The weights [n, k] that `quantize_int4` stands for: (q - zero) · scale."""
    grouped = packed.unflatten(1, (-1, group // 2))
    q = torch.cat((grouped & 15, grouped >> 4), -1).to(dtype)
    return ((q - zeros[..., None].to(dtype)) * scales[..., None].to(dtype)).flatten(1)


def reference_int8(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, out_dtype: Any = torch.float32
) -> Tensor:
    """y = (x_q w_qᵀ) · x_scale · w_scale: [.., m, k], [.., m], [n, k], [n] -> [.., m, n].

    In float64, which holds these integers exactly, and rounded once.
    """
    exact = x_q.double() @ w_q.double().T
    return (exact * x_scale[..., None].double() * w_scale.double()).to(out_dtype)


def reference_int4(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 128
) -> Tensor:
    """y = x wᵀ with w = `dequantize_int4(...)`, in float32 at least: x [.., m, k] -> [.., m, n]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide @ dequantize_int4(packed, scales, zeros, group, wide.dtype).T).to(x.dtype)


@autotune(
    [
        config(warps, stages, BLOCK_N=n, BLOCK_K=k)
        for n, k, warps, stages in ((128, 64, 8, 3), (64, 128, 4, 4), (128, 128, 8, 4))
    ],
    key=["n", "k", "BLOCK_M"],
)
@jit
def _int8(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i, j = place(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    # Rows beyond the end read others instead, which costs no mask; they are never stored.
    x_ptrs = x_ptr + (rows % m).to(tl.int64)[:, None] * k + steps[None, :]
    w_ptrs = w_ptr + (cols % n).to(tl.int64)[None, :] * k + steps[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        inside = steps < k - start
        x = tl.load(x_ptrs + start, mask=inside[None, :], other=0)
        w = tl.load(w_ptrs + start, mask=inside[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + rows % m)
    w_scale = tl.load(w_scale_ptr + cols % n)
    y = acc.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :], y, mask=inside)


@autotune(
    [config(4, stages, BLOCK_N=n) for n, stages in ((64, 3), (64, 5), (128, 4), (32, 5))],
    key=["n", "k", "BLOCK_M", "GROUP"],
)
@jit
def _int4(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, y_ptr, m, n, k,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The tile is that of yᵀ = w xᵀ: Hopper's matrix unit takes its left operand, here the weights,
    # from the registers in which they are unpacked, and is content with few columns on the right.
    HALF: tl.constexpr = GROUP // 2
    i, j = place(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), 8)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, HALF)
    x_ptrs = x_ptr + (rows % m).to(tl.int64)[None, :] * k + steps[:, None]
    line = (cols % n).to(tl.int64)
    packed_ptrs = packed_ptr + line[:, None] * (k // 2) + steps[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g in range(k // GROUP):
        packed = tl.load(packed_ptrs + g * HALF)
        zero = tl.load(zero_ptr + line * (k // GROUP) + g).to(tl.int8)[:, None]
        x_first = tl.load(x_ptrs + g * GROUP)
        x_second = tl.load(x_ptrs + g * GROUP + HALF)
        # Small integers are exact in every type; the scale is applied to the sum in float32.
        first = ((packed & 15).to(tl.int8) - zero).to(x_first.dtype)
        second = ((packed >> 4).to(tl.int8) - zero).to(x_first.dtype)
        part = tl.dot(second, x_second, tl.dot(first, x_first))
        acc += part * tl.load(scale_ptr + line * (k // GROUP) + g)[:, None]
    inside = (rows < m)[None, :] & (cols < n)[:, None]
    tl.store(y_ptr + rows.to(tl.int64)[None, :] * n + cols[:, None], acc, mask=inside)


def _launch(kernel: Any, most: int, *tensors: Tensor, **constants: int) -> None:
    """With as many rows in a tile as there are, up to `most`; x first, then w, y last."""
    (m, k), n = tensors[0].shape, tensors[-1].shape[-1]
    tile = min(max(triton.next_power_of_2(m), 16), most)
    if m and n:
        kernel[lambda meta: (triton.cdiv(m, tile) * triton.cdiv(n, meta["BLOCK_N"]),)](
            *(x.contiguous() for x in tensors), m, n, k, BLOCK_M=tile, **constants
        )


class _Int4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, group: int):
        ctx.save_for_backward(packed, scales, zeros)
        ctx.group = group
        y = x.new_empty(*x.shape[:-1], len(packed))
        _launch(_int4, 64, x.reshape(-1, x.shape[-1]), packed, scales, zeros, y, GROUP=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        # Training through frozen weights (as QLoRA does): one layer's weights, for a moment.
        return dy @ dequantize_int4(*ctx.saved_tensors, ctx.group).to(dy.dtype), *([None] * 4)


def int8_matmul(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, out_dtype: Any = torch.float32
) -> Tensor:
    """`reference_int8`: the integer part is exact, the result rounded to `out_dtype`.

    x_q [.., m, k] and w_q [n, k] of int8, x_scale [.., m] and w_scale [n] of float32. Rounding has
    no gradient, so inputs that want one are refused. Raises ValueError for shapes that do not fit
    and k > 131,071, where the sum could overflow; and as `kernels.runtime.check` does.
    """
    check(x_q, x_scale, w_q, w_scale)
    check(x_q, w_q, dtypes=(torch.int8,))
    check(x_scale, w_scale, dtypes=(torch.float32,))
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype {out_dtype} must be one of {FLOATS}")
    if x_q.ndim == 0 or w_q.ndim != 2 or w_q.shape[1] != x_q.shape[-1]:
        raise ValueError(f"x_q {tuple(x_q.shape)} must be as wide as w_q {tuple(w_q.shape)}")
    if x_scale.shape != x_q.shape[:-1] or w_scale.shape != w_q.shape[:1]:
        raise ValueError(
            f"one scale a row: x_q {tuple(x_q.shape)}, x_scale {tuple(x_scale.shape)}; "
            f"w_q {tuple(w_q.shape)}, w_scale {tuple(w_scale.shape)}"
        )
    n, k = w_q.shape
    if not 0 < k <= WIDEST:
        raise ValueError(f"k={k} must be 1 to {WIDEST}: int32 could overflow beyond")
    if x_scale.requires_grad or w_scale.requires_grad:
        raise ValueError("scales get no gradient here: detach them, or take the reference")
    y = torch.empty(*x_q.shape[:-1], n, dtype=out_dtype, device=x_q.device)
    _launch(_int8, 128, x_q.reshape(-1, k), x_scale, w_q, w_scale, y)
    return y


def int4_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 128
) -> Tensor:
    """`reference_int4`, with a gradient for x: x [.., m, k] -> [.., m, n] of x's dtype.

    x of float16 or bfloat16; packed, scales and zeros from `quantize_int4` with the same group.
    Raises ValueError for shapes that do not fit, and as `kernels.runtime.check` does.
    """
    check(x, packed, scales, zeros)
    # Not float32: on Blackwell, Triton 3.7 would cut it to tf32 beside operands of fewer bits.
    check(x, dtypes=FLOATS[1:])
    check(packed, zeros, dtypes=(torch.uint8,))
    check(scales, dtypes=(torch.float32,))
    if scales.requires_grad:
        raise ValueError("scales get no gradient here: detach them, or take the reference")
    if x.ndim == 0 or packed.ndim != 2 or x.shape[-1] != 2 * packed.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} must be twice as wide as packed {tuple(packed.shape)}, "
            "which holds two weights in a byte"
        )
    _fits(x.shape[-1], group)
    grids = (len(packed), x.shape[-1] // group)
    if scales.shape != grids or zeros.shape != grids:
        raise ValueError(
            f"scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)} must be {grids}: "
            f"one for each group of {group}"
        )
    return _Int4Matmul.apply(x, packed, scales, zeros, group)


def _fits(k: int, group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group={group} must be one of {GROUPS}")
    if k % group or not k:
        raise ValueError(f"k={k} must be a multiple of group={group}")


def cost(m: int, n: int, k: int, bits: int, group: int = 128, itemsize: int = 2) -> Cost:
    """2mnk operations; x, the weights of `bits` 8 or 4 with their scales, and y move once.

    With 4 bits x has `itemsize` bytes, a group 4 bytes of scale and 1 of zero; with 8, x has one
    byte, each row of x and w 4 bytes of scale. y has `itemsize`.

    >>> cost(1, 4096, 4096, bits=4).bytes / cost(1, 4096, 4096, bits=8).bytes
    0.53...
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits} must be 4 or 8")
    if bits == 8:
        return Cost(2 * m * n * k, m * k + n * k + 4 * (m + n) + m * n * itemsize)
    weights = n * k // 2 + n * k // group * 5
    return Cost(2 * m * n * k, weights + (m * k + m * n) * itemsize)


def specs() -> list[Spec]:
    """Both with bf16 results, the second also for few rows, as when text is generated."""
    sizes = dict.fromkeys(("m", "n", "k"), "i32")
    eight = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "w_ptr": "*i8", "w_scale_ptr": "*fp32"}
    four = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*u8"}
    out = {"y_ptr": "*bf16", **sizes}
    tile8 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    tile4 = {"GROUP": 128, "BLOCK_N": 64}
    return [
        Spec("quantize int8_matmul", _int8, eight | out, tile8, 8),
        Spec("quantize int4_matmul bf16", _int4, four | out, tile4 | {"BLOCK_M": 64}),
        Spec("quantize int4_matmul bf16, 16 rows", _int4, four | out, tile4 | {"BLOCK_M": 16}),
    ]
