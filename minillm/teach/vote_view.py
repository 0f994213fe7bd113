"""When do votes help? What one sample says, and what the vote of many then says, exactly."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.prompting.cot import vote_accuracy
from minillm.teach import plots

SAMPLES = (1, 2, 3, 5, 8, 12, 16, 24, 32)


def distribution(right: float, rivals: int, favorite: float = 0.0) -> list[float]:
    """Probabilities of the answers in one sample, the right one first.

    What is wrong goes to one favorite mistake with share `favorite`, the rest in equal parts to
    all `rivals`, the favorite among them. Raises ValueError for shares outside 0 to 1 and for less
    than one rival.

    >>> distribution(0.4, rivals=3, favorite=0.5)
    [0.4, 0.4, 0.1, 0.1]
    """
    if not 0 <= right <= 1 or not 0 <= favorite <= 1:
        raise ValueError(f"right={right} and favorite={favorite} must be shares, from 0 to 1")
    if rivals < 1:
        raise ValueError(f"rivals={rivals}: there must be one wrong answer at least")
    wrong, each = 1 - right, (1 - right) * (1 - favorite) / rivals
    return [round(p, 12) for p in [right, wrong * favorite + each, *[each] * (rivals - 1)]]


def curve(shares: list[float], samples: tuple[int, ...] = SAMPLES) -> list[float]:
    """Chance that the right answer wins the vote, for each number of samples."""
    return [vote_accuracy(shares, n) for n in samples]


def picture(right: float = 0.6, rivals: int = 9, favorite: float = 0.0) -> Figure:
    """Left the answers of one sample, right the accuracy of the vote over the number of samples."""
    shares = distribution(right, rivals, favorite)
    fig, (left, ax) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1, 1.3])
    colors = [plots.COLORS[0], *[plots.COLORS[1]] * rivals]
    left.bar(range(len(shares)), shares, color=colors)
    left.set(xlabel="answer (blue: the right one)", ylabel="probability", ylim=(0, 1))
    left.set(xticks=[], title="one sample")
    ax.plot(SAMPLES, curve(shares), marker="o")
    plots.bound(ax, shares[0], "one sample", below=True)
    ax.set(xlabel="samples that vote", ylabel="the vote is right", ylim=(-0.03, 1.05))
    ax.set_title("wins" if shares[0] > max(shares[1:]) else "does not win in the long run")
    return fig
