"""Ranks are real processes: results, prints, errors, deaths and hangs come back; nothing stays."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from minillm.parallel import RankError, launch
from minillm.parallel.group import world

ROOT = Path(__file__).resolve().parents[1]


def ranks_alive():
    """Processes forked by our server (the server itself stays, as it should)."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [p for server in servers for p in server.children() if p.status() != "zombie"]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    until = time.monotonic() + 2
    while ranks_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert ranks_alive() == []


def total(offset, *, factor=1):
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return (dist.get_rank(), os.getpid(), torch.get_num_threads(), factor * x.item() + offset)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_results_come_in_the_order_of_ranks_from_different_processes(n):
    found = launch(total, 0.5, world_size=n, factor=2)
    assert [rank for rank, *_ in found] == list(range(n))
    assert len({pid for _, pid, *_ in found} | {os.getpid()}) == n + 1
    assert {threads for *_, threads, _ in found} == {1}
    assert {value for *_, value in found} == {n * (n - 1) + 0.5}


def test_functions_and_classes_of_main_travel():
    """As in a notebook: nothing that the ranks could import."""

    class Box:
        def __init__(self, x):
            self.x = x

    def inside(box):
        return Box(box.x + dist.get_rank())

    assert [box.x for box in launch(inside, Box(7), world_size=2)] == [7, 8]


def talk():
    rank = dist.get_rank()
    print(f"one {rank}\ntwo", end=f" {rank}\n")
    os.write(1, f"raw {rank}\n".encode())  # past Python, as compiled code would
    print(f"err {rank}", file=sys.stderr)
    print("no newline", end="")


def test_lines_come_with_the_rank(capfd):
    launch(talk, world_size=2)
    lines = capfd.readouterr().out.splitlines()
    for rank in (0, 1):
        own = [x for x in lines if x.startswith(f"[rank {rank}] ")]
        words = [x.removeprefix(f"[rank {rank}] ") for x in own]
        assert words[:3] == [f"one {rank}", f"two {rank}", f"raw {rank}"]
        assert sorted(words[3:]) == sorted([f"err {rank}", "no newline"])
    assert len(lines) == 10
    launch(talk, world_size=2, echo=False)
    assert capfd.readouterr().out == ""


def one_raises(guilty):
    if dist.get_rank() == guilty:
        raise KeyError("the cause")
    dist.barrier()


@pytest.mark.parametrize("guilty", [0, 2])
def test_the_cause_comes_first(guilty):
    with pytest.raises(RankError) as caught:
        launch(one_raises, guilty, world_size=3)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"--- rank {guilty} failed ---"
    assert "KeyError: 'the cause'" in lines
    assert 'raise KeyError("the cause")' in str(caught.value)  # the line of the source
    assert "worker.py" not in str(caught.value)
    assert caught.value._render_traceback_() == lines
    assert "KeyError" in caught.value.failures[guilty]


def one_ends(how):
    if dist.get_rank() == 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == "exit":
            os._exit(3)
        else:
            sys.exit("enough")
    dist.all_reduce(torch.ones(1000))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("kill", "killed by signal 9"),
        ("segfault", "killed by signal 11"),
        ("exit", "exit code 3 before the function returned"),
        ("sys.exit", "SystemExit: enough"),
    ],
)
def test_a_rank_that_dies_is_named(how, told):
    start = time.monotonic()
    with pytest.raises(RankError, match=told) as caught:
        launch(one_ends, how, world_size=3, timeout=300)
    assert str(caught.value).startswith("--- rank 1 failed ---")
    assert time.monotonic() - start < 200


def one_is_missing():
    if dist.get_rank() != 2:
        dist.all_reduce(torch.ones(3))


def one_computes():
    if dist.get_rank() == 0:
        while True:
            pass
    dist.barrier()


@pytest.mark.slow
def test_a_hang_says_who_waits_where():
    with pytest.raises(RankError) as caught:
        launch(one_is_missing, world_size=3, timeout=5)
    said = str(caught.value)
    assert said.startswith("Not all ranks were done after 5 seconds.")
    for rank in (0, 1):
        assert re.search(rf"rank {rank} waits in all_reduce, line \d+: dist.all_reduce", said)
    assert "rank 2 has returned from the function and waits for the others" in said
    with pytest.raises(RankError, match=r"rank 0 is busy, line \d+: (while True|pass)"):
        launch(one_computes, world_size=2, timeout=5)


def all_send_first():
    group = world()
    big = torch.ones(2**24)
    group.send(big, (group.index + 1) % group.size)()
    group.receive(big, (group.index - 1) % group.size)


@pytest.mark.slow
def test_a_hang_of_single_messages_names_them():
    with pytest.raises(RankError, match=r"rank 0 waits in send, line \d+: group.send"):
        launch(all_send_first, world_size=2, timeout=8)


def shapes_differ():
    dist.all_reduce(torch.ones(2 + dist.get_rank()))


def test_detail_names_shapes_that_do_not_fit():
    with pytest.raises(RankError, match=r"TensorShape=\[3\].*but Rank 0.*TensorShape=\[2\]"):
        launch(shapes_differ, world_size=2, timeout=10, detail=True)


def sleep():
    time.sleep(600)


@pytest.fixture
def interruptible():
    """Processes that a shell put into the background ignore interrupts; Python then does, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_all_ranks(interruptible):
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(sleep, world_size=3)
    assert time.monotonic() - start < 100


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from minillm.parallel import launch

def report():
    # only the server imports this one: without it, each rank would import PyTorch anew
    print("pid", "minillm.parallel.preload" in sys.modules, os.getpid())
    time.sleep(600)

launch(report, world_size=2)
"""


@pytest.mark.slow
def test_ranks_end_when_their_parent_is_killed(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))))
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {"stdout": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": known}
    parent = subprocess.Popen([sys.executable, path], **own)
    said = [parent.stdout.readline().split() for _ in range(2)]
    assert [line[-2] for line in said] == ["True", "True"]
    pids = [int(line[-1]) for line in said]
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


TORCHRUN = """
import pathlib, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from minillm.parallel import launch

def f(x):
    t = torch.tensor([float(dist.get_rank() + x)])
    dist.all_reduce(t)
    return t.item()

results = launch(f, 1, world_size=2)
try:
    launch(f, 1, world_size=3)
except ValueError as error:
    # a file of its own: on one pipe, what two ranks print can mix
    pathlib.Path({folder!r}, str(dist.get_rank())).write_text(f"{{results}} {{error}}")
"""


@pytest.mark.slow
def test_the_same_call_runs_under_torchrun(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(TORCHRUN.format(root=str(ROOT), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        said = (tmp_path / rank).read_text()
        assert said == "[3.0, 3.0] world_size=3, but torchrun started 2 ranks"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"world_size": 0}, "world_size=0"),
        ({"timeout": 0}, "timeout=0"),
        ({"device": "tpu"}, "'tpu'"),
        ({"device": "cuda", "world_size": 99}, "99 ranks need a GPU each"),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        launch(total, 0, **settings)
