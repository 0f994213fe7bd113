"""The map of the course: chapters, what each one needs, which of them exist here today."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minillm.paths import ASSETS, ROOT
from minillm.teach.plots import COLORS, INK, MUTED

WIDTH, HEIGHT = 0.76, 0.64  # of a box, where columns and rows are 1 apart


@dataclass(frozen=True)
class Chapter:
    """One chapter; its folder is `number_name`, and `needs` holds the numbers it builds on."""

    number: str
    name: str
    title: str
    part: str
    needs: tuple[str, ...]
    question: str


def read_chapters(path: Path = ASSETS / "data" / "chapters.csv") -> list[Chapter]:
    """The chapters, in order. Raises ValueError if one needs a chapter that does not come before.

    >>> read_chapters()[0].title
    'start here'
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chapters: list[Chapter] = []
    for row in rows:
        needs = tuple(row["needs"].split())
        unknown = set(needs) - {chapter.number for chapter in chapters}
        if unknown:
            raise ValueError(f"chapter {row['number']} needs {sorted(unknown)}, not before it")
        chapters.append(Chapter(**{**row, "needs": needs}))
    return chapters


def available(chapters: Sequence[Chapter], folder: Path = ROOT / "chapters") -> set[str]:
    """Numbers of the chapters whose lecture is there."""
    return {
        chapter.number
        for chapter in chapters
        if (folder / f"{chapter.number}_{chapter.name}" / "lecture.ipynb").is_file()
    }


def way_to(chapters: Sequence[Chapter], goal: str) -> list[str]:
    """Numbers of all chapters on the way to `goal`, itself last, in an order that respects needs.

    Raises ValueError for a chapter that does not exist.

    >>> way_to(read_chapters(), "03")
    ['00', '01', '03']
    """
    needs = {chapter.number: chapter.needs for chapter in chapters}
    if goal not in needs:
        raise ValueError(f"there is no chapter {goal!r}: choose one of {', '.join(needs)}")
    wanted, stack = set(), [goal]
    while stack:
        number = stack.pop()
        if number not in wanted:
            wanted.add(number)
            stack += needs[number]
    return [chapter.number for chapter in chapters if chapter.number in wanted]


def map_figure(
    chapters: Sequence[Chapter], ready: Collection[str], goal: str | None = None
) -> Figure:
    """The map: one column for each part; arrows come from what a chapter needs.

    A chapter right above needs no name; any other stands, in the color of its part, at the tail
    of a short arrow. Chapters in `ready` are filled, the others outlined. With a `goal`, the rest
    of the map fades.
    """
    way = {c.number for c in chapters} if goal is None else set(way_to(chapters, goal))
    parts = list(dict.fromkeys(chapter.part for chapter in chapters))
    places, colors = {}, {}
    for column, part in enumerate(parts):
        members = [chapter.number for chapter in chapters if chapter.part == part]
        places |= {number: (column, -row) for row, number in enumerate(members)}
        colors |= dict.fromkeys(members, COLORS[column % len(COLORS)])
    rows = 1 - min(y for _, y in places.values())
    fig, ax = plt.subplots(figsize=(2.0 * len(parts), 0.74 * rows + 0.7))
    ax.set(xlim=(-0.62, len(parts) - 0.58), ylim=(-rows + 0.6, 1.05))
    ax.axis("off")
    for column, part in enumerate(parts):
        color = COLORS[column % len(COLORS)]
        style = {"ha": "center", "va": "center", "fontsize": 13.5, "weight": "bold"}
        ax.text(column, 0.74, _wrap(part, 16), color=_dark(color), **style)
    for chapter in chapters:
        number = chapter.number
        alpha = 1.0 if number in way else 0.25
        _needs(ax, chapter, places, colors, alpha)
        _box(ax, places[number], chapter, colors[number], number in ready, alpha)
    _legend(ax, len(parts) - 2.4, -rows + 1.9)
    return fig


def _dark(color: str) -> tuple[float, ...]:
    return tuple(0.8 * channel for channel in to_rgb(color))


def _tint(color: str, share: float) -> tuple[float, ...]:
    return tuple(1 - share * (1 - channel) for channel in to_rgb(color))


def _wrap(text: str, width: int) -> str:
    """Two lines where one would be too long, broken at the space nearest the middle."""
    spaces = [i for i, letter in enumerate(text) if letter == " "]
    if len(text) <= width or not spaces:
        return text
    middle = min(spaces, key=lambda i: abs(2 * i - len(text)))
    return text[:middle] + "\n" + text[middle + 1 :]


def _patch(x: float, y: float, width: float, height: float, color: str, ready: bool):
    return FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.09",
        facecolor=_tint(color, 0.28) if ready else "white",
        edgecolor=color if ready else _tint(color, 0.75),
        linewidth=2.2 if ready else 1.2,
        linestyle="-" if ready else (0, (4, 2)),
        zorder=3,
    )


def _box(
    ax: Axes, place: tuple[int, int], chapter: Chapter, color: str, ready: bool, alpha: float
) -> None:
    x, y = place
    box = _patch(x, y, WIDTH, HEIGHT, color, ready)
    box.set_alpha(alpha)
    ax.add_patch(box)
    left = x - WIDTH / 2
    style = {"va": "center", "zorder": 4, "color": INK if ready else "#4d4d4d", "alpha": alpha}
    ax.text(left + 0.05, y, chapter.number, fontsize=12.5, weight="bold", **style)
    ax.text(left + 0.21, y, _wrap(chapter.title, 11), fontsize=12, linespacing=1.05, **style)


def _needs(
    ax: Axes,
    chapter: Chapter,
    places: dict[str, tuple[int, int]],
    colors: dict[str, str],
    alpha: float,
) -> None:
    x, y = places[chapter.number]
    above = [need for need in chapter.needs if places[need] == (x, y + 1)]
    others = [need for need in chapter.needs if need not in above]
    arrow = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "color": "#6f6f6f"}
    arrow |= {"linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, "alpha": alpha}
    if above:
        tail, head = (x, y + 1 - HEIGHT / 2), (x, y + HEIGHT / 2)
        ax.annotate("", xy=head, xytext=tail, arrowprops=arrow)
    left = x - WIDTH / 2
    for i, need in enumerate(others):
        height = y + 0.2 * ((len(others) - 1) / 2 - i)
        ax.annotate("", xy=(left, height), xytext=(left - 0.085, height), arrowprops=arrow)
        style = {"ha": "right", "va": "center", "fontsize": 10.5, "weight": "bold"}
        ax.text(left - 0.09, height, need, color=_dark(colors[need]), alpha=alpha, **style)


def _legend(ax: Axes, x: float, y: float) -> None:
    for i, (ready, text) in enumerate(((True, "available now"), (False, "planned"))):
        ax.add_patch(_patch(x, y - 0.4 * i, 0.18, 0.24, MUTED, ready))
        ax.text(x + 0.16, y - 0.4 * i, text, va="center", fontsize=12, color=INK)
    ax.text(x - 0.09, y - 0.8, "06", va="center", fontsize=10.5, weight="bold", color=COLORS[0])
    arrow = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "color": "#6f6f6f"}
    ax.annotate("", xy=(x + 0.13, y - 0.8), xytext=(x + 0.04, y - 0.8), arrowprops=arrow)
    ax.text(x + 0.16, y - 0.8, "needs chapter 06", va="center", fontsize=12, color=INK)
