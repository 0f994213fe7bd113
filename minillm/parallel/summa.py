"""SUMMA: matrix products whose three matrices lie in blocks on a square grid of ranks.

No rank ever holds a whole matrix, or a whole row of blocks. For C = A B, in step l, column l of
A's blocks is broadcast along the rows of the grid and row l of B's along its columns:

    C_ij = Σ over l of A_il B_lj

C = A Bᵀ and C = Aᵀ B broadcast one matrix and reduce partial sums of the result instead. The
gradients of each of the three are products of the other two kinds, so that a backward pass never
transposes a matrix across the grid.

Source: van de Geijn and Watts, SUMMA: Scalable Universal Matrix Multiplication Algorithm, 1997;
what they cost in a transformer: Xu and You, An Efficient 2D Method for Training Super-Large Deep
Learning Models, 2021 ("Optimus").
"""

# q side of the grid, i its row and j its column of this rank; C [m, n], k what is summed over
# costs: n ranks, b batch, t tokens, d model width, f width of the MLP

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.mesh import Mesh
from minillm.parallel.slices import join, shard


@dataclass(frozen=True)
class Grid:
    """A rank's place on a q × q grid, and whom it talks to: its row, its column, everybody.

    `row` are the ranks in the same row: they differ in their column, so a mesh calls them
    `mesh.group("column")`. A rank's index in `row` is its column j, in `column` its row i.
    """

    row: Group
    column: Group
    all: Group

    @classmethod
    def of(cls, mesh: Mesh) -> Grid:
        """The grid that a mesh has along its axes "row" and "column" (among others).

        Raises ValueError unless both are there and equally long.
        """
        sides = mesh.axes.get("row"), mesh.axes.get("column")
        if None in sides or sides[0] != sides[1]:
            raise ValueError(f"a grid needs axes row and column of equal size, not {mesh!r}")
        return cls(mesh.group("column"), mesh.group("row"), mesh.group("row", "column"))

    @property
    def side(self) -> int:
        """q."""
        return self.row.size

    @property
    def block(self) -> dict[int, Group]:
        """How a matrix [m, k] lies here, for `tile` and `untile`: block i, j on rank i, j."""
        return {0: self.column, 1: self.row}


def tile(full: Tensor, cuts: Mapping[int, Group]) -> Tensor:
    """This rank's block of a tensor that every rank holds, axis -> ranks that share it: a view.

    Raises ValueError where blocks would not be of equal size: SUMMA sends them around.
    """
    for axis, group in cuts.items():
        if full.shape[axis] % group.size:
            raise ValueError(
                f"axis {axis} of {tuple(full.shape)} must be a multiple of {group.size}, the side "
                "of the grid"
            )
    for axis, group in cuts.items():
        full = shard(full, axis, group)
    return full


def untile(x: Tensor, cuts: Mapping[int, Group]) -> Tensor:
    """The inverse of `tile`: the whole tensor on every rank, without gradients."""
    for axis, group in cuts.items():
        x = join(x.detach(), axis, x.shape[axis] * group.size, group)
    return x


# -- three products ------------------------------------------------------------------------------


