"""Bytes: what training and inference keep in memory, from a config alone.

Two kinds of numbers live here. Formulas of the literature, for models of any kind on GPUs; and
`activations`, which predicts to the byte what autograd keeps of this course's `LM` on a CPU.
"""

# b rows, s tokens, d model width, f hidden width, h query heads, g key/value heads, w head width,
# V vocabulary, L blocks; t tensor-parallel ranks

from __future__ import annotations

from dataclasses import dataclass

from minillm.accounting.flops import RECOMPUTE
from minillm.config import ModelConfig

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
GRADIENTS = ("16", "32", "both")


@dataclass(frozen=True)
class States:
    """Bytes that live as long as the training run."""

    parameters: int
    """those that the passes compute with"""
    gradients: int
    optimizer: int
    """Adam's two moments, and the fp32 master weights if there are any"""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


def states(n: int, precision: str = "mixed", gradients: str = "16") -> States:
    """Bytes of `n` parameters trained with Adam.

    "fp32" and "bf16" keep everything in that one format: 4 + 4 + 8 and 2 + 2 + 4 bytes each.
    "mixed" computes in 16 bits and keeps master weights and moments in fp32: 2 + 2 + 12 = 16 bytes,
    18 with gradients in 32 bits instead of 16, 20 with `both`.

    Raises ValueError for other words. Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward
    Training Trillion Parameter Models, 2020.

    >>> [states(1, gradients=g).total for g in GRADIENTS], states(1, "fp32").total
    ([16, 18, 20], 16)
    """
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients={gradients!r} must be one of {list(GRADIENTS)}")
    if precision == "mixed":
        return States(2 * n, {"16": 2, "32": 4, "both": 6}[gradients] * n, 12 * n)
    if precision not in ITEMSIZE or precision == "fp16":
        raise ValueError(f"precision={precision!r} must be 'mixed', 'fp32' or 'bf16'")
    if gradients != "16":
        raise ValueError(f"gradients={gradients!r} has a meaning with precision='mixed' only")
    size = ITEMSIZE[precision]
    return States(size * n, size * n, 2 * size * n)


def zero(n: float, ranks: int, stage: int, optimizer: int = 12) -> float:
    """Bytes of states on each of `ranks` devices: ZeRO stage 0 (data parallel) to 3.

    2 + 2 + K bytes a parameter; stage 1 shares out the K = `optimizer` bytes, 2 the gradients too,
    3 also the parameters. Raises ValueError for another stage or no rank. Source: Rajbhandari et
    al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020, figure 1.

    >>> [round(zero(7.5e9, 64, stage) / 1e9, 1) for stage in range(4)]
    [120.0, 31.4, 16.6, 1.9]
    """
    if stage not in range(4) or ranks < 1:
        raise ValueError(f"stage={stage} must be 0, 1, 2 or 3 and ranks={ranks} at least 1")
    kept = (2, 2, optimizer)  # parameters, gradients, optimizer: shared out from the right
    shares = (ranks if stage > 2 else 1, ranks if stage > 1 else 1, ranks if stage else 1)
    return n * sum(part / share for part, share in zip(kept, shares, strict=True))


