"""Checkpoints: a run killed at any moment goes on as if nothing had happened, or says why not."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.data.batches import RandomBatches, random_batches
from minillm.model import LM
from minillm.train import checkpoint as module
from minillm.train import optim, train
from minillm.train.checkpoint import Checkpoints
from minillm.train.loop import NotFiniteError, Step, next_token_loss
from minillm.train.spikes import Rewind, SpikeDetector, rewind_and_skip
from minillm.train.state import read_state, write_state

ROOT = Path(__file__).resolve().parents[1]
TOKENS = np.random.default_rng(0).integers(0, 50, 4000).cumsum() % 50
# cut short, changed, emptied, replaced by something else
DAMAGE = {
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "longer": lambda data: data + b" ",
    "foreign": lambda data: b'{"epoch": 3}',
}

# --- a real process, killed for real

# One process imports and then forks a child for each run, since importing takes seconds: the
# children are real processes, killed with SIGKILL.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np, torch
import torch._dynamo  # an optimizer imports it at its first use, for seconds
import minillm.train.state as state
from minillm.config import ModelConfig
from minillm.data.batches import random_batches
from minillm.model import LM
from minillm.train import train
from minillm.train.checkpoint import Checkpoints
from minillm.train.loop import next_token_loss

STEPS = int(sys.argv[1])
torch.set_flush_denormal(True)

def run(folder, kill_at, kill_in_write):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    cfg = ModelConfig(50, d_model=16, n_layers=1, n_heads=2, max_len=16, dropout=0.2)
    model = LM(cfg, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    tokens = np.random.default_rng(0).integers(0, 50, 4000).cumsum() % 50
    batches = random_batches(tokens, batch=2, seq_len=16, seed=1)
    noise = torch.Generator().manual_seed(2)

    def noisy(model, inputs, targets, mask):  # uses up a generator of its own
        keep = torch.rand(targets.shape, generator=noise) > 0.3
        total, _ = next_token_loss(model, inputs, targets, keep)
        return total * targets.numel() / keep.sum(), targets.numel()

    writes, real = [], state.write_atomically
    def killed_writer(path, data):
        writes.append(path)
        if len(writes) == kill_in_write:  # half of it is on the disk, then nothing more
            (path.parent / f".{path.name}.half").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, data)
    state.write_atomically = killed_writer

    checkpoints = Checkpoints(folder, every=3, keep=2, config={"steps": STEPS}, noise=noise)
    schedule = lambda step: 1e-2 * min(1.0, step / 10)
    loop = train(model, batches, optimizer, schedule, 1.0, steps=STEPS, accumulate=2,
                 loss_fn=noisy, checkpoints=checkpoints)
    with open(folder / "curve.jsonl", "a") as log:
        for step in loop:
            line = [step.step, step.loss.hex(), step.grad_norm.hex(), step.tokens, step.lr]
            print(json.dumps(line), file=log, flush=True)
            if step.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    digest = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    last = [digest.sum().item().hex(), digest.square().sum().item().hex(), torch.rand(1).item()]
    (folder / "end.json").write_text(json.dumps(last))

codes = []
for job in json.loads(sys.argv[2]):
    if not (child := os.fork()):
        run(*job)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""
STEPS = 14


def run(*jobs):
    """Jobs (folder, kill at step, kill in write) one after the other; their exit codes."""
    command = [sys.executable, "-c", SCRIPT, str(STEPS)]
    command += [json.dumps([[str(folder), step, write] for folder, step, write in jobs])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def curve(folder):
    """Step -> what the log says of it; every time a step was done it must have said the same."""
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    seen = {}
    for step, *rest in lines:
        assert seen.setdefault(step, rest) == rest, f"step {step} was done again, differently"
    return seen, json.loads((folder / "end.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_gives_the_bit_identical_curve(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills = sorted(random.Random().sample(range(1, STEPS + 1), 3))  # others each time
    writes = [1, 6]  # while a checkpoint is written: its first file, its second
    jobs = [(whole, 0, 0), *((killed, step, 0) for step in kills), (killed, 0, 0)]
    for write in writes:
        jobs += [(tmp_path / f"write{write}", 0, write), (tmp_path / f"write{write}", 0, 0)]
    codes, errors = run(*jobs)
    dead = -signal.SIGKILL
    assert codes == [0, *[dead] * len(kills), 0, *[dead, 0] * len(writes)], (kills, errors)
    expected = curve(whole)
    assert sorted(expected[0]) == list(range(1, STEPS + 1))
    assert len({rest[0] for rest in expected[0].values()}) == STEPS  # it is not constant
    assert curve(killed) == expected, kills
    for write in writes:
        folder = tmp_path / f"write{write}"
        assert curve(folder) == expected, write
        assert not list(folder.glob(".step_*")), "rests of the killed write"
        assert len(list(folder.glob("step_*"))) == 4  # two checkpoints of two files


# --- the same without a process, for everything that is cheaper so


class Run:
    """A tiny run with dropout, accumulation and a generator of its own."""

    def __init__(self, folder, optimizer=torch.optim.AdamW, every=3, dtype=None, seq_len=8, **more):
        cfg = ModelConfig(50, d_model=8, n_layers=1, n_heads=2, max_len=16, dropout=0.1)
        self.model = LM(cfg, seed=0).to(dtype or torch.float32)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.batches = random_batches(TOKENS, batch=2, seq_len=seq_len, seed=1)
        self.checkpoints = None if folder is None else Checkpoints(folder, every=every, **more)

    def __call__(self, steps, checkpoints=None, **options):
        checkpoints = checkpoints or self.checkpoints
        options = {"clip": 1.0, "accumulate": 2, "checkpoints": checkpoints, **options}
        return list(train(self.model, self.batches, self.optimizer, steps=steps, **options))


def losses(steps):
    return [(s.step, s.loss, s.grad_norm, s.tokens, s.lr) for s in steps]


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def same_bits(a, b):
    raw = [t.detach().reshape(-1).view(torch.uint8) if t.dim() else t for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


KINDS = [torch.optim.AdamW, torch.optim.Adam, optim.AdamW, optim.Adafactor]


@pytest.mark.parametrize(
    ("index", "dtype"),
    [*((i, torch.float32) for i in range(4)), *((i, torch.bfloat16) for i in range(3))],
)
def test_optimizer_state_survives_bit_for_bit(index, dtype, tmp_path):
    kind = KINDS[index]
    torch.manual_seed(3)
    first = Run(tmp_path, kind, dtype=dtype)
    first(6)
    for state in first.optimizer.state.values():  # float32 moments of bfloat16 weights
        state.update({k: v.float() + 1e-3 for k, v in state.items() if torch.is_tensor(v)})
    first.checkpoints.save(Step(6, 0.0, 0, 0.0, 0.0))
    second = Run(tmp_path, kind, dtype=dtype)
    second(6)
    mine, theirs = (list(tensors(r.optimizer.state_dict()["state"])) for r in (first, second))
    assert len(mine) == len(theirs) > 10
    assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert same_bits(a, b)
    kinds = [
        [type(v) for v in r.optimizer.state_dict()["param_groups"][0].values()]
        for r in (first, second)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("index", range(4))
def test_resumed_curve_is_identical(index, tmp_path):
    kind = KINDS[index]
    torch.manual_seed(0)
    expected = losses(Run(None, kind)(11))
    torch.manual_seed(0)
    first = losses(Run(tmp_path, kind)(7))
    torch.manual_seed(99)
    second = losses(Run(tmp_path, kind)(11))
    assert first == expected[:7] and second[0][0] == 7 and second == expected[6:]


# each fault: what a resume might forget
FAULTS = {
    "random numbers": lambda monkeypatch: monkeypatch.setattr(torch, "set_rng_state", lambda s: 0),
    "place in the data": lambda monkeypatch: monkeypatch.setattr(
        RandomBatches, "load_state_dict", lambda self, state: None
    ),
    "optimizer": lambda monkeypatch: monkeypatch.setattr(
        torch.optim.Optimizer, "load_state_dict", lambda self, state: None
    ),
    "weights": lambda monkeypatch: monkeypatch.setattr(
        nn.Module, "load_state_dict", lambda self, state: None
    ),
    "step count": lambda monkeypatch: monkeypatch.setattr(
        module, "Step", lambda **k: Step(**{**k, "step": 0})
    ),
    "nothing": lambda monkeypatch: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_forgetting_anything_changes_the_curve(fault, tmp_path, monkeypatch):
    schedule = {"schedule": lambda step: 1e-2 / step}
    torch.manual_seed(0)
    expected = losses(Run(None)(8, **schedule))
    torch.manual_seed(0)
    Run(tmp_path)(4, **schedule)
    FAULTS[fault](monkeypatch)
    resumed = losses(Run(tmp_path)(8, **schedule))
    assert (resumed == expected[3:]) == (fault == "nothing")


def test_generators_of_every_kind_go_on(tmp_path):
    def make():
        return {
            "a": torch.Generator().manual_seed(1),
            "b": np.random.default_rng(2),
            "c": random.Random(3),
            "d": random,
        }

    def draw(g):
        numbers = [torch.rand(1, generator=g["a"]).item(), g["b"].normal()]
        return [*numbers, g["c"].random(), g["d"].random()]

    generators = make()
    draw(generators)
    first = Run(tmp_path, **generators)
    first(3)
    expected = draw(generators)
    again = make()
    second = Run(tmp_path, **again)
    second(3)
    assert draw(again) == expected


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_damaged_files_are_refused_and_the_previous_used(what, suffix, tmp_path):
    torch.manual_seed(0)
    expected = losses(Run(None)(11))
    torch.manual_seed(0)
    Run(tmp_path)(9)
    assert [p.stem for p in Checkpoints(tmp_path).paths()] == [f"step_0000000{n}" for n in "369"]
    victim = tmp_path / f"step_00000009{suffix}"
    victim.write_bytes(DAMAGE[what](victim.read_bytes()))
    with pytest.warns(
        UserWarning, match=rf"{victim.name}.* is refused.*going back to step_00000006"
    ):
        resumed = losses(Run(tmp_path)(11))
    assert resumed == expected[6:]
    with warnings.catch_warnings():  # it was replaced, and all is well
        warnings.simplefilter("error")
        assert losses(Run(tmp_path)(11)) == expected[9:]


def test_missing_tensors_and_nothing_whole(tmp_path):
    Run(tmp_path)(6)
    (tmp_path / "step_00000006.safetensors").unlink()
    assert Checkpoints(tmp_path).newest() == tmp_path / "step_00000003.json"
    with pytest.warns(UserWarning, match="missing"):
        Run(tmp_path)(6)
    for path in tmp_path.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint is whole: .*does not begin as"):
        Run(tmp_path)(6)
    assert Checkpoints(tmp_path).newest() is None


def test_a_state_that_is_no_run_is_refused(tmp_path):
    write_state(tmp_path / "step_00000005.json", {"weights": torch.ones(2)})
    with pytest.raises(ValueError, match="not the state of a training run"):
        Run(tmp_path)(6)


def test_keeps_the_last_n_and_touches_no_other_file(tmp_path):
    other = tmp_path / "step_notes.txt"
    other.write_text("mine")
    Run(tmp_path, every=1, keep=2)(7)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_notes.txt"} | {
        f"step_0000000{n}.{kind}" for n in (6, 7) for kind in ("json", "safetensors")
    }
    with pytest.raises(ValueError, match=r"every=0 and keep=3 must be at least 1"):
        Checkpoints(tmp_path, every=0)


def test_another_config_is_named(tmp_path):
    config = {"lr": 1e-3, "data": {"name": "stories", "shards": (1, 2)}}
    Run(tmp_path, config=config)(3)
    Run(tmp_path, config=config)(3)  # the same
    changed = {"lr": 2e-3, "data": {"name": "pydocs", "shards": [1, 2]}, "new": 1}
    with pytest.raises(ValueError) as error:
        Run(tmp_path, config=changed)(3)
    said = str(error.value)
    assert "lr=0.002 here, 0.001 there" in said and "new=1 here, 'absent' there" in said
    assert "data.name='pydocs' here, 'stories' there" in said and "shards" not in said
    Run(tmp_path, config=changed, may_differ=["lr", "new", "data.name"])(3)
    with pytest.raises(ValueError, match=r"clip=0.5 here, 1.0 there"):
        Run(tmp_path, config=config)(3, clip=0.5)
    with pytest.raises(ValueError, match="saved state does not fit batches: seq_len=7 here"):
        Run(tmp_path, config=config, seq_len=7)(3)


def test_another_model_or_other_parts_are_named(tmp_path):
    Run(tmp_path)(3)
    wider = Run(tmp_path)
    wider.model = LM(ModelConfig(50, d_model=16, n_layers=1, n_heads=2, max_len=16), seed=0)
    with pytest.raises(ValueError, match=r"model.d_model=16 here, 8 there.*model.dropout=0.0 here"):
        wider(3)
    with pytest.raises(ValueError, match=r"parts \['batches', 'detector'"):
        Run(tmp_path, detector=SpikeDetector())(3)
    with pytest.raises(ValueError, match=r"\['model'\] are taken"):
        Run(tmp_path, model=SpikeDetector())(3)
    plain = Run(tmp_path)
    plain.batches = iter([])
    with pytest.raises(ValueError, match=r"batches \(list_iterator\) has no state_dict"):
        plain(3)


# --- the files


def test_state_survives_bit_for_bit(tmp_path):
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    bits = torch.arange(-128, 128, dtype=torch.int8)  # every pattern, NaNs and subnormals too
    shared = torch.randn(3, 4)
    state = {
        "floats": [bits.view(kind) for kind in kinds],
        "whole": {0: bits, 1: bits.view(torch.int64), -1: bits > 0, "b": bits.view(torch.uint8)},
        "odd": (torch.tensor(5), torch.zeros(0, 3), torch.randn(4, 3).T, torch.randn(6)[::2]),
        "tied": [shared, shared, shared[1:], shared.T],
        "plain": (None, True, 3, 2**127, 0.1, float("inf"), "ü", [], {}, ((1,),)),
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
    }
    write_state(tmp_path / "x.json", state)
    back = read_state(tmp_path / "x.json")

    def check(a, b, where="state"):
        assert type(a) is type(b), where
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, where
            assert (
                a.contiguous().numpy(force=True).tobytes() == b.numpy().tobytes()
                if (a.dtype in (torch.float32, torch.float64, torch.int8, torch.int64))
                else same_bits(a.contiguous(), b)
            ), where
        elif isinstance(a, dict):
            assert list(a) == list(b), where
            for key in a:
                check(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                check(x, y, f"{where}.{i}")
        else:
            assert a == b, where

    check(state, back)
    size = sum(t.nbytes for t in tensors(state))
    assert (tmp_path / "x.safetensors").stat().st_size < size + 4096
    for wrong, where in (({"f": print}, r"state\.f is a builtin"), ({(1, 2): 3}, "keys")):
        with pytest.raises(ValueError, match=where):
            write_state(tmp_path / "y.json", wrong)
    assert not list(tmp_path.glob("y*")), "refused before anything was written"


def test_tied_weights_are_written_once(tmp_path):
    lm = LM(ModelConfig(1000, d_model=32, n_layers=1, n_heads=2, max_len=16), seed=0)
    write_state(tmp_path / "lm.json", lm.state_dict())
    once = sum(p.nbytes for p in lm.parameters())
    assert once < (tmp_path / "lm.safetensors").stat().st_size < once + 4096


# --- spikes


def test_detector_by_brute_force_and_its_memory():
    rng = random.Random(0)
    detector, history = SpikeDetector(window=16, threshold=5.0, floor=0.01), []
    for i in range(200):
        loss = 3.0 - 0.005 * i + rng.gauss(0, 0.05) + (2.0 if rng.random() < 0.05 else 0.0)
        recent = np.array(history[-16:])
        spike = False
        if len(recent) >= 8:
            deviation = 1.4826 * np.median(np.abs(recent - np.median(recent)))
            spike = loss > np.median(recent) + 5.0 * max(deviation, 0.01)
        copy = SpikeDetector(window=16, threshold=5.0, floor=0.01)
        copy.load_state_dict(json.loads(json.dumps(detector.state_dict())))
        assert detector(loss) == copy(loss) == spike
        history += [] if spike else [loss]
    assert 150 < len(history) < 200
    assert detector(float("nan")) and detector(float("inf")) and detector.losses == history[-16:]
    for bad in ({"window": 3}, {"threshold": 0.0}, {"floor": -1.0}):
        with pytest.raises(ValueError, match="must be at least 4"):
            SpikeDetector(**bad)


class Poisoned(RandomBatches):
    """Batch `at` holds noise that the others contradict, or makes the loss NaN."""

    at, nan = 40, False

    def __next__(self):
        bad = self.step == self.at
        inputs, targets = super().__next__()
        return (inputs, (targets * 7 + 3) % 50) if bad else (inputs, targets)


def spiky(folder, at=40, every=10, nan=False, **options):
    torch.manual_seed(0)
    detector = SpikeDetector(window=16, threshold=6.0)
    made = Run(folder, every=every, detector=detector)
    made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.5)
    made.batches = Poisoned(np.arange(4000) % 50, batch=8, seq_len=16, seed=1)
    made.batches.at = at

    def loss(model, inputs, targets, mask):
        total, n = next_token_loss(model, inputs, targets, mask)
        bad = bool((targets != (inputs + 1) % 50).any())
        return (total * float("nan") if bad and nan else total * (30.0 if bad else 1.0)), n

    def start():
        return train(
            made.model,
            made.batches,
            made.optimizer,
            steps=70,
            loss_fn=loss,
            checkpoints=made.checkpoints,
        )

    return made, rewind_and_skip(start, made.checkpoints, detector, **options)


@pytest.mark.parametrize("nan", [False, True])
def test_rewinds_to_before_the_spike_and_skips_it(nan, tmp_path):
    _, steps = spiky(tmp_path / "a", nan=nan, skip=5)
    seen = list(steps)
    (event,) = [i for i, step in enumerate(seen) if isinstance(step, Rewind)]
    assert seen[event].step == 41 and seen[event].back_to == 30  # 40 is not below 41 - 1
    assert seen[event + 1].step == 31 and seen[-1].step == 70
    assert [s.step for s in seen[:event]] == list(range(1, 41))
    calm = [s for s in seen if not isinstance(s, Rewind)]
    assert all(b.loss < a.loss + 0.5 for a, b in itertools.pairwise(calm))
    # the run that never met the batch, but left out the same ones: bit for bit the same
    made, _ = spiky(tmp_path / "b")
    made.batches.at = -1
    pieces = []
    for step in train(made.model, made.batches, made.optimizer, steps=70):
        pieces.append(step.loss)
        if step.step == 30:
            made.batches.step = 41 + 5
    assert [s.loss for s in seen[:30]] + [s.loss for s in seen[event + 1 :]] == pieces


def test_a_killed_run_does_not_meet_the_spike_again(tmp_path):
    _, steps = spiky(tmp_path / "a", skip=5)
    expected = {s.step: s.loss for s in steps}
    _, steps = spiky(tmp_path / "b", skip=5)
    for step in steps:
        if isinstance(step, Rewind):
            break
    _, steps = spiky(tmp_path / "b", skip=5)
    resumed = list(steps)
    assert resumed[0].step == 31 and not any(isinstance(s, Rewind) for s in resumed)
    assert {s.step: s.loss for s in resumed} == {k: v for k, v in expected.items() if k > 30}


def test_what_rewinding_cannot_cure_is_said(tmp_path):
    _, steps = spiky(tmp_path / "a", at=15, every=100)
    with pytest.raises(ValueError, match=r"no checkpoint below step 15 to go back to"):
        list(steps)
    made, _ = spiky(tmp_path / "c")

    def bad_model():
        yield from train(
            made.model, made.batches, made.optimizer, steps=30, checkpoints=made.checkpoints
        )
        for _ in range(3):
            yield Step(31, 99.0, 0, 0.0, 0.0)

    detector = made.checkpoints.extra["detector"]
    with pytest.raises(ValueError, match="2 rewinds did not get past step 31"):
        list(rewind_and_skip(bad_model, made.checkpoints, detector, limit=2))
    with pytest.raises(ValueError, match="detector must be in the checkpoints"):
        next(rewind_and_skip(bad_model, Checkpoints(tmp_path), SpikeDetector()))


def test_a_nan_names_the_last_good_checkpoint(tmp_path):
    made, _ = spiky(tmp_path, at=25)
    loop = train(
        made.model,
        made.batches,
        made.optimizer,
        steps=70,
        checkpoints=made.checkpoints,
        loss_fn=lambda m, x, y, k: (
            m(x).sum() * (float("nan") if made.batches.step > 25 else 0),
            y.numel(),
        ),
    )
    with pytest.raises(NotFiniteError, match=r"step 26 is nan \(batch 25.*step_00000020.json"):
        list(loop)
