"""Attention masks: boolean matrices, True = may attend."""

# t queries, offset + t keys: `offset` tokens lie in a cache, so query i stands at offset + i

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(t: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Each token sees itself and everything before it: [t, offset + t], True = may attend.

    With `offset` tokens already in a cache, query i stands at position offset + i.

    >>> causal_mask(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> causal_mask(1, offset=2).int().tolist()
    [[1, 1, 1]]
    """
    return distances(t, offset, device) >= 0


def prefix_mask(
    t: int, prefix: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Causal, but the first `prefix` tokens see each other in both directions.

    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer, 2020.

    >>> prefix_mask(3, prefix=2).int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    if not 0 <= prefix <= offset + t:
        raise ValueError(
            f"prefix={prefix} must lie between 0 and the {offset + t} tokens there are"
        )
    distance = distances(t, offset, device)
    key = torch.arange(offset + t, device=device)
    return (distance >= 0) | (key < prefix)


def sliding_window_mask(
    t: int, window: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Each token sees the last `window` tokens, itself included.

    >>> sliding_window_mask(4, window=2).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
    distance = distances(t, offset, device)
    return (distance >= 0) & (distance < window)


def strided_mask(
    t: int, stride: int, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Each token sees the last `stride` tokens, and every stride-th token before it.

    With stride √n any token is two steps away from any earlier one, at O(n √n) places in all.
    Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019.

    >>> strided_mask(5, stride=2).int()[4].tolist()
    [1, 0, 1, 1, 1]
    """
    if stride < 1:
        raise ValueError(f"stride={stride} must be at least 1")
    distance = distances(t, offset, device)
    return (distance >= 0) & ((distance < stride) | (distance % stride == 0))


def distances(t: int, offset: int, device: torch.device | str | None) -> Tensor:
    """Position of the query minus position of the key, [t, offset + t]."""
    if t < 1 or offset < 0:
        raise ValueError(f"t={t} must be at least 1 and offset={offset} at least 0")
    query = torch.arange(offset, offset + t, device=device)
    return query[:, None] - torch.arange(offset + t, device=device)