def layer_activations(
    batch: int,
    seq: int,
    d: int,
    heads: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> float:
    """Bytes one GPT block keeps for its backward pass in 16 bits: b s d (34 + 5 h s / d).

    With `tensor` = t ranks b s d (10 + 24/t + 5 h s / (d t)), with `sequence_parallel` everything
    over t. "selective" recomputation drops the scores (the last term), "full" keeps only the
    block's input, 2 b s d. The paper counts dropout, one byte a mask, and leaves out the statistics
    of LayerNorm.

    Raises ValueError for an unknown `recompute`, or heads that `tensor` does not divide. Source:
    Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.

    >>> layer_activations(batch=1, seq=2048, d=12288, heads=96) / (2048 * 12288)
    114.0
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r} must be one of {list(RECOMPUTE)}")
    if tensor < 1 or heads % tensor:
        raise ValueError(f"heads={heads} must be a multiple of tensor={tensor}")
    unit = batch * seq * d
    if recompute == "full":
        return 2 * unit
    scores = 5 * heads * seq / d if recompute == "none" else 0.0
    outside = 10 / tensor if sequence_parallel else 10  # norms, dropout, the inputs of q, k, v, up
    return unit * (outside + (24 + scores) / tensor)


def kv_cache(cfg: ModelConfig, batch: int, tokens: int, itemsize: int = 2) -> int:
    """Bytes of keys and values of `tokens` tokens a row: 2 L b g s w · itemsize.

    A window keeps the memory of this course's cache, which does not forget. Raises ValueError for
    a model that has no cache to fill.

    >>> cfg = ModelConfig(32, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8)
    >>> kv_cache(cfg, batch=1, tokens=4096) / 1e9
    1.34217728
    """
    if cfg.kind != "decoder":
        raise ValueError(f"kv_cache counts a decoder, not kind={cfg.kind!r}")
    return 2 * cfg.n_layers * batch * cfg.kv_heads * tokens * cfg.d_head * itemsize


def activations(
    cfg: ModelConfig, batch: int, seq: int, precision: str = "fp32", loss: bool = True
) -> int:
    """Bytes that autograd keeps of `LM(cfg)(tokens)` on a CPU, parameters not counted.

    Every storage counts once. With `loss`, also what `minillm.train.losses.cross_entropy` of the
    logits keeps. Covers pre-norm decoders in "fp32" and "bf16" with learned, sinusoidal, rotary or
    no positions, any norm and MLP, `impl` "auto" (PyTorch's fused attention) and "reference".

    Raises ValueError for configs that keep other things: see `_check_covered`.
    """
    _check_covered(cfg, precision)
    if min(batch, seq) < 1:
        raise ValueError(f"batch={batch} and seq={seq} must be at least 1")
    size, tokens = ITEMSIZE[precision], batch * seq
    d, inner, keys = cfg.d_model, cfg.n_heads * cfg.d_head, cfg.kv_heads * cfg.d_head

    # a norm keeps its input and the result, which is also the input of what follows
    if cfg.norm == "layer":
        norm = tokens * (2 * d + 2) * size  # input, result, mean and 1/std
    else:  # input and quotient are computed in fp32; the result is scaled by the weight
        norm = tokens * ((2 * d + 1) * 4 + d * size)

    squares = batch * cfg.n_heads * seq**2
    if cfg.impl == "auto":  # q, k, v, the output, and the log of each row's denominator
        attention = tokens * ((2 * inner + 2 * keys) * size + 4 * cfg.n_heads)
        if cfg.position == "rope" and seq > 1 and cfg.n_heads > 1:
            attention += tokens * inner * size  # turned queries lie head by head, so does the
            # output: `out` needs a copy that lies token by token
    else:  # in fp32: q, k and v spread over all heads, softmax twice (masked), two masks
        attention = tokens * (3 * inner * 4 + inner * size) + 2 * squares * 4 + 2 * seq**2
    kept = {"relu": 1, "swiglu": 4, "geglu": 4, "geglu_tanh": 4}.get(cfg.mlp, 3 if cfg.gated else 2)
    mlp = tokens * kept * cfg.mlp_width * size

    total = cfg.n_layers * (2 * norm + attention + mlp) + norm + 8 * tokens  # and the token ids
    if cfg.position == "learned":
        total += 8 * seq  # the positions, by which rows are picked
    if cfg.position == "rope":
        total += 4 * seq * cfg.d_head  # one cos and one sin for every pair, for all blocks
    if loss:  # logits and log-denominators in fp32, and the targets
        total += tokens * (4 * cfg.vocab_size + 4 + 8)
    return total


def _check_covered(cfg: ModelConfig, precision: str) -> None:
    """Raise ValueError unless `activations` knows what this config keeps."""
    plain = {
        "kind": ("decoder",),
        "placement": ("pre",),
        "position": ("learned", "sinusoidal", "rope", "none"),
        "embedding_norm": (False,),
        "qk_norm": (False,),
        "window": (None,),
        "dropout": (0.0,),
        "impl": ("auto", "reference"),
    }
    for name, covered in plain.items():
        if getattr(cfg, name) not in covered:
            raise ValueError(
                f"activations are predicted for {name} in {list(covered)}, "
                f"not {getattr(cfg, name)!r}"
            )
    if cfg.position == "rope" and cfg.d_head < 4:
        raise ValueError(f"activations with rope are predicted for head_dim >= 4, not {cfg.d_head}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={precision!r} must be 'fp32' or 'bf16'")
