"""Learning rates by step, and batch sizes by tokens: pure functions made from a few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def _check(peak: float, warmup: int, step: int = 1) -> None:
    if not 0 < peak < math.inf:
        raise ValueError(f"peak={peak}: the learning rate must be positive and finite")
    if warmup < 0:
        raise ValueError(f"warmup={warmup} must be at least 0 steps")
    if step < 1:
        raise ValueError(f"step={step}: steps count from 1")


def warmup_cosine(peak: float, warmup: int, total: int, floor: float = 0.1) -> Schedule:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine down to floor · peak.

    With s = (step - warmup) / (total - warmup) the rate after warm-up is
    peak · (floor + (1 - floor) · (1 + cos πs) / 2); after `total` steps it stays at floor · peak.

    Raises ValueError unless peak > 0, 0 <= warmup < total and 0 <= floor <= 1.
    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017;
    down to a tenth: Brown et al., Language Models are Few-Shot Learners, 2020.

    >>> lr = warmup_cosine(peak=1.0, warmup=2, total=10)
    >>> [round(lr(step), 3) for step in (1, 2, 6, 10, 99)]
    [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    _check(peak, warmup)
    if total <= warmup:
        raise ValueError(f"total={total} must exceed warmup={warmup} steps")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is a fraction of the peak: it must be in [0, 1]")

    def rate(step: int) -> float:
        _check(peak, warmup, step)
        if step <= warmup:
            return peak * (step / warmup)
        share = min(1.0, (step - warmup) / (total - warmup))
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)

    return rate


def inverse_sqrt(peak: float, warmup: int) -> Schedule:
    """Linear to `peak` in `warmup` steps, then peak · √(warmup / step): no end to plan for.

    Raises ValueError unless peak > 0 and warmup >= 1.
    Source: Vaswani et al., Attention Is All You Need, 2017 (there peak = 1 / √(d_model · warmup)).

    >>> lr = inverse_sqrt(peak=1.0, warmup=100)
    >>> lr(50), lr(100), lr(400)
    (0.5, 1.0, 0.5)
    """
    _check(peak, warmup)
    if warmup < 1:
        raise ValueError(f"warmup={warmup} must be at least 1 step: the decay starts from there")

    def rate(step: int) -> float:
        _check(peak, warmup, step)
        return peak * min(step / warmup, (warmup / step) ** 0.5)

    return rate


def constant(peak: float, warmup: int = 0) -> Schedule:
    """Linear to `peak` in `warmup` steps, then `peak` for good.

    >>> lr = constant(peak=1.0, warmup=4)
    >>> lr(1), lr(4), lr(100)
    (0.25, 1.0, 1.0)
    """
    _check(peak, warmup)

    def rate(step: int) -> float:
        _check(peak, warmup, step)
        return peak * min(1.0, step / max(warmup, 1))

    return rate


def batch_ramp(start: int, full: int, over: int, multiple: int = 1) -> Callable[[int], int]:
    """Batch size, in tokens, after so many tokens seen: linear from `start` to `full`.

    The full size is reached when `over` tokens have been seen. Sizes on the way are rounded down
    to a `multiple`, usually the tokens of one row, but never below `start`. GPT-3 went from 32
    thousand to 0.5 to 3.2 million tokens over the first 4 to 12 billion.

    Raises ValueError unless 1 <= multiple <= start <= full, over >= 1, and `start` and `full` are
    multiples of `multiple`.
    Source: Brown et al., Language Models are Few-Shot Learners, 2020.

    >>> size = batch_ramp(start=32, full=128, over=1000, multiple=32)
    >>> [size(seen) for seen in (0, 333, 334, 667, 1000, 5000)]
    [32, 32, 64, 96, 128, 128]
    """
    if not 1 <= multiple <= start <= full:
        raise ValueError(f"need 1 <= multiple={multiple} <= start={start} <= full={full}")
    if start % multiple or full % multiple:
        raise ValueError(f"start={start} and full={full} must be multiples of {multiple}")
    if over < 1:
        raise ValueError(f"over={over} tokens must be at least 1")

    def size(seen: int) -> int:
        if seen < 0:
            raise ValueError(f"seen={seen} tokens cannot be negative")
        # in whole numbers: a float would round billions
        grown = start + (full - start) * min(seen, over) // over
        return grown // multiple * multiple

    return size
