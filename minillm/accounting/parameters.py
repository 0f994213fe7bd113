"""Parameters: how many numbers a model learns, from its config alone."""

# L blocks, d model width, f hidden width, h query heads, g key/value heads, w head width,
# V vocabulary, s context

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from minillm.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; a tied output matrix is counted once, as `tokens`."""

    tokens: int
    """the token table, V d"""
    positions: int
    """learned positions or relative biases, and segments"""
    attention: int
    """q, k, v, out of all blocks, cross-attention included"""
    mlp: int
    norms: int
    """of the blocks (per head as well), after the embedding, and the final one"""
    head: int
    """an output matrix of its own, and what an mlm_head adds"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    @property
    def matrices(self) -> int:
        """Those of the blocks that multiply every token: attention and MLP."""
        return self.attention + self.mlp


def linear(inputs: int, outputs: int, bias: bool = False) -> int:
    """inputs · outputs, and outputs more with a bias."""
    return (inputs + bias) * outputs


def norm(cfg: ModelConfig, width: int | None = None) -> int:
    """One norm: a weight, and a bias if LayerNorm has one."""
    width = cfg.d_model if width is None else width
    return width * (2 if cfg.norm == "layer" and cfg.bias else 1)


def attention(cfg: ModelConfig) -> int:
    """q, k, v, out of one layer: (2h + 2g) w d, which is 4d² for the plain one."""
    queries, keys = cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head
    inward = linear(cfg.d_model, queries + 2 * keys, cfg.bias)
    return inward + linear(queries, cfg.d_model, cfg.bias)


def mlp(cfg: ModelConfig) -> int:
    """One MLP: 2 d f, with a gate 3 d f."""
    up = linear(cfg.d_model, cfg.mlp_width, cfg.bias)
    return (2 if cfg.gated else 1) * up + linear(cfg.mlp_width, cfg.d_model, cfg.bias)


def count(cfg: ModelConfig) -> Parameters:
    """Every parameter of the model that `cfg` describes, by part.

    >>> from minillm.presets import preset
    >>> count(preset("gpt2")).total
    124439808
    >>> count(preset("llama-7b")).total
    6738415616
    """
    d, v = cfg.d_model, cfg.vocab_size
    decoders = 0 if cfg.kind == "encoder" else cfg.n_layers
    blocks, crosses = cfg.encoder_layers + decoders, decoders * (cfg.kind == "encoder-decoder")
    stacks = (cfg.encoder_layers > 0) + (decoders > 0)

    # each branch has a norm, and a second one behind it in a sandwich
    branches = 2 * blocks + crosses
    norms = branches * norm(cfg) * (2 if cfg.placement == "sandwich" else 1)
    norms += (blocks + crosses) * 2 * cfg.d_head * cfg.qk_norm
    # a stream that was never normalized needs a norm at its end
    norms += stacks * norm(cfg) * (cfg.placement in ("pre", "sandwich"))
    norms += stacks * norm(cfg) * cfg.embedding_norm

    head = 0 if cfg.tie_embeddings else v * d
    if cfg.mlm_head:
        head += linear(d, d, bias=True) + norm(cfg) + v
    return Parameters(
        tokens=v * d,
        positions=stacks * position_rows(cfg) + cfg.n_segments * d,
        attention=(blocks + crosses) * attention(cfg),
        mlp=blocks * mlp(cfg),
        norms=norms,
        head=head,
    )


def position_rows(cfg: ModelConfig) -> int:
    """What one stack learns about positions: s d, √s d, buckets · heads, or nothing."""
    if cfg.position == "learned":
        return cfg.max_len * cfg.d_model
    if cfg.position == "hierarchical":
        return (math.isqrt(cfg.max_len - 1) + 1) * cfg.d_model
    return cfg.t5_buckets * cfg.n_heads if cfg.position == "t5" else 0


def blocks_by_rule(layers: int, d: int) -> int:
    """12 L d²: the matrices of plain blocks, 4d² for attention and 8d² for an MLP of width 4d.

    >>> blocks_by_rule(96, 12288) / 1e9
    173.946175488
    """
    return 12 * layers * d**2


def narayanan(layers: int, d: int, vocab: int, context: int) -> float:
    """12 L d² (1 + 13/(12d) + (V + s)/(12 L d)): GPT with biases, tied, without the final norm.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, 2021, equation 2.
    """
    rule = blocks_by_rule(layers, d)
    return rule * (1 + 13 / (12 * d) + (vocab + context) / (12 * layers * d))
