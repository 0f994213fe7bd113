"""One recipe under many meshes: the losses of one process, checkpoints, and ranks that die."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from minillm.parallel import RankError, launch
from minillm.parallel.checkpoint import CheckpointError, checkpoints, newest
from minillm.parallel.group import Tracer
from minillm.recipes import pretrain, pretrain_own, storyteller
from minillm.recipes.pretrain import build, quick, run, whole_model
from minillm.recipes.pretrain_recipe import Recipe, check
from minillm.tokenizers import load_course_tokenizer
from minillm.train import train
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

ROOT = Path(__file__).resolve().parents[1]


def small(**changes):
    """Grouped heads, tied embeddings, float64."""
    known = {"dtype": "float64", "steps": 3, "warmup": 1, "n_kv_heads": 2, "d_model": 16}
    return quick(**(known | changes))


def curve(recipe):
    warnings.simplefilter("ignore", FutureWarning)
    return [(s.step, s.tokens, s.loss, s.grad_norm) for s in run(recipe)]


@cache
def alone(**changes):
    """The curve of one process, by the loop of every other chapter."""
    r = small(**changes)
    model, rates = build(r), warmup_cosine(r.lr, r.warmup, r.steps, floor=0.01)
    optimizer = AdamW(decay_groups(model, r.weight_decay), lr=r.lr, betas=(0.9, 0.98))
    rows = storyteller.Rows(r, load_course_tokenizer())
    options = {"clip": r.clip, "steps": r.steps, "loss_fn": storyteller.loss}
    steps = train(model, rows, optimizer, rates, **options)
    return [(s.step, s.tokens, s.loss, s.grad_norm) for s in steps]


def agree(found, want, rtol=1e-9):
    assert [s[:2] for s in found] == [s[:2] for s in want]
    numbers = [torch.tensor([s[2:] for s in x], dtype=torch.float64) for x in (found, want)]
    torch.testing.assert_close(*numbers, rtol=rtol, atol=0)


def curves(cases):
    return [curve(small(**case)) for case in cases]


def compare(cases, world_size, rtol=1e-9, **common):
    """All cases in one launch, every rank's curve with that of one process."""
    cases = [case | common for case in cases]
    for rank in launch(curves, cases, world_size=world_size, timeout=250, echo=False):
        assert len(rank) == len(cases)
        for found in rank:
            agree(found, alone(), rtol)


@pytest.mark.slow
def test_one_process_is_the_training_loop_of_the_other_chapters():
    agree(curve(small()), alone())
    agree(curve(small(micro_batches=4)), alone())
    # the control: other rows, another curve
    with pytest.raises(AssertionError):
        agree(curve(small(seed=1)), alone())


TWO = [
    {"dp": 2, "zero": 1},
    {"dp": 2, "zero": 2, "micro_batches": 2},
    {"dp": 2, "zero": 3, "micro_batches": 2, "algorithm": "ring"},
    {"tp": 2},
    {"pp": 2},
]


@pytest.mark.slow
def test_two_ranks():
    compare(TWO[:1] + TWO[3:], 2)


@pytest.mark.slow
def test_two_ranks_in_every_way():
    more = [{"dp": 2}, {"dp": 2, "micro_batches": 2}, {"tp": 2, "micro_batches": 2}]
    more += [{"pp": 2, "schedule": name} for name in ("naive", "gpipe", "zb-h1")]
    more += [{"pp": 2, "schedule": "interleaved", "chunks": 2, "micro_batches": 4}]
    compare(TWO[1:3] + more, 2)


@pytest.mark.slow
def test_four_ranks_data_and_tensor():
    compare([{"dp": 2, "tp": 2, "zero": zero} for zero in range(4)], 4)


