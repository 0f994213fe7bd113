"""What the recipes of the zoo share: batches by number, checkpoints, and what is shipped.

A recipe brings a model, batches, a loss and a judge. `train_and_ship` trains; with a folder for
checkpoints a run that was stopped, or killed, goes on as if nothing had happened. Then it saves the
weights, judges what it loads back, and writes the log beside them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm

from minillm.model import LM
from minillm.model.load import load, save
from minillm.paths import write_atomically
from minillm.recipes.storyteller import History
from minillm.tokenizers import COURSE_TOKENIZER
from minillm.train import Checkpoints, Step, train
from minillm.train.loop import Loss

EVERY = 100
"""steps between two checkpoints"""
NOT_SETTINGS = ("folder", "checkpoints")
"""fields of a recipe that say where files lie, not what the result is"""
LONG = ("recipe", "steps", "base", "by_family", "before")
"""entries of a log that are not printed"""


class Numbered:
    """Endless batches; batch i is `make(i)`.

    A batch may depend on its number, or on draws from `generator`: these two are its state.
    """

    def __init__(
        self, make: Callable[[int], tuple[Any, ...]], generator: torch.Generator | None = None
    ) -> None:
        self.make, self.generator, self.step = make, generator, 0

    def __iter__(self) -> Numbered:
        return self

    def __next__(self) -> tuple[Any, ...]:
        self.step += 1
        return self.make(self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The place in the run."""
        drawn = {} if self.generator is None else {"generator": self.generator.get_state()}
        return {"step": self.step, **drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that `state_dict` named."""
        self.step = state["step"]
        if self.generator is not None:
            self.generator.set_state(state["generator"])


class Log(History):
    """What was logged, and the CPU seconds of all threads: what else ran counts little in them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.start = 0.0, time.process_time()

    def cpu_seconds(self) -> float:
        """Since the start of the run, without the time in which it was stopped."""
        return self.before + time.process_time() - self.start

    def state_dict(self) -> dict[str, Any]:
        """All entries, and the seconds so far."""
        return {**super().state_dict(), "cpu_seconds": self.cpu_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the entries and the seconds of before."""
        super().load_state_dict(state)
        self.before, self.start = state["cpu_seconds"], time.process_time()


def train_and_ship(
    name: str,
    recipe: Any,
    model: LM,
    batches: Numbered,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    loss_fn: Loss,
    judge: Callable[[LM], dict[str, Any]],
    *,
    module: str | None = None,
    tokenizer: Path | None = COURSE_TOKENIZER,
    log_every: int = 50,
    log_also: Collection[int] = (1,),
    watch: Callable[[Step], dict[str, Any]] = lambda step: {},
) -> dict[str, Any]:
    """Train `model`, write `name` (weights, config, log) to `recipe.folder`; return the log.

    recipe: a dataclass with `steps`, `folder` and `checkpoints` (a folder, or None for none) among
    its fields. Its other fields are the settings: a checkpoint of other settings is refused.
    module: the recipe's, where it is not called as its model is.
    judge: what the log says of the model, given as it was saved and loaded back.
    log_every, log_also: the steps to log; `watch(step)` adds entries to these.

    Raises what `train` and `Checkpoints` raise.
    """
    settings = {k: v for k, v in asdict(recipe).items() if k not in NOT_SETTINGS}
    log, kept = Log(), None
    if recipe.checkpoints is not None:
        kept = Checkpoints(recipe.checkpoints, every=EVERY, config=settings, log=log)
    loop = train(
        *(model, batches, optimizer, schedule),
        clip=1.0,
        steps=recipe.steps,
        loss_fn=loss_fn,
        checkpoints=kept,
    )
    with tqdm(total=recipe.steps, unit="step", mininterval=1) as bar:
        for step in loop:
            bar.update(step.step - bar.n)  # a run that goes on does not begin at 0
            if step.step % log_every == 0 or step.step in log_also:
                more = watch(step)
                log.steps.append({**asdict(step), **more})
                bar.set_postfix(loss=f"{step.loss:.4f}", **more)
    seconds = round(log.cpu_seconds(), 1)
    save(model.eval(), recipe.folder, name, tokenizer)
    result = {
        "command": " ".join(["python", "-m", f"minillm.recipes.{module or name}", *sys.argv[1:]]),
        "recipe": settings,
        "torch": torch.__version__,
        "seconds": round(log.steps[-1]["seconds"], 1),
        "cpu_seconds": seconds,
        **judge(load(recipe.folder, name, tokenizer)),  # what is judged is what is shipped
        "steps": log.steps,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(recipe.folder / f"{name}.log.json", text.encode())
    print({key: value for key, value in result.items() if key not in LONG})
    return result
