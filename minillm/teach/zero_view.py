"""Memory of the training states under ZeRO: by stage, by number of ranks, by what a GPU has.

`shares` and `fewest` are the arithmetic, `picture` draws it; the lecture's widget is a view over
them. All of it is formula: what real ranks hold is measured in the lecture.
"""

# N ranks

from __future__ import annotations

import math
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.teach import plots

STAGES = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
KINDS = (plots.COLORS[5], plots.COLORS[4], "#8C8C8C")
"""colors of parameters, gradients, optimizer; the first four of the style stand for stages"""


class Shares(NamedTuple):
    """Bytes of each kind of state on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    """master weights and Adam's two moments"""


def shares(
    parameters: float, ranks: int, stage: int, sizes: tuple[float, float, float] = (2, 2, 12)
) -> Shares:
    """What one of `ranks` ranks holds of a model under ZeRO `stage` (0: data parallel).

    `sizes` are bytes a parameter of parameters, gradients and optimizer. Stage 1 divides the last
    by N, stage 2 the last two, stage 3 all. Raises ValueError for a stage or a number of ranks
    that does not exist, and for a model without parameters. Source: Rajbhandari et al., ZeRO:
    Memory Optimizations Toward Training Trillion Parameter Models, 2020.

    >>> shares(1e9, ranks=4, stage=2)
    Shares(parameters=2000000000.0, gradients=500000000.0, optimizer=3000000000.0)
    """
    if stage not in range(4) or ranks < 1 or not parameters > 0:
        raise ValueError(
            f"stage={stage} must be 0, 1, 2 or 3, ranks={ranks} at least 1 and "
            f"parameters={parameters:g} positive"
        )
    whole = 3 - stage  # the first so many kinds are on every rank
    return Shares(*(parameters * b / (1 if i < whole else ranks) for i, b in enumerate(sizes)))


def fewest(
    parameters: float,
    capacity: float,
    stage: int,
    sizes: tuple[float, float, float] = (2, 2, 12),
) -> int | None:
    """The fewest ranks of `capacity` bytes each that hold the states; None if no number does.

    Raises ValueError as `shares`, and unless the capacity is positive.

    >>> [fewest(7.5e9, 80e9, stage) for stage in range(4)]
    [None, 2, 2, 2]
    >>> [fewest(7.5e9, 24e9, stage) for stage in range(4)]
    [None, None, 12, 5]
    """
    if not capacity > 0:
        raise ValueError(f"capacity={capacity:g} bytes must be positive")
    alone = shares(parameters, 1, stage, sizes)
    kept, cut = sum(alone[: 3 - stage]), sum(alone[3 - stage :])
    if kept + cut <= capacity:
        return 1
    if kept >= capacity or not cut:
        return None
    return max(2, math.ceil(cut / (capacity - kept)))


def picture(
    billions: float, ranks: int, capacity_gb: float, sizes: tuple[float, float, float] = (2, 2, 12)
) -> Figure:
    """Left: what a rank holds at each stage, against its memory. Right: the same over all N.

    Raises ValueError as `shares` and `fewest`.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.15])
    held = [shares(billions * 1e9, ranks, stage, sizes) for stage in range(4)]
    below = [0.0] * 4
    for kind, color in zip(Shares._fields, KINDS, strict=True):
        height = [getattr(one, kind) / 1e9 for one in held]
        left.bar(range(4), height, bottom=below, color=color, width=0.62, label=kind)
        below = [a + b for a, b in zip(below, height, strict=True)]
    for stage, total in enumerate(below):
        enough = fewest(billions * 1e9, capacity_gb * 1e9, stage, sizes)
        note = "never fits" if enough is None else f"fits from\nN = {enough:,}"
        text = left.text(stage, total, f"{total:,.1f} GB\n{note}", fontsize=11)
        text.set(ha="center", va="bottom")
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    left.set_ylim(0, 1.32 * max(*below, capacity_gb))
    left.set_xticks(range(4), STAGES, fontsize=11)
    left.set(ylabel="GB a rank", title=f"{billions:g}B parameters on {ranks:,} ranks")
    left.axhline(capacity_gb, color=plots.MUTED, linestyle="--", linewidth=1.6, zorder=1.5)
    left.legend(loc="upper right", fontsize=11)
    numbers = [2**i for i in range(11)]
    for stage, name in enumerate(STAGES):
        gb = [sum(shares(billions * 1e9, n, stage, sizes)) / 1e9 for n in numbers]
        right.loglog(numbers, gb, base=2, color=plots.COLORS[stage], label=name)
        right.plot([ranks], [below[stage]], "o", color=plots.COLORS[stage])
    right.axhline(capacity_gb, color=plots.MUTED, linestyle="--", linewidth=1.6, zorder=1.5)
    note = right.text(1.1, 0.93 * capacity_gb, f"a GPU of {capacity_gb:g} GB", fontsize=11)
    note.set(va="top", color=plots.MUTED)
    note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    right.set_yscale("log", base=10)
    right.set(xlabel="ranks N", xlim=(0.9, 9000), ylabel="GB a rank")
    right.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
    plots.label_lines(right, right.get_lines()[:8:2])
    return fig
