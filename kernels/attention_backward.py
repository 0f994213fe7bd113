"""The backward pass of attention, as in FlashAttention-2: every weight is computed once more.

Kept from the forward pass are only the output and the logarithm of each row's softmax denominator,
from which any tile of weights follows at once: P = exp(S - lse). One kernel walks along the keys
and gathers the queries' gradients, another walks along the queries and gathers those of keys and
values. Each result is written by one program, so that sums have a fixed order.
"""

# b batch, h query heads, g key/value heads (h is a multiple of g), t queries, s keys, d head width
# S scores, P weights, dP and dS their gradients; inside kernels m is a query's place and n a key's

from __future__ import annotations

import torch
from torch import Tensor

from kernels import attention_tiles as shared
from kernels.attention_tiles import keep, put, sequence, span, task, tile, visible
from kernels.cost import Cost
from kernels.runtime import autotune, config, jit, tl, triton
from kernels.spec import TARGETS, Spec


def reference(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None = None, causal: bool = False, window: int | None = None,
    scale: float | None = None, dropout: float = 0.0, seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, by the formulas and with whole matrices.

    q, out, dout [b, h, t, d], k and v [b, g, s, d], lse and dlse [b, h, t]; Z is dropout's factor:

        P = exp(q kᵀ · scale - lse)        dV = (Z ∘ P)ᵀ dO
        D = rowsum(dO ∘ O) - dlse          dS = P ∘ (Z ∘ dO Vᵀ - D) · scale
        dQ = dS K                          dK = dSᵀ Q

    The D of a row is Σ P ∘ dP, what the softmax's gradient subtracts, found without P.

    Source: Dao et al., FlashAttention, 2022.
    """
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    dtypes = q.dtype, k.dtype, v.dtype
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k, v, out, lse, dout = (x.to(wide) for x in (q, k, v, out, lse, dout))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    seen = shared.mask(q.shape[2], k.shape[2], causal, window or 0, q.device)
    p = (q @ k.mT * scale - lse[..., None]).masked_fill(~seen, float("-inf")).exp()
    z = torch.ones_like(p)
    if dropout:
        rows = torch.arange(lse.numel(), device=q.device).view(lse.shape)
        z = shared.kept(dropout, seed, rows, k.shape[2]).to(wide)
    d = (dout * out).sum(-1) - (0 if dlse is None else dlse)
    ds = p * (z * (dout @ v.mT) - d[..., None]) * scale
    grads = ds @ k, ds.mT @ q, (z * p).mT @ dout
    dq, dk, dv = (
        x.unflatten(1, (-1, n)).sum(2) for x, n in zip(grads, (1, group, group), strict=True)
    )
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])


@jit
def _rowsum(out_ptr, dout_ptr, dlse_ptr, d_ptr, stride_b, stride_h, stride_t, heads, t,
            D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    # the vector D of the formulas, for BLOCK_M rows of one head
    i, _, head, b = task(t, heads, BLOCK_M)
    m0 = i * BLOCK_M
    out_ptr += (b * t * heads + head) * D
    dout_ptr += b * stride_b + head * stride_h
    out = tile(out_ptr, m0, heads * D, t, D, BLOCK_M, WIDTH, False).to(tl.float32)
    dout = tile(dout_ptr, m0, stride_t, t, D, BLOCK_M, WIDTH, False).to(tl.float32)
    d = tl.sum(out * dout, axis=1)
    m = m0 + tl.arange(0, BLOCK_M)
    row = (b * heads + head) * t + m
    if dlse_ptr is not None:
        d -= tl.load(dlse_ptr + row, mask=m < t, other=0.0)
    tl.store(d_ptr + row, d, mask=m < t)


@autotune(
    [
        config(8, 2, BLOCK_M=64, BLOCK_N=64),
        config(4, 2, BLOCK_M=64, BLOCK_N=64),
        config(8, 2, BLOCK_M=128, BLOCK_N=64),
        config(8, 2, BLOCK_M=128, BLOCK_N=32),
        config(4, 1, BLOCK_M=32, BLOCK_N=32),
        config(4, 1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["WIDTH", "CAUSAL"],
    prune_configs_by={"early_config_prune": shared.fitting},
)
@jit
def _queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, d_ptr, dq_ptr, offsets_q, offsets_k,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, t, s, longest_q, longest_k, scale, seed,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # dQ of BLOCK_M queries of one head, from the keys that they see: the forward kernel's walk
    i, tiles, head, z = task(longest_q, heads, BLOCK_M)
    m0 = (tiles - 1 - i) * BLOCK_M
    b = z if offsets_q is None else z * 0
    row = (b * heads + head) * t
    dq_ptr += (b * t * heads + head) * D
    q_start, t = sequence(offsets_q, z, t)
    k_start, s = sequence(offsets_k, z, s)
    if m0 >= t:
        return
    row += q_start
    q_ptr += b * stride_qb + head * stride_qh + q_start * stride_qt
    k_ptr += b * stride_kb + head // group * stride_kh + k_start * stride_kt
    v_ptr += b * stride_vb + head // group * stride_vh + k_start * stride_vt
    dout_ptr += b * stride_ob + head * stride_oh + q_start * stride_ot
    dq_ptr += q_start * heads * D

    q = tile(q_ptr, m0, stride_qt, t, D, BLOCK_M, WIDTH, False)
    dout = tile(dout_ptr, m0, stride_ot, t, D, BLOCK_M, WIDTH, False)
    m = m0 + tl.arange(0, BLOCK_M)
    log2_scale = scale * 1.4426950408889634
    lse = tl.load(lse_ptr + row + m, mask=m < t, other=0.0) * 1.4426950408889634
    d = tl.load(d_ptr + row + m, mask=m < t, other=0.0)
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    edges = span(m0, s, s - t - WINDOW + 1, s - t, BLOCK_M, BLOCK_N, WINDOW > 0, CAUSAL)
    for part in tl.static_range(0 if WINDOW else 1, 3):
        for n0 in range(edges[part], edges[part + 1], BLOCK_N):
            k = tile(k_ptr, n0, stride_kt, s, D, BLOCK_N, WIDTH, part == 1)
            v = tile(v_ptr, n0, stride_vt, s, D, BLOCK_N, WIDTH, part == 1)
            n = n0 + tl.arange(0, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(scores * log2_scale - lse[:, None])
            if part != 1:
                seen = visible(m[:, None], n[None, :], s - t, s, CAUSAL, WINDOW)
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            if DROPOUT > 0:
                stays = keep((row + m)[:, None], n[None, :], seed, DROPOUT)
                dp = tl.where(stays, dp / (1 - DROPOUT), 0.0)
            ds = (p * (dp - d[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
    put(dq_ptr, m0, heads * D, t, dq * scale, D, BLOCK_M, WIDTH)


@autotune(
    [
        config(8, 2, BLOCK_M=32, BLOCK_N=64),
        config(8, 2, BLOCK_M=64, BLOCK_N=128),
        config(8, 2, BLOCK_M=32, BLOCK_N=128),
        config(4, 2, BLOCK_M=64, BLOCK_N=64),
        config(4, 1, BLOCK_M=32, BLOCK_N=32),
        config(4, 1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["WIDTH", "CAUSAL"],
    prune_configs_by={"early_config_prune": shared.fitting},
)
@jit
def _keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, d_ptr, dk_ptr, dv_ptr, offsets_q, offsets_k,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_ob, stride_oh, stride_ot,
    heads, group, t, s, longest_q, longest_k, scale, seed,
    D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # dK and dV of BLOCK_N keys of one key/value head, from the queries that see them, of one head
    # of its group after the other. Tiles of weights are transposed here, [keys, queries], as the
    # products want them.
    kv_heads = heads // group
    i, _, kv_head, z = task(longest_k, kv_heads, BLOCK_N)
    n0 = i * BLOCK_N
    b = z if offsets_q is None else z * 0
    place = (b * s * kv_heads + kv_head) * D
    row = b * heads * t
    rows = t
    q_start, t = sequence(offsets_q, z, t)
    k_start, s = sequence(offsets_k, z, s)
    if n0 >= s:
        return
    place += k_start * kv_heads * D
    q_ptr += b * stride_qb + q_start * stride_qt
    dout_ptr += b * stride_ob + q_start * stride_ot
    k_ptr += b * stride_kb + kv_head * stride_kh + k_start * stride_kt
    v_ptr += b * stride_vb + kv_head * stride_vh + k_start * stride_vt

    k = tile(k_ptr, n0, stride_kt, s, D, BLOCK_N, WIDTH, False)
    v = tile(v_ptr, n0, stride_vt, s, D, BLOCK_N, WIDTH, False)
    n = n0 + tl.arange(0, BLOCK_N)
    log2_scale = scale * 1.4426950408889634
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    edges = span(n0, t, t - s, t - s + WINDOW - 1, BLOCK_N, BLOCK_M, CAUSAL, WINDOW > 0)
    if not WINDOW:  # queries beyond the last are zeros and add nothing, so that no mask is needed
        edges = edges[0], edges[1], edges[3], edges[3]
    for head in range(kv_head * group, kv_head * group + group):
        head_row = row + head * rows + q_start
        for part in tl.static_range(0 if CAUSAL else 1, 3 if WINDOW else 2):
            for m0 in range(edges[part], edges[part + 1], BLOCK_M):
                q = tile(q_ptr + head * stride_qh, m0, stride_qt, t, D, BLOCK_M, WIDTH, False)
                dout = tile(dout_ptr + head * stride_oh, m0, stride_ot, t, D, BLOCK_M, WIDTH, False)
                m = m0 + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + head_row + m, mask=m < t, other=0.0) * 1.4426950408889634
                d = tl.load(d_ptr + head_row + m, mask=m < t, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision="ieee")
                p = tl.exp2(scores * log2_scale - lse[None, :])
                if part != 1:
                    seen = visible(m[None, :], n[:, None], s - t, s, CAUSAL, WINDOW)
                    p = tl.where(seen, p, 0.0)
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                left = p
                if DROPOUT > 0:
                    stays = keep((head_row + m)[None, :], n[:, None], seed, DROPOUT)
                    left = tl.where(stays, p / (1 - DROPOUT), 0.0)
                    dp = tl.where(stays, dp / (1 - DROPOUT), 0.0)
                dv = tl.dot(left.to(dout.dtype), dout, dv, input_precision="ieee")
                ds = (p * (dp - d[None, :])).to(q.dtype)
                dk = tl.dot(ds, q, dk, input_precision="ieee")
    put(dk_ptr + place, n0, kv_heads * D, s, dk * scale, D, BLOCK_N, WIDTH)
    put(dv_ptr + place, n0, kv_heads * D, s, dv, D, BLOCK_N, WIDTH)


def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
        dlse: Tensor | None, how: shared.Rule) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The three kernels, one after the other; arguments as of `attention_backward`, checked."""
    out = out.transpose(1, 2).contiguous()
    dout, dlse = shared.readable(dout), None if dlse is None else dlse.contiguous()
    dq, dk, dv, d = shared.empty(q), shared.empty(k), shared.empty(v), torch.empty_like(lse)
    (b, heads, t), constants = lse.shape, how.constants(q)
    _rowsum[(triton.cdiv(t, 64) * b * heads,)](
        *(out, dout, dlse, d, *dout.stride()[:3], heads, t, q.shape[3], constants["WIDTH"], 64)
    )
    strides = [step for x in (q, k, v, dout) for step in x.stride()[:3]]
    rest = (*how.offsets, *strides, *how.numbers(q, k))
    _keys[how.grid(1, k.shape[1])](q, k, v, dout, lse, d, dk, dv, *rest, **constants)
    _queries[how.grid(0, heads)](q, k, v, dout, lse, d, dq, *rest, **constants)
    return dq, dk, dv


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None = None, causal: bool = False, window: int | None = None,
    scale: float | None = None, dropout: float = 0.0, seed: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference` tile by tile: what `kernels.attention.attention` does backward.

    Shapes as in the reference; lse and dlse of float32, all else of one dtype. Raises as
    `attention` does.
    """
    how = shared.rule(q, k, v, causal, window, scale, dropout, seed)
    likes = ((out, q), (dout, q), (lse, lse.float()), (lse if dlse is None else dlse, lse))
    if lse.shape != q.shape[:3] or any(x.shape != y.shape or x.dtype != y.dtype for x, y in likes):
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} and dout {tuple(dout.shape)} {dout.dtype} must be "
            f"like q {tuple(q.shape)} {q.dtype}, lse {tuple(lse.shape)} {lse.dtype} (and dlse) "
            "float32 without the last axis"
        )
    q, k, v = (shared.readable(x) for x in (q, k, v))
    return run(q, k, v, out, lse.contiguous(), dout, dlse, how)


def cost(
    batch: int, heads: int, queries: int, keys: int, d_head: int, kv_heads: int | None = None,
    itemsize: int = 4, causal: bool = False, window: int | None = None,
) -> Cost:  # fmt: skip
    """FLOPs of five products, 10 · d for each pair that the mask leaves, and the bytes that move.

    S once more, dV, dP, dK and dQ, which is how backward passes are usually counted. S and dP are
    computed by both kernels, so that 14 · d are carried out: the price of sums in a fixed order.
    Read: q, k, v, the output and its gradient, lse; written: D and three gradients.

    >>> cost(batch=1, heads=2, queries=8, keys=8, d_head=4).flops
    5120
    """
    kv_heads = heads if kv_heads is None else kv_heads
    rows, columns = batch * heads * queries, batch * kv_heads * keys
    seen = batch * heads * shared.pairs(queries, keys, causal, window)
    return Cost(10 * seen * d_head, (4 * rows + 4 * columns) * d_head * itemsize + 2 * 4 * rows)


def specs() -> list[Spec]:
    """Heads of 64 and 128, with what fits each target's registers."""
    pointers = {"out_ptr": "*bf16", "dout_ptr": "*bf16", "dlse_ptr": "*fp32", "d_ptr": "*fp32"}
    sizes = dict.fromkeys(["stride_b", "stride_h", "stride_t", "heads", "t"], "i32")
    constants = {"D": 128, "WIDTH": 128, "BLOCK_M": 64}
    queries = "attention_backward queries", _queries, "q k v dout lse d dq", "qkvo"
    keys = "attention_backward keys", _keys, "q k v dout lse d dk dv", "qkvo"
    return [
        Spec("attention_backward rowsum bf16 128", _rowsum, pointers | sizes, constants),
        shared.spec(*queries, 64, (4, 2, 64, 64)),
        shared.spec(*queries, 128, (8, 2, 64, 64), TARGETS[:3]),
        shared.spec(*queries, 128, (4, 2, 64, 64), TARGETS[3:]),
        shared.spec(*keys, 64, (8, 2, 32, 128), TARGETS[:3]),
        shared.spec(*keys, 64, (4, 2, 32, 64), TARGETS[3:]),
        shared.spec(*keys, 128, (8, 2, 32, 64), TARGETS[:2]),
        shared.spec(*keys, 128, (8, 1, 32, 64), TARGETS[2:3]),
        shared.spec(*keys, 128, (4, 2, 32, 64), TARGETS[3:]),
    ]
