"""What PPO sees: a response token by token, and curves of several runs with their band."""

# n runs, k steps, t tokens of a response

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.teach import plots
from minillm.teach.viewers import visible

# the 97.5 % points of Student's t with 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over n runs and the ends of its 95 % interval: mean -+ t s / √n, from [n] or [n, k].

    t is the 97.5 % point of Student's distribution with n - 1 degrees of freedom, s the deviation
    of the runs. It holds for values that are about normal over seeds. Raises ValueError for values
    that are not finite and unless 2 <= n <= 10.

    >>> [round(float(x), 2) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    runs = np.asarray(values, dtype=float)
    n = len(runs)
    if not 2 <= n <= 1 + len(_STUDENT):
        raise ValueError(f"{n} runs: an interval is known here for 2 to {1 + len(_STUDENT)}")
    if not np.isfinite(runs).all():
        raise ValueError(f"{(~np.isfinite(runs)).sum()} of {runs.size} values are not finite")
    mean, half = runs.mean(0), _STUDENT[n - 2] * runs.std(0, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def band(ax: Axes, runs: Sequence[Sequence[float]], label: str, color: str) -> None:
    """Draw n curves [n, k] over steps 1 to k: every run thin, their mean thick, its interval."""
    steps = range(1, len(runs[0]) + 1)
    for run in runs:
        ax.plot(steps, run, color=color, linewidth=0.8, alpha=0.55)
    mean, low, high = interval(runs)
    ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    ax.plot(steps, mean, color=color, label=label)


def token_rows(tokens: Sequence[str], rows: Mapping[str, Sequence[float] | Tensor]) -> Figure:
    """A response as a table: its t tokens across, for each name of `rows` t numbers as colors.

    Every row has its own scale, symmetric about 0: blue is below it, orange above.
    Raises ValueError for a row of another length, without tokens and for numbers not finite.
    """
    table = {name: np.asarray(values, dtype=float) for name, values in rows.items()}
    if not tokens or not table:
        raise ValueError(f"{len(tokens)} tokens and {len(table)} rows: there must be some of both")
    for name, values in table.items():
        if values.shape != (len(tokens),) or not np.isfinite(values).all():
            raise ValueError(f"row {name!r}, {values}, must be {len(tokens)} finite numbers")
    data = np.stack(list(table.values()))
    scale = np.abs(data).max(1, keepdims=True)
    shares = np.divide(data, scale, out=np.zeros_like(data), where=scale > 0)
    size = (1.6 + 0.62 * len(tokens), 1.4 + 0.5 * len(table))
    with plt.rc_context({"axes.grid": False}):
        fig, ax = plt.subplots(figsize=size)
        ax.imshow(shares, cmap=_colors(), vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(data):
        ink = "white" if abs(shares[i, j]) > 0.7 else plots.INK
        ax.text(
            j, i, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=11, color=ink
        )
    ax.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=55)
    ax.xaxis.tick_top()
    plt.setp(ax.get_xticklabels(), ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(table)), list(table))
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return fig


def _colors() -> plt.matplotlib.colors.Colormap:
    """Blue, white, orange: told apart with the common color-vision deficiencies."""
    ends = [plots.COLORS[0], "#ffffff", plots.COLORS[1]]
    return plt.matplotlib.colors.LinearSegmentedColormap.from_list("blue_orange", ends)
