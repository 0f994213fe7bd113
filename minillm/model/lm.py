"""The language model: embed the tokens, pass them through blocks, unembed."""

# b batch, t tokens, d model width, v vocabulary, l layers, h heads

from __future__ import annotations

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention import Attention
from minillm.model.block import initialize
from minillm.model.cache import KVCache
from minillm.model.stack import Stack, look_up, make_head, scaled


class LM(Stack):
    """A decoder-only transformer: `unembed(body(embed(tokens)))`.

    Causal by itself; a prefix decoder with `minillm.model.mask.prefix_mask` as its mask. `seed`
    makes the initial weights reproducible; without it they come from PyTorch's global generator.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019; Touvron et
    al., LLaMA, 2023.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = None) -> None:
        if cfg.kind != "decoder":
            raise ValueError(f"LM is a decoder; kind={cfg.kind!r} is in minillm.model.seq2seq")
        super().__init__(cfg, causal=True)
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.head = make_head(cfg, self.tokens)
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
        return scaled(self.head(self.hidden(tokens, positions, mask, cache)), self.cfg)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Everything but the output matrix, [b, t] -> [b, t, d], normalized."""
        return self.run(look_up(self.tokens, tokens, "tokens"), positions, mask, cache)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token vectors, with positions where these are added: [b, t, d]."""
        return self.place(look_up(self.tokens, tokens, "tokens"), positions)

    def unembed(self, x: Tensor) -> Tensor:
        """[b, t, d] -> logits [b, t, v]."""
        return scaled(self.head(self.finish(x)), self.cfg)


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
