"""Dropout whose masks depend on a seed and on what is dropped, not on who computes it.

A generator of random numbers has a state: which numbers a token meets depends on all that were
drawn before it, on this rank. Here each number is a function of (seed, place in the model, row of
the batch, position, channel). One process, data, tensor, sequence, context and pipeline
parallelism drop the same numbers, and recomputation does too.
"""

# b rows of the batch, t tokens, d model width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

STEP = 0x9E3779B97F4A7C15 - 2**64
"""the golden ratio's fraction times 2⁶⁴; all constants as the int64 with the same bits"""
MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, n: int) -> Tensor:
    """To the right, filled with zeros: int64's own shift repeats the sign."""
    return (x >> n) & (2 ** (64 - n) - 1)


def _mix(x: Tensor) -> Tensor:
    """Each of 64 bits depends on every bit of x (int64 products wrap around, as they should)."""
    x = (x ^ _shift(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift(x, 31)


def keep(seed: int, site: int, rows: Tensor, positions: Tensor, width: int, p: float) -> Tensor:
    """Which numbers stay: true with probability 1 - p, independently, [b, t, d].

    `rows` [b] are rows of the whole batch, `positions` [t] or [b, t] of the whole sequence, `site`
    is the place in the model. Raises ValueError for p outside [0, 1).

    Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014 (splitmix64,
    applied once for each index).

    >>> whole = keep(7, 0, torch.arange(4), torch.arange(6), 8, 0.5)
    >>> part = keep(7, 0, torch.tensor([3, 1]), torch.tensor([5]), 8, 0.5)
    >>> torch.equal(part, whole[[3, 1]][:, [5]])
    True
    """
    if not 0 <= p < 1:
        raise ValueError(f"p={p} must be in [0, 1)")
    positions = positions if positions.ndim == 2 else positions[None]
    channels = torch.arange(width, device=rows.device)
    x, place = torch.tensor([seed, site], device=rows.device)
    for index in (place, rows[:, None, None], positions[..., None], channels):
        x = _mix(x + (index + 1) * STEP)
    return _shift(x, 11) >= int(p * 2**53)


@dataclass
class Places:
    """What a rank's activations are: set it before each forward pass.

    It has to be the same again when a part is recomputed.
    """

    seed: int
    """another one for each step"""
    rows: Tensor
    """[b] which rows of the whole batch"""
    positions: Tensor
    """[t] or [b, t] which tokens of the sequence (under sequence parallelism, this rank's)"""


def drop(x: Tensor, p: float, places: Places, site: int) -> Tensor:
    """x [b, t, d] / (1 - p) where `keep` says so, else 0.

    Raises ValueError where `places` describe something of another shape.
    """
    told = (len(places.rows), places.positions.shape[-1])
    if x.shape[:2] != told:
        raise ValueError(f"x {tuple(x.shape)} has other rows or tokens than its places, {told}")
    kept = keep(places.seed, site, places.rows, places.positions, x.shape[2], p)
    return x.masked_fill(~kept, 0.0) / (1 - p)


def place_dropout(model: nn.Module, places: Places, first_layer: int = 0) -> nn.Module:
    """Replace a model's dropout, after the embedding and each branch, in place; from outside.

    Do it after the model was cut. `first_layer` is the number of `model.blocks[0]` in the whole
    model: a pipeline's stage has its own. Raises ValueError for a model that drops nothing.
    """
    found = 0
    for layer, block in enumerate(model.blocks, start=first_layer):
        p, block.dropout = block.dropout, 0.0
        for i, name in enumerate(("attn", "cross", "mlp")):
            if p and hasattr(block, name):
                branch = getattr(block, name)
                branch.register_forward_hook(_hook(p, places, 1 + 3 * layer + i))
                found += 1
    p = model.cfg.dropout
    model.cfg = replace(model.cfg, dropout=0.0)
    if p and model.embedding_norm is not None:
        model.embedding_norm.register_forward_hook(_hook(p, places, 0))
    elif p:
        model.position.add = _after(model.position.add, model, p, places)
    if not found and not p:
        raise ValueError(f"this {type(model).__name__} has no dropout that could be placed")
    return model


def _hook(p: float, places: Places, site: int) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple, x: Tensor) -> Tensor | None:
        return drop(x, p, places, site) if module.training else None

    return hook


def _after(
    add: Callable[..., Tensor], model: nn.Module, p: float, places: Places
) -> Callable[..., Tensor]:
    def dropped(*args: Any) -> Tensor:
        x = add(*args)
        return drop(x, p, places, 0) if model.training else x

    return dropped
