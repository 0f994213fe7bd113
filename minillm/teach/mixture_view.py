"""Tasks of very different size in one mixture: shares under a cap, and how often each repeats."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.data.mixture import epochs, temperature_rates
from minillm.teach import plots


def shares(
    sizes: Mapping[str, float], cap: float | None, temperature: float, budget: float
) -> list[tuple[str, float, float]]:
    """(task, share of what is drawn, epochs in `budget` draws) of each task.

    The share is min(size, cap)^(1/temperature), scaled to a sum of 1. Raises ValueError for a
    budget that is not positive, and where `temperature_rates` does.

    >>> shares({"large": 900, "small": 100}, cap=300, temperature=1, budget=400)
    [('large', 0.75, 0.3333333333333333), ('small', 0.25, 1.0)]
    """
    if not budget > 0:
        raise ValueError(f"budget={budget} examples must be positive")
    rates = temperature_rates(sizes, temperature, cap)
    seen = epochs(rates, sizes, budget)
    return [(name, rates[name], seen[name]) for name in sizes]


def picture(
    sizes: Mapping[str, float],
    log_cap: float | None = None,
    temperature: float = 1.0,
    budget: float = 38_400,
) -> Figure:
    """Left the share of each task, with its size as a gray bar; right how often it is repeated.

    `log_cap` is log10 of the cap; None: no cap.
    """
    cap = None if log_cap is None else 10**log_cap
    names, rates, seen = zip(*shares(sizes, cap, temperature, budget), strict=True)
    total, places = sum(sizes.values()), range(len(names))
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    left.barh(places, [sizes[n] / total for n in names], color="#D8D8D8", label="share of the data")
    left.barh(places, rates, height=0.4, color=plots.COLORS[0], label="share of what is drawn")
    left.set(xlim=(0, 1), xlabel="share", yticks=list(places), yticklabels=names)
    left.legend(loc="lower right")
    left.invert_yaxis()
    right.barh(places, seen, height=0.4, color=plots.COLORS[1])
    right.set(xscale="log", xlim=(0.01, 1000), xlabel=f"epochs in {budget:,.0f} examples")
    right.axvline(1, color=plots.INK, linestyle="--", linewidth=1.2)
    shown = "no cap" if cap is None else f"cap {cap:,.0f}"
    fig.suptitle(f"{shown}, temperature {temperature:g}")
    return fig
