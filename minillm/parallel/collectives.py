"""Collectives, built from send and recv in rings and trees, or the library's own; differentiable.

Each takes a tensor and a `Group` and is a function of the tensors of all ranks; its backward pass
is the collective that carries gradients the other way:

    broadcast <-> reduce      scatter <-> gather      all_gather <-> reduce_scatter
    all_reduce <-> all_reduce                         all_to_all <-> all_to_all

where every rank's result counts once in the loss, the sum of all ranks' losses.
"""

# K numbers of a tensor, N ranks; places are positions in the group, not global ranks

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.parallel.group import Group

# PyTorch's names for these two have changed
native_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
native_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _native(group: Group, x: Tensor) -> bool:
    # alone there is nothing to send, and a group of one may have no process group: that of all
    several = group.size > 1 and dist.is_initialized()
    return group.algorithm == "native" and several and x.numel() > 0


def _places(group: Group, root: int) -> None:
    if not 0 <= root < group.size:
        raise ValueError(f"root={root} is not a place in a group of {group.size}")


# -- without gradients ---------------------------------------------------------------------------


def _chunks(x: Tensor, n: int) -> list[Tensor]:
    """n views of a flat tensor, as equal as can be (some may be empty)."""
    bounds = [len(x) * i // n for i in range(n + 1)]
    return [x[a:b] for a, b in itertools.pairwise(bounds)]


def _ring_reduce_scatter(chunks: list[Tensor], group: Group) -> Tensor:
    """The sum over ranks of chunk `index`; nothing of `chunks` changes (alone, it is the chunk).

    N - 1 steps; each sends the sum that has come furthest to the next rank, which adds its own.
    """
    n, i = group.size, group.index
    total = chunks[(i - 1) % n]
    for step in range(n - 1):
        own = chunks[(i - step - 2) % n]
        received = torch.empty_like(own)
        total = group.exchange(total, (i + 1) % n, received, (i - 1) % n).add_(own)
    return total


def _ring_all_gather(chunks: list[Tensor], group: Group) -> None:
    """Chunk `index` of each rank travels around until all have it: N - 1 steps."""
    n, i = group.size, group.index
    for step in range(n - 1):
        here, there = chunks[(i - step) % n], chunks[(i - step - 1) % n]
        group.exchange(here, (i + 1) % n, there, (i - 1) % n)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks in 2(N-1)/N · K numbers sent by each: reduce-scatter, then all-gather."""
    if _native(group, x):
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group.process_group)
        return y
    x = x.detach().contiguous()
    y = torch.empty_like(x)
    chunks = _chunks(y.view(-1), group.size)
    mine = _ring_reduce_scatter(_chunks(x.view(-1), group.size), group)
    chunks[group.index].copy_(mine)
    _ring_all_gather(chunks, group)
    return y


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """x [N · k, ...] -> the sum over ranks of rows index · k to (index + 1) · k."""
    if len(x) % group.size:
        raise ValueError(f"{len(x)} rows cannot be scattered evenly over {group.size} ranks")
    x = x.detach().contiguous()
    if _native(group, x):
        y = x.new_empty(len(x) // group.size, *x.shape[1:])
        native_reduce_scatter(y, x, group=group.process_group)
        return y
    chunks = list(x.chunk(group.size))
    if group.size == 1 or not x.numel():
        return chunks[0].clone()
    return _ring_reduce_scatter(chunks, group)


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """x [k, ...] of each rank -> [N · k, ...], in the order of places."""
    y = x.new_empty(group.size * len(x), *x.shape[1:])
    if _native(group, x):
        native_all_gather(y, x.detach().contiguous(), group=group.process_group)
        return y
    if not x.numel():
        return y
    chunks = list(y.chunk(group.size))
    chunks[group.index].copy_(x.detach())
    _ring_all_gather(chunks, group)
    return y


def _broadcast(x: Tensor, group: Group, root: int) -> Tensor:
    """root's x, on every rank, along a tree: log2 N rounds; ranks that have it pass it on."""
    y = x.detach().clone(memory_format=torch.contiguous_format)
    if _native(group, x):
        dist.broadcast(y, group.ranks[root], group=group.process_group)
        return y
    n, me, width = group.size, (group.index - root) % group.size, 1
    while width < n:
        if me < width and me + width < n:
            group.send(y, (me + width + root) % n)()
        elif width <= me < 2 * width:
            group.receive(y, (me - width + root) % n)
        width *= 2
    return y


def _reduce(x: Tensor, group: Group, root: int) -> Tensor:
    """The sum over ranks at root, zeros elsewhere: the tree of `_broadcast` the other way."""
    y = x.detach().clone(memory_format=torch.contiguous_format)
    n, me = group.size, (group.index - root) % group.size
    width = 1
    while width < n:
        width *= 2
    while width > 1:
        width //= 2
        if width <= me < 2 * width:
            group.send(y, (me - width + root) % n)()
        elif me < width and me + width < n:
            y += group.receive(torch.empty_like(y), (me + width + root) % n)
    return y if me == 0 else torch.zeros_like(y)


def _scatter(x: Tensor, group: Group, root: int) -> Tensor:
    """Rows index · k to (index + 1) · k of root's x [N · k, ...]; the others' x gives the shape."""
    if len(x) % group.size:
        raise ValueError(f"{len(x)} rows cannot be scattered evenly over {group.size} ranks")
    parts = x.detach().contiguous().chunk(group.size)
    if group.index != root:
        return group.receive(torch.empty_like(parts[0]), root)
    for wait in [group.send(parts[i], i) for i in range(group.size) if i != root]:
        wait()
    return parts[root].clone()


def _gather(x: Tensor, group: Group, root: int) -> Tensor:
    """All x [k, ...] at root, [N · k, ...]; zeros elsewhere."""
    y = x.new_zeros(group.size * len(x), *x.shape[1:])
    if group.index != root:
        group.send(x.detach(), root)()
        return y
    for i, part in enumerate(y.chunk(group.size)):
        if i == root:
            part.copy_(x.detach())
        else:
            group.receive(part, i)
    return y


def _all_to_all(x: Tensor, group: Group) -> Tensor:
    """x [N · k, ...]: block j goes to rank j; block i of the result came from rank i."""
    if len(x) % group.size:
        raise ValueError(f"{len(x)} rows are not one block of equal size for {group.size} ranks")
    x = x.detach().contiguous()
    n, i, y = group.size, group.index, torch.empty_like(x)
    mine, theirs = x.chunk(n), y.chunk(n)
    if not x.numel():
        return y
    theirs[i].copy_(mine[i])
    for step in range(1, n):
        group.exchange(mine[(i + step) % n], (i + step) % n, theirs[(i - step) % n], (i - step) % n)
    return y


# -- with gradients ------------------------------------------------------------------------------


class _Collective(torch.autograd.Function):
    """`forth` in forward, `back` in backward, both recorded by the group's tracer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forth: tuple, back: tuple) -> Tensor:
        ctx.group, ctx.back = group, back
        return _traced(x, group, *forth)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _traced(grad, ctx.group, *ctx.back), None, None, None


def _traced(x: Tensor, group: Group, name: str, call: Callable[..., Tensor], *args: Any) -> Tensor:
    native = _native(group, x) and call in _HAS_NATIVE
    return group.run(name, lambda: call(x, group, *args), counted=not native)


_HAS_NATIVE = (_all_reduce, _reduce_scatter, _all_gather, _broadcast)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, of one shape, on every rank; 2(N-1)/N · K numbers sent by each.

    Source: Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms, 2009.
    """
    way = ("all_reduce", _all_reduce)
    return _Collective.apply(x, group, way, way)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """x [k, ...] -> [N · k, ...], everyone's rows in order; (N-1) · K numbers sent by each."""
    return _Collective.apply(
        x, group, ("all_gather", _all_gather), ("reduce_scatter", _reduce_scatter)
    )


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """x [N · k, ...] -> this place's k rows of the sum over ranks; (N-1)/N · K numbers sent."""
    return _Collective.apply(
        x, group, ("reduce_scatter", _reduce_scatter), ("all_gather", _all_gather)
    )


def broadcast(x: Tensor, group: Group, root: int = 0) -> Tensor:
    """root's x on every rank, in log2 N rounds; the others' x gives the shape only."""
    _places(group, root)
    return _Collective.apply(x, group, ("broadcast", _broadcast, root), ("reduce", _reduce, root))


def reduce(x: Tensor, group: Group, root: int = 0) -> Tensor:
    """The sum of all ranks' x at root, zeros elsewhere."""
    _places(group, root)
    return _Collective.apply(x, group, ("reduce", _reduce, root), ("broadcast", _broadcast, root))


def scatter(x: Tensor, group: Group, root: int = 0) -> Tensor:
    """This place's rows of root's x [N · k, ...]: [k, ...]; the others' x gives the shape only."""
    _places(group, root)
    return _Collective.apply(x, group, ("scatter", _scatter, root), ("gather", _gather, root))


def gather(x: Tensor, group: Group, root: int = 0) -> Tensor:
    """All ranks' x [k, ...] at root, [N · k, ...]; zeros elsewhere."""
    _places(group, root)
    return _Collective.apply(x, group, ("gather", _gather, root), ("scatter", _scatter, root))


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """x [N · k, ...]: block j to rank j; (N-1)/N · K numbers sent by each."""
    way = ("all_to_all", _all_to_all)
    return _Collective.apply(x, group, way, way)


def barrier(group: Group) -> None:
    """Nobody goes on before everybody is here."""
    group.run("barrier", lambda: _all_reduce(torch.zeros(group.size), group))


def parameter_server(x: Tensor, group: Group, root: int = 0) -> Tensor:
    """The same sum as `all_reduce`, through one rank: its wire carries (N-1) · K numbers each way.

    Source: Li et al., Scaling Distributed Machine Learning with the Parameter Server, 2014.
    """

    def work() -> Tensor:
        total = _gather(x[None], group, root).sum(0)
        everyone = total.expand(group.size, *x.shape).contiguous()
        return _scatter(everyone, group, root)[0]

    return group.run("parameter_server", work)
