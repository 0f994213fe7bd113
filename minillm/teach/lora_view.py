"""The rank of an update against what it is worth: singular values, and quality when cut."""

# ΔW [out, in] an update, σ its singular values, r how many are kept

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from minillm.teach import plots


def truncate(delta: Tensor, rank: int) -> Tensor:
    """The matrix of rank `rank` nearest to `delta` [out, in]: its first singular triplets.

    Raises ValueError unless 0 <= rank <= min(out, in). Source: Eckart and Young, The Approximation
    of One Matrix by Another of Lower Rank, 1936.
    """
    if not 0 <= rank <= min(delta.shape):
        raise ValueError(f"rank={rank} must be in 0 to {min(delta.shape)}, of {tuple(delta.shape)}")
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def share(values: Sequence[float] | Tensor, rank: int) -> float:
    """Σ of the `rank` largest σ² over Σ of all: how much of |ΔW|² a cut keeps.

    >>> share([1.0, 3.0, 0.0], 1)
    0.9
    """
    squares = torch.as_tensor(values, dtype=torch.float64).square().sort(descending=True).values
    if not 0 <= rank <= len(squares):
        raise ValueError(f"rank={rank} must be in 0 to {len(squares)}")
    return (squares[:rank].sum() / squares.sum()).item()


def picture(
    spectra: Mapping[str, Sequence[float]], quality: Mapping[int, float], rank: int
) -> Figure:
    """Left the singular values of each update, those kept at `rank` filled; right `quality`, rank
    -> share of right answers when all updates are cut to it, with `rank` (or the next lower one
    that was measured) marked.

    Raises ValueError for a rank below all that were measured.
    """
    below = [r for r in quality if r <= rank]
    if not below:
        raise ValueError(f"rank={rank} is below {min(quality)}, the lowest that was measured")
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for (name, values), color in zip(spectra.items(), plots.COLORS, strict=False):
        place = range(1, len(values) + 1)
        left.loglog(place, values, color=color, alpha=0.4)
        kept = f"{name}: {share(values, rank):.0%} kept"
        left.loglog(place[:rank], values[:rank], "o", markersize=4, color=color, label=kept)
    left.axvline(rank + 0.5, color=plots.MUTED, linestyle="--")
    left.set(xlabel="number i", ylabel="singular value σᵢ of ΔW", title=f"rank {rank}")
    left.legend(loc="lower left")
    chosen = max(below)
    right.plot(list(quality), list(quality.values()), "o-", color=plots.COLORS[0])
    right.plot([chosen], [quality[chosen]], "o", markersize=14, color=plots.COLORS[1])
    right.set_xscale("symlog", linthresh=1)
    right.set_xticks(list(quality), [str(r) for r in quality])
    right.minorticks_off()
    right.set(xlabel="rank that every update is cut to", ylabel="cards right", ylim=(-0.05, 1.05))
    right.set_title(f"at rank {chosen}: {quality[chosen]:.0%}")
    return fig
