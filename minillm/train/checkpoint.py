"""Checkpoints of a whole training run: what is in one, which are kept, what is refused.

A run that goes on must not notice that it stopped. So a checkpoint holds everything the next step
depends on: weights, optimizer, loss scaler, random number generators, the place in the data, the
step. `step_00000120.json` and `step_00000120.safetensors` are the one behind step 120; a process
killed at any moment leaves it whole or not at all (see `minillm.train.state`).
"""

from __future__ import annotations

import json
import random
import re
import types
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.train.loop import Step
from minillm.train.state import read_state, write_state

# the last part: what a kill in mid-write leaves behind
_FILE = re.compile(r"(\.?)step_(\d{8,})\.(json|safetensors)(\..*)?")


class Checkpoints:
    """The checkpoints of one run in `folder`, for `train(..., checkpoints=...)`.

    every: steps between two; keep: how many of the newest stay. `config` says what the run is:
    nested dictionaries of plain values. Going on with another one is refused, apart from the
    entries named in `may_differ` ("lr", or "model.dropout" for one inside another). `train` adds
    its own settings and, where the model has a `cfg`, that.

    The parts of a checkpoint are what `train` is given, and `extra`: anything with `state_dict`
    and `load_state_dict`, and generators of random numbers (`torch.Generator`,
    `numpy.random.Generator`, `random.Random`, or the module `random` itself). PyTorch's global
    generators are always in it.

    Raises ValueError when `every` or `keep` is below 1.
    """

    def __init__(
        self,
        folder: Path | str,
        every: int = 100,
        keep: int = 3,
        config: Mapping[str, Any] | None = None,
        may_differ: Iterable[str] = (),
        **extra: Any,
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.config, self.may_differ = dict(config or {}), set(may_differ)
        self.extra, self.parts = extra, dict[str, Any]()

    def open(
        self, parts: Mapping[str, Any], settings: Mapping[str, Any] | None = None
    ) -> Step | None:
        """Take the parts of a run and go on behind its newest good checkpoint; see `resume`.

        Raises ValueError when a part cannot tell its state (a plain generator of batches cannot).
        """
        if clash := sorted(self.extra.keys() & parts.keys()):
            raise ValueError(f"the names {clash} are taken by parts of the training loop")
        self.parts = {**parts, **self.extra}
        for name, part in self.parts.items():
            if not (hasattr(part, "load_state_dict") or _is_generator(part)):
                raise ValueError(
                    f"{name} ({type(part).__name__}) has no state_dict and load_state_dict: a "
                    "resumed run could not go on where it stopped"
                )
        cfg = getattr(parts.get("model"), "cfg", None)
        own = {} if cfg is None else {"model": asdict(cfg)}
        flat = _flat({**own, **(settings or {}), **self.config})
        self.settings = json.loads(json.dumps(flat, default=str))  # as it will be read back
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.resume()

    def save(self, step: Step) -> Path:
        """Write the present state as that behind `step`; what is too old, or newer, is removed."""
        states = {name: _state(part) for name, part in self.parts.items()}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda}
        path = self.folder / f"step_{step.step:08d}.json"
        state = {"step": asdict(step), "config": self.settings, "parts": states, "rng": rng}
        write_state(path, state)
        self._drop(keep=[p for p in self.paths() if p <= path][-self.keep :])
        return path

    def resume(self, before: int | None = None) -> Step | None:
        """Load the newest checkpoint that is whole (of a step below `before`) into the parts.

        Torn and foreign files are refused with a warning, and the previous one is used. Returns
        the step behind which it goes on, None if there is no checkpoint.

        Raises ValueError when there are some but none is whole, and when the newest good one
        belongs to a run of another config, naming what differs.
        """
        refused: list[str] = []
        for path in reversed(self.paths()):
            if before is not None and _number(path) >= before:
                continue
            try:
                state = _read(path)
            except (ValueError, OSError) as reason:
                refused.append(str(reason))
                continue
            for reason in refused:
                warnings.warn(f"{reason}; going back to {path.name}", stacklevel=3)
            self._check(path, state)
            self._load(state)
            return Step(**state["step"])
        if refused:
            raise ValueError("no checkpoint is whole: " + "; ".join(refused))
        return None

    def rewind(self, before: int) -> Step | None:
        """Go back to the newest good checkpoint of a step below `before` and remove newer ones.

        Only the source of batches stays where it is, so that what came since is not seen again.
        Returns the step behind which it goes on, None (and changes nothing) if there is none.
        """
        batches = self.parts.pop("batches")
        try:
            step = self.resume(before)
        finally:
            self.parts["batches"] = batches
        if step is not None:
            self._drop(keep=[path for path in self.paths() if _number(path) < before])
        return step

    def paths(self) -> list[Path]:
        """The checkpoints in the folder, oldest first, whole or not."""
        found = [(p, _FILE.fullmatch(p.name)) for p in self.folder.glob("step_*.json")]
        return sorted((p for p, name in found if name), key=_number)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        for path in reversed(self.paths()):
            try:
                _read(path)
            except (ValueError, OSError):
                continue
            return path
        return None

    def _drop(self, keep: Iterable[Path]) -> None:
        """Remove all checkpoints but these, JSON first: no moment shows one without its tensors."""
        kept = {_number(path) for path in keep}
        for path in sorted(self.folder.iterdir(), key=lambda p: p.suffix != ".json"):
            name = _FILE.fullmatch(path.name)
            if name and (name[1] or int(name[2]) not in kept):
                path.unlink(missing_ok=True)

    def _check(self, path: Path, state: Mapping[str, Any]) -> None:
        there, here, absent = state["config"], self.settings, object()
        differ = [
            f"{name}={here.get(name, 'absent')!r} here, {there.get(name, 'absent')!r} there"
            for name in sorted((there.keys() | here.keys()) - self.may_differ)
            if here.get(name, absent) != there.get(name, absent)
        ]
        if state["parts"].keys() - {"batches"} != self.parts.keys() - {"batches"}:
            differ.append(f"parts {sorted(self.parts)} here, {sorted(state['parts'])} there")
        if differ:
            raise ValueError(f"{path} belongs to another run: " + "; ".join(differ))

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            try:
                _restore(part, state["parts"][name])
            except (RuntimeError, ValueError, KeyError) as reason:
                raise ValueError(f"the saved state does not fit {name}: {reason}") from reason
        torch.set_rng_state(state["rng"]["cpu"])
        there, here = len(state["rng"]["cuda"]), torch.cuda.device_count()
        if there == here:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        else:
            said = f"saved with {there} GPUs, going on with {here}: their random numbers start anew"
            warnings.warn(said, stacklevel=3)


def _read(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if not isinstance(state, dict) or state.keys() != {"step", "config", "parts", "rng"}:
        raise ValueError(f"{path} is refused: it is not the state of a training run")
    return state


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _is_generator(part: Any) -> bool:
    known = torch.Generator | np.random.Generator | random.Random
    return isinstance(part, known) or part is random


def _state(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    if isinstance(part, random.Random | types.ModuleType):
        return part.getstate()
    return part.state_dict()


def _restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, random.Random | types.ModuleType):
        part.setstate(state)
    else:
        part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        # PyTorch casts the state to the dtype of the parameters: put back what was saved, or
        # float32 moments of bfloat16 weights would come back rounded
        for index, mine in part.state_dict()["state"].items():
            for name, value in state["state"][index].items():
                if isinstance(value, Tensor):
                    mine[name] = value.to(mine[name].device)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inside = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return flat
