"""Induction heads: what stood behind this token the last time is what comes next."""

# b batch, l layers, h heads, t tokens, v ids to draw from

from __future__ import annotations

import torch
from torch import Tensor


def repeated(
    ids: Tensor, length: int, batch: int, generator: torch.Generator, copies: int = 2
) -> Tensor:
    """Rows of `length` different random tokens of `ids` [v], `copies` times over: [b, t].

    Nothing but the repetition tells what comes next. Raises ValueError for more tokens than ids,
    fewer than 1 and fewer than 2 copies.
    """
    if not 1 <= length <= len(ids) or copies < 2:
        raise ValueError(f"length={length} must lie in [1, {len(ids)}], copies={copies} from 2 on")
    block = torch.rand(batch, len(ids), generator=generator).argsort(-1)[:, :length]
    return ids[block].repeat(1, copies)


def induction_scores(maps: Tensor, tokens: Tensor) -> Tensor:
    """How far each head looks at what followed the present token before: [l, h], in [0, 1].

    maps are attention weights [b, l, h, t, t], tokens [b, t]. For each query whose token stood
    earlier, the weight on all tokens right behind earlier occurrences; then the mean over such
    queries. A token behind itself (a a) says nothing and does not count. Source: Olsson et al.,
    In-context Learning and Induction Heads, 2022 (prefix matching). Raises ValueError for shapes
    that do not fit, and if no token occurs twice.
    """
    b, t = tokens.shape
    if maps.ndim != 5 or maps.shape[0] != b or maps.shape[3:] != (t, t):
        raise ValueError(f"maps {tuple(maps.shape)} must be [b, l, h, t, t] for tokens {(b, t)}")
    behind = torch.zeros(b, t, t, dtype=torch.bool, device=tokens.device)
    behind[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]  # query i, key behind its like
    behind = behind.tril(-1)
    asked = behind.any(-1)
    if not asked.any():
        raise ValueError("no token occurs a second time: there is nothing to look back at")
    weight = (maps * behind[:, None, None]).sum(-1)  # [b, l, h, t]
    return weight.movedim(3, 1)[asked].mean(0)


def previous_scores(maps: Tensor) -> Tensor:
    """How far each head looks at the token right before: [l, h], the first part of the circuit."""
    return maps.diagonal(-1, dim1=-2, dim2=-1).mean((0, -1))
