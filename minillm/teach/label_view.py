"""Label pairs of cards yourself, and watch a small reward model follow.

The model is Bradley and Terry's with a worth for each line: a card is worth the sum of its lines.
It learns in a few steps of Newton's method, so it can answer each click.
"""

# p pairs, f different lines

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from minillm.data.cards import split_lines
from minillm.teach import plots

CHOICES = ("not labeled", "left", "right")


def differences(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    """The lines that occur, greetings left out, and how often left has each less right: [p, f].

    >>> lines, x = differences([("Dear Mia, I miss you. I miss you.", "Dear Mia, You are kind.")])
    >>> lines, x.tolist()
    (['I miss you.', 'You are kind.'], [[2.0, -1.0]])
    """
    cut = [[_lines(card) for card in pair] for pair in pairs]
    lines = sorted({line for pair in cut for card in pair for line in card})
    x = [[left.count(line) - right.count(line) for line in lines] for left, right in cut]
    return lines, np.array(x, dtype=float).reshape(len(pairs), len(lines))


def _lines(card: str) -> list[str]:
    return [piece for piece in split_lines(card) if not piece.endswith(",")]


def fit(x: np.ndarray, won: np.ndarray, doubt: float = 1.0) -> np.ndarray:
    """Worths w [f] that minimize Σ -log σ(±x w) + doubt |w|² / 2; `won` [p] is 1 where left won.

    Without labels, or for lines in none of them, a worth is 0. A larger `doubt` asks for more
    labels before a line counts; at 0 a line that always wins would be worth infinitely much, so it
    must be above 0 (ValueError).
    """
    if not doubt > 0:
        raise ValueError(f"doubt={doubt} must be above 0: a few labels would make worths infinite")
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (won - p) - doubt * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + doubt * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w = w + step
        if np.abs(step).max(initial=0) < 1e-9:
            break
    return w


def picture(pairs: Sequence[tuple[str, str]], labels: Sequence[str], doubt: float = 1.0) -> Figure:
    """Left what each line is worth by the labels; right each pair, and who wins by these worths.

    `labels` are of `CHOICES`, one a pair (ValueError otherwise). Labeled pairs are marked: at the
    others one sees what the model makes of cards it was told nothing about.
    """
    if len(labels) != len(pairs) or not set(labels) <= set(CHOICES):
        raise ValueError(f"labels {list(labels)} must be {len(pairs)} of {list(CHOICES)}")
    lines, x = differences(pairs)
    known = np.array([label != CHOICES[0] for label in labels])
    won = np.array([label == "left" for label in labels], dtype=float)
    w = fit(x[known], won[known], doubt)
    fig, (a, b) = plt.subplots(1, 2, figsize=(13, 0.75 * len(pairs) + 1.2), width_ratios=(1, 2))
    order = np.argsort(w)
    a.barh([lines[i] for i in order], w[order], color=plots.COLORS[0])
    a.axvline(0, color=plots.MUTED)
    a.set(xlabel="worth of a line")
    a.tick_params(axis="y", labelsize=9)
    chance = 1 / (1 + np.exp(-x @ w))
    for row, (pair, p, label) in enumerate(zip(pairs, chance, labels, strict=True)):
        color = plots.COLORS[1] if label != CHOICES[0] else plots.MUTED
        b.barh(row, p, height=0.3, color=color)
        told = f"{row + 1}  {pair[0]}\n     or  {pair[1]}"
        b.text(0, row - 0.2, told, fontsize=9, va="bottom")
    b.axvline(0.5, color=plots.MUTED, linestyle="--")
    b.set(xlim=(0, 1), ylim=(len(pairs) - 0.6, -0.9), yticks=[])
    b.set(xlabel="P(the first of the two is better); colored: labeled")
    return fig
