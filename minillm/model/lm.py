"""The language model: embed the tokens, pass them through blocks, unembed."""

# b batch, t tokens, d model width, v vocabulary, l layers, h heads

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention import Attention
from minillm.model.block import Block, initialize
from minillm.model.cache import KVCache
from minillm.model.norm import make_norm
from minillm.model.position import Position


class LM(nn.Module):
    """A decoder-only transformer: `unembed(body(embed(tokens)))`.

    Causal by itself; a prefix decoder with `minillm.model.mask.prefix_mask` as its mask. `seed`
    makes the initial weights reproducible; without it they come from PyTorch's global generator.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; Touvron et
    al., LLaMA, 2023.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        if cfg.kind != "decoder":
            raise ValueError(f"LM is a decoder; kind={cfg.kind!r} is in minillm.model.seq2seq")
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = Position(cfg)
        self.embedding_norm = make_norm(cfg) if cfg.embedding_norm else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        # after the last join post-norm has normalized already
        self.norm = make_norm(cfg) if cfg.placement in ("pre", "sandwich") else None
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.tokens.weight
        initialize(self, cfg, seed)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens [b, t] -> logits [b, t, v] for the token after each.

        `positions` [t] or [b, t] default to 0, 1, 2, ... (with a cache: going on behind it).
        `mask` (True = may attend, see `minillm.model.attention.attend`) defaults to causal, or to
        the sliding window of the config. With a `cache`, tokens are the new ones only.

        Raises ValueError for tokens outside the vocabulary, positions outside the context and
        masks or caches that do not fit.
        """
        return self._logits(self.hidden(tokens, positions, mask, cache))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Everything but the output matrix, [b, t] -> [b, t, d], normalized."""
        offset = 0 if cache is None else cache.length
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, at least one], got {tuple(tokens.shape)}")
        if cache is not None and len(cache.layers) != len(self.blocks):
            raise ValueError(f"a cache of {len(cache.layers)} layers, {len(self.blocks)} blocks")
        if positions is None:
            positions = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
        return self._finish(self.body(self.embed(tokens, positions), positions, mask, cache))

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token vectors, with positions where these are added: [b, t, d]."""
        x = self.position.add(look_up(self.tokens, tokens, "tokens"), positions)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return F.dropout(x, self.cfg.dropout, self.training) if self.cfg.dropout else x

    def body(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The blocks, [b, t, d] -> [b, t, d]."""
        keys = positions if cache is None else cache.remember(positions)
        rotation, bias = self.position.rotation(positions), self.position.bias(positions, keys)
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, mask=mask, cache=layer, rotation=rotation, bias=bias)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """[b, t, d] -> logits [b, t, v]."""
        return self._logits(self._finish(x))

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        return logits if self.cfg.logit_scale == 1 else logits * self.cfg.logit_scale


def look_up(table: nn.Embedding, ids: Tensor, name: str) -> Tensor:
    """Rows of `table`; ValueError that says where `ids` lie if some are outside (CPU only)."""
    try:
        return table(ids)
    except IndexError:
        low, high, last = ids.min(), ids.max(), table.num_embeddings - 1
        raise ValueError(f"{name} run from {low} to {high}, the model knows 0 to {last}") from None


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention weights of every layer and head for tokens [b, t]: [b, l, h, t, t].

    They are recorded from outside while the model runs; the model itself knows nothing of it.
    """
    maps: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        known = {name: kwargs.get(name) for name in ("mask", "rotation", "bias")}
        maps.append(module.weights(args[0], **known))

    layers = [m for m in model.modules() if isinstance(m, Attention)]
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in layers]
    try:
        model(tokens, positions=positions, mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps, dim=1)
