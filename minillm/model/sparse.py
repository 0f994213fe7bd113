"""Sparse attention that does only the work its mask leaves: local and strided."""

# b batch, h heads, t tokens, d head width, n blocks, w window or stride

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minillm.model.attention import check_shapes, merge
from minillm.model.mask import distances
from minillm.ops import op


def attend_local(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """`attend` under `sliding_window_mask`, at O(t · window) cost.

    The tokens are cut into blocks of `window`; a block needs only itself and the block before.
    q [b, h, t, d], k and v [b, g, t, d]. Source: Child et al., Generating Long Sequences with
    Sparse Transformers, 2019; Beltagy et al., Longformer, 2020.
    """
    _check_self(q, k, v)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
    return _local(q, k, v, window, scale)[0]


def _local(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    b, t = q.shape[0], q.shape[2]
    q, k, v = (_blocks(x, window) for x in (q, k, v))
    k, v = (torch.cat([_shift(x), x], dim=3) for x in (k, v))  # [b, g, n, 2w, d]
    distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)
    mask = ((distance >= 0) & (distance < window)).to(q.device).repeat(q.shape[2], 1, 1)
    mask[0, :, :window] = False  # nothing stands before the first block
    q, k, v = (rearrange(x, "b h n w d -> (b n) h w d") for x in (q, k, v))
    mask = mask.repeat(b, 1, 1)[:, None]
    out, lse = op("attention", "reference")(q, k, v, mask, scale, return_lse=True)
    out = rearrange(out, "(b n) h w d -> b h (n w) d", b=b)
    return out[:, :, :t], rearrange(lse, "(b n) h w -> b h (n w)", b=b)[:, :, :t]


def attend_strided(
    q: Tensor, k: Tensor, v: Tensor, stride: int, scale: float | None = None
) -> Tensor:
    """`attend` under `strided_mask`, at O(t · (stride + t / stride)) cost: O(t √t) at stride √t.

    The local part is `attend_local`; the far part compares only tokens whose positions agree
    modulo `stride`, which a reshape brings together; `merge` joins the two.
    """
    _check_self(q, k, v)
    if stride < 1:
        raise ValueError(f"stride={stride} must be at least 1")
    b, t = q.shape[0], q.shape[2]
    near = _local(q, k, v, stride, scale)
    q, k, v = (rearrange(_blocks(x, stride), "b h n w d -> (b w) h n d") for x in (q, k, v))
    earlier = distances(q.shape[2], 0, q.device) > 0  # the token itself belongs to the local part
    out, lse = op("attention", "reference")(q, k, v, earlier, scale, return_lse=True)
    out = rearrange(out, "(b w) h n d -> b h (n w) d", b=b)[:, :, :t]
    lse = rearrange(lse, "(b w) h n -> b h (n w)", b=b)[:, :, :t]
    return merge(*near, out, lse)[0]


def _blocks(x: Tensor, width: int) -> Tensor:
    """[b, h, t, d] -> [b, h, n, width, d], padded with zeros at the end."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % width))
    return rearrange(padded, "b h (n w) d -> b h n w d", w=width)


def _shift(x: Tensor) -> Tensor:
    """Each block's predecessor; the first block's is zeros."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2)


def _check_self(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shapes(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"self-attention needs as many keys as queries: {k.shape[2]}, {q.shape[2]}"
        )
