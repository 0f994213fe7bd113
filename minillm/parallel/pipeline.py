"""Carries out a pipeline schedule on real ranks: each holds some stages and talks to the others."""

# K devices, one rank each; a result is what an action gives to another: see `actions.Result`

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minillm.parallel import actions
from minillm.parallel.actions import Action, Result, Schedule, Timed
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Event, Group, span
from minillm.parallel.halves import input_gradient


class Pipeline:
    """The part of this rank in a schedule; `run` carries it out, as often as there are batches.

    `stages` are the callables x -> y of this device (place `group.index`), in the order of their
    numbers. The first stage of all gets a micro-batch as it is, the others and the loss get what
    the one before returned: a tensor of the shape, dtype and device of `like`. A schedule that
    needs older weights (PipeDream, 2BW) takes modules, and keeps their versions.

    Opposite directions may not share one communicator on GPUs: give a second group of the same
    ranks as `back`, which then carries what goes from a higher place to a lower one.

    Raises ValueError for a schedule that fails `actions.check` or does not fit group and stages,
    and for one that computes halves of a backward (zb-h1) in stages with FSDP.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Callable[[Any], Tensor]],
        group: Group,
        like: Tensor,
        back: Group | None = None,
    ) -> None:
        actions.check(schedule)
        if len(schedule) != group.size:
            raise ValueError(f"a schedule for {len(schedule)} devices, a group of {group.size}")
        self.where, self.own = actions.placement(schedule), schedule[group.index]
        mine = sorted(stage for stage, device in self.where.items() if device == group.index)
        if len(stages) != len(mine):
            raise ValueError(
                f"place {group.index} holds stages {mine}, got {len(stages)} callables"
            )
        self.stages, self.group, self.like = dict(zip(mine, stages, strict=True)), group, like
        self.micro_batches = 1 + max(a.micro_batch for a in self.own)
        self.last_use = actions.last_use(self.own)
        self.late = {
            a.stage
            for i, a in enumerate(self.own)
            if a.what == "update" and self.last_use.get((a.stage, a.version - 1), -1) > i
        }
        if plain := [s for s in self.late if not isinstance(self.stages[s], nn.Module)]:
            raise ValueError(f"older weights are kept of modules only, stages {plain} are none")
        parts = [m for s in stages if isinstance(s, nn.Module) for m in s.modules()]
        if any(a.what == "backward_weight" for a in self.own) and FSDP in map(type, parts):
            raise ValueError("FSDP frees weights when backward has left them: no halves of it")
        # each message's place in the sender's list, and in the list of who receives it
        self.order = {
            source: [
                (i, r)
                for i, a in enumerate(its)
                if self._receiver(r := actions.gives(a)) == group.index
            ]
            for source, its in enumerate(schedule)
        }
        self.used = {
            (device, result): i
            for device, its in enumerate(schedule)
            for i, a in enumerate(its)
            for result in actions.needs(a, len(self.where))
        }
        # an emulated link delays a message, here, before it is sent: the receiver has to wait
        self.link, self.forth = group.link, group.with_(link=None)
        self.back = self.forth if back is None else back.with_(link=None)

    def run(
        self,
        micro_batches: Sequence[Any],
        loss: Callable[[Tensor, int], Tensor],
        update: Callable[[int], None] | None = None,
        busy: Callable[[Action], None] | None = None,
        stash: bool = True,
    ) -> list[Tensor]:
        """Carry out the schedule; the losses by micro-batch where the last stage is, elsewhere [].

        `loss(y, m)` is a scalar of micro-batch m; gradients of the sum of all losses are added to
        the stages' `.grad` (for a mean, divide in `loss`). `update(stage)` is called when the
        schedule says so, to let an optimizer change the stage's weights in place and clear their
        gradients; a synchronous schedule of one batch can do without. `busy(action)` is called at
        the start of each, within its recorded time: sleep there to emulate compute, or set a
        generator by the micro-batch. Without `stash` nothing is kept of older weights, so that
        late gradients are wrong: to see why it is there.

        The group's tracer gets each action, each wait for a message ("receive") and each message
        ("send", until it is handed over); `recorded` turns the actions into a timeline.

        Raises ValueError if the number of micro-batches is another, a stage's output does not
        look like `like`, or weights have to change and `update` is None.
        """
        if len(micro_batches) != self.micro_batches:
            raise ValueError(
                f"the schedule has {self.micro_batches} micro-batches, got {len(micro_batches)}"
            )
        if update is None and any(a.version for a in self.own if a.what != "update"):
            raise ValueError("later micro-batches use changed weights: update= has to change them")
        self.inbox: dict[Result, Tensor] = {}
        self.coming = {source: iter(order) for source, order in self.order.items()}
        self.sent: dict[int, list[tuple[int, Callable[[], Any]]]] = defaultdict(list)
        self.kept: dict[tuple[int, int], Any] = {}
        self.weights: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.losses: dict[int, Tensor] = {}
        self.data, self.loss = micro_batches, loss
        tracer = self.group.tracer
        for i, action in enumerate(self.own):
            what, m, stage, version = action
            tag = f"{m} {stage} {version}"
            other = [r for r in actions.needs(action, len(self.where)) if r[1] != stage]
            message = self._receive(other[0], tag) if other else None
            start = time.monotonic()
            if busy is not None:
                busy(action)
            if what == "update":
                self._update(i, action, update, stash)
            else:
                result = getattr(self, f"_{what}")(action, message)
            span(tracer, what, self.group, start, tag)
            if (given := actions.gives(action)) is not None and result is not None:
                self._send(given, result, tag)
        for pending in self.sent.values():
            for _, wait in pending:
                wait()
        return [self.losses[m] for m in sorted(self.losses)]

    # -- actions -------------------------------------------------------------------------------

    def _forward(self, action: Action, x: Any) -> Tensor | None:
        _, m, stage, version = action
        x = self.data[m] if stage == 0 else x.requires_grad_()
        if stage in self.late:
            y = torch.func.functional_call(self.stages[stage], self._stashed(stage, version), (x,))
        else:
            y = self.stages[stage](x)
        last = stage + 1 == len(self.where)
        if last:
            y = self.loss(y, m)
            self.losses[m] = y.detach()
        elif (y.shape, y.dtype) != (self.like.shape, self.like.dtype):
            raise ValueError(
                f"stage {stage} returned {tuple(y.shape)} of {y.dtype}, but messages are "
                f"{tuple(self.like.shape)} of {self.like.dtype}"
            )
        self.kept[stage, m] = (x if stage else None, y)
        return None if last else y.detach()

    def _backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        x, y = self.kept.pop((action.stage, action.micro_batch))
        torch.autograd.backward(y, gradient)
        self._collect(action)
        return None if x is None else x.grad

    def _backward_input(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        here = (action.stage, action.micro_batch)
        x, y = self.kept.pop(here)
        if x is None:  # the first stage owes nobody a gradient
            self.kept[here] = lambda: torch.autograd.backward(y, gradient)
            return None
        found, self.kept[here] = input_gradient(y, x, gradient)
        return found

    def _backward_weight(self, action: Action, _: None) -> None:
        self.kept.pop((action.stage, action.micro_batch))()
        self._collect(action)

    # -- versions of the weights ---------------------------------------------------------------

    def _stashed(self, stage: int, version: int) -> dict[str, Tensor]:
        """The weights of a version: other tensors than the module's, in the memory they had."""
        if (stage, version) not in self.weights:
            self.weights[stage, version] = {
                name: p.data.requires_grad_(p.requires_grad)
                for name, p in self.stages[stage].named_parameters()
            }
        return self.weights[stage, version]

    def _collect(self, action: Action) -> None:
        """Gradients of an older version count for the module, which has the latest."""
        for name, old in self.weights.get((action.stage, action.version), {}).items():
            p = self.stages[action.stage].get_parameter(name)
            if old.grad is not None:
                p.grad = old.grad if p.grad is None else p.grad + old.grad
                old.grad = None

    def _update(self, i: int, action: Action, update: Any, stash: bool) -> None:
        stage, old = action.stage, action.version - 1
        if stash and self.last_use.get((stage, old), -1) > i:
            self._stashed(stage, old)
            for p in self.stages[stage].parameters():
                p.data = p.data.clone()  # the old version keeps its memory
        if update is not None:
            update(stage)
        for key in [key for key in self.weights if self.last_use[key] <= i and key[0] == stage]:
            del self.weights[key]

    # -- messages ------------------------------------------------------------------------------
    # A rank never waits for a message to leave, so two that send to each other both go on. It
    # receives from each in the order of the other's list, and keeps what it does not need yet.

    def _receiver(self, result: Result | None) -> int | None:
        """The device of the next stage, or for a gradient of the stage before."""
        if result is None:
            return None
        return self.where.get(result[1] + (1 if result[0] == "forward" else -1))

    def _wire(self, source: int, to: int) -> Group:
        return self.forth if source < to else self.back

    def _send(self, result: Result, x: Tensor, tag: str) -> None:
        me, to = self.group.index, self._receiver(result)
        if to == me:
            self.inbox[result] = x
        if to is None or to == me:
            return
        wire = self._wire(me, to)

        def post() -> Callable[[], None]:
            if self.link is not None:
                time.sleep(self.link.seconds(x.nbytes))
            return wire.send(x, to)

        if self.link is None:
            wait = wire.run("send", post, tag=tag)
        else:  # one message after the other, while this thread goes on
            future = self.forth.later(lambda: wire.run("send", post, tag=tag))
            wait = lambda: future.result()()  # noqa: E731
        self.sent[to].append((self.used[to, result], wait))

    def _receive(self, result: Result, tag: str) -> Tensor:
        source, me = self.where[result[1]], self.group.index
        start = time.monotonic()
        while result not in self.inbox:
            i, coming = next(self.coming[source])
            into = torch.empty(self.like.shape, dtype=self.like.dtype, device=self.like.device)
            self.inbox[coming] = self._wire(source, me).receive(into, source)
            # it did so after all that it needed from us before, which has thus left our memory
            for _, wait in [s for s in self.sent[source] if s[0] <= i]:
                wait()
            self.sent[source] = [s for s in self.sent[source] if s[0] > i]
        if source != me:
            span(self.group.tracer, "receive", self.group, start, tag)
        return self.inbox.pop(result)


def recorded(events: Iterable[Event]) -> list[Timed]:
    """What the tracers of all ranks recorded of a schedule, as a timeline that starts at 0."""
    done = [e for e in events if e.op in actions.KINDS]
    first = min((e.start for e in done), default=0.0)
    timed = [
        Timed(
            e.group.index(e.rank),
            Action(e.op, *map(int, e.tag.split())),
            e.start - first,
            e.end - first,
        )
        for e in done
    ]
    return sorted(timed, key=lambda t: (t.start, t.end, t.device))
