"""Which numbers of a kernel's result are wrong, as a picture of its programs' tiles."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from minillm.teach import check, plots

Block = int | tuple[int, int]
KINDS = {"right": "#CFE3F1", "wrong": plots.COLORS[1], "NaN or never written": plots.INK}


def judge(got: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> np.ndarray:
    """0 where got is right, 1 where it is wrong, 2 where it is NaN and should not be.

    Raises AssertionError where the shapes differ.
    """
    check.equal(tuple(got.shape), tuple(want.shape), "the shape of the result")
    g, w = (x.detach().double().cpu().numpy() for x in (got, want))
    right = np.isclose(g, w, rtol=rtol, atol=atol, equal_nan=True)
    return np.where(right, 0, np.where(np.isnan(g), 2, 1))


def compare(
    got: Tensor, want: Tensor, block: Block, rtol: float = 1e-5, atol: float = 1e-6
) -> Figure:
    """Draw the result with its wrong numbers marked; each frame holds one program's numbers.

    A vector is drawn in rows of `block` numbers, a matrix with tiles of `block` = (rows, columns);
    what has more axes is first made a matrix, by joining all but the last.
    """
    kinds = judge(got, want, rtol, atol)
    shown = kinds.reshape(-1, kinds.shape[-1]).astype(float)
    tall, wide = block if isinstance(block, tuple) else (1, block)
    if isinstance(block, int):  # one row for each program; what is beyond the end stays white
        shown = np.pad(kinds.reshape(-1) * 1.0, (0, -kinds.size % block), constant_values=np.nan)
        shown = shown.reshape(-1, block)
    rows, columns = shown.shape
    height = min(4.6, 0.6 * rows, max(0.5, 9 * rows / columns))
    fig, ax = plt.subplots(figsize=(9, 1.4 + height))
    ax.imshow(shown, cmap=ListedColormap(list(KINDS.values())), vmin=0, vmax=2, aspect="auto")
    ax.grid(False)
    ax.vlines(np.arange(0, columns, wide) - 0.5, -0.5, rows - 0.5, color="white")
    ax.hlines(np.arange(0, rows, tall) - 0.5, -0.5, columns - 0.5, color="white")
    for number, (name, color) in enumerate(KINDS.items()):
        ax.plot([], [], "s", color=color, label=f"{name}: {int((kinds == number).sum())}")
    fig.legend(loc="outside upper left", ncols=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.set(xlabel="column", ylabel="block" if isinstance(block, int) else "row")
    return fig


def expect(
    got: Tensor, want: Tensor, message: str, block: Block, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Nothing if all is right; else the picture, and `check.close`'s AssertionError."""
    if judge(got, want, rtol, atol).any():
        compare(got, want, block, rtol, atol)
        plt.show()
    check.close(got, want, message, rtol, atol)
