"""Every kernel compiles for every target that knows its types, without a GPU, and fits there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import compile as compiler
from kernels import runtime
from kernels.compile import SHARED_LIMIT, Report, choose, found, report, source
from kernels.spec import TARGETS

pytestmark = pytest.mark.skipif(runtime.MODE == "absent", reason="Triton is not installed")

# Bytes that each thread may spill, (kernel, target) -> bytes; what is not listed may spill nothing.
RECORDED = {}

# Exact float32 products have no matrix instruction on NVIDIA's GPUs.
NO_MATRIX_UNIT = {
    (name, target)
    for name in ("matmul fp32 ieee", "decode_attention fp32")
    for target in TARGETS
    if target != "gfx942"
}


def complaints(row: Report, recorded=RECORDED) -> list[str]:
    """What a row must not say; nothing for a good one."""
    if row.error:
        return [f"{row.kernel}, {row.target}: {row.error}"]
    allowed = recorded.get((row.kernel, row.target), 0)
    found = []
    if row.spills > allowed:
        found.append(f"{row.kernel}, {row.target} spills {row.spills} bytes, recorded: {allowed}")
    if row.shared > SHARED_LIMIT[row.target]:
        limit = SHARED_LIMIT[row.target]
        found.append(f"{row.kernel}, {row.target} needs {row.shared} bytes shared, limit: {limit}")
    if row.narrowed:
        found.append(f"{row.kernel}, {row.target} computes exact products with tf32")
    if row.dots and not row.matrix and (row.kernel, row.target) not in NO_MATRIX_UNIT:
        found.append(f"{row.kernel}, {row.target} multiplies without matrix instructions")
    return found


def groups() -> list[list[str]]:
    """Files to compile together: each that multiplies matrices takes long, the others do not."""
    files = [file for file, specs in found().items() if specs]
    folder = Path(compiler.__file__).parent
    long = [f for f in files if "tl.dot(" in (folder / f"{f}.py").read_text(encoding="utf-8")]
    return [[f] for f in long] + [[f for f in files if f not in long]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "files", groups(), ids=lambda files: files[0] if files[1:] == [] else "rest"
)
def test_kernels_compile_for_their_targets(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the report does not depend on where it is asked for
    lines = []
    rows = report(files, progress=lines.append)
    assert [(row.kernel, row.target) for row in rows] == [
        (s.name, t) for s, t in choose(files, TARGETS)
    ]
    assert [complaint for row in rows for complaint in complaints(row)] == []
    assert [line.split(" registers")[0] for line in lines] == [
        str(row).split(" registers")[0] for row in rows
    ]
    assert all(0 < row.registers <= (512 if row.target == "gfx942" else 255) for row in rows)
    matrix = {"sm_80": {"mma.sync"}, "sm_90": {"mma.sync", "wgmma"}, "gfx942": {"v_mfma"}}
    matrix["sm_100"] = {"mma.sync", "tcgen05.mma"}
    assert all(set(row.matrix) <= matrix[row.target] for row in rows)


def test_names_and_records_are_of_kernels_that_exist():
    files = found()
    for file, specs in files.items():
        assert all(spec.name.partition(" ")[0] == file for spec in specs), file
    listed = [spec for specs in files.values() for spec in specs]
    names = [spec.name for spec in listed]
    assert len(set(names)) == len(names)
    for spec in listed:
        assert spec.targets and set(spec.targets) <= set(TARGETS), spec.name
    for name, target in {*RECORDED, *NO_MATRIX_UNIT}:
        assert name in names and target in TARGETS
    assert all(allowed > 0 for allowed in RECORDED.values())


SCRATCH = """
import json
from dataclasses import asdict

from kernels.compile import examine, main
from kernels.runtime import autotune, config, jit, tl
from kernels.spec import Spec