@pytest.mark.slow
def test_four_ranks_with_pipelines():
    cases = [{"dp": 2, "pp": 2, "zero": zero, "micro_batches": 2} for zero in range(4)]
    inter = {"schedule": "interleaved", "chunks": 2, "micro_batches": 2, "pp": 2}
    cases += [{"dp": 2, "pp": 2, "zero": 2, "schedule": "zb-h1", "micro_batches": 2}]
    cases += [{"tp": 2, **inter}, {"dp": 2, "zero": 3, **inter}, {"pp": 4, "micro_batches": 4}]
    compare(cases, 4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_eight_ranks_three_ways(zero):
    compare([{"dp": 2, "tp": 2, "pp": 2, "zero": zero}], 8)


@pytest.mark.slow
def test_float32_agrees_to_its_own_precision():
    cases = [{"dp": 2, "tp": 2, "zero": 3}, {"tp": 2, "pp": 2}]
    compare(cases, 4, rtol=2e-5, dtype="float32")


@pytest.mark.slow
def test_pytorchs_engine_on_two_ranks():
    cases = [{"dp": 2, "zero": 3}, {"dp": 2, "zero": 2, "micro_batches": 2}, {"tp": 2}]
    cases += [{"pp": 2}, {"pp": 2, "schedule": "interleaved", "chunks": 2, "micro_batches": 4}]
    compare(cases, 2, engine="torch")


@pytest.mark.slow
def test_pytorchs_engine_on_four_ranks():
    cases = [{"dp": 2, "tp": 2, "zero": 3}, {"tp": 2, "pp": 2, "schedule": "gpipe"}]
    cases += [{"dp": 2, "pp": 2, "zero": zero, "micro_batches": 2} for zero in (2, 3)]
    compare(cases, 4, engine="torch")


def broken(fault):
    """A run with a fault planted in the engine."""
    if fault == "ends":  # both ends of the pipeline keep their own gradient of the tied matrix
        pretrain_own.all_reduce = lambda x, group: x
    if fault == "copies":  # what two ranks hold counts twice in the norm

        def graded(self):
            for options, holder in before(self):
                yield options | {"copies": 1}, holder

        before, pretrain_own.Own.graded = pretrain_own.Own.graded, graded
    if fault == "rows":  # both copies read the same rows
        Share = pretrain.Share
        pretrain.Share = lambda recipe, tokenizer, place: Share(recipe, tokenizer, 0)
    return curve(small(**({"dp": 2} if fault == "rows" else {"pp": 2})))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ends", "copies", "rows"])
def test_a_planted_fault_is_seen(fault):
    for found in launch(broken, fault, world_size=2, timeout=120, echo=False):
        with pytest.raises(AssertionError):
            agree(found, alone())


def shares(zero):
    """Numbers that this rank keeps of parameters and moments, and the bytes it has sent."""
    made, tracer, engine = [], Tracer(), pretrain.Own
    warnings.simplefilter("ignore", FutureWarning)
    pretrain.Own = lambda *a: made.append(engine(*a)) or made[0]
    list(run(small(steps=2, dp=2, zero=zero, algorithm="ring"), tracer=tracer))
    pretrain.Own = engine
    held = sum(p.numel() for p in made[0].named.values())
    state = made[0].optimizer.state.values()
    return held, sum(s["exp_avg"].numel() for s in state), tracer.sent()


@pytest.mark.slow
def test_stages_divide_what_they_say():
    whole = sum(p.numel() for p in build(small()).parameters())
    stages = lambda: [shares(zero) for zero in range(4)]  # noqa: E731
    for found in launch(stages, world_size=2, timeout=120, echo=False):
        parameters, moments, sent = zip(*found, strict=True)
        assert parameters[:3] == (whole,) * 3 and moments[0] == whole
        # halves, and less than a row of each parameter for padding
        assert all(whole / 2 <= n < 0.51 * whole for n in (*moments[1:], parameters[3]))
        # the same bytes in stages 0 to 2, half as many again in stage 3
        assert all(n / sent[0] == pytest.approx(1, rel=0.3) for n in sent[1:3])
        assert sent[3] > 1.2 * sent[2]


# -- meshes that cannot be -----------------------------------------------------------------------

WRONG = [
    ({"dp": 2}, 4, r"dp=2 x tp=1 x pp=1 = 2 must be the number of ranks, which is 4"),
    ({"tp": 3}, 3, "n_heads=4, kv heads=4 must be multiples of tp=3"),
    ({"tp": 2, "n_kv_heads": 1}, 2, "kv heads=1 must be multiples of tp=2"),
    ({"pp": 8, "batch": 16}, 8, r"n_layers=4 must be at least pp=8 x chunks=1 stages"),
    ({"dp": 3}, 3, "batch=8 rows must be a multiple of dp=3"),
    ({"zero": 1}, 1, "zero=1 divides among the copies of the model, but dp=1"),
    ({"pp": 2, "schedule": "pipedream"}, 2, "late weights"),
    ({"schedule": "gpipe"}, 1, "belong to pp > 1, but pp=1"),
    ({"pp": 2, "schedule": "1f1b", "chunks": 2, "batch": 8}, 2, "only 'interleaved' has several"),
    ({"dp": 2, "pp": 2, "zero": 3, "schedule": "zb-h1", "micro_batches": 2}, 4, "zb-h1 has halves"),
    ({"dp": 0}, 1, "dp=0"),
    ({"every": 0}, 1, "every=0"),
    ({"dp": 2, "engine": "torch"}, 2, "zero=0 with dp=2: fully_shard is stage 3"),
    (
        {"pp": 2, "engine": "torch", "schedule": "naive"},
        2,
        "'naive' of engine 'torch' must be one of",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "rule"), WRONG)
def test_a_mesh_that_cannot_be_is_refused_with_the_rule(changes, world_size, rule):
    with pytest.raises(ValueError, match=rule):
        check(quick(**changes), world_size)


def test_pytorchs_engine_needs_a_process_group():
    with pytest.raises(ValueError, match="needs a process group, also for one rank"):
        list(run(quick(engine="torch")))


def test_what_is_legal_is_completed():
    assert check(quick(pp=2), 2).micro_batches == 4
    assert check(quick(), 1).micro_batches == 1
    assert check(Recipe(dp=2, tp=2, pp=2, zero=1, micro_batches=8), 8).micro_batches == 8


# -- checkpoints ---------------------------------------------------------------------------------

SAVED = {
    "zero 1": (2, {"dp": 2, "zero": 1}),
    "data and tensor": (4, {"dp": 2, "tp": 2, "zero": 2}),
    "pipeline and tensor": (4, {"pp": 2, "tp": 2}),
    "pytorch": (4, {"dp": 2, "tp": 2, "zero": 3, "engine": "torch"}),
}
LOADED = {
    1: [{}],
    2: [{"tp": 2}, {"dp": 2, "zero": 3}, {"pp": 2, "engine": "torch"}],
    4: [{"dp": 4}, {"dp": 2, "pp": 2, "zero": 1, "micro_batches": 2}],
}
LONG = {"steps": 5, "every": 3}


def go_on(cases, folder):
    """Each case from a copy of the checkpoints of its own, which rank 0 makes."""
    found = []
    for i, case in enumerate(cases):
        copy = folder.with_name(f"{folder.name} {dist.get_world_size()} {i}")
        if dist.get_rank() == 0:
            shutil.copytree(folder, copy)
        dist.barrier()
        found.append(curve(small(**LONG, **case, checkpoints=copy)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_goes_on_under_any_other_mesh(name, tmp_path):
    n, case = SAVED[name]
    folder = tmp_path / "saved"
    cases = [case | LONG | {"checkpoints": folder}]
    (first, *_) = launch(curves, cases, world_size=n, timeout=250, echo=False)
    agree(first[0], alone(**LONG))
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    for world_size, others in LOADED.items():
        for rank in launch(go_on, others, folder, world_size=world_size, timeout=250, echo=False):
            for found in rank:
                agree(found, alone(**LONG)[3:])


@pytest.mark.slow
def test_moments_and_place_in_the_data_are_in_it(tmp_path):
    """Without one of them the curve is another one."""
    folder = tmp_path / "saved"
    curve(small(**LONG, checkpoints=folder))
    again = small(**LONG, checkpoints=folder)
    agree(curve(again), alone(**LONG)[3:])
    kept = pretrain_own.Own.pieces, pretrain.Share.load_state_dict
    lost = lambda self: (p for p in kept[0](self) if " of " not in p.name)  # noqa: E731
    for place, name, fault in (
        (pretrain_own.Own, "pieces", lost),
        (pretrain.Share, "load_state_dict", lambda self, state: None),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises(AssertionError):
                agree(curve(again), alone(**LONG)[3:])


@pytest.mark.slow
def test_the_whole_model_is_read_from_shards(tmp_path):
    recipe = small(dp=2, zero=3, every=3, checkpoints=tmp_path)
    launch(curve, recipe, world_size=2, timeout=120, echo=False)
    found = whole_model(newest(tmp_path)).double().state_dict()
    curve(replace(recipe, dp=1, zero=0, checkpoints=tmp_path / "alone"))
    want = whole_model(tmp_path / "alone" / "step_00000003").double().state_dict()
    for name, x in want.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6)  # it is made in float32
    assert (build(small()).tokens.weight - want["tokens.weight"]).abs().max() > 1e-3


def test_another_model_is_refused(tmp_path):
    curve(small(every=3, checkpoints=tmp_path))
    rule = "belongs to another run: d_model=32 here, 16 there; seed=1 here, 0 there"
    with pytest.raises(ValueError, match=rule):
        curve(small(d_model=32, seed=1, checkpoints=tmp_path))


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over(tmp_path):
    recipe = small(steps=5, every=2, checkpoints=tmp_path)
    curve(recipe)
    file = tmp_path / "step_00000004" / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="it is torn; going back to step_00000002"):
        steps = list(run(recipe))
    agree([(s.step, s.tokens, s.loss, s.grad_norm) for s in steps], alone(**LONG)[2:])
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]
    assert newest(tmp_path).name == "step_00000004"  # written anew


# -- faults, for real ----------------------------------------------------------------------------


def out_of_space(folder):
    """From step 3 on, rank 1 cannot write files of more than 10 kB."""
    warnings.simplefilter("ignore", FutureWarning)
    steps = []
    try:
        for step in run(small(dp=2, zero=1, steps=6, every=2, checkpoints=folder)):
            steps.append(step.step)
            if step.step == 3 and dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    except CheckpointError as error:
        return steps, str(error)


def whole_and_alone(folder, names):
    """Only these checkpoints, and the newest is good."""
    assert sorted(p.name for p in folder.iterdir()) == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(folder).name == names[-1]


@pytest.mark.slow
def test_a_rank_that_cannot_write_is_named_and_the_last_checkpoint_stays(tmp_path):
    for steps, text in launch(out_of_space, tmp_path, world_size=2, timeout=120, echo=False):
        assert steps == [1, 2, 3, 4]  # every rank hears of it, and ends
        assert "step_00000004 was not written, rank 1: " in text and "File too large" in text
    whole_and_alone(tmp_path, ["step_00000002"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(small_disk):
    """One checkpoint is about 0.9 MB, two are not there at a time."""
    folder = small_disk / "saved"
    recipe = small(dp=2, zero=1, steps=6, every=2, dtype="float32", checkpoints=folder)
    with pytest.raises(RankError, match=r"step_00000004 was not written, rank .*No space left"):
        launch(curve, recipe, world_size=2, timeout=120, echo=False)
    whole_and_alone(folder, ["step_00000002"])


SCRIPT = """
import os, signal, sys, warnings
import torch.distributed as dist
from pathlib import Path
from minillm.parallel import launch
from minillm.recipes.pretrain import quick, run

def work(folder):
    warnings.simplefilter("ignore", FutureWarning)
    settings = {settings}
    recipe = quick(dp=2, zero=1, checkpoints=folder / "saved", log=folder / "log", **settings)
    for step in run(recipe):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if step.step == 5 and first and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

launch(work, Path(sys.argv[1]), world_size=2, timeout=120)
"""


def ended(command, folder, **more):
    """Exit status and output of a command, of which no process is left, whatever happened.

    torchrun gives each rank a session of its own: they are known by a variable that they inherit.
    """
    mark = str(uuid.uuid4())
    more |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | more | {"MINILLM_TEST": mark}
    process = subprocess.Popen(command, cwd=folder, env=environment, **options)
    try:
        output, _ = process.communicate(timeout=270)
        until = time.monotonic() + 30
        while (left := marked(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        assert not left, left
        return process.returncode, output
    finally:
        for p in marked(mark):
            p.kill()


def marked(mark):
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if p.environ().get("MINILLM_TEST") == mark and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
    return found


def torchrun(arguments, folder, n):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *arguments]
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see pretrain.slurm
    return ended(command, folder, **store)


@pytest.mark.slow
def test_a_killed_rank_under_torchrun_repeats_only_the_work_since_the_last_checkpoint(tmp_path):
    settings = {"dtype": "float64", "warmup": 1, "n_kv_heads": 2, "d_model": 16}
    settings |= {"steps": 7, "every": 2}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(settings=settings))
    code, output = torchrun(["--max-restarts=1", str(script), str(tmp_path)], tmp_path, 2)
    assert code == 0, output
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    # rank 0 may be ended before it has told of step 5
    assert [s["step"] for s in log] in ([1, 2, 3, 4, 5, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7])
    want = {s[0]: s for s in alone(steps=7, every=2)}
    found = [(s["step"], s["tokens"], s["loss"], s["grad_norm"]) for s in log]
    agree(found, [want[s["step"]] for s in log])


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    mesh = ["--dp=2", "--tp=2", "--zero=1", "--quick", "--d-model=16", "--steps=5", "--every=2"]
    saved = ["--checkpoints", "saved", "--step-log", "log"]
    code, output = torchrun(["-m", "minillm.recipes.pretrain", *mesh, *saved], tmp_path, 4)
    assert code == 0 and output.count("loss") == 5, output
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and [s["step"] for s in log] == [1, 2, 3, 4, 5]
    whole_and_alone(tmp_path / "saved", ["step_00000002", "step_00000004"])


@pytest.mark.slow
def test_the_slurm_script(tmp_path):
    """With a srun and a scontrol that stand for a cluster of this one machine."""
    for name, text in {
        "srun": 'exec "$@"',
        "scontrol": "echo localhost; echo elsewhere",
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    known = {"SLURM_JOB_NODELIST": "x[1-2]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    known |= {"SLURM_JOB_ID": "7", "MASTER_PORT": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "minillm" / "recipes" / "pretrain.slurm"
    more = ["--quick", "--device=cpu", "--dp=2", "--d-model=16", "--steps=5"]
    code, output = ended(["bash", script, *more], tmp_path, **known)
    assert code == 0 and output.count("loss") == 5, output
    whole_and_alone(tmp_path / "checkpoints" / "7", ["step_00000004"])


@pytest.mark.slow
def test_the_command_starts_its_own_ranks(tmp_path):
    command = [sys.executable, "-m", "minillm.recipes.pretrain", "--quick", "--tp", "2"]
    command += ["--steps", "2", "--warmup", "1", "--d-model", "16"]
    code, output = ended(command, tmp_path)
    assert code == 0 and output.count("[rank 0] step") == 2, output
    code, output = ended([*command[:-6], "--tp", "3"], tmp_path)
    assert code and "must be multiples of tp=3" in output
