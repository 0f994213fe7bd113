"""SPoT: prompts as descriptions of tasks: which are alike, and which to start another task from.

A prompt that was trained for one task starts that of another (`apply_prompt(..., start=...)`).
Which one, their likeness tells: the prompts of both tasks, each trained a little, are compared.

Source: Vu et al., SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, 2022.
"""

# n and m virtual tokens, w model width

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(a: Tensor, b: Tensor, pairs: bool = False) -> float:
    """Cosine of the mean vectors of prompts a [n, w] and b [m, w], or the mean over all `pairs`.

    The order of the virtual tokens does not matter, and prompts may differ in length. Raises
    ValueError for prompts of models of different width.

    >>> round(similarity(torch.eye(2), torch.tensor([[1.0, 1.0]])), 3)
    1.0
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"prompts {tuple(a.shape)} and {tuple(b.shape)} must be [n, w] of one w")
    if pairs:
        return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).mean().item()
    return F.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()


def rank(target: Tensor, library: Mapping[str, Tensor], pairs: bool = False) -> dict[str, float]:
    """Name of a task -> likeness of its prompt to `target`, the likest first.

    >>> list(rank(torch.ones(1, 2), {"far": -torch.ones(1, 2), "near": torch.ones(3, 2)}))
    ['near', 'far']
    """
    found = {name: similarity(target, prompt, pairs) for name, prompt in library.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def mixture(target: Tensor, library: Mapping[str, Tensor], k: int) -> Tensor:
    """Mean of the k prompts likest to `target`, weighted by their likeness: a start, [n, w].

    Raises ValueError unless 1 <= k <= prompts, and where one of the k is not alike at all (a
    likeness of zero or less gives no weight).
    """
    if not 1 <= k <= len(library):
        raise ValueError(f"k={k} must lie between 1 and the {len(library)} prompts there are")
    best = dict(list(rank(target, library).items())[:k])
    if min(best.values()) <= 0:
        raise ValueError(
            f"likeness must be above zero to be a weight, got {best}: take a smaller k"
        )
    shapes = {tuple(library[name].shape) for name in best}
    if len(shapes) > 1:
        raise ValueError(f"prompts of one shape can be averaged, these have {sorted(shapes)}")
    weights = torch.tensor(list(best.values()))
    stacked = torch.stack([library[name] for name in best])
    return torch.einsum("k, k n w -> n w", weights / weights.sum(), stacked)
