"""What every transformer is made of between token vectors and the output matrix."""

# b batch, t tokens, s tokens of another sequence, d model width, v vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.block import Block
from minillm.model.cache import KVCache
from minillm.model.norm import make_norm
from minillm.model.position import Position


class Stack(nn.Module):
    """Positions, blocks and the final norm.

    `causal` blocks look back only; `cross` adds attention to a second sequence to each block.
    """

    def __init__(self, cfg: ModelConfig, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        # a model that adds token vectors and a head has them in the order of the computation,
        # which is also the order in which `initialize` draws
        self.register_module("tokens", None)
        layers = cfg.n_layers if causal else cfg.encoder_layers
        self.position = Position(cfg, bidirectional=not causal)
        self.embedding_norm = make_norm(cfg) if cfg.embedding_norm else None
        self.blocks = nn.ModuleList(Block(cfg, causal, cross) for _ in range(layers))
        # after the last join post-norm has normalized already
        self.norm = make_norm(cfg) if cfg.placement in ("pre", "sandwich") else None

    def run(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """Token vectors x [b, t, d], and `memory` [b, s, d] for `cross` -> [b, t, d], normalized.

        `positions` [t] or [b, t] default to 0, 1, 2, ..., going on behind a cache.
        """
        offset = 0 if cache is None else cache.length
        if cache is not None and len(cache.layers) != len(self.blocks):
            raise ValueError(f"a cache of {len(cache.layers)} layers, {len(self.blocks)} blocks")
        if positions is None:
            positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        x = self.place(x, positions)
        return self.finish(self.body(x, positions, mask, cache, memory, memory_mask))

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Token vectors [b, t, d] with positions, where these are added to them."""
        x = self.position.add(x, positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return F.dropout(x, self.cfg.dropout, self.training) if self.cfg.dropout else x

    def body(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """The blocks, [b, t, d] -> [b, t, d]."""
        keys = positions if cache is None else cache.remember(positions)
        rotation, bias = self.position.rotation(positions), self.position.bias(positions, keys)
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, mask, layer, rotation, bias, memory, memory_mask)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The final norm, if the placement has one."""
        return x if self.norm is None else self.norm(x)


def make_head(cfg: ModelConfig, tokens: nn.Embedding) -> nn.Linear:
    """The output matrix [v, d], which is that of the token vectors where they are tied."""
    head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
    if cfg.tie_embeddings:
        head.weight = tokens.weight
    return head


def scaled(logits: Tensor, cfg: ModelConfig) -> Tensor:
    """Times `cfg.logit_scale`."""
    return logits if cfg.logit_scale == 1 else logits * cfg.logit_scale


def look_up(table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
    """Rows of `table` for ids [b, t]: [b, t, d].

    Raises ValueError for another shape, and says where `ids` lie if some are outside (CPU only).
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"{name} must be [batch, at least one], got {tuple(ids.shape)}")
    try:
        return table(ids)
    except IndexError:
        low, high, last = ids.min(), ids.max(), table.num_embeddings - 1
        raise ValueError(f"{name} run from {low} to {high}, the model knows 0 to {last}") from None
