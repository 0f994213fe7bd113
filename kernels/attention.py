"""Scaled dot-product attention, softmax(q kᵀ / √d) v: the explicit form and FlashAttention-2.

Every faster form in the course is compared with `reference`. The kernel visits the keys tile by
tile, computes the softmax as it goes and never stores the matrix of scores. Its backward pass is
`kernels.attention_backward`.
"""

# b batch, h query heads, g key/value heads (h is a multiple of g), t queries, s keys, d head width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import attention_tiles as shared
from kernels.attention_backward import run
from kernels.attention_tiles import keep, put, sequence, span, task, tile, visible
from kernels.cost import Cost
from kernels.runtime import autotune, config, jit, tl
from kernels.spec import TARGETS, Spec


def _spread(x: Tensor, n_heads: int) -> Tensor:
    """Repeat each of the g key/value heads for its h / g query heads."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def _allowed(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """The mask, or the causal one in which the last query stands at the last key."""
    return shared.mask(q.shape[2], k.shape[2], True, window or 0, q.device) if causal else mask


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, bias: Tensor | None
) -> Tensor:
    """q kᵀ · scale + bias, [b, h, t, s], forbidden places at the lowest finite number."""
    wide = torch.promote_types(q.dtype, torch.float32)  # half precision would overflow
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.to(wide) @ _spread(k, q.shape[1]).to(wide).mT) * scale
    if bias is not None:
        scores = scores + bias
    # Finite, so that a row without any allowed key makes no NaN on its way to zero.
    return scores if mask is None else scores.masked_fill(~mask, torch.finfo(wide).min)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    p = scores.softmax(-1)
    return p if mask is None else p.masked_fill(~mask, 0.0)


def weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention weights softmax(q kᵀ · scale + bias), [b, h, t, s], float32 at least.

    Rows sum to one, except rows whose mask allows no key: those are zero, as in PyTorch.
    """
    mask = _allowed(q, k, mask, causal, window)
    return _softmax(_scores(q, k, mask, scale, bias), mask)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    return_lse: bool = False,
    window: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention output softmax(q kᵀ · scale + bias) v, [b, h, t, d].

    q [b, h, t, d], k and v [b, g, s, d]; `mask` is boolean, True = may attend, and broadcasts to
    [b, h, t, s], or `causal` is the mask in which the last query stands at the last key, and with a
    `window` sees that many; `scale` defaults to 1/√d; `bias` broadcasts to [b, h, t, s]. With
    `return_lse` also the log of each row's softmax denominator, log Σ exp(score), [b, h, t]: with
    it the results over two sets of keys can be merged into the result over both.

    Source: Vaswani et al., Attention Is All You Need, 2017.
    """
    mask = _allowed(q, k, mask, causal, window)
    scores = _scores(q, k, mask, scale, bias)
    p = _softmax(scores, mask)
    out = (p @ _spread(v, q.shape[1]).to(p.dtype)).to(v.dtype)
    return (out, scores.logsumexp(-1)) if return_lse else out


@autotune(
    [
        config(8, 3, BLOCK_M=128, BLOCK_N=64),
        config(8, 3, BLOCK_M=128, BLOCK_N=128),
        config(4, 3, BLOCK_M=128, BLOCK_N=64),
        config(4, 3, BLOCK_M=64, BLOCK_N=64),
        config(8, 2, BLOCK_M=128, BLOCK_N=32),
        config(4, 1, BLOCK_M=32, BLOCK_N=32),
        config(4, 1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["WIDTH", "CAUSAL"],
    prune_configs_by={"early_config_prune": shared.fitting},
)
@jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, offsets_q, offsets_k,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, heads, group, t, s, longest_q, longest_k, scale, seed,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One program for BLOCK_M queries of one head. Those at the end of a causal sequence see most
    # keys and start first, so that no long one is left over at the end.
    i, tiles, head, z = task(longest_q, heads, BLOCK_M)
    m0 = (tiles - 1 - i) * BLOCK_M
    b = z if offsets_q is None else z * 0
    row = (b * heads + head) * t
    out_ptr += (b * t * heads + head) * D
    q_start, t = sequence(offsets_q, z, t)
    k_start, s = sequence(offsets_k, z, s)
    if m0 >= t:
        return
    row += q_start
    q_ptr += b * stride_qb + head * stride_qh + q_start * stride_qt
    k_ptr += b * stride_kb + head // group * stride_kh + k_start * stride_kt
    v_ptr += b * stride_vb + head // group * stride_vh + k_start * stride_vt
    out_ptr += q_start * heads * D

    q = tile(q_ptr, m0, stride_qt, t, D, BLOCK_M, WIDTH, False)
    m = m0 + tl.arange(0, BLOCK_M)
    # largest score so far, in units of log2; finite, so that rows which see nothing make no NaN
    top = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    log2_scale = scale * 1.4426950408889634
    edges = span(m0, s, s - t - WINDOW + 1, s - t, BLOCK_M, BLOCK_N, WINDOW > 0, CAUSAL)
    for part in tl.static_range(0 if WINDOW else 1, 3):
        for n0 in range(edges[part], edges[part + 1], BLOCK_N):
            k = tile(k_ptr, n0, stride_kt, s, D, BLOCK_N, WIDTH, part == 1)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            n = n0 + tl.arange(0, BLOCK_N)
            if part != 1:
                seen = visible(m[:, None], n[None, :], s - t, s, CAUSAL, WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * log2_scale)
            p = tl.exp2(scores * log2_scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            if DROPOUT > 0:
                p = tl.where(keep((row + m)[:, None], n[None, :], seed, DROPOUT), p, 0.0)
            v = tile(v_ptr, n0, stride_vt, s, D, BLOCK_N, WIDTH, part == 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            top = new_top
    lse = tl.where(total == 0, top, (top + tl.log2(total)) * 0.6931471805599453)
    total = tl.where(total == 0, 1.0, total) * (1 - DROPOUT)
    tl.store(lse_ptr + row + m, lse, mask=m < t)
    put(out_ptr, m0, heads * D, t, out / total[:, None], D, BLOCK_M, WIDTH)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: shared.Rule
    ) -> tuple[Tensor, Tensor]:
        q, k, v = shared.readable(q), shared.readable(k), shared.readable(v)
        out, lse = shared.empty(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        _forward[how.grid(0, q.shape[1])](
            *(q, k, v, out, lse, *how.offsets),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *how.numbers(q, k)),
            **how.constants(q),
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise ValueError("this kernel has no second derivative: take the reference")
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        return *run(q, k, v, out, lse, dout, dlse, ctx.how), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference` in O(t + s) memory, forward and backward: softmax(q kᵀ · scale) v, [b, h, t, d].

    q [b, h, t, d], k and v [b, g, s, d] of float32, float16 or bfloat16, with h a multiple of g and
    d at most 256; no copies are made of views whose last axis is contiguous. With `causal` the last
    query stands at the last key and, where there is a `window`, sees that many keys, itself
    included. Queries that see nothing give zeros. `dropout` of the weights is a function of `seed`,
    query and key, see `kernels.attention_tiles.kept`. With `return_lse` also the log of the
    softmax's denominator [b, h, t] in float32, differentiable too.

    Raises ValueError when shapes, dtypes or settings do not fit and when a second derivative is
    asked for, and as `kernels.runtime.check`.
    Source: Dao, FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning,
    2023.
    """
    how = shared.rule(q, k, v, causal, window, scale, dropout, seed)
    out, lse = _Attention.apply(q, k, v, how)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor,
    causal: bool = False, window: int | None = None, scale: float | None = None,
    dropout: float = 0.0, seed: int | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` of b sequences of various lengths, packed one behind the other without padding.

    q [n, h, d], k and v [m, g, d]; sequence i has the queries offsets_q[i] ... offsets_q[i + 1] - 1
    and the keys likewise, both offsets [b + 1] of integers. Result [n, h, d], lse [n, h]. The
    offsets are read on the host: on a GPU that waits for the device unless they are CPU tensors.
    """
    if not q.ndim == k.ndim == v.ndim == 3:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"packed sequences are q [n, h, d] and k, v [m, g, d]; got {shapes}")
    packed = [x[None].transpose(1, 2) for x in (q, k, v)]
    how = shared.rule(*packed, causal, window, scale, dropout, seed, (offsets_q, offsets_k))
    out, lse = _Attention.apply(*packed, how)
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return (out, lse) if return_lse else out


def cost(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    d_head: int,
    kv_heads: int | None = None,
    itemsize: int = 4,
    fused: bool = False,
    causal: bool = False,
    window: int | None = None,
) -> Cost:
    """FLOPs of the two products, 4 · d for each pair, and the bytes that move.

    Both forms read q, k, v and write the output once. The explicit form computes all b·h·t·s pairs
    and passes over their matrix four times: scores written and read, weights written and read. The
    `fused` one computes those pairs that the mask leaves and writes the log-sum-exp instead. The
    softmax's own arithmetic, one exponential a pair, is left out, as usual.

    >>> cost(batch=1, heads=2, queries=8, keys=8, d_head=4).flops
    2048
    >>> cost(batch=1, heads=2, queries=8, keys=8, d_head=4, fused=True, causal=True).flops
    1152
    """
    kv_heads = heads if kv_heads is None else kv_heads
    ends = 2 * batch * heads * queries * d_head + 2 * batch * kv_heads * keys * d_head
    if fused:
        seen = batch * heads * shared.pairs(queries, keys, causal, window)
        return Cost(4 * seen * d_head, ends * itemsize + 4 * batch * heads * queries)
    matrix = batch * heads * queries * keys
    return Cost(flops=4 * matrix * d_head, bytes=(ends + 4 * matrix) * itemsize)


def specs() -> list[Spec]:
    """Heads of 64 and 128; gfx942 has a third of the shared memory."""
    fixed = "attention forward", _forward, "q k v out lse", "qkv"
    return [
        shared.spec(*fixed, 64, (4, 3, 128, 64)),
        shared.spec(*fixed, 128, (8, 3, 128, 64), TARGETS[:3]),
        shared.spec(*fixed, 128, (8, 2, 128, 64), TARGETS[3:]),
    ]
