"""Two matrix products in a row, each cut in some way: what has to be sent between the ranks.

    y = gelu(x A) B        x [n, d], A [d, f], B [f, d], N ranks

`journey` gives the messages of any choice of cuts, `carry_out` sends them on real ranks, `picture`
draws them. The lecture's widget, its table and its measured bytes come from these functions.
"""

# n tokens, d model width, f hidden width, N ranks

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.slices import shard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CUTS = ("columns", "rows", "whole")
"""of a weight [in, out]: a rank computes some outputs, or from some inputs, or repeats it all"""
NEEDS = {"columns": "whole", "rows": "split", "whole": "whole"}
"""what a product with such a weight has to be given"""
GIVES = {"columns": "split", "rows": "partial", "whole": "whole"}
"""and what it returns: some columns on each rank, summands on each rank, or all on every rank"""


class Move(NamedTuple):
    """How a tensor gets from the form in which it is to the one that is needed, and back."""

    forth: str
    """what is done in the forward pass: nothing, slice, all_gather, all_reduce, reduce_scatter"""
    back: str
    """and to the gradient in the backward pass"""
    width: int
    """columns of the whole tensor"""

    def numbers(self, tokens: int, ranks: int) -> tuple[float, float]:
        """Numbers that each rank sends, forward and backward, through rings."""
        trips = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
        share = tokens * self.width * (ranks - 1) / ranks
        return trips.get(self.forth, 0) * share, trips.get(self.back, 0) * share


def journey(first: str, second: str, d: int = 64, f: int = 256) -> tuple[Move, Move, Move]:
    """The moves of x before A, of x A before the GELU, and of the result, which all shall have.

    `first` and `second` are the cuts of A and B. Raises ValueError for an unknown cut. Source of
    the pair columns, rows: Shoeybi et al., Megatron-LM, 2019.

    >>> [move.forth for move in journey("columns", "rows")]
    ['nothing', 'nothing', 'all_reduce']
    >>> [move.back for move in journey("columns", "rows")]
    ['all_reduce', 'nothing', 'nothing']
    """
    for cut in (first, second):
        if cut not in CUTS:
            raise ValueError(f"cut={cut!r} must be one of {list(CUTS)}")
    into = _move("whole", NEEDS[first], d, parts=first == "columns")
    between = _move(GIVES[first], NEEDS[second], f, parts=second == "columns")
    out = _move(GIVES[second], "whole", d, parts=False)
    return into, between, out


def _move(have: str, need: str, width: int, parts: bool) -> Move:
    """`parts`: whole on every rank, but each computes a part of what follows.

    Then each rank's gradient is a summand of the whole one; otherwise all have the same.
    """
    if need == "split":
        ways = {
            "whole": ("slice", "all_gather"),
            "split": ("nothing", "nothing"),
            "partial": ("reduce_scatter", "all_gather"),
        }
        return Move(*ways[have], width)
    ways = {
        "whole": ("nothing", "all_reduce" if parts else "nothing"),
        "split": ("all_gather", "reduce_scatter" if parts else "slice"),
        "partial": ("all_reduce", "all_reduce" if parts else "nothing"),
    }
    return Move(*ways[have], width)


# -- on real ranks -------------------------------------------------------------------------------


def _along_columns(collective: Callable[[Tensor, Group], Tensor]) -> Callable:
    return lambda x, group: collective(x.T.contiguous(), group).T


