"""Scaled dot-product attention, softmax(q kᵀ / √d) v, in its explicit form.

Every faster form in the course is compared with `reference`.
"""

# b batch, h query heads, g key/value heads (h is a multiple of g), t queries, s keys, d head width

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cost import Cost


def _spread(x: Tensor, n_heads: int) -> Tensor:
    """Repeat each of the g key/value heads for its h / g query heads."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def _allowed(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The mask, or the causal one in which the last query stands at the last key."""
    if not causal:
        return mask
    t, s = q.shape[2], k.shape[2]
    return torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)


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
) -> Tensor:
    """Attention weights softmax(q kᵀ · scale + bias), [b, h, t, s], float32 at least.

    Rows sum to one, except rows whose mask allows no key: those are zero, as in PyTorch.
    """
    mask = _allowed(q, k, mask, causal)
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention output softmax(q kᵀ · scale + bias) v, [b, h, t, d].

    q [b, h, t, d], k and v [b, g, s, d]; `mask` is boolean, True = may attend, and broadcasts to
    [b, h, t, s], or `causal` is the mask in which the last query stands at the last key; `scale`
    defaults to 1/√d; `bias` broadcasts to [b, h, t, s]. With `return_lse` also the log of each
    row's softmax denominator, log Σ exp(score), [b, h, t]: with it the results over two sets of
    keys can be merged into the result over both.

    Source: Vaswani et al., Attention Is All You Need, 2017.
    """
    mask = _allowed(q, k, mask, causal)
    scores = _scores(q, k, mask, scale, bias)
    p = _softmax(scores, mask)
    out = (p @ _spread(v, q.shape[1]).to(p.dtype)).to(v.dtype)
    return (out, scores.logsumexp(-1)) if return_lse else out


def cost(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    d_head: int,
    kv_heads: int | None = None,
    itemsize: int = 4,
) -> Cost:
    """FLOPs of the two products, 4·b·h·t·s·d, and the bytes that the explicit form moves.

    The explicit form reads q, k, v and writes the output once, and passes over the score matrix
    four times: scores written and read, weights written and read. The softmax's own arithmetic,
    of order b·h·t·s, is left out, as usual.

    >>> cost(batch=1, heads=2, queries=8, keys=8, d_head=4).flops
    2048
    """
    kv_heads = heads if kv_heads is None else kv_heads
    matrix = batch * heads * queries * keys
    ends = 2 * batch * heads * queries * d_head + 2 * batch * kv_heads * keys * d_head
    return Cost(flops=4 * matrix * d_head, bytes=(ends + 4 * matrix) * itemsize)
