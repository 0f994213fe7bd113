"""Encoder and encoder-decoder: the blocks of `minillm.model.lm`, with other masks.

`LM`, the decoder, lets each token see what lies behind it; `Encoder` lets it see every token; in
`Seq2Seq` the decoder sees, besides what lies behind, a whole other sequence.
"""

# b batch, t (target) tokens, s source tokens, d model width, v vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.block import initialize
from minillm.model.cache import KVCache
from minillm.model.norm import make_norm
from minillm.model.stack import Stack, look_up, make_head, scaled


class MaskedHead(nn.Module):
    """BERT's last step before the output matrix: norm(GELU(dense(x))), and a bias for the logits.

    Source: Devlin et al., BERT, 2019, and its published code.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(cfg.d_model, cfg.d_model)
        self.norm = make_norm(cfg)
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        return self.norm(F.gelu(self.dense(x)))


class Encoder(Stack):
    """A transformer that sees both ways, for tokens to be filled in or for features.

    With `cfg.n_segments` each token also carries the vector of its segment, with `cfg.mlm_head`
    BERT's head stands before the output matrix. Source: Devlin et al., BERT, 2019.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = None) -> None:
        if cfg.kind != "encoder":
            raise ValueError(f"Encoder needs kind='encoder', got {cfg.kind!r}")
        super().__init__(cfg, causal=False)
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.segments = nn.Embedding(cfg.n_segments, cfg.d_model) if cfg.n_segments else None
        self.mlm = MaskedHead(cfg) if cfg.mlm_head else None
        self.head = make_head(cfg, self.tokens)
        initialize(self, cfg, seed)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """tokens [b, t] -> logits [b, t, v] for the token at each place.

        Without a `mask` every token sees every token. Where rows are padded, `real[:, None, None]`
        hides the padding, with real [b, t] True at tokens. `segments` [b, t] default to 0.

        Raises ValueError for tokens, segments and positions out of range, and for masks that do
        not fit.
        """
        x = self.hidden(tokens, positions, mask, segments)
        x = x if self.mlm is None else self.mlm(x)
        logits = scaled(self.head(x), self.cfg)
        return logits if self.mlm is None else logits + self.mlm.bias

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the blocks make of tokens [b, t], before any head: [b, t, d]."""
        x = look_up(self.tokens, tokens, "tokens")
        if self.segments is not None:
            segments = torch.zeros_like(tokens) if segments is None else segments
            x = x + look_up(self.segments, segments, "segments")
        elif segments is not None:
            raise ValueError("segments were given, but the config has n_segments=0")
        return self.run(x, positions, mask)


class Seq2Seq(nn.Module):
    """An encoder reads the source, a decoder writes the target and looks at the source as it goes.

    Both share the token vectors; positions, blocks and final norms are their own. Source: Vaswani
    et al., Attention Is All You Need, 2017; Raffel et al., Exploring the Limits of Transfer
    Learning with a Unified Text-to-Text Transformer, 2020.
    """

    def __init__(self, cfg: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        if cfg.kind != "encoder-decoder":
            raise ValueError(f"Seq2Seq needs kind='encoder-decoder', got {cfg.kind!r}")
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Stack(cfg, causal=False)
        self.decoder = Stack(cfg, causal=True, cross=True)
        self.head = make_head(cfg, self.tokens)
        initialize(self, cfg, seed)

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source [b, s], target [b, t] -> logits [b, t, v] for the target token after each.

        `source_mask` [b, 1, 1, s] is True at the source's tokens, False at its padding.

        Raises ValueError for tokens and positions out of range, and for masks that do not fit.
        """
        if source_mask is not None and (source_mask.ndim != 4 or source_mask.shape[1:3] != (1, 1)):
            raise ValueError(
                f"source_mask {tuple(source_mask.shape)} must be [batch, 1, 1, source tokens]: "
                "it serves the source's own rows and the target's"
            )
        return self.decode(target, self.encode(source, source_mask), source_mask)

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """source [b, s] -> memory [b, s, d]."""
        return self.encoder.run(look_up(self.tokens, source, "source"), mask=source_mask)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """target [b, t] and memory [b, s, d] -> logits [b, t, v].

        With a `cache`, target holds the new tokens only.
        """
        x = look_up(self.tokens, target, "target")
        x = self.decoder.run(x, cache=cache, memory=memory, memory_mask=memory_mask)
        return scaled(self.head(x), self.cfg)
