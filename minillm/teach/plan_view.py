"""A simulated training step to look at: who works when, where the seconds go, whether it fits.

`plan` turns a few choices into a plan, or says why there is none; `picture` draws its step. The
numbers are those of `minillm.parallel.simulate` and `minillm.parallel.plan`.
"""

# K devices of one pipeline

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.parallel.actions import Timed
from minillm.parallel.plan import device_bytes
from minillm.parallel.simulate import Cluster, Plan, Run, Step, check, simulate
from minillm.teach import plots

PARTS = ("compute", "tensor", "pipeline", "data", "optimizer", "idle")
KINDS = {"forward": plots.COLORS[0], "backward": plots.COLORS[1], "update": plots.COLORS[2]}


def plan(run: Run, tp: int, pp: int, micro_batch: int, chunks: int) -> Plan:
    """A plan for the model, batch and number of GPUs of a published run; dp is what is left.

    Raises ValueError, with the rule, if there is none.
    """
    gpus = run.plan.gpus
    if gpus % (tp * pp):
        raise ValueError(f"{gpus} GPUs must be a multiple of tp * pp = {tp} * {pp}")
    name = "interleaved" if chunks > 1 else "1f1b"
    found = Plan(gpus // (tp * pp), tp, pp, micro_batch, name, chunks, overlap=run.plan.overlap)
    check(run.cfg, found, run.batch)
    return found


def seconds(step: Step) -> dict[str, float]:
    """Where the busiest device's time goes; the parts add up to the step."""
    found = {name: getattr(step, name) for name in PARTS[:-1]}
    return found | {"idle": max(0.0, step.seconds - sum(found.values()))}


def spans(events: Iterable[Timed]) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Start and length of everything that takes time, by device and kind of action."""
    found = defaultdict(list)
    for device, action, start, end in events:
        if end > start:
            found[device, action.what.split("_")[0]].append((start, end - start))
    return dict(found)


def lanes(ax: Axes, events: Iterable[Timed]) -> None:
    """One lane a device, device 0 on top: quick for ten thousands of actions."""
    drawn = spans(events)
    rows = 1 + max(device for device, _ in drawn)
    for (device, what), pieces in drawn.items():
        ax.broken_barh(pieces, (device - 0.42, 0.84), color=KINDS[what], linewidth=0)
    for what, color in KINDS.items():
        ax.broken_barh([], (0, 0), color=color, label=what)
    ax.set(ylim=(rows - 0.4, -0.6), xlim=(0, None), ylabel="stage", xlabel="time (s)")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, handlelength=1)
    ax.grid(False)


def bars(ax: Axes, steps: dict[str, Step]) -> None:
    """Shares of each step's time, stacked."""
    left = dict.fromkeys(steps, 0.0)
    colors = (*plots.COLORS[:5], "#C8C8C8")
    for part, color in zip(PARTS, colors, strict=True):
        share = {name: seconds(s)[part] / s.seconds for name, s in steps.items()}
        ax.barh(
            list(steps), list(share.values()), 0.8, list(left.values()), color=color, label=part
        )
        left = {name: left[name] + share[name] for name in steps}
    ax.set(xlim=(0, 1), ylim=(len(steps) - 0.5, -0.5), xlabel="share of the step")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(PARTS), handlelength=1)
    ax.grid(axis="y", visible=False)


def picture(
    run: Run, cluster: Cluster, tp: int = 8, pp: int = 8, micro_batch: int = 2, chunks: int = 1
) -> Figure:
    """Timeline and shares of one step, or a figure that says why there is no such plan."""
    try:
        chosen = plan(run, tp, pp, micro_batch, chunks)
    except ValueError as error:
        fig, ax = plt.subplots(figsize=(11, 1.6))
        ax.text(0, 0.5, f"no such plan: {error}", va="center", wrap=True)
        ax.set_axis_off()
        return fig
    step = simulate(run.cfg, chosen, cluster, run.batch, run.seq)
    size, room = device_bytes(run.cfg, chosen, run.batch, run.seq), cluster.hardware.memory
    fig, (top, below) = plt.subplots(2, 1, figsize=(11, 2.6 + 0.22 * pp), height_ratios=[pp + 2, 3])
    lanes(top, step.timeline)
    fits = "fits" if size <= room else "does not fit"
    top.set_title(f"dp = {chosen.dp}: {step.teraflops:.0f} TFLOP/s a GPU, {step.seconds:.1f} s")
    bars(below, {"": step})
    below.set_xlabel(f"share of the step; {size / 1e9:.0f} GB a GPU {fits} into {room / 1e9:.0f}")
    return fig
