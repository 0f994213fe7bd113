"""ZeRO stages 1 and 2: every rank keeps the optimizer's state of its own part of the parameters.

Parameters lie in flat buckets, padded to N equal parts. A rank receives the summed gradient of its
part only, updates it, and sends the new values to all. In stage 1 the gradients stay whole until
the end of the backward pass, in stage 2 they leave bucket by bucket while it runs.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
2020.
"""

# N ranks, K numbers of all parameters

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minillm.parallel.collectives import all_gather, reduce_scatter
from minillm.parallel.data import fill_buckets
from minillm.parallel.group import Group
from minillm.parallel.partition import Bucket, clip_grad_norm, options


class ShardedOptimizer(torch.optim.Optimizer):
    """`optimizer_cls(params, **kwargs)`, with 1/N of its state on each of the N ranks of `group`.

        stage=1                 backward as ever, then a reduce-scatter: 2(N-1)/N · K numbers a step
        stage=1, reduce=None    gradients were summed by `DDP`; then 3(N-1)/N · K
        stage=2                 reduce-scatter in backward; a gradient is freed once it is sent

    K counts all parameters; one third or half of it is the all-gather of new parameters.
    `reduce` is "mean" or "sum" over ranks, see `DDP`. `params` are parameters or groups of them.
    All ranks start from those of place 0. They become views of flat buckets of `bucket_bytes`,
    which leave in the reverse of their order. With `dtype` they are converted after masters were
    taken. Between backward and step call `finish_gradient_synchronization()`, or let `step` do
    it; in stage 2 after every backward pass: its gradient is added to what the rank's part has
    got, in the parameters' dtype. A parameter that no rank used has a gradient of zero; a tied one
    is one. Frozen ones and buffers are the caller's: alike on all ranks, in `dtype`, and not to be
    unfrozen later.

    The optimizer must treat all numbers alike, as AdamW does: it sees flat parts, of each bucket
    in turn (while the last one's new values travel).

    Raises ValueError for settings that mean nothing and when nothing is to be trained.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        optimizer_cls: type[torch.optim.Optimizer],
        group: Group,
        stage: int = 1,
        reduce: str | None = "mean",
        bucket_bytes: int = 25 * 2**20,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if stage not in (1, 2) or reduce not in ("mean", "sum", None) or bucket_bytes < 1:
            raise ValueError(
                f"stage={stage} must be 1 or 2, reduce={reduce!r} 'mean', 'sum' or None, "
                f"bucket_bytes={bucket_bytes} at least 1"
            )
        if stage == 2 and reduce is None:
            raise ValueError("stage=2 sums gradients itself: reduce must be 'mean' or 'sum'")
        self.group, self.stage, self.reduce = group, stage, reduce
        self.bucket_bytes, self.dtype = bucket_bytes, dtype
        self.buckets: list[Bucket] = []
        self.inner: torch.optim.Optimizer | None = None
        self._make = lambda groups: optimizer_cls(groups, **kwargs)
        self._flying: list[Bucket] = []
        self._finished = False
        super().__init__(params, {})
        if not self.buckets:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        self.state, self.defaults = self.inner.state, self.inner.defaults

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; all ranks have to."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        trained = [p for p in dict.fromkeys(group["params"]) if p.requires_grad]
        new = [Bucket(b, self.group, self.dtype) for b in fill_buckets(trained, self.bucket_bytes)]
        parts = {**options(group), "params": [b.part for b in new]}
        if self.inner is None:
            self.inner = self._make([parts])
        else:
            self.inner.add_param_group(parts)
        for name, value in self.inner.param_groups[-1].items():
            group.setdefault(name, value)
        self.buckets += new
        if self.stage == 2:
            for bucket in new:
                for p in bucket.parameters:
                    p.register_post_accumulate_grad_hook(self._arrived(bucket))

    def _arrived(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            bucket.missing -= 1
            if bucket.missing < 0:
                raise RuntimeError(
                    "a second backward pass before finish_gradient_synchronization(): stage 2 "
                    "keeps no gradients, so call it after each pass"
                )
            # in the order of buckets on every rank, whatever the order of gradients
            for one in self.buckets:
                if not one.sent:
                    if one.missing:
                        return
                    self._send(one)

        return hook

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        self._collect(1)  # so that at most two buckets are in memory, however slow the wire
        row, bucket.sent = bucket.gradients(), True
        for p in bucket.parameters:
            p.grad = None
        bucket.message = self.group.later(lambda: reduce_scatter(row, self.group))
        self._flying.append(bucket)

    def _collect(self, keep: int) -> None:
        factor = 1 / self.group.size if self.reduce == "mean" else 1.0
        while len(self._flying) > keep:
            bucket = self._flying.pop(0)
            bucket.add(bucket.message.result().mul_(factor))
            bucket.message = None

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Wait until this rank has the gradient of its part over all ranks, and free the rest.

        Called by all ranks after a backward pass, also by one that used no parameter.
        """
        for bucket in self.buckets:
            if self.reduce is None:
                bucket.grad = bucket.gradients()[bucket.mine].clone()
            elif not bucket.sent:
                self._send(bucket)
        self._collect(0)
        for bucket in self.buckets:
            bucket.start_over()
        self._finished = True

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `partition.clip_grad_norm`, for the gradients of all ranks together."""
        if not self._finished:
            self.finish_gradient_synchronization()
        return clip_grad_norm(self.buckets, max_norm, self.group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's part and exchange parts: afterwards all ranks have all of it."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if not self._finished:
            self.finish_gradient_synchronization()
        for group, parts in zip(self.param_groups, self.inner.param_groups, strict=True):
            parts.update(options(group))  # a schedule writes to ours
        for bucket in self.buckets:
            bucket.part.grad = bucket.grad.to(bucket.part.dtype)
            self.inner.step()  # passes by all parts that have no gradient
            bucket.part.grad = None
            self._publish(bucket)
        self._receive()
        self._finished = False
        return loss

    def _publish(self, bucket: Bucket) -> None:
        part = bucket.part.detach().to(bucket.row.dtype)
        bucket.message = self.group.later(lambda: all_gather(part, self.group))

    def _receive(self) -> None:
        for bucket in self.buckets:
            bucket.row.copy_(bucket.message.result())
            bucket.message = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, whole and in parts."""
        if any(bucket.sent for bucket in self.buckets):
            self.finish_gradient_synchronization()  # messages are on their way
        super().zero_grad(set_to_none)
        for bucket in self.buckets:
            bucket.grad = None
        self._finished = False

    # -- saving and loading --------------------------------------------------------------------

    def _states(self) -> list[dict[str, Any]]:
        masters = [{"master": b.part.detach()} if b.has_master else {} for b in self.buckets]
        return [self.state.get(b.part, {}) | m for b, m in zip(self.buckets, masters, strict=True)]

    def _packed(self) -> tuple[dict[int, int], list[dict[str, Any]]]:
        """The number of each parameter, by id, and the groups with numbers for parameters."""
        every = [p for group in self.param_groups for p in group["params"]]
        number = {id(p): i for i, p in enumerate(every)}
        numbers = ([number[id(p)] for p in group["params"]] for group in self.param_groups)
        groups = zip(self.param_groups, numbers, strict=True)
        return number, [{**options(g), "params": params} for g, params in groups]

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state; it fits the same place among as many ranks."""
        place = (self.group.index, self.group.size)
        return {"place": place, "parts": self._states(), "param_groups": self._packed()[1]}

    @torch.no_grad()
    def consolidated_state_dict(self) -> dict[str, Any]:
        """The whole state, as `optimizer_cls` has it in one process, on every rank; all call it.

        Masters are in it as a parameter's "master".
        """
        number, groups = self._packed()
        state: dict[int, dict[str, Any]] = {}
        for bucket, part in zip(self.buckets, self._states(), strict=True):
            states = [state.setdefault(number[id(p)], {}) for p in bucket.parameters]
            for name, value in part.items():
                pieces = [value] * len(states)
                if isinstance(value, Tensor) and value.shape == bucket.part.shape:
                    pieces = bucket.cut(all_gather(value, self.group))
                for one, x in zip(states, pieces, strict=True):
                    one[name] = x.clone() if isinstance(x, Tensor) else x
        return {"state": {i: s for i, s in sorted(state.items()) if s}, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a rank's own `state_dict`, or a consolidated one of any number of ranks.

        Called by all ranks. Masters set the parameters; without them they follow the parameters.
        Raises ValueError if the state is of another place or other groups, or if parameters of
        one bucket are at different steps.
        """
        number, groups = self._packed()
        saved = state_dict["param_groups"]
        if [g["params"] for g in saved] != [g["params"] for g in groups]:
            sizes = [[len(g["params"]) for g in x] for x in (saved, groups)]
            raise ValueError(f"the state has groups of {sizes[0]} parameters, not {sizes[1]}")
        place = (self.group.index, self.group.size)
        if tuple(state_dict.get("place", place)) != place:
            raise ValueError(
                "a state of place {} of {} does not fit place {} of {}: save the "
                "consolidated_state_dict()".format(*state_dict["place"], *place)
            )
        for i, bucket in enumerate(self.buckets):
            if "place" in state_dict:
                part = {k: _copy(x) for k, x in state_dict["parts"][i].items()}
            else:
                every = [state_dict["state"].get(number[id(p)], {}) for p in bucket.parameters]
                part = _part(every, bucket)
            bucket.part.copy_(part.pop("master", bucket.row[bucket.mine]))
            self.state[bucket.part] = part
            self._publish(bucket)
        self._receive()
        for group, old in zip(self.param_groups, saved, strict=True):
            group.update(options(old))


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _part(states: list[dict[str, Any]], bucket: Bucket) -> dict[str, Any]:
    """This rank's part of the states of all parameters of a bucket."""
    if any(s.keys() != states[0].keys() or s.get("step") != states[0].get("step") for s in states):
        found = [{k: v for k, v in s.items() if k == "step"} or list(s) for s in states]
        raise ValueError(f"parameters of one bucket must have the same state and step, got {found}")
    part, shape = {}, bucket.parameters[0].shape
    for name, value in states[0].items():
        part[name] = _copy(value)
        if isinstance(value, Tensor) and name != "step" and value.shape == shape:
            row = bucket.flatten([s[name] for s in states])[bucket.mine]
            part[name] = row.to(bucket.part, copy=True)
    return part
