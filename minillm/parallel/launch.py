"""Start a function on several ranks: real processes, from a notebook cell or under torchrun.

    launch(function, argument, world_size=4)

Processes are forked from a server that has imported PyTorch once, so that a call costs a tenth of a
second. Functions and classes may be defined in the cell above: they travel with cloudpickle.
"""

from __future__ import annotations

import atexit
import datetime
import linecache
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from minillm.parallel import worker

GRACE = 1.0
"""seconds that the others get to report after the first error"""
PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Application timeout caused pair closure",
    "Timed out waiting",
)
"""how gloo says that not this rank is at fault but the one it talks to"""


class RankError(RuntimeError):
    """Ranks failed; the message shows the cause first. `failures` maps each rank to its text."""

    def __init__(self, message: str, failures: dict[int, str]) -> None:
        super().__init__(message)
        self.failures = failures

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: what the ranks say, not where the notebook waited for them."""
        return str(self).splitlines()


def launch(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 4,
    timeout: float = 60.0,
    device: str = "cpu",
    echo: bool = True,
    detail: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on `world_size` ranks; what each of them returned, in order.

    Each rank is a process with one thread, in a process group of gloo (`device="cuda"`: nccl, one
    GPU a rank). Lines that a rank prints appear with its number while it runs (`echo`). Under
    torchrun the ranks are there already: the function runs in this one, and all results are
    gathered. `detail` lets PyTorch compare every collective between ranks before it starts, which
    is slow, and names what does not fit.

    Raises RankError when a rank raises, dies, or is not done within `timeout` seconds: the cause
    first, then what the others were waiting for. No process outlives the call, also when it is
    interrupted. Raises ValueError for a `world_size` that cannot be.
    """
    if world_size < 1 or not 0 < timeout <= 2e6:  # the system counts milliseconds in 32 bits
        raise ValueError(f"world_size={world_size} must be at least 1, timeout={timeout} 0 to 2e6")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} must be 'cpu' or 'cuda'")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _on_this_rank(function, args, kwargs, world_size, timeout, device)
    if device == "cuda" and torch.cuda.device_count() < world_size:
        raise ValueError(
            f"{world_size} ranks need a GPU each, {torch.cuda.device_count()} are here"
        )
    call = cloudpickle.dumps((function, args, kwargs, _cells()))
    with tempfile.TemporaryDirectory(prefix="ranks") as folder:
        store = f"{folder}/store"
        jobs = [
            worker.Job(rank, world_size, store, call, timeout, device, detail)
            for rank in range(world_size)
        ]
        ranks: list[_Rank] = []
        try:
            with _hidden_main():
                context = _server()
                for job in jobs:
                    ranks.append(_Rank(context, job, echo))
            return _collect(ranks, timeout)
        finally:
            for rank in ranks:
                rank.end()


def _on_this_rank(
    function: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    world_size: int,
    timeout: float,
    device: str,
) -> list[Any]:
    if int(os.environ["WORLD_SIZE"]) != world_size:
        raise ValueError(
            f"world_size={world_size}, but torchrun started {os.environ['WORLD_SIZE']} ranks"
        )
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
        atexit.register(_leave)
    results = [None] * world_size
    dist.all_gather_object(results, function(*args, **kwargs))
    return results


