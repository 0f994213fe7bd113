"""The training loop: a generator, so that a caller can plot, stop or save between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minillm.train.losses import cross_entropy


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    """counts from 1"""
    loss: float
    """nats a token, before the step"""
    tokens: int
    """targets seen since the start"""
    lr: float
    """learning rate of this step"""
    seconds: float
    """wall time since the start"""


def train(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
) -> Iterator[Step]:
    """Train `model` on each batch once, yielding a `Step` after each.

    A batch is `(inputs, targets)` or `(inputs, targets, mask)`, each [b, t]. `schedule(step)`
    gives the learning rate of step 1, 2, ...; `clip` bounds the norm of all gradients together.

    Raises ValueError at the first loss that is not finite, before it spoils the weights.
    """
    start, tokens = time.perf_counter(), 0
    model.train()
    for number, batch in enumerate(batches, start=1):
        inputs, targets, *mask = batch
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(number)
        loss = cross_entropy(model(inputs), targets, *mask)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {number} is {loss.item()}; nothing was updated")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        tokens += int(mask[0].sum()) if mask else targets.numel()
        lr = optimizer.param_groups[0]["lr"]
        yield Step(number, loss.item(), tokens, lr, time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> float:
    """Mean loss in nats a token; every token of every batch counts the same.

    Raises ValueError when there is no token to take a mean over.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for inputs, targets, *mask in batches:
        n = int(mask[0].sum()) if mask else targets.numel()
        if n:
            total += cross_entropy(model(inputs), targets, *mask).item() * n
            count += n
    model.train(was_training)
    if count == 0:
        raise ValueError("no batch holds a token that counts: the mean loss is undefined")
    return total / count
