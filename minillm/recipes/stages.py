"""Work in stages that goes on where it was killed: what is finished is not done again.

A stage reads what the stages before it wrote and writes a folder of its own. Each runs in a process
of its own, so that nothing but files can pass from one to the next, and the largest memory of the
process is that of the stage. `done.json` comes last and says what the stage was made from and what
it left behind:

    inputs = SHA-256(name, settings, output of the stage before)
    output = SHA-256(inputs, SHA-256 of each file)

A stage whose `inputs` are still these and whose files are whole is finished. Everything else is
done again, and since outputs are part of the next inputs, so is what comes behind it. Changes of
the code are not noticed: to start anew, remove the folder.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from minillm.paths import write_atomically


class StageError(RuntimeError):
    """The process of a stage was killed."""


@dataclass(frozen=True)
class Stage:
    """A piece of work. Of `settings`, a dataclass, everything must be plain values or paths."""

    name: str
    work: Callable[[Path, Any], dict[str, Any]]
    """(folder of the run, settings) -> numbers to report; writes into folder / name"""
    settings: Any


@dataclass(frozen=True)
class Done:
    """A stage that is finished, as in its `done.json`."""

    name: str
    inputs: str
    output: str
    settings: dict[str, Any]
    files: dict[str, str]
    """name -> SHA-256"""
    numbers: dict[str, Any]
    seconds: float
    """wall time of the process that finished it"""
    cpu_seconds: float
    """of all its threads"""
    peak_bytes: int
    """the most memory that process held (resident set), Python and PyTorch themselves included"""
    starts: int
    """1 if nothing interrupted it; the times of processes that were killed are in no number"""


def run(stages: Sequence[Stage], folder: Path, threads: int = 1) -> Iterator[tuple[Done, str]]:
    """Bring each stage up to date, in order; yields it and why it was done now ("" if it was not).

    What a stage raises comes through; what was finished before stays finished. Raises StageError
    where its process was killed, and ValueError for two stages of one name.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages {names} share folders: each needs a name of its own")
    before = ""
    for stage in stages:
        inputs = _digest([stage.name, _plain(stage.settings), before])
        done, why = _finished(folder / stage.name, stage, inputs)
        if done is None:
            done = _perform(stage, folder, inputs, threads)
        yield done, why
        before = done.output


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as they come back from JSON."""
    return json.loads(json.dumps(asdict(settings), default=str))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that a stage has left in its folder; hidden ones do not count
    (a process that is killed while it writes leaves some)."""
    own = ("done.json", "started.json")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != ".")
    files = [path for path in files if path.name not in own]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _finished(place: Path, stage: Stage, inputs: str) -> tuple[Done | None, str]:
    """The finished stage, or why there is none."""
    last, started = _read(place / "done.json"), _read(place / "started.json")
    if last is None:
        same = started is not None and started["inputs"] == inputs
        return None, "goes on" if same else "new"
    done, wanted = Done(**last), _plain(stage.settings)
    if differ := [
        f"{key}={wanted.get(key)!r}, was {done.settings.get(key)!r}"
        for key in sorted(wanted.keys() | done.settings.keys())
        if wanted.get(key) != done.settings.get(key)
    ]:
        return None, "settings changed: " + "; ".join(differ)
    if done.inputs != inputs:
        return None, "what it is made from changed"
    there = _hashes(place)
    if differ := sorted(x for x in there.keys() | done.files if there.get(x) != done.files.get(x)):
        return None, "files changed: " + ", ".join(differ)
    return done, ""


def _perform(stage: Stage, folder: Path, inputs: str, threads: int) -> Done:
    """Do a stage. What an earlier process left of the same work is there to go on from."""
    place = folder / stage.name
    started = _read(place / "started.json")
    same = started is not None and started["inputs"] == inputs
    if not same or (place / "done.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        started = {"inputs": inputs, "starts": 0}
    place.mkdir(parents=True, exist_ok=True)
    started["starts"] += 1
    _write(place / "started.json", started)
    numbers, seconds, cpu_seconds, peak = _apart(stage, folder, threads)
    files = _hashes(place)
    output = _digest([inputs, files])
    done = Done(
        *(stage.name, inputs, output, _plain(stage.settings), files, numbers),
        *(seconds, cpu_seconds, peak, started["starts"]),
    )
    _write(place / "done.json", asdict(done))
    return done


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _apart(stage: Stage, folder: Path, threads: int) -> tuple[dict[str, Any], float, float, int]:
    """Numbers, wall and CPU seconds and peak memory of a stage in a process of its own.

    That is forked from a server which has imported what the work needs, and computed nothing. It
    ends with this one, however that ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, stage.work.__module__])
    with ProcessPoolExecutor(1, context, _begin, (threads,)) as pool:
        try:
            return pool.submit(_measured, stage, folder).result()
        except BrokenProcessPool as error:
            raise StageError(
                f"the process of stage {stage.name} was killed, often for want of memory; run "
                "again to go on"
            ) from error


def _begin(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _measured(stage: Stage, folder: Path) -> tuple[dict[str, Any], float, float, int]:
    wall, cpu = time.perf_counter(), time.process_time()
    numbers = json.loads(json.dumps(stage.work(folder, stage.settings)))  # as it will be read back
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return numbers, round(seconds, 2), round(cpu_seconds, 2), peak
