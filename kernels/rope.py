"""Rotary positions: each pair of numbers of a query or key turns by the angle of its position."""

# b batch, h heads, t tokens, d width of a head, half = d / 2 pairs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.spec import Spec

WIDEST = 1024


def reference(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for each pair in x [b, h, t, d], rounded once.

    cos and sin are [t, d/2] or [b, 1, t, d/2]. A pair is, in layout "half", numbers i and i + d/2,
    in "interleaved" 2i and 2i + 1. Raises ValueError for another layout.

    Source: Su et al., RoFormer, 2021.
    """
    _check_layout(layout)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    axis = -2 if layout == "half" else -1
    a, b = x.to(wide).unflatten(-1, (2, -1) if axis == -2 else (-1, 2)).unbind(axis)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2).to(x.dtype)


def _check_layout(layout: str) -> None:
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout={layout!r} must be 'half' or 'interleaved'")


@jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, h, t, half,
    x_b, x_h, x_t, out_b, out_h, out_t,  # strides
    angles_b,  # from one sequence's angles to the next one's; 0 where all share them
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # a program turns a tile of tokens x heads x pairs: the angles of a token serve all its heads
    head_blocks = tl.cdiv(h, HEADS)
    token_blocks = tl.cdiv(t, TOKENS)
    program = tl.program_id(0)
    batch = (program // (head_blocks * token_blocks)).to(tl.int64)
    token = ((program // head_blocks) % token_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = (program % head_blocks).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    token, head = token[:, None, None], head[None, :, None]
    x_rows = x_ptr + batch * x_b + head * x_h + token * x_t
    out_rows = out_ptr + batch * out_b + head * out_h + token * out_t

    pair = tl.arange(0, HALF)[None, None, :]
    angles = batch * angles_b + token * half + pair
    known = (token < t) & (pair < half)
    cos = tl.load(cos_ptr + angles, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=known, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin  # a rotation's transpose turns back
    if INTERLEAVED:  # read and written side by side, and taken apart in registers
        place = tl.arange(0, 2 * HALF)[None, None, :]
        inside = (token < t) & (head < h) & (place < 2 * half)
        x = tl.load(x_rows + place, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [TOKENS, HEADS, HALF, 2]))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(out_rows + place, tl.reshape(turned, [TOKENS, HEADS, 2 * HALF]), mask=inside)
    else:
        inside = (head < h) & known
        a = tl.load(x_rows + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_rows + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows + pair, a * cos - b * sin, mask=inside)
        tl.store(out_rows + half + pair, b * cos + a * sin, mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, layout: str, back: bool) -> Tensor:
    """x into out, whatever their strides; cos and sin [1 | b, t, d/2], contiguous."""
    if out.numel() == 0:
        return out
    (b, h, t, d), x = x.shape, _dense(x)
    tile = {"HALF": triton.next_power_of_2(d // 2), "HEADS": min(triton.next_power_of_2(h), 8)}
    # on a GPU 16 pairs for each of 128 threads; the interpreter takes as long for a single one
    pairs = 2048 if x.is_cuda else 65_536
    tokens = max(pairs // (tile["HALF"] * tile["HEADS"]), 1)
    tile["TOKENS"] = min(triton.next_power_of_2(t), tokens)
    grid = (b * triton.cdiv(h, tile["HEADS"]) * triton.cdiv(t, tile["TOKENS"]),)
    steps = (*x.stride()[:3], *out.stride()[:3], 0 if len(cos) == 1 else cos.stride(0))
    turns = {"BACK": back, "INTERLEAVED": layout == "interleaved"}
    _rotate[grid](x, cos, sin, out, h, t, d // 2, *steps, **turns, **tile)
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
        cos, sin = ((a[None] if a.ndim == 2 else a[:, 0]).contiguous() for a in (cos, sin))
        ctx.save_for_backward(cos, sin)
        # x's order of axes; where numbers repeat, `empty_like` may put another axis last
        out = torch.empty_like(x.contiguous() if 0 in x.stride() else _dense(x))
        ctx.layout, ctx.strides = layout, out.stride()
        return _turn(x, cos, sin, out, layout, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        # the same order again: the projection that made x gets its gradient without a copy
        dx = dout.new_empty_strided(dout.shape, ctx.strides)
        return _turn(dout, *ctx.saved_tensors, dx, ctx.layout, back=True), None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """`reference`, forward and backward: x read once, the result written once, in x's memory order.

    x [b, h, t, d] may be a view, such as a transposed [b, t, h, d], without a copy, as long as the
    last axis is dense; cos and sin are [t, d/2] or [b, 1, t, d/2]. All float32, float16 or
    bfloat16; x and the angles may differ. cos and sin get no gradient. Raises ValueError where
    they require one, for another layout, for shapes that do not fit, and as
    `kernels.runtime.check` does.
    """
    check(x, cos, sin, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    _check_layout(layout)
    if x.ndim != 4 or x.shape[-1] % 2 or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(
            f"x {tuple(x.shape)} must be [b, h, t, d] with an even d, at most {WIDEST}: "
            "numbers turn in pairs"
        )
    b, _, t, d = x.shape
    fits = ((t, d // 2), (b, 1, t, d // 2), (1, 1, t, d // 2))
    if cos.shape != sin.shape or cos.shape not in fits:
        raise ValueError(
            f"x {tuple(x.shape)} needs cos and sin of {fits[0]} or {fits[1]}; "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin get no gradient from this kernel: detach them")
    return _Rope.apply(x, cos, sin, layout)


def cost(
    batch: int, heads: int, tokens: int, d_head: int, itemsize: int = 4, angle_size: int = 4
) -> Cost:
    """x read, the result written, cos and sin [t, d/2] read once; backward costs the same.

    Four products and two sums turn a pair.

    >>> cost(batch=1, heads=2, tokens=8, d_head=4)
    Cost(flops=192, bytes=640)
    """
    numbers = batch * heads * tokens * d_head
    return Cost(3 * numbers, 2 * numbers * itemsize + tokens * d_head * angle_size)


def specs() -> list[Spec]:
    """Heads of 128 in bf16 with angles in fp32, in both layouts."""
    types = {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= dict.fromkeys(("h", "t", "half", "x_b", "x_h", "x_t"), "i32")
    types |= dict.fromkeys(("out_b", "out_h", "out_t", "angles_b"), "i32")
    tile = {"BACK": False, "TOKENS": 4, "HEADS": 8, "HALF": 64}
    return [
        Spec(f"rope {layout} bf16", _rotate, types, tile | {"INTERLEAVED": layout != "half"})
        for layout in ("half", "interleaved")
    ]
