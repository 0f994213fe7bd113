"""Attention of one new query per sequence over a long cache, cut into splits that work at once.

With one query there are only batch · heads rows of work, too few for a GPU, and all its time goes
into reading the cache. So the cache is cut: each program reads one stretch of it, once for all
query heads that share it, and a second kernel merges the stretches.
"""

# b batch, h query heads, g key/value heads (h is a multiple of g), s keys, d head width

from __future__ import annotations

import torch
from torch import Tensor

from kernels import attention
from kernels.cost import Cost
from kernels.runtime import check, jit, programs, tl, triton
from kernels.spec import Spec

WIDEST = 256
CHUNK = 16  # splits merged at once


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q kᵀ · scale) v over the first `lengths` keys of each sequence, [b, h, 1, d].

    q [b, h, 1, d], k and v [b, g, s, d], lengths [b] (all s keys without it); `scale` defaults to
    1/√d. A sequence of length 0 gives zeros.
    """
    mask = None
    if lengths is not None:
        mask = torch.arange(k.shape[2], device=k.device) < lengths[:, None, None, None]
    return attention.reference(q, k, v, mask, scale)


@jit
def _split(
    q_ptr, k_ptr, v_ptr, lengths_ptr, part_ptr, lse_ptr,
    s, g, group, d, size, splits, scale,  # `group` query heads share keys, `size` keys are a split
    k_b, k_g, k_s, v_b, v_g, v_s,  # strides
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # one (sequence, key head, ROWS heads of its group, split): their attention to these keys alone
    program = tl.program_id(0)
    split = program % splits
    rows = tl.cdiv(group, ROWS)  # 1, unless a group is very large
    row = program // splits % rows * ROWS + tl.arange(0, ROWS)
    kv = (program // splits // rows % g).to(tl.int64)
    batch = (program // splits // rows // g).to(tl.int64)
    length = s
    if lengths_ptr is not None:  # nobody looked at them on a GPU; no key beyond s is read
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), s).to(tl.int32)
    start = split * size
    end = tl.minimum(start + size, length)

    col = tl.arange(0, WIDTH)[None, :]
    head = (batch * g + kv) * group + row
    inside = (row < group)[:, None] & (col < d)
    q = tl.load(q_ptr + head[:, None] * d + col, mask=inside, other=0.0)
    k_ptr += batch * k_b + kv * k_g
    v_ptr += batch * v_b + kv * v_g
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(start, end, BLOCK):
        key = (first + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here = (key < end) & (col < d)
        # beyond the end zeros are taken, whatever the cache holds there: 0 · NaN would be NaN
        k = tl.load(k_ptr + key * k_s + col, mask=here, other=0.0)
        v = tl.load(v_ptr + key * v_s + col, mask=here, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(first + tl.arange(0, BLOCK)[None, :] < end, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))  # finite: each block has one key at least
        p = tl.exp(scores - new[:, None])
        keep = tl.exp(top - new)
        total = total * keep + tl.sum(p, axis=1)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    # a split without keys: its part is zero, and log 0 makes its log-sum-exp -inf
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    place = head * splits + split
    tl.store(part_ptr + place[:, None] * d + col, acc, mask=inside)
    tl.store(lse_ptr + place, top + tl.log(total), mask=row < group)


@jit
def _merge(part_ptr, lse_ptr, out_ptr, splits, d, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    # one (sequence, head): its parts, weighted by their softmax's denominators, exp(log-sum-exp)
    head = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, WIDTH)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        here = split < splits
        place = head * splits + split
        lse = tl.load(lse_ptr + place, mask=here, other=float("-inf"))
        inside = here[:, None] & (col < d)[None, :]
        part = tl.load(part_ptr + place[:, None] * d + col[None, :], mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(lse, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # no key so far: exp(-inf - 0) is 0
        weight = tl.exp(lse - safe)
        keep = tl.exp(top - safe)
        total = total * keep + tl.sum(weight, axis=0)
        acc = acc * keep + tl.sum(weight[:, None] * part, axis=0)
        top = new
    tl.store(out_ptr + head * d + col, acc / tl.where(total == 0, 1.0, total), mask=col < d)


def _tile(group: int, d: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of `_split`, and its warps and stages.

    Tiles of 16 KiB, of which two of k and two of v are under way: small enough that four programs
    fit one processor. Tensor cores take 16 rows at least; without them (float32) fewer at once, and
    more warps, or threads would run out of registers.
    """
    width = max(triton.next_power_of_2(d), 16)
    rows = min(max(triton.next_power_of_2(group), 16), 64 if itemsize == 2 else 32)
    warps = 8 if rows == 64 or itemsize == 4 else 4
    tile = {"ROWS": rows, "BLOCK": min(16_384 // (width * itemsize), 128), "WIDTH": width}
    return tile, {"num_warps": warps, "num_stages": 2}


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """`reference`, with the cache cut into `splits` (chosen to fill the device if None).

    q [b, h, 1, d], k and v [b, g, s, d], of one dtype (float32, float16, bfloat16), with d at most
    256 and any strides (a cache whose last axis is not dense is copied); lengths [b], integers.
    The result depends on `splits` only by rounding. For generation: there is no backward.

    Raises ValueError for shapes or dtypes that do not fit, where a gradient is required, for
    lengths beyond the cache (looked at on the CPU; on a GPU they count as 0 or s), and as
    `kernels.runtime.check` does.

    Source: Dao, Haziza, Massa and Sizov, Flash-Decoding for long-context inference, 2023.
    """
    check(q, k, v, lengths)
    check(q, k, v, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    _fit(q, k, v, lengths, splits)
    q, lengths = q.contiguous(), None if lengths is None else lengths.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (b, h, _, d), (g, s) = q.shape, k.shape[1:3]
    tile, launch = _tile(h // g, d, q.element_size())
    rows = b * g * triton.cdiv(h // g, tile["ROWS"])
    if splits is None:  # whole blocks, such that all splits together fill the device
        wanted = triton.cdiv(programs(q.device), max(rows, 1))
        blocks = triton.cdiv(triton.cdiv(s, tile["BLOCK"]), wanted)  # in each split
        size = max(blocks, 1) * tile["BLOCK"]
        splits = max(triton.cdiv(s, size), 1)
    else:
        size = max(triton.cdiv(s, splits), 1)
    part = torch.empty(b * h, splits, d, device=q.device, dtype=torch.float32)
    lse = torch.empty(b * h, splits, device=q.device, dtype=torch.float32)
    out = torch.empty_like(q)
    if out.numel():
        scale = d**-0.5 if scale is None else scale
        sizes = (s, g, h // g, d, size, splits, scale, *k.stride()[:3], *v.stride()[:3])
        _split[(rows * splits,)](q, k, v, lengths, part, lse, *sizes, **tile, **launch)
        _merge[(b * h,)](part, lse, out, splits, d, CHUNK=CHUNK, WIDTH=tile["WIDTH"])
    return out


def _fit(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, splits: int | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[2] != 1:
        raise ValueError(f"{shapes} must be [b, h, 1, d], [b, g, s, d] and [b, g, s, d]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not 0 < q.shape[3] <= WIDEST:
        raise ValueError(f"{shapes} must share b and a head width d of 1 to {WIDEST}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads must be a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits={splits} must be at least 1")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("decode_attention has no backward: take attention, or torch.no_grad()")
    if lengths is None:
        return
    b, s = len(q), k.shape[2]
    if lengths.shape != (b,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths {tuple(lengths.shape)} {lengths.dtype} must be [{b}] of int32 or int64"
        )
    if lengths.is_cpu and b and not 0 <= lengths.min() <= lengths.max() <= s:
        raise ValueError(f"lengths {lengths.tolist()} must lie between 0 and the cache's {s} keys")


def cost(
    batch: int,
    heads: int,
    keys: int,
    d_head: int,
    kv_heads: int | None = None,
    splits: int = 1,
    itemsize: int = 4,
) -> Cost:
    """FLOPs of the two products, 4·b·h·s·d, and bytes: the cache, 2·b·g·s·d, is nearly all.

    The rest: q and the result, and the parts of each split with their log-sum-exp, float32, which
    are written and read.

    >>> cost(batch=1, heads=8, keys=4096, d_head=64, kv_heads=2, itemsize=2)
    Cost(flops=8388608, bytes=2103360)
    >>> 2 * 2 * 4096 * 64 * 2  # of these, the cache
    2097152
    """
    kv_heads = heads if kv_heads is None else kv_heads
    cache = 2 * batch * kv_heads * keys * d_head * itemsize
    ends = 2 * batch * heads * d_head * itemsize
    parts = 2 * batch * heads * splits * (d_head + 1) * 4
    return Cost(4 * batch * heads * keys * d_head, cache + ends + parts)


def specs() -> list[Spec]:
    """Heads of 128, four query heads to a key head, in bf16 and fp32; and the merge."""
    found = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        types = {f"{x}_ptr": f"*{dtype}" for x in "qkv"} | {"lengths_ptr": "*i64", "scale": "fp32"}
        types |= dict.fromkeys(("part_ptr", "lse_ptr"), "*fp32")
        numbers = "s g group d size splits k_b k_g k_s v_b v_g v_s"
        types |= dict.fromkeys(numbers.split(), "i32")
        tile, launch = _tile(4, 128, itemsize)
        found.append(Spec(f"decode_attention {dtype}", _split, types, tile, **launch))
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= {"splits": "i32", "d": "i32"}
    constants = {"CHUNK": CHUNK, "WIDTH": 128}
    return [*found, Spec("decode_attention merge bf16", _merge, types, constants)]
