"""Units of a model for ZeRO stage 3: what is gathered together, and how it is cut over ranks."""

# N ranks, k numbers of a unit on each rank, t of them trained

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel.collectives import broadcast
from minillm.parallel.group import Group

Places = list[tuple[nn.Module, str]]


class Part:
    """One parameter: `shard`, this rank's rows of it, and `whole`, which has memory when live."""

    def __init__(self, p: nn.Parameter, places: Places, n: int, start: int, dtype: Any) -> None:
        self.places, self.shape, self.size = places, p.shape, p.numel()
        self.rows = -(-(p.shape[0] if p.ndim else 1) // n)
        self.columns = slice(start, start + self.rows * prod(p.shape[1:]))
        self.shard: nn.Parameter
        # rows of all ranks; the last ones are padding
        self.table = p.new_empty(n, self.columns.stop - start, dtype=dtype)
        self.bytes = self.table.nbytes
        self.whole = nn.Parameter(self.cut(self.table), requires_grad=p.requires_grad)

    def pad(self, x: Tensor) -> Tensor:
        """The parameter, or its gradient -> [N, rows · width]."""
        return F.pad(x.reshape(-1), (0, self.table.numel() - self.size)).view(self.table.shape)

    def cut(self, table: Tensor) -> Tensor:
        """[N, rows · width] -> in the parameter's shape."""
        return table.reshape(-1)[: self.size].view(self.shape)

    def put(self, p: nn.Parameter) -> None:
        """Let the modules use p."""
        for owner, name in self.places:
            owner._parameters[name] = p


class Unit:
    """Parameters that are gathered together. `flat` [k] is this rank's part, masters."""

    def __init__(
        self, module: nn.Module, found: dict[nn.Parameter, Places], group: Group, dtype: Any
    ) -> None:
        self.module = module
        kinds = {p.dtype for p in found}
        if len(kinds) > 1:
            raise ValueError(f"parameters of one unit must have one dtype, not {kinds}")
        own = kinds.pop() if kinds else torch.float32
        self.dtype, self.parts, k = dtype or own, [], 0
        # trained ones first: what travels of gradients is one piece
        order = sorted(found, key=lambda p: not p.requires_grad)
        for p in order:
            self.parts.append(Part(p, found[p], group.size, k, self.dtype))
            k = self.parts[-1].columns.stop
        self.trained = [part for part in self.parts if part.whole.requires_grad]
        master = torch.promote_types(own, torch.float32)
        rows = [part.pad(p.detach()) for part, p in zip(self.parts, order, strict=True)]
        table = torch.cat(rows, 1) if rows else torch.zeros(group.size, 0)
        self.flat = broadcast(table, group)[group.index].to(master, copy=True)
        for part in self.parts:
            rows = self.flat[part.columns].view(part.rows, *part.shape[1:])
            part.shard = nn.Parameter(rows, requires_grad=part.whole.requires_grad)
        self.coming: Future | None = None  # [N, k], gathered ahead of time
        self.before: Unit | None = None  # whose forward was before this one's
        self.after: Unit | None = None
        self.entered: list[object] = []  # calls of which forward runs
        self.open: set[object] = set()  # calls of which backward runs
        self.live, self.pending = True, False
        self.free()

    def fill(self, table: Tensor) -> None:
        """Give the whole parameters memory and the numbers of all ranks [N, k]."""
        for part in self.parts:
            part.table.untyped_storage().resize_(part.bytes)
            # through `data`: autograd must not take this for a change of what it has saved
            part.table.data.copy_(table[:, part.columns])
            part.put(part.whole)
        self.live = True

    def free(self) -> None:
        """Take their memory back; the modules see the shards."""
        for part in self.parts:
            part.table.untyped_storage().resize_(0)
            part.put(part.shard)
        self.live = False

    def gradients(self) -> Tensor:
        """Of the whole parameters, which forget them: [N, t]; zeros where one took no part."""
        rows = []
        for part in self.trained:
            grad, part.whole.grad = part.whole.grad, None
            rows.append(torch.zeros_like(part.table) if grad is None else part.pad(grad))
        return torch.cat(rows, 1)

    def add(self, grad: Tensor) -> None:
        """Add a gradient [t] to those of the shards."""
        grad = grad.to(self.flat.dtype)
        for part in self.trained:
            piece = grad[part.columns].view_as(part.shard)
            part.shard.grad = piece if part.shard.grad is None else part.shard.grad.add_(piece)


def find_units(
    module: nn.Module, units: str | Sequence[nn.Module]
) -> dict[nn.Module, dict[nn.Parameter, Places]]:
    """Which parameters each unit has, and where; the module itself, first, has the rest."""
    names = {m: name for name, m in module.named_modules()}
    if isinstance(units, str):
        chosen = [m for m, name in names.items() if name and re.fullmatch(units, name)]
        if not chosen:
            raise ValueError(f"units={units!r} matches none of {list(names.values())[1:]}")
    else:
        chosen = list(units)
    if any(m not in names or m is module for m in chosen):
        raise ValueError("units must be modules within the module")
    owner: dict[nn.Module, nn.Module] = {}
    for unit in chosen:
        for m in unit.modules():
            if owner.setdefault(m, unit) is not unit:
                raise ValueError(f"{names[m]!r} is in two units: they must not overlap")
    places: dict[nn.Parameter, Places] = {}
    homes: dict[nn.Parameter, set[nn.Module]] = {}
    for m in names:
        for name, p in m._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((m, name))
                homes.setdefault(p, set()).add(owner.get(m, module))
    found: dict[nn.Module, dict[nn.Parameter, Places]] = {m: {} for m in (module, *chosen)}
    for p, where in places.items():
        home = homes[p].pop() if len(homes[p]) == 1 else module
        found[home][p] = where
    return found
