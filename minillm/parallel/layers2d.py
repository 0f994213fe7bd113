"""Layers whose activations and weights both lie in blocks on a grid of ranks.

Rank i, j of a q × q grid holds rows i of the batch and columns j of the width: activations are
[b/q, t, d/q], weights [out/q, in/q], norms and biases [d/q], alike on the ranks of a column.

Source: Xu and You, An Efficient 2D Method for Training Super-Large Deep Learning Models, 2021
("Optimus"). There, norms and biases lie in the first row and are broadcast; here each row has them.
"""

# b batch, t tokens, d model width, v vocabulary; q side of the grid, i row and j column of a rank

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.slices import bounds, f
from minillm.parallel.summa import Grid, matmul, tile


class Tiled(nn.Module):
    """This rank's blocks of another module's parameters, under their old names.

    Raises ValueError for a module of another kind than it can stand for.
    """

    kind: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(self, full: nn.Module, grid: Grid) -> None:
        super().__init__()
        if not isinstance(full, self.kind):
            raise ValueError(
                f"{type(self).__name__} stands for a {self.kind.__name__}, not for a "
                f"{type(full).__name__}"
            )
        self.grid, self.tiles = grid, {}


def hold_2d(module: nn.Module, name: str, full: Tensor | None, cuts: Mapping[int, Group]) -> None:
    """Make `module` own its block of a parameter, and remember how it was cut: axis -> ranks."""
    if full is not None:
        own = tile(full.detach(), cuts).clone(memory_format=torch.contiguous_format)
        module.tiles[name] = dict(cuts)
        full = nn.Parameter(own, requires_grad=full.requires_grad)
    module.register_parameter(name, full)


class _Readers:
    """Linears that are given the same x: one product with all their weights, so x travels once."""

    def __init__(self, linears: list[SummaLinear]) -> None:
        self.linears, self.x = linears, None
        self.results: dict[SummaLinear, Tensor] = {}

    def read(self, linear: SummaLinear, x: Tensor) -> Tensor:
        if self.x is not x or linear not in self.results:
            weight = torch.cat([each.weight for each in self.linears])
            y = matmul(x.flatten(0, -2), weight.T, linear.grid).unflatten(0, x.shape[:-1])
            parts = y.split([len(each.weight) for each in self.linears], dim=-1)
            self.x, self.results = x, dict(zip(self.linears, parts, strict=True))
        y = self.results.pop(linear)
        self.x = x if self.results else None
        return y


class SummaLinear(Tiled):
    """x Wᵀ + b as a SUMMA product: x [..., in/q] -> [..., out/q], on all ranks of a grid.

    Rank i, j holds block i, j of Wᵀ. The bias is cut like the result; ranks of a column have the
    same share and each sees a part of its gradient, hence `f`.
    """

    def __init__(self, full: nn.Module, grid: Grid) -> None:
        super().__init__(full, grid)
        hold_2d(self, "weight", full.weight, {0: grid.row, 1: grid.column})
        hold_2d(self, "bias", full.bias, {0: grid.row})
        self.readers = _Readers([self])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in/q] -> [..., out/q]."""
        y = self.readers.read(self, x)
        return y if self.bias is None else y + f(self.bias, self.grid.column)


class Head2d(Tiled):
    """x Wᵀ where W lies like the token vectors, to which it may be tied: block i, j on rank i, j.

    So it is a product A Bᵀ, and logits [b/q, t, v/q] travel instead of x.
    """

    def __init__(self, full: nn.Module, grid: Grid) -> None:
        super().__init__(full, grid)
        hold_2d(self, "weight", full.weight, grid.block)

    def forward(self, x: Tensor) -> Tensor:
        """[b/q, t, d/q] -> [b/q, t, v/q]."""
        logits = matmul(x.flatten(0, -2), self.weight, self.grid, "abt")
        return logits.unflatten(0, x.shape[:-1])


class Embedding2d(Tiled):
    """One-hot tokens times the table: its blocks are broadcast along columns, one at a time.

    (q-1)/q² · v · d numbers are sent in each direction, however many tokens there are.
    """

    kind: ClassVar = nn.Embedding

    def __init__(self, full: nn.Module, grid: Grid) -> None:
        super().__init__(full, grid)
        self.num_embeddings = full.num_embeddings
        hold_2d(self, "weight", full.weight, grid.block)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b/q, t] -> [b/q, t, d/q]; IndexError outside the vocabulary (CPU only)."""
        size, column = self.num_embeddings, self.grid.column
        if tokens.is_cpu and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < size:
            raise IndexError(f"tokens run from {tokens.min()} to {tokens.max()} of {size}")
        found = []
        for step in range(self.grid.side):
            table = C.broadcast(self.weight, column, step)  # backward: the sum of all rows' parts
            start, stop = bounds(size, column, step)
            here = (tokens >= start) & (tokens < stop)
            rows = F.embedding((tokens - start).where(here, 0), table)
            found.append(rows.masked_fill(~here[..., None], 0.0))
        return sum(found[1:], found[0])


class Norm2d(Tiled):
    """LayerNorm or RMSNorm of x [..., d/q]: sums over the width are sums along the grid's row.

    Each rank goes on with the sum for its own columns, so the gradient is summed as well: the
    differentiable `all_reduce`, not `g`. One number a token forward and backward, two with a mean.
    """

    kind: ClassVar = nn.Module

    def __init__(self, full: nn.Module, grid: Grid) -> None:
        super().__init__(full, grid)
        self.eps, self.width = full.eps, len(full.weight)
        self.centered = isinstance(full, nn.LayerNorm)
        hold_2d(self, "weight", full.weight, {0: grid.row})
        hold_2d(self, "bias", getattr(full, "bias", None), {0: grid.row})

    def _mean(self, x: Tensor) -> Tensor:
        return C.all_reduce(x.sum(-1, keepdim=True), self.grid.row) / self.width

    def forward(self, x: Tensor) -> Tensor:
        """[..., d/q] -> [..., d/q], statistics in float32 at least."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - self._mean(y) if self.centered else y
        y = y * (self._mean(y.square()) + self.eps).rsqrt()
        y = y * f(self.weight, self.grid.column).to(y.dtype)
        y = y if self.bias is None else y + f(self.bias, self.grid.column).to(y.dtype)
        return y.to(x.dtype)


def share_input_2d(linears: list[nn.Module | None]) -> None:
    """Let Linears that a module gives the same x make one product together."""
    linears = [each for each in linears if isinstance(each, SummaLinear)]
    for linear in linears:
        linear.readers = linears[0].readers
        linear.readers.linears = linears