def _leave() -> None:
    """Stop the group's threads before the interpreter ends: one still running then aborts it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Rank:
    """A rank's process, seen from outside."""

    def __init__(self, context: Any, job: worker.Job, echo: bool) -> None:
        self.rank, self.echo, self.rest = job.rank, echo, b""
        self.answer, theirs = context.Pipe(duplex=False)
        self.output, printed = context.Pipe(duplex=False)
        questions, self.ask = context.Pipe(duplex=False)
        ends = (theirs, printed, questions)
        self.process = context.Process(target=worker.main, args=(job, *ends), daemon=True)
        self.process.start()
        for end in ends:
            end.close()  # ours; so that the rank's death closes the last one
        self.open = {self.answer, self.output}

    def read_output(self) -> None:
        """Print whole lines; what is left of one waits for its end, or the rank's."""
        data = os.read(self.output.fileno(), 65536)
        if not data:
            self.open.discard(self.output)
        *lines, self.rest = (self.rest + data).split(b"\n")
        lines += [self.rest] if not data and self.rest else []
        for line in lines if self.echo else []:
            print(f"[rank {self.rank}] {line.decode(errors='replace')}", flush=True)

    def end(self) -> None:
        """Not alive any more, and nothing left open."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        for end in (self.answer, self.output, self.ask):
            end.close()


def _collect(ranks: list[_Rank], timeout: float) -> list[Any]:
    """Wait for all answers; RankError with what went wrong, in the order in which it did."""
    results: dict[int, Any] = {}
    errors: dict[int, tuple[str, str]] = {}
    deadline, late = time.monotonic() + timeout, False
    while any(rank.open for rank in ranks):
        left = deadline - time.monotonic()
        if left <= 0:
            late = not errors
            break
        pipes = {pipe: rank for rank in ranks for pipe in rank.open}
        for pipe in connection.wait(list(pipes), timeout=left):
            rank = pipes[pipe]
            if pipe is rank.output:
                rank.read_output()
                continue
            try:
                kind, *content = pipe.recv()
            except (EOFError, ConnectionResetError):
                rank.open.discard(pipe)
                if rank.rank not in results and rank.rank not in errors:
                    errors[rank.rank] = ("died", _obituary(rank))
            else:
                if kind == "done":
                    results[rank.rank] = cloudpickle.loads(content[0])
                elif kind == "error":
                    errors[rank.rank] = tuple(content)
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE)
    if not errors and not late:
        return [results[rank.rank] for rank in ranks]
    missing = [r for r in ranks if r.rank not in results and r.rank not in errors]
    waiting = _ask(missing)
    done = sorted(results)
    raise RankError(*_message(errors, waiting, done, timeout if late else None))


def _obituary(rank: _Rank) -> str:
    rank.process.join(1)
    code = rank.process.exitcode
    if code is not None and code < 0:
        return f"the process was killed by signal {-code}"
    return f"the process ended with exit code {code} before the function returned"


def _ask(ranks: list[_Rank], patience: float = 3.0) -> dict[int, str]:
    """Where ranks are that do not answer."""
    found = {}
    for rank in ranks:
        try:
            rank.ask.send("where")
        except OSError:
            continue
    until = time.monotonic() + patience
    for rank in ranks:
        found[rank.rank] = "does not answer"
        try:
            while rank.answer.poll(max(0.0, until - time.monotonic())):
                kind, *content = rank.answer.recv()
                if kind == "where":
                    found[rank.rank] = content[0]
                    break
        except (EOFError, OSError):
            found[rank.rank] = "is gone"
    return found


def _message(
    errors: dict[int, tuple[str, str]],
    waiting: dict[int, str],
    done: list[int],
    late: float | None,
) -> tuple[str, dict[int, str]]:
    """The text, cause first, and each rank's part of it."""
    failures = {rank: text for rank, (_, text) in errors.items()} | waiting
    innocent = {r for r, (_, text) in errors.items() if any(x in text for x in PEER_IS_GONE)}
    guilty = [r for r in errors if r not in innocent] or list(errors)[:1]
    lines = []
    if late is not None:
        lines.append(f"Not all ranks were done after {late:g} seconds.")
    for rank in guilty[:1]:
        lines += [f"--- rank {rank} failed ---", errors[rank][1]]
    for rank in guilty[1:]:
        lines += [f"--- rank {rank} failed, too ---", errors[rank][1].splitlines()[-1]]
    others = sorted(r for r in errors if r not in guilty)
    if others:
        lines.append(f"--- rank {', '.join(map(str, others))} then lost the connection to it ---")
    lines += [f"rank {rank} {text}" for rank, text in sorted(waiting.items())]
    if done:
        lines.append(f"rank {', '.join(map(str, done))} had finished")
    return "\n".join(lines), failures


def _server() -> Any:
    """A server that forks ranks; started at the first call, it imports PyTorch with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minillm.parallel.preload"])
    # it does not inherit sys.path, and passes by in silence what it cannot import
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep new processes from running the main script, or looking for a notebook's, again."""
    main = sys.modules["__main__"].__dict__
    kept = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        del main["__spec__"]
        main.update(kept)


def _cells() -> dict[str, list[str]]:
    """The source of notebook cells, so that a rank's traceback can show it."""
    return {
        name: entry[2]
        for name, entry in linecache.cache.items()
        if len(entry) == 4 and ("ipykernel_" in name or name.startswith("<ipython"))
    }
