"""ZeRO stage 3, fully sharded: parameters too are in parts, and whole only while they are used.

A model is cut into units, such as its blocks. Before a unit computes, its parameters are gathered
from all ranks, in forward and again in backward; afterwards they are freed. Gradients are reduced
and scattered as soon as backward leaves a unit.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
2020; Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023.
"""

# N ranks, K numbers of all parameters

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from minillm.parallel.collectives import all_gather, broadcast, reduce_scatter
from minillm.parallel.group import Group
from minillm.parallel.partition import clip_grad_norm
from minillm.parallel.units import Part, Unit, find_units


class _Entrance(torch.autograd.Function):
    """Inputs as they are; `left` is called when backward has come through all that follows."""

    @staticmethod
    def forward(ctx: Any, left: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.left = left
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        ctx.left()
        return None, *grads


class FSDP(nn.Module):
    """`module` with 1/N of every parameter, gradient and optimizer state on each of N ranks.

    Use it as the module itself, and give `fsdp.parameters()` to an optimizer: they are this rank's
    rows, ceil(rows / N) of each parameter with zeros at the end, in float32 at least, under their
    own names and with as many axes; freeze before. Between backward and step call
    `finish_gradient_synchronization()`; several backward passes add up (a unit whose inputs need no
    gradient, as the outermost, stays whole until that call: so make it after each).
    (N-1)/N · K numbers travel three times: to forward, to backward, and the gradients back.

    `units` are modules, or a pattern for their names, which must not contain one another; what
    is left, and what two of them share, is a unit of its own around all others. Every rank has to
    run the same units in the same order. The next one is gathered while one computes (`prefetch`;
    the order is known from the last forward pass). Whole parameters and floating-point inputs of
    the module are in `compute_dtype`, or as they were. `reduce` is "mean" or "sum" over ranks, see
    `minillm.parallel.data.DDP`; parameters and buffers of place 0 count.

    Raises ValueError for settings that mean nothing, units that are not there or are nested, and a
    module without anything to train.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        compute_dtype: torch.dtype | None = None,
        units: str | Sequence[nn.Module] = r"(.*\.)?blocks\.\d+",
        reduce: str = "mean",
        prefetch: bool = True,
    ) -> None:
        super().__init__()
        if reduce not in ("mean", "sum"):
            raise ValueError(f"reduce={reduce!r} must be 'mean' or 'sum'")
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError("no parameter of the module requires a gradient")
        self.module, self.group, self.compute_dtype = module, group, compute_dtype
        self.factor = 1 / group.size if reduce == "mean" else 1.0
        self.prefetch, self.complete = prefetch, False
        self._flying: list[tuple[Unit, Future]] = []
        with torch.no_grad():
            for x in module.buffers():
                x.copy_(broadcast(x, group))
            found = find_units(module, units)
            self.units = [Unit(m, ps, group, compute_dtype) for m, ps in found.items()]
        self.last = self.units[0]  # in the order of the last forward pass
        for unit in self.units:
            unit.module.register_forward_pre_hook(partial(self._enter, unit), with_kwargs=True)
            unit.module.register_forward_hook(partial(self._leave, unit))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own."""
        return self.module(*args, **kwargs)

    # -- what happens at a unit's borders ------------------------------------------------------

    def _enter(self, unit: Unit, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if self.complete:
            return args, kwargs
        first = unit is self.units[0]
        if first:
            for one in self.units:  # a pass may have broken off: what it left is older numbers
                one.coming = None
                one.entered.clear()
                if one.live and not one.open:
                    one.free()
        elif unit is not self.last:
            unit.before, self.last.after = self.last, unit
        self.last = unit
        self._gather(unit, unit.after)
        call = object()
        unit.entered.append(call)
        leaves, spec = tree_flatten((args, kwargs))
        if first and self.compute_dtype is not None:
            leaves = [x.to(self.compute_dtype) if _is_float(x) else x for x in leaves]
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if places and torch.is_grad_enabled():
            left = partial(self._left, unit, call)
            inputs = _Entrance.apply(left, *(leaves[i] for i in places))
            for i, x in zip(places, inputs, strict=True):
                leaves[i] = x
        return tree_unflatten(leaves, spec)

    def _leave(self, unit: Unit, module: nn.Module, args: tuple, out: Any) -> None:
        if self.complete:
            return
        call = unit.entered.pop()
        if torch.is_grad_enabled():
            unit.pending = True
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(partial(self._back, unit, call))
        if not unit.open:  # else forward runs once more within backward
            unit.free()

    def _back(self, unit: Unit, call: object, grad: Tensor) -> None:
        """Backward is about to go into the unit."""
        unit.open.add(call)
        self._gather(unit, self.last if unit is self.units[0] else unit.before)

    def _left(self, unit: Unit, call: object) -> None:
        """Backward has left it."""
        unit.open.discard(call)
        if not unit.open:
            self._reduce(unit)

    # -- messages, all of them on the group's wire, in the same order on all ranks -------------

    @torch.no_grad()
    def _gather(self, unit: Unit, following: Unit | None) -> None:
        if not unit.live:
            table = (unit.coming or self._start(unit)).result()
            unit.coming = None
            unit.fill(table)
        if self.prefetch and following and not following.live and following.coming is None:
            following.coming = self._start(following)

    def _start(self, unit: Unit, dtype: torch.dtype | None = None) -> Future:
        row = unit.flat.to(dtype or unit.dtype)[None]
        return self.group.later(lambda: all_gather(row, self.group))

    @torch.no_grad()
    def _reduce(self, unit: Unit) -> None:
        unit.pending = False
        if unit.trained:
            self._collect(1)  # at most two units' gradients in memory, however slow the wire
            table = unit.gradients()
            future = self.group.later(lambda: reduce_scatter(table, self.group))
            self._flying.append((unit, future))
        unit.free()

    def _collect(self, keep: int) -> None:
        while len(self._flying) > keep:
            unit, message = self._flying.pop(0)
            unit.add(message.result()[0].mul_(self.factor))

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Wait until every shard has its gradient over all ranks; to be called by all ranks.

        A parameter that no rank used, in a unit that ran, has a gradient of zero.
        """
        for unit in self.units:
            unit.open.clear()
            unit.coming = None
            if unit.pending:
                self._reduce(unit)
        self._collect(0)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `partition.clip_grad_norm`, for the gradients of all ranks together."""
        return clip_grad_norm(self.parameters(), max_norm, self.group)

    # -- everything at once --------------------------------------------------------------------

    @property
    def gathered_bytes(self) -> int:
        """Bytes of parameters on this rank now beside its own shards."""
        whole = sum(p.table.untyped_storage().nbytes() for unit in self.units for p in unit.parts)
        ahead = [unit for unit in self.units if unit.coming is not None]
        return whole + sum(p.bytes for unit in ahead for p in unit.parts)

    @contextmanager
    def gather_full_params(self) -> Iterator[nn.Module]:
        """The module with whole parameters, as precise as the shards: to read, save or generate.

        All ranks have to enter. What they change alike stays; gradients are not kept.
        """
        whole: list[tuple[Unit, Part, nn.Parameter]] = []
        with torch.no_grad():
            for unit in self.units:
                table = self._start(unit, unit.flat.dtype).result()
                for part in unit.parts:
                    p = nn.Parameter(part.cut(table[:, part.columns]), part.whole.requires_grad)
                    part.put(p)
                    whole.append((unit, part, p))
        self.complete = True
        try:
            yield self.module
        finally:
            self.complete = False
            with torch.no_grad():
                for unit, part, p in whole:
                    unit.flat[part.columns] = part.pad(p)[self.group.index]
                    part.put(part.shard)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
