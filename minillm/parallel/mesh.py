"""A mesh gives ranks names along axes: which of them hold the same data, layers or columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from minillm.parallel.group import Group, split


def coordinates(rank: int, axes: Mapping[str, int]) -> dict[str, int]:
    """Where a rank stands on each axis; the last axis counts fastest.

    Neighboring ranks sit in one machine, so the axis that talks most comes last.

    >>> coordinates(5, {"data": 2, "pipeline": 2, "tensor": 2})
    {'data': 1, 'pipeline': 0, 'tensor': 1}
    """
    found = {}
    for name, size in reversed(axes.items()):
        rank, found[name] = divmod(rank, size)
    return {name: found[name] for name in axes}


def partition(axes: Mapping[str, int], along: str | Sequence[str]) -> list[list[int]]:
    """All groups of ranks that differ only `along` one axis (or several).

    Every rank is in one of them. Raises ValueError for an axis that is not there.

    >>> partition({"data": 2, "tensor": 2}, "data")
    [[0, 2], [1, 3]]
    >>> partition({"data": 2, "tensor": 2}, ["data", "tensor"])
    [[0, 1, 2, 3]]
    """
    along = [along] if isinstance(along, str) else list(along)
    unknown = [name for name in along if name not in axes]
    if unknown or len(set(along)) != len(along):
        raise ValueError(f"axes {along} must be different ones of {list(axes)}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(axes.values())):
        place = coordinates(rank, axes)
        groups.setdefault(tuple(place[a] for a in axes if a not in along), []).append(rank)
    return list(groups.values())


class Mesh:
    """The groups of this rank along each axis.

        mesh = Mesh({"data": 2, "pipeline": 2, "tensor": 2})
        mesh.group("tensor")      # the ranks that hold other columns of the same layers
        mesh.group("data", "tensor")   # those of the same stage

    Every rank of the world makes it, and asks for the same groups in the same order, since a group
    is made by all. `settings` (tracer, link, algorithm) are those of the groups; a mapping from an
    axis to settings makes an axis differ, as a wire between machines does.

    Raises ValueError when the sizes do not multiply to the number of ranks.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        **common: Any,
    ) -> None:
        n = dist.get_world_size() if dist.is_initialized() else 1
        if any(size < 1 for size in axes.values()) or math.prod(axes.values()) != n:
            product = " x ".join(f"{name}={size}" for name, size in axes.items())
            raise ValueError(f"{product} must multiply to the {n} ranks there are")
        unknown = [axis for axis in settings or {} if axis not in axes]
        if unknown:
            raise ValueError(f"settings for {unknown}, the axes are {list(axes)}")
        self.axes, self.common, self.settings = dict(axes), common, dict(settings or {})
        self.place = coordinates(dist.get_rank() if dist.is_initialized() else 0, axes)
        self._groups: dict[tuple[str, ...], Group] = {}

    def group(self, *along: str) -> Group:
        """The ranks that differ from this one along these axes only."""
        along = tuple(name for name in self.axes if name in along) or along
        if along not in self._groups:
            known = self.common | (self.settings.get(along[0], {}) if len(along) == 1 else {})
            parts = partition(self.axes, along)
            single = len(parts[0]) == 1
            rank = dist.get_rank() if dist.is_initialized() else 0
            # alone there is nobody to talk to, and no group to make
            self._groups[along] = Group((rank,), **known) if single else split(parts, **known)
        return self._groups[along]

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{n}={s}' for n, s in self.axes.items())})"


def links(axes: Mapping[str, int], along: str, per_node: int) -> float:
    """Which share of the messages of a ring along an axis crosses from one machine to another.

    Machines hold `per_node` neighboring ranks each.

    >>> links({"data": 2, "tensor": 4}, "tensor", per_node=4)
    0.0
    >>> links({"tensor": 2, "data": 4}, "tensor", per_node=4)
    1.0
    """
    pairs = [
        (a, b)
        for ranks in partition(axes, along)
        for a, b in itertools.pairwise([*ranks, ranks[0]])
        if a != b
    ]
    crossing = sum(a // per_node != b // per_node for a, b in pairs)
    return crossing / len(pairs) if pairs else 0.0
