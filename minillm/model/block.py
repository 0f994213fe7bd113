"""A block: attention carries information between tokens, the MLP works on each; both add up."""

# b batch, t tokens, s tokens of another sequence, d model width

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention import Attention
from minillm.model.cache import LayerCache
from minillm.model.mlp import MLP
from minillm.model.norm import deepnorm_constants, make_norm


class Block(nn.Module):
    """Attention, then (with `cross`) attention to another sequence, then an MLP.

    Each is a branch f beside the stream x, joined as `cfg.placement` says:

        pre       x + f(norm(x))              the stream is never normalized
        post      norm(x + f(x))              as in the first transformer
        deepnorm  norm(α x + f(x))            α and the initialization's β from the depth
        sandwich  x + norm_out(f(norm(x)))    each branch adds numbers of size one

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture, 2020; Wang et
    al., DeepNet, 2022; Ding et al., CogView, 2021 (sandwich).
    """

    def __init__(self, cfg: ModelConfig, causal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.placement, self.dropout = cfg.placement, cfg.dropout
        stack = "decoder" if causal else "encoder"
        self.alpha = deepnorm_constants(cfg, stack)[0] if cfg.placement == "deepnorm" else 1.0
        self.norm1, self.attn = make_norm(cfg), Attention(cfg, causal=causal)
        if cross:
            self.norm_cross, self.cross = make_norm(cfg), Attention(cfg, causal=False)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)
        if cfg.placement == "sandwich":
            self.norm1_out, self.norm2_out = make_norm(cfg), make_norm(cfg)
            if cross:
                self.norm_cross_out = make_norm(cfg)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """x [b, t, d] -> [b, t, d]; `memory` [b, s, d] is what `cross` attends to."""
        if (memory is not None) != hasattr(self, "cross"):
            given, built = ("no memory", "with") if memory is None else ("memory", "without")
            raise ValueError(f"{given} for a block {built} cross-attention")
        x = self._join(x, "norm1", self.attn, mask=mask, cache=cache, rotation=rotation, bias=bias)
        if memory is not None:
            x = self._join(x, "norm_cross", self.cross, mask=memory_mask, memory=memory)
        return self._join(x, "norm2", self.mlp)

    def _join(self, x: Tensor, norm: str, branch: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        normalize = getattr(self, norm)
        if self.placement in ("post", "deepnorm"):
            return normalize(self.alpha * x + self._drop(branch(x, **kwargs)))
        y = self._drop(branch(normalize(x), **kwargs))
        return x + (getattr(self, f"{norm}_out")(y) if self.placement == "sandwich" else y)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


@torch.no_grad()
def initialize(model: nn.Module, cfg: ModelConfig, seed: int | None = None) -> None:
    """Draw all weights anew as `cfg.init` says; vectors become ones (weights) and zeros (biases).

    The order is that of `named_parameters`, from one generator, so that `seed` fixes everything.
    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (scaled);
    Glorot and Bengio, Understanding the Difficulty of Training Deep Feedforward Neural Networks,
    2010 (xavier).
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        part = name.split(".")[-2] if "." in name else name
        if p.ndim < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        elif cfg.init == "xavier" and "blocks." in name:
            gain = 1.0
            if cfg.placement == "deepnorm" and part not in ("q", "k"):
                gain = deepnorm_constants(cfg, "encoder" if "encoder" in name else "decoder")[1]
            p.normal_(0.0, gain * (2 / sum(p.shape)) ** 0.5, generator=generator)
        else:
            # 2 L branches add up in the stream: their last maps start smaller to keep its size
            last = cfg.init == "scaled" and part in ("out", "down")
            layers = max(cfg.n_layers, cfg.encoder_layers)
            p.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if last else 0.02, generator=generator)
