"""A prompt under construction: which demonstrations, in which order, with which labels.

`build` makes the prompt and asks the model, `picture` draws both; the lecture's widget is a view
over them. The same number of demonstrations with the same seed are always the same ones, so that
a change of order or of labels changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.prompting import Score, icl
from minillm.prompting.icl import Demonstration, Template
from minillm.prompting.icl_order import random_choice
from minillm.teach import plots

ORDERS = ("as drawn", "reversed", "label by label", "labels reversed")
MARKS = ("true", "random", "wrong", "foreign")
WIDE = 40  # characters of a line that the picture shows


class Built(NamedTuple):
    """A prompt and what the model makes of it."""

    prompt: str
    lines: tuple[tuple[str, str], ...]
    """each demonstration as (what stands before its label, its label's word), then the question"""
    words: tuple[str, ...]
    probs: tuple[float, ...]
    """p(label) as the model gives it"""
    fair: tuple[float, ...]
    """the same, calibrated with inputs that say nothing"""


def build(
    score: Score,
    template: Template,
    pool: Sequence[Demonstration],
    labels: Sequence[str],
    text: str,
    count: int = 4,
    order: str = "as drawn",
    marks: str = "true",
    foreign: Sequence[str] = (),
    blanks: Sequence[str] = icl.CONTENT_FREE,
    seed: int = 0,
) -> Built:
    """Draw `count` demonstrations from the pool, order and label them, and ask about `text`.

    `order` is one of ORDERS; sorted by label, the prompt ends with the last label of `labels`, or
    `labels reversed` with the first. `marks` is one of MARKS: the true labels, labels at random,
    another label each time, or words of `foreign` at random. `blanks` are the inputs for
    calibration. Raises ValueError for an unknown order or mark, a count outside of the pool, and
    where `minillm.prompting.icl` does.
    """
    if order not in ORDERS or marks not in MARKS or not 0 <= count <= len(pool):
        raise ValueError(
            f"order={order!r} must be one of {ORDERS}, marks={marks!r} one of {MARKS}, and "
            f"count={count} in [0, {len(pool)}]"
        )
    rng = torch.Generator().manual_seed(seed)
    places = random_choice(len(pool), count, rng) if count else []
    if order.startswith("label"):
        places.sort(key=lambda i: list(labels).index(pool[i].label))
    shown = [pool[i] for i in places]
    if order in ("reversed", "labels reversed"):
        shown.reverse()
    if marks != "true":
        drawn_from = foreign if marks == "foreign" else labels
        shown = icl.relabel(shown, drawn_from, 1.0, rng, wrong=marks == "wrong")
    if template.words is not None:  # foreign words stand for themselves
        template = replace(template, words={**{word: word for word in foreign}, **template.words})
    probs = icl.label_probs(score, template, shown, [text], labels)
    prior = icl.content_free_prior(score, template, shown, labels, blanks)
    before, between, _ = template.parts
    lines = [(before + d.text + between, template.word(d.label)) for d in shown]
    return Built(
        template.prompt(shown, text),
        (*lines, (before + text + between, "?")),
        tuple(template.word(label) for label in labels),
        tuple(probs[0].tolist()),
        tuple(icl.calibrate(probs, prior)[0].tolist()),
    )


def picture(built: Built) -> Figure:
    """Left the prompt, labels in color; right p(label), as given and calibrated."""
    rows = len(built.lines)
    fig, axes = plt.subplots(1, 2, figsize=(10.5, max(3.4, 0.3 * rows + 1.2)), width_ratios=[2, 1])
    colors = dict(zip(built.words, plots.COLORS, strict=False))
    _write(axes[0], built, colors)
    for i, word in enumerate(built.words):
        color = colors.get(word, plots.MUTED)
        for value, width, place in ((built.probs[i], 0.34, -0.2), (built.fair[i], 0.22, 0.14)):
            faint = 1.0 if place < 0 else 0.45
            axes[1].barh(i + place, value, width, color=color, alpha=faint)
            axes[1].text(value + 0.02, i + place, f"{value:.2f}", va="center", fontsize=11)
    axes[1].set_yticks(range(len(built.words)), built.words)
    axes[1].set_xticks([0, 0.5, 1])
    axes[1].set(xlim=(0, 1.2), xlabel="p(label)", ylim=(len(built.words) - 0.5, -0.5))
    axes[1].set_title("full: as given\npale: calibrated", fontsize=12)
    axes[1].grid(axis="y", visible=False)
    return fig


def _write(ax: Axes, built: Built, colors: dict[str, str]) -> None:
    rows, font = len(built.lines), {"family": "monospace", "fontsize": 12, "va": "center"}
    for i, (before, word) in enumerate(built.lines):
        before = before.replace("\n", " ")
        if len(before) > WIDE:
            before = "…" + before[-WIDE + 1 :]
        weight = "bold" if i == rows - 1 else "normal"
        ax.text(0, i, before, fontweight=weight, **font)
        color = colors.get(word, plots.MUTED)
        # in monospace, blanks keep the place of what stands before
        ax.text(0, i, " " * len(before) + word, color=color, fontweight="bold", **font)
    ax.set(xlim=(0, 1), ylim=(max(rows, 7) - 0.4, -0.6))  # a short prompt stays on top
    noun = "demonstration" if rows == 2 else "demonstrations"
    ax.set_title(f"the prompt: {rows - 1} {noun} and a question")
    ax.axis("off")
