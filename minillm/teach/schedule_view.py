"""Pipeline schedules to look at: one bar an action, what stands idle, what has to be kept.

`explore` asks `minillm.parallel.schedules` for a schedule and times it; `bars` turns any timeline,
predicted or recorded by real ranks, into rectangles; `lanes` and `picture` draw them.
"""

# K devices, v chunks a device, M micro-batches

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.parallel import schedules
from minillm.parallel.actions import Timed
from minillm.teach import plots

COLORS = {
    "forward": plots.COLORS[0],
    "backward": plots.COLORS[1],
    "backward_input": plots.COLORS[1],
    "backward_weight": plots.COLORS[2],
}
NAMES = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "backward, input",
    "backward_weight": "backward, weights",
}
LETTER = 0.11
"""inches that a digit needs"""


class Explored(NamedTuple):
    """A schedule and what it costs. Times in the unit in which they were given."""

    events: list[Timed]
    """updates take no time, and are among them"""
    span: float
    """from the first start to the last end"""
    idle: float
    """share of all devices' time without work"""
    bubble: float
    """time without work over time with work, idle / (1 - idle)"""
    in_flight: list[float]
    """for each device, the most micro-batches whose activations it holds; a chunk counts 1/v"""
    versions: list[int]
    """for each device, the most versions of its weights at one time"""


class Bar(NamedTuple):
    """One action as a rectangle of height 1 in its device's lane."""

    device: int
    left: float
    width: float
    color: tuple[float, float, float]
    text: str
    """the micro-batch"""
    what: str


def explore(
    name: str,
    stages: int,
    micro_batches: int,
    chunks: int = 1,
    batches: int = 1,
    forward: float = 1.0,
    backward: float = 2.0,
    communication: float = 0.0,
) -> Explored:
    """Time a schedule whose devices take `forward` and `backward` for one micro-batch.

    With v = `chunks` a device's work is cut into v pieces of 1/v of these times; each half of a
    split backward takes half of it; a message takes `communication`, and keeps nobody from
    working. Raises ValueError where `minillm.parallel.schedules.schedule` does, and for times that
    are not positive (`communication`: negative).

    >>> found = explore("gpipe", stages=4, micro_batches=4)
    >>> round(found.idle, 3), found.in_flight
    (0.429, [4.0, 4.0, 4.0, 4.0])
    """
    if forward <= 0 or backward <= 0 or communication < 0:
        raise ValueError(
            f"forward={forward} and backward={backward} must be positive, "
            f"communication={communication} not negative"
        )
    lists = schedules.schedule(name, stages, micro_batches, chunks, batches)
    events = schedules.timeline(lists, forward / chunks, backward / chunks, communication)
    idle = schedules.idle_share(events)
    span = max(e.end for e in events) - min(e.start for e in events)
    kept = [n / chunks for n in schedules.in_flight(lists)]
    return Explored(events, span, idle, idle / (1 - idle), kept, schedules.versions(lists))


def bars(events: Iterable[Timed]) -> list[Bar]:
    """A rectangle for each action that takes time, in the order of `events`; updates have none.

    A device's later chunks are paler. Raises ValueError for an action of an unknown kind.
    """
    events = list(events)
    if unknown := {e.action.what for e in events} - {*COLORS, "update"}:
        raise ValueError(f"no color for {sorted(unknown)}, only for {', '.join(COLORS)}")
    own: dict[int, set[int]] = {}
    for e in events:
        own.setdefault(e.device, set()).add(e.action.stage)
    found = []
    for device, action, start, end in events:
        if action.what != "update":
            stages = sorted(own[device])
            pale = 0.6 * stages.index(action.stage) / len(stages)
            color = tuple(c + pale * (1 - c) for c in to_rgb(COLORS[action.what]))
            text = str(action.micro_batch)
            found.append(Bar(device, start, end - start, color, text, action.what))
    return found


def lanes(ax: Axes, events: Sequence[Timed], until: float | None = None) -> None:
    """Draw a timeline, one lane a device, device 0 on top; the axis ends at `until`.

    Micro-batches are named where their bars are wide enough.
    """
    drawn, devices = bars(events), 1 + max(e.device for e in events)
    until = max(e.end for e in events) if until is None else until
    inches = ax.get_position().width * ax.figure.get_figwidth() / until
    rows, lefts, widths, colors, *_ = zip(*drawn, strict=True)
    ax.barh(rows, widths, 0.84, lefts, color=colors, edgecolor="white", linewidth=0.7)
    for bar in drawn:
        if bar.width * inches > LETTER * len(bar.text):
            where = bar.left + bar.width / 2, bar.device + 0.04
            dark = sum(bar.color) < 1.7
            ink = "white" if dark else plots.INK
            ax.text(*where, bar.text, ha="center", va="center", color=ink, fontsize=10.5)
    ax.set(ylim=(devices - 0.4, -0.6), xlim=(0, until), yticks=range(devices), ylabel="device")
    ax.grid(False)


def legend(ax: Axes, events: Iterable[Timed]) -> None:
    """Name the colors of a timeline, above it on the right."""
    kinds = {e.action.what for e in events}
    known = [Patch(color=COLORS[what], label=NAMES[what]) for what in COLORS if what in kinds]
    ax.legend(handles=known, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, handlelength=1)


def picture(found: Explored, title: str = "") -> Figure:
    """The timeline, and beside it what each device has to keep."""
    devices = len(found.in_flight)
    size = (11, 1.6 + 0.42 * devices)
    fig, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=[3.4, 1], sharey=True)
    lanes(left, found.events)
    legend(left, found.events)
    said = f"{found.idle:.1%} idle"
    left.set(xlabel="time (forwards of a device)", title=f"{title}: {said}" if title else said)
    right.barh(range(devices), found.in_flight, 0.84, color=plots.COLORS[3])
    for device, (kept, versions) in enumerate(zip(found.in_flight, found.versions, strict=True)):
        weights = f", {versions} versions" if versions > 1 else ""
        right.text(kept, device, f" {kept:g}{weights}", va="center", fontsize=12)
    right.set(xlabel="micro-batches", title="held", xlim=(0, 1.15 * max(found.in_flight) + 0.5))
    if max(found.versions) > 1:
        right.set_xlim(0, 3.2 * max(found.in_flight))
    right.grid(axis="y", visible=False)
    return fig
