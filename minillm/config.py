"""Frozen descriptions of what to build. Everything else in the package takes one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one transformer.

    `n_kv_heads` fewer than `n_heads` gives grouped-query attention (1: multi-query); `None` means
    as many. `d_ff` is the width of the MLP's hidden layer, `None` means 4 * d_model. `window`
    limits each token to the last `window` positions, itself included (`None`: all of them).

    Raises ValueError when the numbers contradict each other.

    >>> ModelConfig(vocab_size=256, d_model=64, n_layers=2, n_heads=4).d_head
    16
    >>> ModelConfig(vocab_size=256, d_model=100, n_layers=2, n_heads=12)
    Traceback (most recent call last):
        ...
    ValueError: d_model=100 must be a multiple of n_heads=12
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    d_ff: int | None = None
    max_len: int = 256
    window: int | None = None
    tie_embeddings: bool = True
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_kv_heads", "d_ff", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or None")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} must be a multiple of n_heads={self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.kv_heads}"
            )

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer, resolved."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff
