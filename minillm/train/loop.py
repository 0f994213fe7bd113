"""The training loop: a generator, so that a caller can plot, stop or save between steps."""

# b batch, t tokens

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.train.optim import clip_grad_norm

if TYPE_CHECKING:
    from minillm.train.checkpoint import Checkpoints
    from minillm.train.precision import LossScaler

Loss = Callable[..., tuple[Tensor, int | Tensor]]
"""(model, inputs, targets, mask or None) -> (sum of the losses, how many tokens it sums over)"""


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
    """wall time since the start; a resumed run goes on from what was saved"""
    grad_norm: float | None = None
    """L2 norm of all gradients together, before clipping; None without `clip`"""
    skipped: bool = False
    """the loss scaler found gradients that are not finite: the weights were left alone"""


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite; `step` says where, nothing was updated."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def next_token_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, int | Tensor]:
    """Sum of -log p(target) over targets [b, t] where `mask` is true, and how many these are.

    Computed in float32 at least. The sum over an empty mask is 0, of 0 tokens. Raises ValueError
    when the shapes do not fit.
    """
    logits = model(inputs)
    if logits.shape[:-1] != targets.shape or (mask is not None and mask.shape != targets.shape):
        got = tuple(targets.shape), None if mask is None else tuple(mask.shape)
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets and mask {tuple(logits.shape[:-1])}, "
            f"got {got[0]} and {got[1]}"
        )
    if mask is not None:
        targets = targets.where(mask.bool(), -100)  # the index that PyTorch leaves out
    # one fused pass: on a CPU 1.7 times as fast as logsumexp and gather
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=-100)
    return total, _count(targets, mask)


def train(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
    *,
    steps: int | None = None,
    accumulate: int = 1,
    scaler: LossScaler | None = None,
    autocast: torch.dtype | None = None,
    loss_fn: Loss = next_token_loss,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Step]:
    """Train `model` on each batch once, yielding a `Step` after each optimizer step.

    A batch is `(inputs, targets)` or `(inputs, targets, mask)`, each [b, t]; `loss_fn` may take
    other inputs. `schedule(step)` gives the learning rate of step 1, 2, ...; `clip` bounds the
    norm of all gradients together (`math.inf` only measures it).

    - `steps`: stop behind this one, counted from the start of the run, not of the resumed part.
    - `accumulate`: batches that make up a step. Its gradient is that of the mean over all their
      tokens, Σ losses / Σ tokens, not the mean of their means. A short rest at the end is a step.
    - `autocast`: the dtype matrix products run in (`torch.autocast`); the weights stay as they are.
    - `scaler`: multiplies the loss before the backward pass and divides the gradients after it.
      A step whose gradients overflowed is skipped; the schedule goes on.
    - `checkpoints`: go on behind the newest good one, if there is any, and save another every
      `checkpoints.every` steps: model, optimizer, scaler, random numbers, place in `batches`. It
      is saved when the caller asks for the next step: one who sees that the loss went astray, and
      does not ask, keeps the last good state.

    Raises NotFiniteError, a ValueError, at the first loss or gradient norm that is not finite,
    before it spoils the weights, naming step, batches and last good checkpoint. A scaler cannot
    cure a loss that is not finite, since it scales only what comes after: that stops as well.
    """
    if accumulate < 1 or (clip is not None and not clip > 0):
        raise ValueError(
            f"accumulate={accumulate} must be at least 1, clip={clip} positive or None"
        )
    last = None
    if checkpoints is not None:
        parts = {"batches": batches, "model": model, "optimizer": optimizer}
        parts |= {} if scaler is None else {"scaler": scaler}
        settings = {"accumulate": accumulate, "clip": clip, "autocast": str(autocast)}
        last = checkpoints.open(parts, settings)
    number, tokens, before = (last.step, last.tokens, last.seconds) if last else (0, 0, 0.0)
    start = time.perf_counter() - before
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device.type
    source = iter(batches)
    model.train()
    while steps is None or number < steps:
        first = getattr(batches, "step", number * accumulate)  # a RandomBatches knows its place
        group = [(*batch, None)[:3] for batch in islice(source, accumulate)]
        if not group:
            return
        number += 1
        if schedule is not None:
            rate = schedule(number)
            if not 0 <= rate < math.inf:
                raise ValueError(f"the schedule gives lr={rate} for step {number}: it must be >= 0")
            for options in optimizer.param_groups:
                options["lr"] = rate
        total = sum(_count(targets, mask) for _, targets, mask in group)
        scale = 1.0 if scaler is None else scaler.scale
        optimizer.zero_grad(set_to_none=True)
        sums, counted = [], 0
        for batch in group:
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss, n = loss_fn(model, *batch)
            (loss * scale / total).backward()
            sums.append(loss.detach())
            counted += n
        losses = torch.stack(sums).tolist()  # the first wait for the device in this step
        count = int(total)
        if int(counted) != count:
            raise ValueError(f"loss_fn summed over {int(counted)} targets where {count} count")
        mean = sum(losses) / count if count else math.nan
        if not math.isfinite(mean):
            bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
            places = [first + i for i in bad or range(len(group))]
            raise _stop(f"loss of step {number} is {mean}", number, places, checkpoints)
        overflow, norm = scaler is not None and scaler.unscale(parameters), None
        if clip is not None and not overflow:
            norm = float(clip_grad_norm(parameters, clip))
            if not math.isfinite(norm):
                places = range(first, first + len(group))
                raise _stop(
                    f"gradient norm of step {number} is {norm}", number, places, checkpoints
                )
        if not overflow:
            optimizer.step()
        if scaler is not None:
            scaler.update(overflow)
        tokens += count
        lr, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - start
        step = Step(number, mean, tokens, lr, seconds, norm, overflow)
        yield step
        if checkpoints is not None and number % checkpoints.every == 0:
            checkpoints.save(step)


def _stop(
    what: str, step: int, places: Sequence[int], checkpoints: Checkpoints | None
) -> NotFiniteError:
    where = f"batch{'es' * (len(places) > 1)} {', '.join(map(str, places))}, counted from 0"
    saved = "" if checkpoints is None else f"; last good checkpoint: {checkpoints.newest()}"
    return NotFiniteError(f"the {what} ({where}); nothing was updated{saved}", step)


def _count(targets: Tensor, mask: Tensor | None) -> int | Tensor:
    """How many targets count; a tensor where reading it would make the host wait."""
    if mask is None:
        return targets.numel()
    return mask.bool().sum()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    *,
    autocast: torch.dtype | None = None,
    loss_fn: Loss = next_token_loss,
) -> float:
    """Mean loss in nats a token; every token of every batch counts the same.

    Dropout is off meanwhile. Raises ValueError when there is no token to take a mean over.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    total, count = 0.0, 0
    try:
        for batch in batches:
            with torch.autocast(device, autocast, enabled=autocast is not None):
                loss, n = loss_fn(model, *(*batch, None)[:3])
            total, count = total + loss.item(), count + int(n)
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("no batch holds a token that counts: the mean loss is undefined")
    return total / count
