"""A recipe that was stopped, or killed, goes on and ships what it would have shipped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch

from minillm.data.batches import Packed
from minillm.paths import ROOT
from minillm.recipes import icl, icl_regression, instruct, reasoner, training
from minillm.recipes.training import Numbered
from minillm.tokenizers import load_course_tokenizer
from minillm.train import Checkpoints, read_state, write_state

TOKENIZER = load_course_tokenizer()
SMALL = {"d_model": 12, "n_layers": 1, "n_heads": 2, "steps": 7, "warmup": 2}
WORDS = icl.Words(**SMALL, early_steps=3, early_batch=4, batch=8, lines=5, held_out=9, likeness=1.0)
REGRESSION = icl.Regression(**SMALL, examples=4, batch=6, held_out=20)
INSTRUCT = instruct.Recipe(steps=7, warmup=2, batch=3, questions=2)
REASONER = reasoner.Recipe(**SMALL, rows=8)
SOURCES = {
    "words": lambda: icl.word_batches(WORDS, TOKENIZER),
    "regression": lambda: icl_regression.regression_batches(REGRESSION),
    "instruct": lambda: instruct.batches(INSTRUCT, TOKENIZER, 384),
    "reasoner": lambda: reasoner.batches(REASONER, TOKENIZER),
}
RUNS = {
    "icl": (icl.main, WORDS),
    "icl_regression": (icl.main, REGRESSION),
    "instruct": (instruct.main, INSTRUCT),
    "reasoner": (reasoner.main, REASONER),
}


def tensors(batch):
    """All tensors of a batch, those of packed rows as well."""
    for part in batch:
        yield from vars(part).values() if isinstance(part, Packed) else [part]


def same(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_batches_go_on_where_they_stopped(make, tmp_path):
    """Through a file, from the middle of a block of the reasoner's into the next one."""
    whole, stopped, resumed = list(islice(make(), 11)), make(), make()
    for _ in range(5):
        next(stopped)
    write_state(tmp_path / "state.json", stopped.state_dict())
    resumed.load_state_dict(read_state(tmp_path / "state.json"))
    for batch, wanted in zip(resumed, whole[5:], strict=False):
        assert same(batch, wanted)
    assert resumed.step == 11 + 1  # zip asked for one more before it saw that the list had ended
    assert not any(same(whole[0], other) for other in whole[1:])


def test_batches_are_numbered_from_zero():
    assert list(islice(Numbered(lambda i: (i,)), 3)) == [(0,), (1,), (2,)]


class Stopped(BaseException):
    """As Ctrl-C: nothing catches it."""


@pytest.fixture
def stop(monkeypatch):
    """Call with a step: a run that gets there is stopped. What it yielded is in the list."""
    monkeypatch.setattr(training, "EVERY", 2)
    monkeypatch.setattr(instruct, "judge", lambda *_: {"judged": 1})
    monkeypatch.setattr(reasoner, "judge", lambda *_: {"judged": 1})
    steps, real = [], training.train

    def at(last):
        def stopping(*args, **kwargs):
            for step in real(*args, **kwargs):
                steps.append(step.step)
                yield step
                if step.step == last:
                    raise Stopped

        monkeypatch.setattr(training, "train", stopping)
        return steps

    return at


def shipped(folder, name):
    """Weights, config, and the log without what is measured or depends on how it was started."""
    log = json.loads((folder / f"{name}.log.json").read_text())
    timed = {key: log.pop(key) for key in ("command", "seconds", "cpu_seconds", "torch")}
    assert timed["cpu_seconds"] >= 0 and timed["torch"] == torch.__version__
    for entry in log["steps"]:
        assert entry.pop("seconds") > 0
    return (folder / f"{name}.safetensors").read_bytes(), log


def run(name, folder, checkpoints=None, **changes):
    main, recipe = RUNS[name]
    main(dataclasses.replace(recipe, folder=folder, checkpoints=checkpoints, **changes))


@pytest.mark.parametrize(
    "name",
    [
        "icl_regression",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("icl", "reasoner", "instruct")),
    ],
)
def test_a_run_that_was_stopped_ships_the_same(name, stop, tmp_path):
    steps = stop(None)
    run(name, tmp_path / "whole")
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    steps.clear()
    stop(5)
    with pytest.raises(Stopped):
        run(name, tmp_path / "parts", tmp_path / "kept")
    assert not (tmp_path / "parts").exists()
    stop(None)
    run(name, tmp_path / "parts", tmp_path / "kept")
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7]  # the checkpoint behind step 4 is the last one
    weights, log = shipped(tmp_path / "whole", name)
    assert shipped(tmp_path / "parts", name) == (weights, log)
    assert log["steps"][0]["step"] == 1 and log["recipe"]["steps"] == 7
    assert not {"folder", "checkpoints"} & set(log["recipe"])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [None, "batches", "log"])
def test_a_lost_part_of_a_checkpoint_is_seen(lost, stop, tmp_path, monkeypatch):
    stop(None)
    run("icl", tmp_path / "whole", steps=10)
    stop(5)
    with pytest.raises(Stopped):
        run("icl", tmp_path / "parts", tmp_path / "kept", steps=10)
    if lost:
        part = {"batches": Numbered, "log": training.Log}[lost]
        monkeypatch.setattr(part, "load_state_dict", lambda self, state: None)
    stop(None)
    run("icl", tmp_path / "parts", tmp_path / "kept", steps=10)
    weights, log = shipped(tmp_path / "parts", "icl")
    wanted, wanted_log = shipped(tmp_path / "whole", "icl")
    assert [entry["step"] for entry in wanted_log["steps"]] == [1, 10]
    assert (weights == wanted) == (lost != "batches")
    assert (log == wanted_log) == (lost is None)


def test_another_runs_checkpoints_are_refused(stop, tmp_path):
    stop(3)
    with pytest.raises(Stopped):
        run("icl", tmp_path / "shipped", tmp_path / "kept")
    other = dataclasses.replace(WORDS, lr=1e-3, folder=tmp_path, checkpoints=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"lr=0.001 here, 0.003 there"):
        icl.main(other)


def test_seconds_go_on_where_they_stopped():
    first, second = training.Log(), training.Log()
    first.steps.append({"step": 1})
    first.start -= 100.0
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.steps == [{"step": 1}]
    assert 100 <= second.cpu_seconds() < 160


@pytest.mark.slow
def test_a_killed_run_ships_the_same(tmp_path):
    """SIGKILL once there is a checkpoint; the same command again; a run that nobody disturbed."""
    options = {
        **{"d-model": 12, "n-layers": 1, "n-heads": 2, "steps": 520, "early-steps": 60},
        **{"early-batch": 4, "batch": 8, "lines": 5, "held-out": 9},
    }
    command = [sys.executable, "-m", "minillm.recipes.icl", "words"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]

    def start(folder, *more):
        return subprocess.Popen(
            [*command, "--folder", str(tmp_path / folder), *more],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    kept = tmp_path / "kept"
    killed = start("parts", "--checkpoints", str(kept))
    while not list(kept.glob("step_*.json")) and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "parts").exists()
    assert Checkpoints(kept).newest() is not None
    assert start("parts", "--checkpoints", str(kept)).wait() == 0
    assert start("whole").wait() == 0
    assert shipped(tmp_path / "parts", "icl") == shipped(tmp_path / "whole", "icl")
