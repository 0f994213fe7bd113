"""A decoder language model: embed the tokens, pass them through blocks, unembed."""

# b batch, t tokens, d model width, v vocabulary, l layers, h heads

from __future__ import annotations

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention import Attention
from minillm.model.cache import KVCache, LayerCache
from minillm.model.mask import causal_mask, sliding_window_mask


class MLP(nn.Module):
    """Two linear maps with a GELU between them, the same for every token."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(cfg.d_model, cfg.mlp_width, bias=False)
        self.down = nn.Linear(cfg.mlp_width, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): both branches add to one stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.d_model, bias=False)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.d_model, bias=False)
        self.mlp = MLP(cfg)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        x = x + self.attn(self.norm1(x), mask=mask, cache=cache)
        return x + self.mlp(self.norm2(x))


class LM(nn.Module):
    """A decoder-only transformer with learned positions: `unembed(body(embed(tokens)))`.

    `seed` makes the initial weights reproducible; without it they come from PyTorch's global
    generator. Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.positions = nn.Embedding(cfg.max_len, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.LayerNorm(cfg.d_model, bias=False)
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.tokens.weight
        self._initialise(None if seed is None else torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # 2 l branches add up in the stream: their last maps start smaller to keep its size
                last = name.endswith(("attn.out.weight", "mlp.down.weight"))
                std = 0.02 / (2 * self.cfg.n_layers) ** 0.5 if last else 0.02
                p.normal_(0.0, std, generator=generator)

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
        offset = 0 if cache is None else cache.length
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, at least one], got {tuple(tokens.shape)}")
        if cache is not None and len(cache.layers) != len(self.blocks):
            raise ValueError(f"a cache of {len(cache.layers)} layers, {len(self.blocks)} blocks")
        if positions is None:
            positions = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
        if mask is None:
            mask = self.mask(tokens.shape[1], offset, tokens.device)
        return self.unembed(self.body(self.embed(tokens, positions), mask, cache))

    def mask(self, t: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
        """The mask the model is trained with, [t, offset + t]."""
        if self.cfg.window is None:
            return causal_mask(t, offset, device)
        return sliding_window_mask(t, self.cfg.window, offset, device)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token and position vectors, added: [b, t, d]."""
        _check_ids("tokens", tokens, self.cfg.vocab_size)
        _check_ids("positions", positions, self.cfg.max_len)
        return self.tokens(tokens) + self.positions(positions)

    def body(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The blocks, [b, t, d] -> [b, t, d]."""
        layers = [None] * len(self.blocks) if cache is None else cache.layers
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, mask, layer)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        """[b, t, d] -> logits [b, t, v]."""
        return self.head(self.norm(x))


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.device.type != "cpu":  # reading the values would make the host wait for the device
        return
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= size:
        raise ValueError(f"{name} run from {low} to {high}, the model knows 0 to {size - 1}")


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
        maps.append(module.weights(args[0], kwargs["mask"]))

    layers = [m for m in model.modules() if isinstance(m, Attention)]
    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in layers]
    try:
        model(tokens, positions=positions, mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps, dim=1)
