"""What PPO's clip does to one token: its loss, and the pull on its log-probability."""

# ρ = π(a) / π_old(a) how much likelier a token has become, A its advantage, ε the clip

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from minillm.align.objectives import policy_loss
from minillm.teach import plots

RATIOS = tuple(i / 50 for i in range(5, 101))  # 0.1 to 2


def curve(
    advantage: float, clip: float = 0.2, ratios: Sequence[float] = RATIOS
) -> tuple[list[float], list[float]]:
    """The loss of one token at each ratio, and its derivative to log π: both from `policy_loss`.

        loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)        d loss / d log π = -ρ A, or 0 where held

    Raises ValueError for a ratio or a clip that is not above 0. Source: Schulman et al., Proximal
    Policy Optimization Algorithms, 2017, figure 1.

    >>> curve(2.0, clip=0.25, ratios=[0.5, 1.0, 1.5])
    ([-1.0, -2.0, -2.5], [-1.0, -2.0, 0.0])
    """
    if bad := [ratio for ratio in ratios if not ratio > 0]:
        raise ValueError(f"ratios {bad} must be above 0: they are of probabilities")
    losses, slopes = [], []
    for ratio in ratios:
        logp = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_(True)
        old, mask = torch.zeros_like(logp), torch.ones_like(logp)
        loss = policy_loss(logp, old, advantage * mask, mask, clip).loss
        (slope,) = torch.autograd.grad(loss, logp)
        # + 0.0 makes one zero of two
        losses.append(round(loss.item(), 12) + 0.0)
        slopes.append(round(slope.item(), 12) + 0.0)
    return losses, slopes


def verdict(ratio: float, advantage: float, clip: float = 0.2) -> str:
    """In words, what a step of gradient descent does to a token at this ratio.

    >>> verdict(1.5, 1.0), verdict(1.5, -1.0), verdict(0.5, -1.0)
    ('held: no pull', 'pushed down', 'held: no pull')
    """
    (slope,) = curve(advantage, clip, [ratio])[1]
    if slope == 0:
        return "nothing to learn: no pull" if advantage == 0 else "held: no pull"
    return "pushed up" if slope < 0 else "pushed down"


def picture(ratio: float = 1.3, advantage: float = 1.0, clip: float = 0.2) -> Figure:
    """Loss (left) and derivative to log π (right) over the ratio, for `advantage` and for its
    opposite; the token itself as a dot, the clip's range shaded."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    here = [values[0] for values in curve(advantage, clip, [ratio])]
    for sign, color in ((1, plots.COLORS[0]), (-1, plots.COLORS[1])):
        mine = (advantage >= 0) == (sign > 0)
        a = sign * abs(advantage)
        for ax, values in zip(axes, curve(a, clip), strict=True):
            ax.plot(RATIOS, values, color=color, alpha=1.0 if mine else 0.35, label=f"A = {a:+.1f}")
    for ax, value in zip(axes, here, strict=True):
        ax.axvspan(1 - clip, 1 + clip, color=plots.GRID, zorder=0)
        ax.plot([ratio], [value], "o", markersize=12, color=plots.COLORS[advantage < 0])
        ax.set(xlabel="ratio ρ = π / π_old", xlim=(0, 2.05))
    axes[0].set(ylabel="loss of the token", title=f"ε = {clip:.2f} (shaded)")
    axes[1].set(
        ylabel="d loss / d log π", title=f"ρ = {ratio:.2f}: {verdict(ratio, advantage, clip)}"
    )
    axes[0].legend(loc="upper left")
    return fig
