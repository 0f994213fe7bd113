"""A tensor in slices, one on each rank: how it is cut, and how gradients pass in and out.

Source: Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism, 2019.
"""

# N ranks; a Linear's weight is [out, in]

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minillm.parallel import collectives as C
from minillm.parallel.group import Group

# Between f and g every rank computes a part; outside, all ranks hold the same numbers and the same
# loss, which therefore counts once. `collectives.all_reduce` has another view: each rank's result
# counts, so its backward pass sums as well. On a loss that all ranks repeat, that would make every
# gradient N times too large. Inside a Function nothing is differentiated, so it can serve here.


class _F(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return C.all_reduce(grad, ctx.group), None


class _G(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return C.all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


def f(x: Tensor, group: Group) -> Tensor:
    """x itself, where ranks begin to differ: backward sums the gradients of their parts."""
    return _F.apply(x, group)


def g(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, where they agree again: backward gives each the gradient as it is.

    Conjugate to `f`: the one's forward pass is the other's backward pass.
    """
    return _G.apply(x, group)


# -- slices --------------------------------------------------------------------------------------


def bounds(size: int, group: Group, place: int | None = None) -> tuple[int, int]:
    """Where the share of this rank (or of another `place`) of `size` entries starts and stops.

    Shares differ by one at most. Raises ValueError where somebody would get nothing.
    """
    n, i = group.size, group.index if place is None else place
    if size < n:
        raise ValueError(f"{size} entries are too few for {n} ranks: each needs one at least")
    return size * i // n, size * (i + 1) // n


def shard(full: Tensor, axis: int, group: Group) -> Tensor:
    """This rank's slice of a tensor that every rank holds: a view."""
    start, stop = bounds(full.shape[axis], group)
    return full.narrow(axis, start, stop - start)


def join(x: Tensor, axis: int, size: int, group: Group) -> Tensor:
    """The inverse of `shard`: `size` entries along `axis`, on every rank; without gradients.

    Shares may differ by one row, messages may not: they are padded.
    """
    rows = x.movedim(axis, 0)
    padded = rows.new_zeros(-(-size // group.size), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = C.all_gather(padded, group).chunk(group.size)
    ends = [bounds(size, group, i) for i in range(group.size)]
    full = torch.cat([part[: b - a] for part, (a, b) in zip(parts, ends, strict=True)])
    return full.movedim(0, axis).contiguous()


class Cut(NamedTuple):
    """How a parameter is divided: its axis, and how long that is in the whole one."""

    axis: int
    size: int


def hold(module: nn.Module, name: str, full: Tensor | None, axis: int | None) -> None:
    """Make `module` own its group's slice of a parameter (all of it without an axis)."""
    if full is not None and axis is not None:
        module.cuts[name] = Cut(axis, full.shape[axis])
        own = shard(full.detach(), axis, module.group).clone(memory_format=torch.contiguous_format)
        full = nn.Parameter(own, requires_grad=full.requires_grad)
    module.register_parameter(name, full)


class Sharded(nn.Module):
    """This rank's slices of another module's parameters, under their old names.

    Raises ValueError for a module of another kind than it can stand for (also one that is cut
    already).
    """

    kind: ClassVar[type[nn.Module]] = nn.Linear
    axes: ClassVar[dict[str, int | None]] = {}

    def __init__(self, full: nn.Module, group: Group) -> None:
        super().__init__()
        if not isinstance(full, self.kind):
            raise ValueError(
                f"{type(self).__name__} stands for a {self.kind.__name__}, not for a "
                f"{type(full).__name__}"
            )
        self.group, self.cuts = group, {}
        for name, axis in self.axes.items():
            hold(self, name, getattr(full, name), axis)

    def extra_repr(self) -> str:
        """The slice, and of what."""
        shape, cut = tuple(self.weight.shape), self.cuts["weight"]
        return f"{shape}, {cut.size} along axis {cut.axis} over {self.group.size} ranks"
