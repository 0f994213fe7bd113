"""Loss spikes: notice one, go back to before it, and leave out the batches that led to it.

Large runs now and then jump to a much higher loss. PaLM's cure was to restart from a checkpoint
some 100 steps before the spike and to skip 200 to 500 batches; the same batches did no harm when
they were met at another state of the weights, so it takes both to make a spike.

Source: Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022, section 5.1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from minillm.train.checkpoint import Checkpoints
from minillm.train.loop import NotFiniteError, Step


class SpikeDetector:
    """Says whether a loss stands out from the last `window` ones.

        loss > median + threshold · max(1.4826 · median |loss - median|, floor)

    The median and its deviation do not move when a few losses are wild, as mean and standard
    deviation would; 1.4826 makes it the standard deviation of normal noise. `floor` (nats) keeps
    a very smooth curve from making every wiggle a spike. Nothing is said before the window is
    half full. A loss that stands out is not remembered.

    Raises ValueError for a window below 4 and a threshold or floor that is not positive.

    >>> detector = SpikeDetector(window=8)
    >>> [detector(loss) for loss in (2.0, 2.1, 1.9, 2.0, 2.1, 5.0, 2.0)]
    [False, False, False, False, False, True, False]
    """

    def __init__(self, window: int = 64, threshold: float = 8.0, floor: float = 0.02) -> None:
        if window < 4 or not threshold > 0 or not floor > 0:
            raise ValueError(
                f"window={window} must be at least 4, threshold={threshold} and floor={floor} "
                "positive"
            )
        self.window, self.threshold, self.floor = window, threshold, floor
        self.losses: list[float] = []

    def limit(self) -> float:
        """The largest loss, in nats, that is not a spike now."""
        if len(self.losses) < self.window // 2:
            return float("inf")
        middle = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.threshold * max(deviation, self.floor)

    def __call__(self, loss: float) -> bool:
        """Whether `loss` is a spike; if not, it is remembered."""
        if not loss <= self.limit():  # NaN is a spike
            return True
        self.losses = [*self.losses, loss][-self.window :]
        return False

    def state_dict(self) -> dict[str, Any]:
        """The losses remembered."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember the losses of `state`."""
        self.losses = list(state["losses"])[-self.window :]


@dataclass(frozen=True)
class Rewind(Step):
    """The step that spiked (its loss is NaN if the loop stopped there), and what was done."""

    back_to: int = 0
    """the step behind which training goes on"""


def rewind_and_skip(
    run: Callable[[], Iterator[Step]],
    checkpoints: Checkpoints,
    detector: SpikeDetector,
    margin: int = 1,
    skip: int = 0,
    limit: int = 8,
) -> Iterator[Step]:
    """The steps of `run`, gone back and around its spikes; a `Rewind` stands where that happens.

    `run()` starts `train(..., checkpoints=checkpoints)`. At a spike at step n (the detector says
    so, or the loss is not finite) everything but the place in the data goes back to the newest
    checkpoint of a step below n - margin, `skip` more batches are left out, and `run()` goes on:
    the steps are done again, with other batches. The margin is there because the step that did
    the damage comes before the one whose loss shows it. Give the detector to the checkpoints too,
    `Checkpoints(..., detector=detector)`, so that a killed run sees the same spikes.

    Raises ValueError when there is no checkpoint to go back to, and when `limit` rewinds in a row
    do not get past the spike: then it is not the data.
    """
    if detector not in checkpoints.extra.values():
        raise ValueError("the detector must be in the checkpoints: Checkpoints(..., detector=...)")
    tries, farthest = 0, 0
    while tries < limit:
        spike = None
        try:
            for step in (steps := run()):
                if detector(step.loss):
                    spike = step
                    steps.close()
                    break
                tries = tries if step.step <= farthest else 0
                yield step
        except NotFiniteError as error:
            spike = Step(error.step, float("nan"), 0, float("nan"), float("nan"))
        if spike is None:
            return
        tries, farthest = tries + 1, max(farthest, spike.step)
        back = checkpoints.rewind(before=spike.step - margin)
        if back is None:
            raise ValueError(
                f"the loss of step {spike.step} is {spike.loss}, and there is no checkpoint below "
                f"step {spike.step - margin} to go back to: save more often"
            )
        for _ in islice(checkpoints.parts["batches"], skip):
            pass
        checkpoints.save(back)  # now with the new place in the data: a kill cannot undo the skip
        yield Rewind(**asdict(spike), back_to=back.step)
    raise ValueError(f"{limit} rewinds did not get past step {farthest}: it is not the data")
