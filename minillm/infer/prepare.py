"""The same model laid out for generating, where one token at a time leaves little to multiply."""

# b batch, t tokens, h query heads, g key/value heads, d head width

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from minillm.model.attention import Attention
from minillm.model.lm import LM


class FusedAttention(Attention):
    """Attention whose queries, keys and values come out of one product instead of three."""

    def __init__(self, attn: Attention) -> None:
        nn.Module.__init__(self)
        for name, value in vars(attn).items():
            if not name.startswith("_"):  # those are PyTorch's own
                setattr(self, name, value)
        for name, module in attn.named_children():
            if name not in ("q", "k", "v"):
                self.add_module(name, module)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        parts = (attn.q, attn.k, attn.v)
        self.sizes = [part.out_features // attn.d_head for part in parts]
        bias = attn.q.bias is not None
        self.qkv = nn.Linear(attn.q.in_features, sum(part.out_features for part in parts), bias)
        with torch.no_grad():
            self.qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
            if bias:
                self.qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]))

    def project(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.project`, without memory: q [b, h, t, d], k and v [b, g, t, d]."""
        if memory is not None:
            raise ValueError("queries and keys of two sequences cannot come out of one product")
        heads = self.qkv(x).view(x.shape[0], x.shape[1], -1, self.d_head).transpose(1, 2)
        q, k, v = heads.split(self.sizes, dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = (self.rotate(y, *rotation, self.layout) for y in (q, k))
        return q, k, v


def _is_plain(attn: nn.Module) -> bool:
    """Whether nothing was put in the place of, or hooked to, an attention and its projections."""
    if type(attn) is not Attention or {"forward", "project"} & set(vars(attn)):
        return False
    parts = (attn.q, attn.k, attn.v)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (attn, *parts))
    return not hooked and all(type(part) is nn.Linear for part in parts)


def prepare(model: LM) -> LM:
    """A copy of a decoder for `generate`: the same function, faster for few tokens at a time.

    Queries, keys and values come from one product, and weights lie in memory as [in, out], which a
    CPU multiplies faster by a few rows (their shapes do not change). It takes the model's memory
    once more, does not follow it when it is trained on, and has no gradients. Attention that was
    wrapped from outside (by adapters, say) is left as it is.
    """
    ready = copy.deepcopy(model).eval()
    for block in ready.blocks:
        if _is_plain(block.attn):
            block.attn = FusedAttention(block.attn)
    for module in ready.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    return ready.requires_grad_(False)
