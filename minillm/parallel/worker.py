"""The life of one rank: set up, run the function, send back what it returned or raised."""

from __future__ import annotations

import datetime
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import torch
import torch.distributed as dist


class Job(NamedTuple):
    """What a rank needs to know."""

    rank: int
    world_size: int
    store: str
    """the file through which ranks find each other"""
    call: bytes
    """cloudpickled: the function, its arguments, and the cells' source for tracebacks"""
    timeout: float
    device: str
    detail: bool


def main(job: Job, answer: Connection, output: Connection, asked: Connection) -> None:
    """Run in a process of its own; ends the process.

    Sends one ("done", result) or ("error", kind, traceback) through `answer`, and ("where", text)
    whenever something arrives in `asked`; everything printed goes to `output` as raw bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    os.dup2(output.fileno(), 1)  # also what compiled code prints
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            answer.send(message)

    main_thread = threading.get_ident()
    threading.Thread(target=_watch, args=(asked, send, main_thread), daemon=True).start()
    try:
        send("done", cloudpickle.dumps(_run(job)))
        failed = False
    except BaseException as error:  # SystemExit too: nothing may end a rank in silence
        send("error", type(error).__name__, _traceback(error))
        failed = True
    sys.stdout.flush()
    sys.stderr.flush()
    if not failed:
        dist.destroy_process_group()
    os._exit(failed)  # without it, threads of a broken group would keep the process


def _run(job: Job) -> Any:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(job.rank), "LOCAL_RANK": str(job.rank)}
    os.environ |= {"WORLD_SIZE": str(job.world_size), "GLOO_SOCKET_IFNAME": "lo"}
    if job.detail:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    if job.device == "cuda":
        torch.cuda.set_device(job.rank)
    function, args, kwargs, cells = cloudpickle.loads(job.call)
    for name, lines in cells.items():
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
    dist.init_process_group(
        "nccl" if job.device == "cuda" else "gloo",
        store=dist.FileStore(job.store, job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        timeout=datetime.timedelta(seconds=job.timeout),
    )
    result = function(*args, **kwargs)
    dist.barrier()  # nobody leaves while another still needs an answer
    return result


def _watch(asked: Connection, send: Any, main_thread: int) -> None:
    """End with the parent, whatever happens to it; say where the main thread is when asked."""
    parent = multiprocessing.parent_process()
    while True:
        ready = connection.wait([parent.sentinel, asked])
        if parent.sentinel in ready:
            os._exit(1)
        try:
            asked.recv()
        except EOFError:
            return
        send("where", whereabouts(sys._current_frames()[main_thread]))


def whereabouts(frame: Any) -> str:
    """What a thread does, in a line: which collective it waits in, and the line that called it."""
    stack = traceback.extract_stack(frame)
    own = [s for s in stack if not _is_inner(s.filename)]
    waits = [s.name for s in stack if "torch/distributed" in s.filename and s.name[0] != "_"]
    ours = [s.name for s in stack if s.filename.endswith("parallel/collectives.py")]
    # a single message, whose `wait` is called by whoever got it from `send`
    wires = {"send": "send", "wait": "send", "receive": "receive", "exchange": "exchange"}
    found = [s.name for s in stack if s.filename.endswith("parallel/group.py")]
    ours += [wires[name] for name in found if name in wires]
    names = [name for name in (*ours, *waits) if name not in ("wrapper", "inner")]
    doing = f"waits in {names[0]}" if names else "is busy"
    if not own:
        return "has returned from the function and waits for the others"
    return f"{doing}, line {own[-1].lineno}: {own[-1].line}"


def _is_inner(filename: str) -> bool:
    inner = ("<string>", "torch/", "multiprocessing/", "minillm/parallel/", "threading.py")
    return any(part in filename for part in inner)


def _traceback(error: BaseException) -> str:
    """Without the frames of this file, which say nothing about the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()
