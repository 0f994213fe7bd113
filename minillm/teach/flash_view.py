"""Attention block by block, recorded: which block was visited, and what was known after it.

`replay` carries out the computation of FlashAttention for one head and yields an event per block;
`picture` draws one moment of it. The lecture's pictures, its animation and its counts of visited
blocks all come from these events.
"""

# t queries, s keys, d head width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from minillm.teach import plots


class Step(NamedTuple):
    """One visited block, and what is known after it; rows not yet reached are −inf, 0, 0."""

    block: tuple[int, int]
    """its place, counted in blocks: down (queries), right (keys)"""
    rows: slice
    cols: slice
    masked: bool
    """whether the mask forbids some of its scores"""
    scores: Tensor
    """[rows, cols] of this block, −inf where forbidden"""
    top: Tensor
    """[t], the largest score of each row so far"""
    total: Tensor
    """[t], Σ exp(score − top) so far"""
    out: Tensor
    """[t, d], attention over the keys seen so far"""


def allowed(rows: Tensor, cols: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which of these queries (positions among the keys) may see which keys: bool [rows, cols]."""
    distance = rows[:, None] - cols
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal or window is not None:
        seen &= distance >= 0
    return seen if window is None else seen & (distance < window)


def replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int,
    block_k: int,
    causal: bool = False,
    window: int | None = None,
    order: Sequence[tuple[int, int]] | None = None,
) -> Iterator[Step]:
    """softmax(q kᵀ / √d) v of one head, q [t, d], k and v [s, d], an event for each visited block.

    The last query stands at the last key. With `causal` or `window` (the last so many keys, itself
    included) blocks without any allowed score are skipped: they make no event. `order` gives the
    blocks in another order than row by row. Raises ValueError when shapes or blocks do not fit.

    Source: Dao, FlashAttention-2: Faster Attention with Better Parallelism, 2023.
    """
    if q.ndim != 2 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"one head needs q [t, d], k [s, d] and v [s, d], got {shapes}")
    if block_q < 1 or block_k < 1 or (window is not None and window < 1):
        raise ValueError(f"block_q={block_q}, block_k={block_k}, window={window}: at least 1 each")
    (t, d), s = q.shape, len(k)
    at, keys = torch.arange(t) + s - t, torch.arange(s)
    every = [(i, j) for i in range(-(-t // block_q)) for j in range(-(-s // block_k))]
    if order is not None and sorted(order) != every:
        raise ValueError(f"order must name each block from (0, 0) to {every[-1:]} once")
    top, total, out = q.new_full((t,), -torch.inf), q.new_zeros(t), v.new_zeros(t, d)
    for i, j in every if order is None else order:
        rows = slice(i * block_q, min((i + 1) * block_q, t))
        cols = slice(j * block_k, min((j + 1) * block_k, s))
        mask = allowed(at[rows], keys[cols], causal, window)
        if not mask.any():
            continue
        scores = (q[rows] @ k[cols].T / d**0.5).masked_fill(~mask, -torch.inf)
        new_top = torch.maximum(top[rows], scores.amax(-1))
        base = new_top.masked_fill(new_top == -torch.inf, 0.0)  # a row that has seen nothing yet
        p, shrink = (scores - base[:, None]).exp(), (top[rows] - base).exp()
        new_total = shrink * total[rows] + p.sum(-1)
        old = (shrink * total[rows])[:, None] * out[rows]  # the output is kept divided, to look at
        new_out = (old + p @ v[cols]) / new_total.clamp_min(torch.finfo(q.dtype).tiny)[:, None]
        top, total, out = top.clone(), total.clone(), out.clone()
        top[rows], total[rows], out[rows] = new_top, new_total, new_out
        yield Step((i, j), rows, cols, not bool(mask.all()), scores, top, total, out)


def picture(steps: Sequence[Step], at: int, row: int | None = None) -> Figure:
    """The score matrix after step `at`, what one row knows by then, and how far outputs are off.

    `steps` are all events of one `replay`; `row` is the query whose running maximum and sum are
    drawn (by default the middle one). Raises ValueError for a step that does not exist and for a
    row that no step visits.
    """
    t = len(steps[0].out) if steps else 0
    row = t // 2 if row is None else row
    seen = [n for n, step in enumerate(steps) if step.rows.start <= row < step.rows.stop]
    if not 0 <= at < len(steps) or not seen:
        raise ValueError(f"of {len(steps)} steps there is no step {at}, or none visits row {row}")
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8), width_ratios=[1.15, 1, 1])
    _matrix(left, steps, at, row)
    for name, label in (("top", "maximum m"), ("total", "sum ℓ")):
        height = torch.stack([getattr(steps[n], name)[row] for n in seen]).nan_to_num(neginf=0.0)
        known = height.where(torch.tensor(seen) <= at, torch.nan)
        middle.plot([n + 1 for n in seen], known.tolist(), "o-", label=label)
        room = (1.3 * height).tolist()  # the same at each step, so that nothing jumps
        middle.plot([n + 1 for n in seen], room, color="none")
    middle.set(xlabel="step", title=f"query {row}, so far", xticks=[n + 1 for n in seen])
    middle.legend(loc="upper left", ncols=2, handlelength=1)
    off = torch.stack([(step.out - steps[-1].out).norm(dim=-1) for step in steps])
    right.barh(range(t), off[at].tolist(), height=1.0, color=plots.COLORS[2])
    right.set(ylim=(t - 0.5, -0.5), xlim=(0, float(off.max())), yticks=[0, row, t - 1])
    right.set(title="distance to the result", xlabel="norm of the difference")
    return fig


def _matrix(ax: plt.Axes, steps: Sequence[Step], at: int, row: int) -> None:
    t, s = len(steps[0].out), max(step.cols.stop for step in steps)
    ax.add_patch(plt.Rectangle((-0.5, -0.5), s, t, facecolor="#D8D8D8"))  # what is never visited
    now = torch.full((t, s), torch.nan)
    for n, step in enumerate(steps):
        corner = (step.cols.start - 0.5, step.rows.start - 0.5)
        size = (step.cols.stop - step.cols.start, step.rows.stop - step.rows.start)
        ax.add_patch(plt.Rectangle(corner, *size, facecolor="white", edgecolor=plots.GRID))
        if n <= at:  # under the maximum known today, as the running sums count them
            weights = (step.scores - steps[at].top[step.rows, None]).exp().float()
            now[step.rows, step.cols] = weights.where(step.scores.isfinite(), torch.nan)
        if n == at:
            ax.add_patch(plt.Rectangle(corner, *size, fill=False, ec="C1", lw=3, zorder=3))
    ax.imshow(now.numpy(), vmin=0, vmax=1, cmap="Blues", zorder=2)
    ax.set(title=f"step {at + 1} of {len(steps)}", xlabel="key", ylabel="query")
    ax.set(xlim=(-0.5, s - 0.5), ylim=(t - 0.5, -0.5), xticks=[0, s - 1], yticks=[0, row, t - 1])
    ax.grid(False)