_DO = {
    "nothing": lambda x, group: x.clone(),
    "slice": lambda x, group: shard(x, 1, group).clone(),
    "all_reduce": C.all_reduce,
    "all_gather": _along_columns(C.all_gather),
    "reduce_scatter": _along_columns(C.reduce_scatter),
}


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, group: Group) -> Tensor:
        ctx.move, ctx.group = move, group
        return _DO[move.forth](x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _DO[ctx.move.back](grad, ctx.group), None, None


def cut_weight(weight: Tensor, cut: str, group: Group) -> Tensor:
    """This rank's part of a weight [in, out]."""
    axis = {"columns": 1, "rows": 0, "whole": None}[cut]
    return weight if axis is None else shard(weight, axis, group)


def carry_out(
    x: Tensor, a: Tensor, b: Tensor, first: str, second: str, group: Group, moves: Any = None
) -> Tensor:
    """gelu(x a) b on every rank; `a` and `b` are this rank's parts of the weights.

    Widths are multiples of N. `moves` replaces the journey that belongs to the cuts.
    """
    n = group.size
    d, f = x.shape[1], a.shape[1] * (n if first == "columns" else 1)
    into, between, out = journey(first, second, d, f) if moves is None else moves
    h = _Carry.apply(_Carry.apply(x, into, group) @ a, between, group)
    return _Carry.apply(F.gelu(h) @ b, out, group)


# -- drawn ---------------------------------------------------------------------------------------
# (ranks import this file too, and should not have to wait for a library that they do not need)


def draw_cut(
    ax: Axes, x: float, y: float, size: tuple[float, float], form: str, ranks: int
) -> None:
    """A matrix with its lower left corner at x, y: whole, split (columns), rows, or partial."""
    from matplotlib.patches import Rectangle

    from minillm.teach.plots import COLORS

    wide, high = size
    edge = {"ec": "white", "lw": 0.8}
    if form == "whole":
        ax.add_patch(Rectangle((x, y), wide, high, fc="#BDBDBD", **edge))
    for i in range(ranks if form != "whole" else 0):
        color = COLORS[i % len(COLORS)]
        if form in ("split", "columns"):
            corner, part = (x + wide * i / ranks, y), (wide / ranks, high)
        elif form == "rows":
            corner, part = (x, y + high * (ranks - 1 - i) / ranks), (wide, high / ranks)
        else:  # as many layers as summands
            shift = 0.12 * (ranks - 1 - i)
            corner, part = (x + shift, y + shift), (wide, high)
        ax.add_patch(Rectangle(corner, *part, fc=color, **edge))


def picture(first: str = "columns", second: str = "rows", ranks: int = 4) -> Figure:
    """The matrices of gelu(x A) B, each rank's part in its color, and the messages between them.

    Raises ValueError for an unknown cut or fewer ranks than one.
    """
    import matplotlib.pyplot as plt

    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1")
    d, hidden, tokens = 64, 256, 64
    moves = journey(first, second, d, hidden)
    fig, ax = plt.subplots(figsize=(11, 3.1))
    forms = [
        ("x", NEEDS[first], (1, 1)),
        ("A", first, (3, 1)),
        ("x A", GIVES[first], (3, 1)),
        ("gelu", NEEDS[second], (3, 1)),
        ("B", second, (1, 3)),
        ("(…) B", GIVES[second], (1, 1)),
        ("y", "whole", (1, 1)),
    ]
    gaps = {1: "·", 2: "=", 3: moves[1], 4: "·", 5: "=", 6: moves[2]}
    x = _message(ax, 0.0, moves[0])
    for i, (name, form, size) in enumerate(forms):
        gap = gaps.get(i)
        if isinstance(gap, Move):
            x = _message(ax, x, gap)
        elif gap:
            ax.text(x + 0.25, 0, gap, ha="center", va="center", fontsize=18)
            x += 0.5
        draw_cut(ax, x, -size[1] / 2, size, form if ranks > 1 else "whole", ranks)
        ax.text(x + size[0] / 2, -size[1] / 2 - 0.15, name, ha="center", va="top")
        x += size[0] + (0.12 * (ranks - 1) if form == "partial" else 0) + 0.1
    sent = [sum(move.numbers(tokens, ranks)[way] for move in moves) for way in (0, 1)]
    held = sum(1 if cut == "whole" else 1 / ranks for cut in (first, second)) / 2
    title = (
        f"sent by each of {ranks} ranks, as multiples of x: {sent[0] / tokens / d:.2f} forward, "
        f"{sent[1] / tokens / d:.2f} backward;  weights and FLOPs of a rank: {held:.0%}"
    )
    ax.set_title(title, fontsize=13)
    ax.set(xlim=(-0.1, x + 0.1), ylim=(-2.1, 1.7), aspect="equal")
    ax.axis("off")
    return fig


def _message(ax: Axes, x: float, move: Move) -> float:
    """What happens here, forward above and backward below; returns where it goes on."""
    wide = 2.9 if (move.forth, move.back) != ("nothing", "nothing") else 0.6
    for y, name, color, ends in ((0.3, move.forth, "C0", "->"), (-0.3, move.back, "C1", "<-")):
        ax.annotate(
            "", (x + wide, y), (x, y), arrowprops={"arrowstyle": ends, "color": color, "lw": 1.6}
        )
        if name != "nothing":
            ax.text(
                x + wide / 2,
                y + (0.12 if y > 0 else -0.12),
                name.replace("_", "-"),
                ha="center",
                va="bottom" if y > 0 else "top",
                color=color,
                fontsize=12,
            )
    return x + wide + 0.15
