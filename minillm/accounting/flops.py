"""FLOPs: how many floating-point operations a model needs, from its config alone.

Only matrix products are counted, a multiply-add as 2; norms, softmax and activations are of lower
order. Attention counts its whole square: a causal mask saves nothing unless a kernel skips it.
"""

# b rows, s tokens of each (t: of the target), d model width, L blocks, V vocabulary

from __future__ import annotations

from dataclasses import asdict, dataclass

from minillm.accounting import parameters
from minillm.config import ModelConfig

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Flops:
    """FLOPs by part."""

    projections: int
    """q, k, v and out"""
    scores: int
    """queries times keys, and weights times values"""
    mlp: int
    logits: int
    """the output matrix, and what an mlm_head adds"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def times(self, projections: int, scores: int, mlp: int, logits: int) -> Flops:
        """Each part so often."""
        return Flops(
            projections * self.projections,
            scores * self.scores,
            mlp * self.mlp,
            logits * self.logits,
        )


def forward(cfg: ModelConfig, batch: int, seq: int, target: int | None = None) -> Flops:
    """One pass over `batch` rows of `seq` tokens, logits for every token included.

    A plain block costs 24 b s d² + 4 b s² d, the logits 2 b s d V. An encoder-decoder reads rows
    of `seq` and writes rows of `target` tokens (None: as many).

    Raises ValueError for less than one row or token, or a `target` without a decoder to write it.

    >>> cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=1, n_heads=4)
    >>> f, b, s, d = forward(cfg, batch=2, seq=100), 2, 100, 128
    >>> f.total - f.logits == 24 * b * s * d**2 + 4 * b * s**2 * d
    True
    """
    both = cfg.kind == "encoder-decoder"
    if target is not None and not both:
        raise ValueError(f"target={target} needs kind='encoder-decoder', not {cfg.kind!r}")
    target = seq if target is None else target
    if min(batch, seq, target) < 1:
        raise ValueError(f"batch={batch}, seq={seq}, target={target} must be at least 1")
    inner = cfg.n_heads * cfg.d_head
    keys = 2 * cfg.d_model * cfg.kv_heads * cfg.d_head * 2  # k and v of one token
    queries = 2 * cfg.d_model * inner * 2  # q and out of one token
    per_mlp = 2 * (3 if cfg.gated else 2) * cfg.d_model * cfg.mlp_width
    encoders, decoders = cfg.encoder_layers, 0 if cfg.kind == "encoder" else cfg.n_layers
    last = target if both else seq
    read, written = encoders * seq, decoders * last  # tokens times blocks
    crossed = written if both else 0
    head = 2 * cfg.d_model * (cfg.vocab_size + cfg.d_model * cfg.mlm_head)
    squares = encoders * seq**2 + decoders * last**2 + (decoders * last * seq if both else 0)
    return Flops(
        projections=batch * ((queries + keys) * (read + written) + queries * crossed)
        + batch * keys * (decoders * seq if both else 0),
        scores=batch * 4 * squares * inner,
        mlp=batch * per_mlp * (read + written),
        logits=batch * last * head,
    )


def decode(cfg: ModelConfig, batch: int, context: int) -> Flops:
    """One new token for each of `batch` rows, with `context` tokens in the cache, itself included.

    A plain block costs 24 b d² + 4 b d s. Raises ValueError for another model than a decoder.

    >>> cfg = ModelConfig(vocab_size=64, d_model=128, n_layers=1, n_heads=4)
    >>> f = decode(cfg, batch=2, context=100)
    >>> f.total - f.logits == 24 * 2 * 128**2 + 4 * 2 * 128 * 100
    True
    """
    if cfg.kind != "decoder":
        raise ValueError(f"decode counts a decoder, not kind={cfg.kind!r}")
    if min(batch, context) < 1:
        raise ValueError(f"batch={batch} and context={context} must be at least 1")
    one = forward(cfg, batch, 1)
    return one.times(1, min(context, cfg.window or context), 1, 1)


def training(
    cfg: ModelConfig,
    batch: int,
    seq: int,
    target: int | None = None,
    recompute: str = "none",
) -> Flops:
    """One training step: the backward pass is two products for each of the forward pass.

    That makes 3 times the forward pass. With `recompute="full"` each block is run once more (4
    times), with "selective" only its scores. These repeats keep a device busy but train nothing:
    leave them out of a model FLOPs utilization.

    Raises ValueError for an unknown `recompute`.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} must be one of {list(RECOMPUTE)}")
    block, scores = 3 + (recompute == "full"), 3 + (recompute != "none")
    return forward(cfg, batch, seq, target).times(block, scores, block, 3)


def six_n_d(n: float, tokens: float) -> float:
    """6 N D: 2 for the forward pass, 4 for the backward pass, per parameter and token.

    Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020.

    >>> f"{six_n_d(175e9, 300e9):.2e}"
    '3.15e+23'
    """
    return 6 * n * tokens


def narayanan(batch: int, seq: int, layers: int, d: int, vocab: int) -> float:
    """96 B s L d² (1 + s/(6d) + V/(16 L d)): a step of a GPT with full recomputation.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, 2021, equation 3.

    >>> from minillm.presets import preset
    >>> exact = training(preset("gpt3"), 1, 2048, recompute="full").total
    >>> round(narayanan(1, 2048, 96, 12288, 50257) / exact, 9)
    1.0
    """
    rule = 8 * seq * batch * parameters.blocks_by_rule(layers, d)
    return rule * (1 + seq / (6 * d) + vocab / (16 * layers * d))
