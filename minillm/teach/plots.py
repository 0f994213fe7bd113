"""One look for every figure of the course, and the few helpers that figures share.

The colors are those of Okabe and Ito ("Color Universal Design", 2008), which people with the
common color-vision deficiencies can tell apart, ordered so that the first ones also differ in
lightness; their yellow is left out because it disappears on white.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
INK = "#222222"
MUTED = "#666666"
GRID = "#E4E4E4"


def use_style() -> None:
    """Set the course's matplotlib style for everything drawn from here on.

    Text stays readable when a figure is shown at half its size; figures are white in a dark
    theme too, so that the colors keep their contrast.

    >>> use_style()
    >>> plt.rcParams["axes.prop_cycle"].by_key()["color"][0]
    '#0072B2'
    """
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 4.0),
            "figure.dpi": 90,
            "savefig.dpi": 90,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.w_pad": 0.08,
            "figure.constrained_layout.h_pad": 0.08,
            "font.family": "DejaVu Sans",
            "font.size": 13,
            "axes.titlesize": 14,
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.labelsize": 13,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=COLORS),
            "grid.color": GRID,
            "grid.linewidth": 0.9,
            "lines.linewidth": 2.2,
            "lines.markersize": 6,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "legend.fontsize": 12,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "image.interpolation": "nearest",
        }
    )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions as little as possible (least squares) until neighbors are `gap` apart.

    Used to keep labels from overlapping. The order is kept. Subtracting i * gap from the i-th
    smallest turns the rule into "never falling", whose least-squares solution pools neighbors
    that violate it into their mean (Barlow et al., Statistical Inference under Order
    Restrictions, 1972).

    Raises ValueError for a negative gap.

    >>> spread([0.0, 0.0, 10.0], gap=2.0)
    [-1.0, 1.0, 10.0]
    """
    if gap < 0:
        raise ValueError(f"gap={gap} must not be negative")
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    pools: list[list[float]] = []  # [sum, count] of neighbors that ended up in one block
    for rank, i in enumerate(order):
        pools.append([positions[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    levels = [total / count for total, count in pools for _ in range(int(count))]
    moved = [0.0] * len(positions)
    for rank, i in enumerate(order):
        moved[i] = levels[rank] + rank * gap
    return moved


def label_lines(
    ax: Axes, lines: Sequence[Line2D] | None = None, fontsize: float = 12
) -> list[Text]:
    """Write each line's label at its right end, in its color, instead of a legend.

    Lines without a label are skipped; labels that would overlap are moved apart. Call it last,
    when limits and scales are final.
    """
    candidates = ax.get_lines() if lines is None else lines
    named = [line for line in candidates if not str(line.get_label()).startswith("_")]
    points_per_pixel = 72 / ax.figure.dpi
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in named]
    heights = [float(ax.transData.transform(end)[1]) * points_per_pixel for end in ends]
    moved = spread(heights, gap=1.25 * fontsize)
    return [
        ax.annotate(
            str(line.get_label()),
            xy=end,
            xytext=(6, new - old),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=fontsize,
            va="center",
            annotation_clip=False,
        )
        for line, end, old, new in zip(named, ends, heights, moved, strict=True)
    ]


def label_points(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    labels: Sequence[str],
    colors: Sequence[str] | None = None,
    fontsize: float = 12,
) -> list[Text]:
    """Name points of a scatter plot beside them, avoiding other points and names.

    Each label takes the first free of the places right, left, above, below and the diagonals, and
    steps farther out (with a thin line to its point) when all are taken. Call it last, when
    limits, scales and the figure's size are final.
    """
    figure = ax.figure
    figure.canvas.draw()  # fixes the layout, so that sizes in pixels are known
    renderer = figure.canvas.get_renderer()
    points = ax.transData.transform(np.column_stack([x, y]).astype(float))
    taken = [Bbox.from_bounds(px - 5, py - 5, 10, 10) for px, py in points]
    room = ax.get_window_extent()
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    tries = [(dx, dy, r) for r in (9, 16, 26, 40) for dx, dy in directions]
    texts = []
    for i, label in enumerate(labels):
        color = INK if colors is None else colors[i]
        text = ax.annotate(
            label,
            (x[i], y[i]),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=fontsize,
            color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkB": 3},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
        )
        for dx, dy, radius in tries:
            text.set_position((dx * radius, dy * radius))
            text.set_ha({1: "left", 0: "center", -1: "right"}[dx])
            text.set_va({1: "bottom", 0: "center", -1: "top"}[dy])
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1
            inside &= room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        text.arrow_patch.set_visible(radius > 16)
        taken.append(box)
        texts.append(text)
    return texts


def label_bars(ax: Axes, fmt: str = "{:.3g}", fontsize: float = 12) -> list[Text]:
    """Write each bar's value at its end and make room for it.

    >>> fig, ax = plt.subplots()
    >>> _ = ax.bar(["a", "b"], [1.0, 2.5])
    >>> [text.get_text() for text in label_bars(ax)]
    ['1', '2.5']
    >>> plt.close(fig)
    """
    labels = [
        text
        for container in ax.containers
        for text in ax.bar_label(container, fmt=fmt, padding=3, fontsize=fontsize)
    ]
    horizontal = any(getattr(c, "orientation", None) == "horizontal" for c in ax.containers)
    ax.margins(**({"x": 0.14} if horizontal else {"y": 0.12}))
    return labels


def bound(
    ax: Axes,
    y: float,
    label: str,
    axis: str = "y",
    color: str = MUTED,
    below: bool = False,
) -> Line2D:
    """Draw a bound or a reference value as a dashed line with its name on it.

    `axis="y"` draws a horizontal line at height y, `axis="x"` a vertical one. `below` puts the
    name on the other side of a horizontal line. Raises ValueError for another axis.
    """
    if axis == "y":
        line = ax.axhline(y, color=color, linestyle="--", linewidth=1.6, zorder=1.5)
        place = {"xy": (0.995, y), "xycoords": ("axes fraction", "data"), "ha": "right"}
        offset, rotation = (0, -4 if below else 4), 0
    elif axis == "x":
        line = ax.axvline(y, color=color, linestyle="--", linewidth=1.6, zorder=1.5)
        place = {"xy": (y, 0.99), "xycoords": ("data", "axes fraction"), "ha": "right"}
        offset, rotation = (-4, 0), 90
    else:
        raise ValueError(f"axis={axis!r} must be 'x' or 'y'")
    ax.annotate(
        label,
        xytext=offset,
        textcoords="offset points",
        rotation=rotation,
        va="bottom" if axis == "y" and not below else "top",
        color=color,
        fontsize=12,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        **place,
    )
    return line