def _ab(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    c = a.new_zeros(a.shape[0], b.shape[1])
    for step in range(grid.side):
        c.addmm_(C.broadcast(a, grid.row, step), C.broadcast(b, grid.column, step))
    return c


def _abt(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    c = a.new_empty(a.shape[0], b.shape[0])
    for step in range(grid.side):  # what a row of ranks computes together is block `step` of C
        part = C.reduce(a @ C.broadcast(b, grid.column, step).T, grid.row, step)
        c = part if grid.row.index == step else c
    return c


def _atb(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    c = a.new_empty(a.shape[1], b.shape[1])
    for step in range(grid.side):
        part = C.reduce(C.broadcast(a, grid.row, step).T @ b, grid.column, step)
        c = part if grid.column.index == step else c
    return c


class _Form(NamedTuple):
    product: Callable[[Tensor, Tensor, Grid], Tensor]
    inner: tuple[int, int]
    """the axes of A and B that are summed over"""
    d_a: Callable[[Tensor, Tensor, Tensor, Grid], Tensor]
    """from A, B and the gradient of C, that of A"""
    d_b: Callable[[Tensor, Tensor, Tensor, Grid], Tensor]


FORMS = {
    "ab": _Form(_ab, (1, 0), lambda a, b, c, g: _abt(c, b, g), lambda a, b, c, g: _atb(a, c, g)),
    "abt": _Form(_abt, (1, 1), lambda a, b, c, g: _ab(c, b, g), lambda a, b, c, g: _atb(c, a, g)),
    "atb": _Form(_atb, (0, 0), lambda a, b, c, g: _abt(b, c, g), lambda a, b, c, g: _ab(a, c, g)),
}
"""A B, A Bᵀ, Aᵀ B"""


class _Product(torch.autograd.Function):
    """Keeps its blocks of A and B only: backward has the others' sent again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, grid: Grid, form: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.grid, ctx.form = grid, FORMS[form]
        return ctx.form.product(a, b, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        a, b = ctx.saved_tensors
        known = a, b, grad, ctx.grid
        d_a = ctx.form.d_a(*known) if ctx.needs_input_grad[0] else None
        d_b = ctx.form.d_b(*known) if ctx.needs_input_grad[1] else None
        return d_a, d_b, None, None


def matmul(a: Tensor, b: Tensor, grid: Grid, form: str = "ab") -> Tensor:
    """This rank's block of C = A B ("ab"), A Bᵀ ("abt") or Aᵀ B ("atb"), from those of A and B.

    Blocks i, j lie on rank i, j; all of one matrix have one shape. Differentiable: every rank's
    block counts in the loss. A rank sends `summa_bytes`, twice that again in the backward pass.

    Raises ValueError for another form and for blocks that do not fit.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {list(FORMS)}")
    inner = FORMS[form].inner
    if a.ndim != 2 or b.ndim != 2 or a.shape[inner[0]] != b.shape[inner[1]]:
        raise ValueError(
            f"blocks {tuple(a.shape)} and {tuple(b.shape)} do not fit: {form!r} sums over axis "
            f"{inner[0]} of the first and {inner[1]} of the second"
        )
    return _Product.apply(a, b, grid, form)


# -- what products cost --------------------------------------------------------------------------


def summa_bytes(m: int, k: int, n: int, q: int, form: str = "ab", itemsize: int = 4) -> float:
    """Bytes that each rank sends for one product C [m, n], summed over k, on a q × q grid.

    (q-1) / q² · (the numbers of the two matrices that travel): A and B for "ab", B and C for
    "abt", A and C for "atb". Over all q steps each rank stands in each place of the broadcasts'
    trees once, so all send alike. Forward and backward together: three times as much, since
    every kind of product has the other two as its gradients and all move the same two.

    >>> summa_bytes(8, 4, 6, q=2)  # half of 8 · 4 + 4 · 6 numbers, 4 bytes each, halved again
    56.0
    """
    travels = {"ab": m * k + k * n, "abt": k * n + m * n, "atb": m * k + m * n}
    if form not in travels:
        raise ValueError(f"form={form!r} must be one of {list(FORMS)}")
    return (q - 1) / q**2 * travels[form] * itemsize


class Cost(NamedTuple):
    """What one rank does for the four products of a transformer layer, in bytes."""

    forward: float
    """sent in the forward pass"""
    backward: float
    """sent in the backward pass, without recomputation"""
    memory: float
    """blocks of weights, and of what goes into the products and comes out, between them"""


def _layer(b: int, t: int, d: int, f: int | None) -> list[tuple[int, int, int]]:
    """m, k, n of queries, keys and values in one, of attention's output, and of the MLP's two."""
    m, f = b * t, 4 * d if f is None else f
    return [(m, d, 3 * d), (m, d, d), (m, d, f), (m, f, d)]


def _root(n: int, power: int) -> int:
    side = isqrt(n) if power == 2 else round(n ** (1 / 3))
    if n < 1 or side**power != n:
        raise ValueError(f"n={n} ranks are no {'square' if power == 2 else 'cube'} of a number")
    return side


def bytes_1d(b: int, t: int, d: int, n: int, f: int | None = None, itemsize: int = 4) -> Cost:
    """Megatron's cut: two all-reduces of b·t·d numbers forward, two backward; inputs stay whole.

    Source: Shoeybi et al., Megatron-LM, 2019.

    >>> [round(bytes_1d(1, 1024, 512, n).forward / 2**20, 2) for n in (4, 16, 64)]
    [6.0, 7.5, 7.88]
    """
    products = _layer(b, t, d, f)
    sent = 2 * 2 * (n - 1) / n * b * t * d
    weights = sum(k * w for _, k, w in products) / n
    columns = sum(m * k + m * w / n for m, k, w in (products[0], products[2]))
    rows = sum(m * k / n + m * w for m, k, w in (products[1], products[3]))
    return Cost(sent * itemsize, sent * itemsize, (weights + columns + rows) * itemsize)


def bytes_2d(b: int, t: int, d: int, n: int, f: int | None = None, itemsize: int = 4) -> Cost:
    """Optimus: (q-1)/q² · (7 b·t·d + 12 d²) numbers forward for f = 4d, twice that backward.

    The paper times the longest path, log2(q) · q messages after each other, and counts 3 times
    backward, since it recomputes; these are bytes, as `minillm.parallel.group.Tracer` counts them.
    Raises ValueError for n that is no square.

    >>> [round(bytes_2d(1, 1024, 512, n).forward / 2**20, 2) for n in (4, 16, 64)]
    [6.5, 4.88, 2.84]
    """
    return bytes_25d(b, t, d, n, 1, f, itemsize)


def bytes_25d(
    b: int, t: int, d: int, n: int, depth: int, f: int | None = None, itemsize: int = 4
) -> Cost:
    """Tesseract: `depth` grids of side q, each with its share of the batch and all weights.

    SUMMA in each grid with m / depth rows; then the weights' gradients, [k/q, n/q] blocks, are
    summed over depth. `depth=1` is 2-D, q=1 data parallelism. Raises ValueError unless n / depth
    is a square. Source: Wang et al., Tesseract: Parallelize the Tensor Parallelism Efficiently,
    2021.
    """
    if depth < 1 or n % depth:
        raise ValueError(f"n={n} ranks are not depth={depth} grids")
    q, products = _root(n // depth, 2), _layer(b, t, d, f)
    forward = sum(summa_bytes(m / depth, k, w, q, "ab", itemsize) for m, k, w in products)
    weights = sum(k * w for _, k, w in products) / q**2 * itemsize
    streams = sum(m * k + m * w for m, k, w in products) / n * itemsize
    return Cost(forward, 2 * forward + 2 * (depth - 1) / depth * weights, weights + streams)


def bytes_3d(b: int, t: int, d: int, n: int, f: int | None = None, itemsize: int = 4) -> Cost:
    """A cube of side l: each matrix over all l³ ranks, and every product is cut three ways.

    A and B are gathered along one axis each, l blocks of 1/l³, and C is reduce-scattered along
    the third: (l-1)/l³ · (mk + kn + mn) numbers, and as many again for each gradient. Raises
    ValueError for n that is no cube. Source: Bian et al., Maximizing Parallelism in Distributed
    Training for Huge Neural Networks, 2021.

    >>> round(bytes_3d(1, 1024, 512, 64).forward / 2**20, 2)  # 7.88 and 2.84 in one and two
    2.06
    """
    side = _root(n, 3)
    numbers = sum(m * k + k * w + m * w for m, k, w in _layer(b, t, d, f)) * itemsize
    sent = (side - 1) / side**3 * numbers
    return Cost(sent, 2 * sent, numbers / n)
