"""Attention: every token takes a weighted mean of what the tokens it may look at offer."""

# b batch, h query heads, g key/value heads, t queries, s keys, d head width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.cache import LayerCache
from minillm.model.norm import RMSNorm
from minillm.ops import op


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "reference",
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v: a mean of the values, weighted by how well each key fits.

    q [b, h, t, d], k and v [b, g, s, d] with h a multiple of g, result [b, h, t, d]. `mask` is
    boolean, True = may attend, [t, s] or [b | 1, h | 1, t | 1, s]; `causal` is the mask in which
    the last query stands at the last key (not both). `scale` defaults to 1/√d; `bias`
    [b | 1, h, t, s] is added to the scores. A row that may attend to nothing gives zeros.

    Raises ValueError when shapes or the mask do not fit. Source: Vaswani et al., Attention Is All
    You Need, 2017; grouped heads: Ainslie et al., GQA, 2023.
    """
    check_shapes(q, k, v, mask)
    if causal and (mask is not None or q.shape[2] > k.shape[2]):
        raise ValueError(
            "causal is a mask of its own, for at most as many queries as keys; got "
            f"{q.shape[2]} queries, {k.shape[2]} keys and {'a' if mask is not None else 'no'} mask"
        )
    return op("attention", impl)(q, k, v, mask=mask, scale=scale, bias=bias, causal=causal)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention needs [batch, heads, tokens, width], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"batch, width of q and k, and k and v's tokens must agree: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads")
    if mask is None:
        return
    full = (*q.shape[:3], k.shape[2])
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean, True = may attend; got {mask.dtype}")
    if mask.ndim == 3:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} leaves open whether the first axis is batch or "
            "heads: insert the other one with mask[:, None] or mask[None]"
        )
    fits = all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits or mask.ndim > 4:
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit scores of shape {full} "
            "[batch, heads, queries, keys]"
        )


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Each output [b, h, t, d] is a weighted mean; its weight in the union is its share of the
    softmax's denominator, whose logarithm `lse` [b, h, t] is kept beside it.
    """
    both = torch.logaddexp(lse, other_lse)
    share, other_share = (lse - both).exp(), (other_lse - both).exp()
    merged = out * share[..., None].to(out.dtype) + other_out * other_share[..., None].to(out.dtype)
    return merged, both


def attend_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    chunk: int = 64,
) -> Tensor:
    """The same result as `attend` with O(t · d) memory: keys are visited `chunk` at a time.

    With `causal`, the last query stands at the last key. Forward only: raises ValueError when a
    gradient is asked for, since autograd would keep every chunk's scores and undo the saving.

    Source: Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018; Rabe and
    Staats, Self-attention Does Not Need O(n²) Memory, 2021.
    """
    check_shapes(q, k, v)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attend_chunked is forward only: call it under torch.no_grad()")
    t, s = q.shape[2], k.shape[2]
    if causal and t > s:
        raise ValueError(f"causal attention of {t} queries needs at least as many keys, got {s}")
    explicit = op("attention", "reference")
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full(q.shape[:3], torch.finfo(wide).min, dtype=wide)
    position = torch.arange(s, device=q.device)
    for start in range(0, s, chunk):
        keys = slice(start, min(start + chunk, s))
        first = max(0, start - (s - t)) if causal else 0  # earlier queries see none of these keys
        mask = position[s - t + first :, None] >= position[keys] if causal else None
        part = explicit(q[:, :, first:], k[:, :, keys], v[:, :, keys], mask, scale, return_lse=True)
        out[:, :, first:], lse[:, :, first:] = merge(out[:, :, first:], lse[:, :, first:], *part)
    return out


class Attention(nn.Module):
    """Multi-head attention: h heads look at different parts of the same vectors.

    Grouped-query where `cfg.n_kv_heads` < `cfg.n_heads`, multi-query where it is 1. The number of
    heads is read off the width of the projections, so a narrower q, k, v, out works unchanged.

    Source: Vaswani et al., Attention Is All You Need, 2017; Shazeer, Fast Transformer Decoding,
    2019; Ainslie et al., GQA, 2023; norm of queries and keys: Henry et al., Query-Key
    Normalization for Transformers, 2020.
    """

    def __init__(self, cfg: ModelConfig, causal: bool = False) -> None:
        super().__init__()
        self.d_head, self.scale = cfg.d_head, cfg.attention_scale
        self.causal, self.window, self.layout = causal, cfg.window, cfg.rope_layout
        names = ("attention", "attention_weights", "rope")
        self.attend, self.look, self.rotate = (op(name, cfg.impl) for name in names)
        self.q = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.bias)
        self.k = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.d_head, bias=cfg.bias)
        self.v = nn.Linear(cfg.d_model, cfg.kv_heads * cfg.d_head, bias=cfg.bias)
        self.out = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps, cfg.impl) if cfg.qk_norm else None
        self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps, cfg.impl) if cfg.qk_norm else None

    def project(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, t, d_model] -> q [b, h, t, d], k and v [b, g, t, d], or from `memory` [b, s, ...].

        `rotation` is cos and sin of x's positions, see `minillm.model.position.rotate`.
        """
        source = x if memory is None else memory
        # [b, t, h · d] -> [b, h, t, d]; views, because in generation every microsecond counts
        q, k, v = (
            y.view(y.shape[0], y.shape[1], -1, self.d_head).transpose(1, 2)
            for y in (self.q(x), self.k(source), self.v(source))
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (self.rotate(y, *rotation, self.layout) for y in (q, k))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """x [b, t, d_model] -> [b, t, d_model].

        Without a mask a causal layer sees what lies behind (within the window, if there is one),
        any other everything. With a cache, x holds only the new tokens; their keys and values are
        appended, and the mask covers the old keys too: [t, old + t]. With `memory` [b, s, d_model]
        keys and values come from there.
        """
        q, k, v = self.project(x, rotation, memory)
        if cache is not None:
            k, v = cache.append(k, v)
        if mask is not None or memory is not None:
            check_shapes(q, k, v, mask)
        y = self.attend(q, k, v, mask=mask, scale=self.scale, bias=bias, **self._sight(mask))
        return self.out(y.transpose(1, 2).flatten(2))

    def _sight(self, mask: Tensor | None) -> dict[str, Any]:
        """What the operation does without a matrix: look back only, and only so far."""
        causal = self.causal and mask is None
        return {"causal": causal, "window": self.window if causal else None}

    def weights(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Attention weights [b, h, t, s] that `forward` would use: to look at, not to train."""
        q, k, _ = self.project(x, rotation, memory)
        return self.look(q, k, mask=mask, scale=self.scale, bias=bias, **self._sight(mask))
