"""Frozen descriptions of what to build. Everything else in the package takes one of these."""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = {
    "kind": ("decoder", "encoder", "encoder-decoder"),
    "norm": ("layer", "rms"),
    "placement": ("pre", "post", "sandwich", "deepnorm"),
    "init": ("scaled", "normal", "xavier"),
    "position": ("learned", "sinusoidal", "hierarchical", "t5", "rope", "alibi", "none"),
    "rope_layout": ("half", "interleaved"),
    "rope_scaling": ("none", "linear", "ntk"),
    "mlp": (
        *("relu", "gelu", "gelu_tanh", "swish"),
        *("glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu"),
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """One transformer, whole: its shape and what its parts are.

    The defaults give the decoder that the first chapters build: LayerNorm before each branch,
    learned positions, a GELU MLP, no biases.

    Raises ValueError when the choices are unknown or contradict each other.

    >>> ModelConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4).d_head
    16
    >>> ModelConfig(vocab_size=256, d_model=100, n_layers=2, n_heads=12)
    Traceback (most recent call last):
        ...
    ValueError: d_model=100 must be a multiple of n_heads=12, or head_dim must be given
    """

    vocab_size: int
    d_model: int
    n_layers: int
    """of the decoder; of the encoder where there is nothing else"""
    n_heads: int
    n_kv_heads: int | None = None
    """fewer than `n_heads`: grouped-query attention, 1: multi-query; None: as many"""
    head_dim: int | None = None
    """width of one head; None: d_model / n_heads"""
    d_ff: int | None = None
    """width of the MLP's hidden layer; None: 4 d_model, or about 8/3 d_model with a gate"""
    max_len: int = 256
    """the context: positions run from 0 to max_len - 1"""
    window: int | None = None
    """each token sees only the last `window` positions, itself included"""
    kind: str = "decoder"
    n_encoder_layers: int | None = None
    """only for an encoder-decoder; None: n_layers"""
    norm: str = "layer"
    norm_eps: float = 1e-5
    placement: str = "pre"
    embedding_norm: bool = False
    """a norm between embedding and first block"""
    qk_norm: bool = False
    """an RMSNorm over each head's query and key"""
    position: str = "learned"
    rope_theta: float = 10_000.0
    rope_layout: str = "half"
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    """how many times longer than in training the context shall be"""
    hierarchical_alpha: float = 0.4
    t5_buckets: int = 32
    t5_max_distance: int = 128
    mlp: str = "gelu"
    bias: bool = False
    """in all Linears of the blocks and in LayerNorms"""
    n_segments: int = 0
    """segment embeddings beside the tokens' (BERT has two)"""
    mlm_head: bool = False
    """a Linear, GELU, norm and bias at the output (BERT)"""
    tie_embeddings: bool = True
    attention_scale: float | None = None
    """of the scores; None: 1 / sqrt(d_head)"""
    logit_scale: float = 1.0
    init: str = "scaled"
    """std 0.02 if "normal"; with "scaled" that / sqrt(2 n_layers) in the last map of a branch
    (GPT-2); with "xavier" variance 2 / (in + out), and DeepNorm's gains where they belong"""
    dropout: float = 0.0
    """after the embedding and at the end of each branch"""
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_kv_heads", "head_dim", "d_ff", "window", "n_encoder_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {list(choices)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.placement == "deepnorm" and self.init != "xavier":
            raise ValueError(f"placement='deepnorm' needs init='xavier', not {self.init!r}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be positive")
        self._check_attention()
        self._check_positions()
        self._check_kind()

    def _check_attention(self) -> None:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of n_heads={self.n_heads}, "
                "or head_dim must be given"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.kv_heads}"
            )

    def _check_positions(self) -> None:
        if self.position == "rope" and self.d_head % 2:
            raise ValueError(f"rope turns pairs: d_head={self.d_head} must be even")
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sine and cosine alternate: d_model={self.d_model} must be even")
        if self.position != "rope" and (self.rope_scaling != "none" or self.rope_factor != 1):
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r} and rope_factor={self.rope_factor} "
                f"have no meaning with position={self.position!r}"
            )
        if self.rope_factor < 1 or (self.rope_scaling == "none" and self.rope_factor != 1):
            raise ValueError(
                f"rope_factor={self.rope_factor} must be at least 1, and 1 without rope_scaling"
            )
        if self.position == "hierarchical" and not 0 < self.hierarchical_alpha < 1:
            raise ValueError(f"hierarchical_alpha={self.hierarchical_alpha} must be in (0, 1)")
        if self.position == "hierarchical" and self.hierarchical_alpha == 0.5:
            raise ValueError("hierarchical_alpha=0.5 gives positions (i, j) and (j, i) one row")
        if self.position == "t5" and (self.t5_buckets < 4 or self.t5_buckets % 4):
            raise ValueError(f"t5_buckets={self.t5_buckets} must be a multiple of 4")
        if self.position == "t5" and self.t5_max_distance <= self.t5_buckets:
            raise ValueError(
                f"t5_max_distance={self.t5_max_distance} must exceed t5_buckets={self.t5_buckets}"
            )

    def _check_kind(self) -> None:
        if self.kind == "encoder" and self.window is not None:
            raise ValueError(f"window={self.window} looks back only; an encoder looks both ways")
        if self.kind != "encoder-decoder" and self.n_encoder_layers is not None:
            raise ValueError(
                f"n_encoder_layers={self.n_encoder_layers} needs kind='encoder-decoder', "
                f"not {self.kind!r}"
            )
        if self.kind != "encoder" and (self.n_segments or self.mlm_head):
            raise ValueError(
                f"n_segments={self.n_segments} and mlm_head={self.mlm_head} need kind='encoder', "
                f"not {self.kind!r}"
            )

    @property
    def d_head(self) -> int:
        """Width of one head, resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections (the GLU family)."""
        return self.mlp.endswith(("glu", "bilinear", "glu_tanh"))

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer, resolved.

        With a gate, 8/3 d_model rounded up to a multiple of 8 has the parameters of 4 d_model
        without.
        """
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 24) * 8 if self.gated else 4 * self.d_model

    @property
    def encoder_layers(self) -> int:
        """Number of encoder blocks: 0 for a decoder."""
        if self.kind == "decoder":
            return 0
        return self.n_layers if self.n_encoder_layers is None else self.n_encoder_layers
