"""Data parallelism: every rank has the whole model and a part of the batch; gradients are summed.

What travels is one all-reduce of all gradients a step, in buckets, while the backward pass still
computes the gradients of earlier layers.
"""

# N ranks

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minillm.parallel.collectives import all_reduce, broadcast
from minillm.parallel.group import Group


class Bucket:
    """Some parameters whose gradients travel as one message."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters, self.missing = parameters, len(parameters)
        self.message: Future | None = None

    def flat(self) -> Tensor:
        """All gradients in one row; zeros for a parameter that took no part."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([grad.reshape(-1) for grad in grads])

    def put_back(self, total: Tensor, factor: float) -> None:
        """Each parameter's gradient becomes its part of `total`, times `factor`: a view of it."""
        parts = total.mul_(factor).split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.grad = part.view_as(p)


def fill_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters in the reverse of the order in which the model uses them, cut where a bucket of
    `bucket_bytes` is full or the dtype changes: gradients come from the last layer first."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        if not buckets or size + p.nbytes > bucket_bytes or buckets[-1][0].dtype != p.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.nbytes
    return buckets


class DDP(nn.Module):
    """`module` with gradients summed over the ranks of `group`, or their mean.

    Use it as the module itself; between backward and the optimizer's step call
    `finish_gradient_synchronization()`. All ranks start from the parameters and buffers of place
    0. `bucket_bytes` is the size of a message; a bucket leaves as soon as its last gradient is
    there (`overlap`), or all at the end. With `reduce="mean"` each rank's loss counts alike: right
    if each is a mean over equally many tokens. Otherwise divide every rank's sum by the count of
    all ranks, and take `reduce="sum"`.

    Raises ValueError for settings that mean nothing and a module without anything to train.
    Source: Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training,
    2020.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        bucket_bytes: int = 25 * 2**20,
        overlap: bool = True,
        reduce: str = "mean",
    ) -> None:
        super().__init__()
        if reduce not in ("mean", "sum") or bucket_bytes < 1:
            raise ValueError(
                f"reduce={reduce!r} must be 'mean' or 'sum', bucket_bytes={bucket_bytes} at least 1"
            )
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the module requires a gradient")
        self.module, self.group, self.overlap = module, group, overlap
        self.factor = 1 / group.size if reduce == "mean" else 1.0
        self.silent = False
        with torch.no_grad():
            for x in (*module.parameters(), *module.buffers()):
                x.copy_(broadcast(x, group))
        self.buckets = [Bucket(b) for b in fill_buckets(trained, bucket_bytes)]
        for bucket in self.buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(self._arrived(bucket))

    def forward(self, *args: object, **kwargs: object) -> object:
        """The module's own."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; the next one outside sends all of it at once."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def finish_gradient_synchronization(self) -> None:
        """Wait until every parameter's gradient is the sum (or mean) over ranks.

        Also where a rank did not use a parameter: its gradient counts as zero. To be called once
        after the backward pass that is not in `no_sync`.
        """
        for bucket in self.buckets:
            if bucket.message is None:
                self._send(bucket)
        for bucket in self.buckets:
            bucket.put_back(bucket.message.result(), self.factor)
            bucket.message, bucket.missing = None, len(bucket.parameters)

    def _arrived(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if self.silent:
                return
            bucket.missing -= 1
            if bucket.missing < 0:
                raise RuntimeError(
                    "a second backward pass before finish_gradient_synchronization(): put all but "
                    "the last into no_sync()"
                )
            if not self.overlap:
                return
            # in the order of buckets on every rank, whatever the order of gradients
            for one in self.buckets:
                if one.message is None:
                    if one.missing:
                        return
                    self._send(one)

        return hook

    def _send(self, bucket: Bucket) -> None:
        flat = bucket.flat()
        with torch.no_grad():
            bucket.message = self.group.later(lambda: all_reduce(flat, self.group))
