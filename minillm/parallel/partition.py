"""Parts of a model's states: rows of numbers cut over ranks, their common norm, their bytes."""

# N ranks, k numbers of a bucket on each rank

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.parallel.collectives import all_reduce, broadcast
from minillm.parallel.group import Group


class Bucket:
    """Some parameters in one row [N · k], of which this rank updates `part` [k].

    Parameters of 16 bits get a float32 master as `part`; otherwise it is a view of the row.
    """

    def __init__(self, parameters: list[nn.Parameter], group: Group, dtype: Any) -> None:
        self.parameters, self.group = parameters, group
        self.k = -(-sum(p.numel() for p in parameters) // group.size)
        self.mine = slice(group.index * self.k, (group.index + 1) * self.k)
        row = broadcast(self.flatten([p.detach() for p in parameters]), group)
        self.row = row.to(dtype or row.dtype)
        low = self.row.dtype.itemsize < 4
        part = row[self.mine].to(torch.float32, copy=True) if low else self.row[self.mine]
        self.part, self.has_master = nn.Parameter(part), low
        for p, piece in zip(parameters, self.cut(self.row), strict=True):
            p.grad, p.data = None, piece
        self.grad: Tensor | None = None  # [k], in the parameters' dtype
        self.message: Future | None = None
        self.start_over()

    def start_over(self) -> None:
        """Wait for every gradient again."""
        self.missing, self.sent = len(self.parameters), False

    def flatten(self, tensors: list[Tensor]) -> Tensor:
        """One tensor a parameter -> [N · k], with zeros at the end."""
        padding = self.group.size * self.k - sum(x.numel() for x in tensors)
        return torch.cat([*(x.reshape(-1) for x in tensors), tensors[0].new_zeros(padding)])

    def cut(self, row: Tensor) -> list[Tensor]:
        """[N · k] -> one view of it a parameter."""
        sizes = [p.numel() for p in self.parameters]
        pieces = row[: sum(sizes)].split(sizes)
        return [x.view(p.shape) for x, p in zip(pieces, self.parameters, strict=True)]

    def gradients(self) -> Tensor:
        """[N · k]; zeros for a parameter that took no part."""
        rows = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        return self.flatten(list(rows))

    def add(self, grad: Tensor) -> None:
        """Add to the gradient of this rank's part."""
        self.grad = grad if self.grad is None else self.grad.add_(grad)


def options(group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group of an optimizer says about its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


@torch.no_grad()
def clip_grad_norm(parts: Iterable[Any], max_norm: float, group: Group) -> Tensor:
    """Scale the gradients (`.grad`) of all ranks' parts so that their common norm is `max_norm`.

    Returns the norm before. One that is not finite is returned, and the gradients are left alone.
    Raises ValueError unless max_norm > 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")
    grads = [part.grad for part in parts if part.grad is not None]
    exact = (g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads)
    squares = [g.square().sum() for g in exact]
    total = torch.stack(squares).sum() if squares else torch.zeros(())
    norm = group.later(lambda: all_reduce(total[None], group)).result()[0].sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1).where(norm.isfinite(), 1.0)
    for g in grads:
        g.mul_(factor)
    return norm


class Held(NamedTuple):
    """Bytes that a rank holds."""

    parameters: int
    gradients: int
    optimizer: int
    """masters and the optimizer's state"""

    @property
    def total(self) -> int:
        """All three."""
        return sum(self)


def held(module: nn.Module, optimizer: torch.optim.Optimizer) -> Held:
    """Bytes that this rank holds now, added up over real storages, each once."""
    parameters, buckets = list(module.parameters()), getattr(optimizer, "buckets", [])
    grads = [x.grad for x in (*parameters, *buckets) if x.grad is not None]
    states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    states += [b.part for b in buckets]
    every = storage_bytes(parameters), storage_bytes(grads), storage_bytes([*parameters, *states])
    return Held(every[0], every[1], every[2] - every[0])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    found = (x.untyped_storage() for x in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())
