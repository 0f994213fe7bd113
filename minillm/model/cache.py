"""The key/value cache: what a decoder keeps of the tokens it has already read."""

# b batch, g key/value heads, t new tokens, d head width

from __future__ import annotations

import torch
from torch import Tensor

from minillm.config import ModelConfig


class LayerCache:
    """Keys and values of one layer, [b, g, capacity, d] each, of which `length` are in use."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [b, g, t, d] behind the old ones; views of all so far, [b, g, length, d].

        Raises ValueError, and stores nothing, when they do not fit or carry a gradient.
        """
        batch, heads, _, width = self.keys.shape
        if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != width:
            raise ValueError(
                f"the cache holds [batch={batch}, kv_heads={heads}, tokens, d_head={width}], "
                f"got k {tuple(k.shape)} and v {tuple(v.shape)}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("a KV cache is for inference: call the model under torch.no_grad()")
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {start} of {self.capacity} tokens, "
                f"{k.shape[2]} more are {end - self.capacity} too many"
            )
        self.keys[:, :, start:end] = k
        self.values[:, :, start:end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` per layer, allocated at once: 2 · layers · b · g · capacity · d numbers.

    >>> cache = KVCache(n_layers=2, batch=1, kv_heads=4, capacity=128, d_head=16)
    >>> cache.length, cache.capacity, cache.bytes()
    (0, 128, 131072)
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        d_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, kv_heads, capacity, d_head)
        if min(n_layers, *shape) < 1:
            raise ValueError(
                f"a cache needs at least one of each, got n_layers={n_layers}, batch={batch}, "
                f"kv_heads={kv_heads}, capacity={capacity}, d_head={d_head}"
            )
        self.layers = [
            LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(n_layers)
        ]
        self._positions = torch.zeros(batch, capacity, dtype=torch.long, device=device)

    def remember(self, positions: Tensor) -> Tensor:
        """Store the new tokens' positions [t] or [b, t]; all so far, [b, length + t].

        To be called before the layers append. Raises ValueError when they do not fit.
        """
        start, end = self.length, self.length + positions.shape[-1]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {start} of {self.capacity} tokens, "
                f"{positions.shape[-1]} more are {end - self.capacity} too many"
            )
        self._positions[:, start:end] = positions
        return self._positions[:, :end]

    @classmethod
    def for_config(
        cls,
        cfg: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """A cache for a model of shape `cfg`; `capacity` defaults to the model's context."""
        capacity = cfg.max_len if capacity is None else capacity
        return cls(cfg.n_layers, batch, cfg.kv_heads, capacity, cfg.d_head, dtype, device)

    @property
    def length(self) -> int:
        """How many tokens are stored."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.layers[0].capacity

    def bytes(self) -> int:
        """Size in bytes of all keys and values, in use or not."""
        return sum(x.nbytes for layer in self.layers for x in (layer.keys, layer.values))