@jit
def product(a_ptr, b_ptr, c_ptr, steps, N: tl.constexpr, K: tl.constexpr, WAY: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([N, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + i[:, None] * K + k[None, :] + step * N * K)
        b = tl.load(b_ptr + k[:, None] * N + i[None, :] + step * N * K)
        acc = tl.dot(a.to(tl.float32), b, acc, input_precision=WAY)
    tl.store(c_ptr + i[:, None] * N + i[None, :], acc)


@jit
def broken(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), no_such_name)


@autotune([config(2, 2, N=32, K=32), config(4, 3, N=64, K=64)], key=[])
@jit
def tuned(a_ptr, c_ptr, N: tl.constexpr, K: tl.constexpr):
    tl.store(c_ptr + tl.arange(0, N), tl.load(a_ptr + tl.arange(0, N)) + K)


pointers = {name: "*fp32" for name in ("a_ptr", "b_ptr", "c_ptr")} | {"steps": "i32"}
two = {name: "*fp32" for name in ("a_ptr", "c_ptr")}
specs = [
    # 128 · 128 sums on 32 threads are 512 registers for each, and it has 255
    Spec("spilling", product, pointers, {"N": 128, "K": 16, "WAY": "tf32"}, 1),
    Spec("by hand", product, pointers, {"N": 32, "K": 32, "WAY": "ieee"}),
    Spec("large", product, pointers, {"N": 128, "K": 64, "WAY": "tf32"}, 8, 5),
    Spec("fine", product, pointers, {"N": 64, "K": 32, "WAY": "tf32"}),
    Spec("broken", broken, {"x_ptr": "*fp32"}, {"N": 16}),
    Spec("untyped", product, two, {"N": 64, "K": 32, "WAY": "tf32"}),
    Spec("too much", tuned, two | {"d": "i32"}, {}),
    Spec("tuned", tuned, two, {"K": 5}),
]
rows = [examine(spec, "sm_80") for spec in specs]
# one operand is widened from bf16
mixed = Spec("mixed", product, pointers | {"a_ptr": "*bf16"}, {"N": 64, "K": 32, "WAY": "ieee"})
rows += [examine(mixed, "sm_100")]
print(json.dumps([asdict(row) for row in rows]))
for words in ("gfx942 --show amdgcn", "sm_80 --show sass"):
    main(["--only", "add fp32", "--target", *words.split()])
"""


@pytest.mark.slow
def test_planted_faults_are_refused(tmp_path):
    path = tmp_path / "scratch.py"
    path.write_text(SCRATCH, encoding="utf-8")
    root = Path(compiler.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table, code = done.stdout.split("\n", 1)
    rows = {r["kernel"]: Report(**r | {"matrix": tuple(r["matrix"])}) for r in json.loads(table)}
    spilling, large = rows["spilling"], rows["large"]
    assert spilling.spills > 1000 and spilling.registers == 255
    (refused,) = complaints(spilling)
    assert f"spills {spilling.spills} bytes, recorded: 0" in refused
    assert complaints(spilling, {("spilling", "sm_80"): spilling.spills}) == []
    assert complaints(spilling, {("spilling", "sm_80"): spilling.spills - 1}) != []
    assert "without matrix instructions" in complaints(rows["by hand"])[0]
    assert large.shared > 166_912 and "limit: 166912" in complaints(large)[-1]
    assert complaints(rows["fine"]) == [] and rows["fine"].matrix == ("mma.sync",)
    assert "mixed, sm_100 computes exact products with tf32" in complaints(rows["mixed"])
    assert not rows["by hand"].narrowed and not rows["fine"].narrowed, "exact; asked for tf32"
    assert "no_such_name" in rows["broken"].error and complaints(rows["broken"])
    assert "untyped: b_ptr, steps: each argument of the kernel needs" in rows["untyped"].error
    assert "too much: d: each argument of the kernel needs" in rows["too much"].error
    assert not rows["tuned"].error and rows["tuned"].registers > 0, "N comes from the first config"
    assert "global_load_dwordx4" in code and "v_pk_add_f32" in code, "AMD's assembly of add"
    assert "LDG.E.128" in code and "FADD" in code, "NVIDIA's machine code of add"


@pytest.mark.slow
def test_the_machine_code_of_the_first_lesson():
    ptx = source("add fp32", "sm_90")
    assert "add.f32" in ptx and "ld.global.v4.b32" in ptx and ".loc" not in ptx
    high = source("add fp32", "sm_90", "ttgir")
    assert "arith.addf" in high and "loc(" not in high and ".py" not in high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: report(["nope"]), "is called 'nope': .*add fp32, add bf16"),
        (lambda: report(["add fp33"]), "is called 'add fp33': .*add fp32"),
        (lambda: report(["add"], ["sm_70"]), "target 'sm_70' must be one of sm_80, sm_90"),
        (lambda: report([]), r"none of \[\] is meant for sm_80"),
        (lambda: source("add", "sm_90"), "'add' holds several kernels: add fp32, add bf16"),
        (lambda: source("add fp32", "gfx942", "ptx"), "gfx942 is compiled through ttir, .*amdgcn"),
        (lambda: source("add fp32", "sm_90", "exe"), "not 'exe'"),
    ],
)
def test_what_does_not_exist_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_line_refuses_too(capsys):
    for words, message in (
        (["--only", "nope"], "is called 'nope'"),
        (["--target", "sm_70"], "target 'sm_70' must be"),
        (["--only", "add", "--show", "ptx"], "--show takes one kernel and one target, not 8 pairs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compiler.main(words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_process_that_dies_is_no_empty_report(monkeypatch):
    monkeypatch.setattr(compiler.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="compiling ended with 1"):
        report(["add"])
    with pytest.raises(RuntimeError, match="compiling ended with 1"):
        source("add fp32", "sm_90")
    monkeypatch.setattr(runtime, "MODE", "absent")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        report(["add"])


def test_a_row_reads_like_one():
    row = Report("add fp32", "sm_90", 4, 25, 0, 512, 232_448, ("wgmma",), True, seconds=1.25)
    words = "add fp32 sm_90 4 warps 25 registers 0 B spilled 512 B shared wgmma 1.25 s"
    assert " ".join(str(row).split()) == words
    row = Report("add fp32", "sm_90", 4, error="Problem: no")
    assert " ".join(str(row).split()) == "add fp32 sm_90 4 warps Problem: no"
