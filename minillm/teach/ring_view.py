"""A ring all-reduce, step by step: which chunk travels where, and whose numbers each sum holds.

`replay` follows the algorithm with sets instead of numbers, so that a picture (and a test) can see
who has contributed to what; `picture` draws one moment of it.
"""

# N ranks, N chunks of each rank's tensor

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.teach import plots


class Message(NamedTuple):
    """A chunk on its way from one rank to another."""

    source: int
    to: int
    chunk: int


class Step(NamedTuple):
    """What travels in a step, all at once, and what everyone holds after it."""

    phase: str
    """"start", "reduce-scatter" (arriving chunks are added) or "all-gather" (they replace)"""
    messages: tuple[Message, ...]
    held: tuple[tuple[frozenset[int], ...], ...]
    """held[rank][chunk]: the ranks whose numbers are in that sum"""


def replay(n: int) -> list[Step]:
    """All moments of an all-reduce over n ranks: the start and 2(n - 1) steps.

    In step s rank i sends chunk i - s - 1 (modulo n) to rank i + 1, in both phases. Raises
    ValueError for fewer than one rank.

    Source: Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, 2009.

    >>> [step.phase for step in replay(2)]
    ['start', 'reduce-scatter', 'all-gather']
    >>> replay(2)[1].messages
    (Message(source=0, to=1, chunk=1), Message(source=1, to=0, chunk=0))
    """
    if n < 1:
        raise ValueError(f"n={n} ranks: there must be one at least")
    held = tuple(tuple(frozenset({rank}) for _ in range(n)) for rank in range(n))
    steps = [Step("start", (), held)]
    for s in range(2 * (n - 1)):
        adding = s < n - 1
        messages = tuple(Message(i, (i + 1) % n, (i - s - 1) % n) for i in range(n))
        now = [list(row) for row in held]
        for source, to, chunk in messages:
            arrived = held[source][chunk]
            now[to][chunk] = held[to][chunk] | arrived if adding else arrived
        held = tuple(map(tuple, now))
        steps.append(Step("reduce-scatter" if adding else "all-gather", messages, held))
    return steps


def picture(steps: Sequence[Step], at: int) -> Figure:
    """Left the ring with the messages of step `at`, right what each rank holds after it.

    A cell names the ranks in its sum, and is darker the more there are; a frame marks what has
    just arrived. Raises ValueError for a step that does not exist.
    """
    if not 0 <= at < len(steps):
        raise ValueError(f"of {len(steps)} moments there is no number {at}")
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[1, 1.35])
    _ring(left, steps[at])
    _table(right, steps[at])
    left.set_title(f"step {at} of {len(steps) - 1}: {steps[at].phase}")
    right.set_title("ranks in each sum, afterwards")
    return fig


def _ring(ax: plt.Axes, step: Step) -> None:
    n = len(step.held)
    angles = [math.pi / 2 - 2 * math.pi * i / n for i in range(n)]
    where = [(math.cos(a), math.sin(a)) for a in angles]
    for source, to, chunk in step.messages:
        color = plots.COLORS[chunk % len(plots.COLORS)]
        look = {"arrowstyle": "-|>", "color": color, "lw": 2.5, "mutation_scale": 20}
        look |= {"shrinkA": 20, "shrinkB": 20, "connectionstyle": "arc3,rad=-0.25"}
        ax.annotate("", where[to], where[source], arrowprops=look)
        # clockwise from the source, half of the way to the next rank
        middle = angles[source] - math.pi / n
        x, y = 1.12 * math.cos(middle), 1.12 * math.sin(middle)
        side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        ax.text(x, y, f"chunk {chunk}", ha=side, va="center", color=color, fontweight="bold")
    for rank, (x, y) in enumerate(where):
        ax.plot(x, y, "o", markersize=30, color="white", markeredgecolor=plots.INK, zorder=3)
        ax.text(x, y, str(rank), ha="center", va="center", fontsize=15, zorder=4)
    ax.set(xlim=(-1.9, 1.9), ylim=(-1.4, 1.4), aspect="equal")
    ax.axis("off")


def _table(ax: plt.Axes, step: Step) -> None:
    n = len(step.held)
    ax.imshow([[len(x) for x in row] for row in step.held], vmin=0, vmax=1.6 * n, cmap="Blues")
    for rank, row in enumerate(step.held):
        for chunk, ranks in enumerate(row):
            text = "all" if len(ranks) == n > 1 else " ".join(map(str, sorted(ranks)))
            ax.text(chunk, rank, text, ha="center", va="center", fontsize=13 if n < 6 else 9)
    for _, to, chunk in step.messages:
        corner = (chunk - 0.47, to - 0.47)
        frame = {"fill": False, "ec": plots.COLORS[chunk % len(plots.COLORS)], "lw": 3}
        ax.add_patch(plt.Rectangle(corner, 0.94, 0.94, **frame))
    ax.set(xlabel="chunk", ylabel="rank", xticks=range(n), yticks=range(n), aspect="auto")
    ax.grid(False)
