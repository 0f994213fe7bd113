"""A group of ranks, what it sends, and how fast its emulated wires are."""

# K numbers of a tensor, N ranks

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Event(NamedTuple):
    """One operation of one rank. Times in seconds of `time.monotonic`, one clock for a machine."""

    op: str
    """as "all_reduce", or what `Tracer.span` was told, as "forward" """
    rank: int
    group: tuple[int, ...]
    sent: int
    """bytes that this rank handed to a wire, counted at each send; -1 where nobody can count them
    (a library's own collective)"""
    start: float
    end: float
    tag: str = ""


class Tracer:
    """Collects events of one rank. Give it to a `Group`; read `events` when the work is done."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)

    def sent(self, op: str | None = None) -> int:
        """Bytes sent in all (or by `op`), where they were counted."""
        known = [e for e in self.events if op in (None, e.op)]
        if any(e.sent < 0 for e in known):
            raise ValueError("a library's own collective does not say what it sends: use rings")
        return sum(e.sent for e in known)

    def count(self, op: str) -> int:
        """How many operations of that name there were."""
        return sum(e.op == op for e in self.events)

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()


class Link(NamedTuple):
    """An emulated wire between ranks: sending n bytes takes latency + n / bandwidth seconds.

    The sender sleeps for what the real transport (memory of one machine) was too fast; who
    receives may go on before. The wire of a rank and group carries one message after the other.
    """

    latency: float
    """seconds a message (α)"""
    bandwidth: float
    """bytes a second (1/β)"""

    def seconds(self, n: int) -> float:
        """How long a message of n bytes is on its way."""
        return self.latency + n / self.bandwidth


@dataclass(frozen=True)
class Group:
    """Some ranks in a fixed order, this one's place among them, and how they talk.

    `algorithm="ring"` moves everything by send and recv, counted; `"native"` calls the library's
    own collectives (gloo, nccl): faster, and their bytes are not known.
    """

    ranks: tuple[int, ...]
    process_group: Any = None
    tracer: Tracer | None = None
    link: Link | None = None
    algorithm: str = "ring"
    _wire: list[ThreadPoolExecutor] = field(default_factory=list, repr=False, compare=False)
    _counted: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)
    _busy: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.algorithm not in ("ring", "native"):
            raise ValueError(f"algorithm={self.algorithm!r} must be 'ring' or 'native'")
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"ranks {self.ranks} must differ")

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's place in the group; ValueError if it is not in it."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not in the group {self.ranks}")
        return self.ranks.index(rank)

    def with_(self, **changes: Any) -> Group:
        """The same ranks with another tracer, link or algorithm."""
        return replace(self, _wire=[], _counted=[0], _busy=[0.0], **changes)

    def neighbor(self, step: int) -> int:
        """The global rank `step` places on, around the ring."""
        return self.ranks[(self.index + step) % self.size]

    # -- wires ---------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        """Start to send x to the rank at place `to`; call the result to wait until it is gone."""
        x = x.contiguous()
        self._counted[0] += x.nbytes
        work = dist.isend(x, self.ranks[to], group=self.process_group)
        gone = 0.0
        if self.link is not None:
            gone = max(time.monotonic(), self._busy[0]) + self.link.seconds(x.nbytes)
            self._busy[0] = gone

        def wait() -> None:
            work.wait()
            time.sleep(max(0.0, gone - time.monotonic()))

        return wait

    def receive(self, into: Tensor, source: int) -> Tensor:
        """Receive from the rank at place `source` into a contiguous tensor."""
        if not into.is_contiguous():
            raise ValueError("a message is received into a contiguous tensor")
        dist.recv(into, self.ranks[source], group=self.process_group)
        return into

    def exchange(self, x: Tensor, to: int, into: Tensor, source: int) -> Tensor:
        """Send and receive at the same time: one step of a ring."""
        wait = self.send(x, to)
        self.receive(into, source)
        wait()
        return into

    # -- recording and overlap -----------------------------------------------------------------

    def run(self, op: str, work: Callable[[], Any], counted: bool = True, tag: str = "") -> Any:
        """Carry out `work` and record it as `op`, with the bytes that it sent."""
        if self.tracer is None:
            return work()
        before, start = self._counted[0], time.monotonic()
        result = work()
        sent = self._counted[0] - before if counted else -1
        self.tracer.add(
            Event(op, self.ranks[self.index], self.ranks, sent, start, time.monotonic(), tag)
        )
        return result

    def later(self, work: Callable[[], Any]) -> Future:
        """Carry out `work` on this group's wire, one after the other, while this thread goes on.

        Nothing else may be sent in this group until the result was waited for: collectives match
        by their order.
        """
        if not self._wire:
            self._wire.append(ThreadPoolExecutor(1, thread_name_prefix="wire"))
        grad = torch.is_grad_enabled()

        def carried() -> Any:
            with torch.set_grad_enabled(grad):
                return work()

        return self._wire[0].submit(carried)


def world(**settings: Any) -> Group:
    """All ranks; alone where no process group is."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return Group(tuple(range(size)), **settings)


def split(partition: Iterable[Iterable[int]], **settings: Any) -> Group:
    """The group among `partition` that this rank is in; every rank has to call it alike.

    Raises ValueError unless each rank is in one of them exactly.
    """
    groups = [tuple(ranks) for ranks in partition]
    if sorted(r for ranks in groups for r in ranks) != list(range(dist.get_world_size())):
        raise ValueError(f"each of {dist.get_world_size()} ranks must be in one group: {groups}")
    made = [dist.new_group(list(ranks)) for ranks in groups]  # a collective: all make all
    mine = next(i for i, ranks in enumerate(groups) if dist.get_rank() in ranks)
    return Group(groups[mine], made[mine], **settings)


def span(tracer: Tracer | None, op: str, group: Group, start: float, tag: str = "") -> None:
    """Record work of this rank that sends nothing, from `start` until now."""
    if tracer is not None:
        tracer.add(
            Event(op, group.ranks[group.index], group.ranks, 0, start, time.monotonic(), tag)
        )
