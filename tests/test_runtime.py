"""Where kernels run is decided once; wherever they cannot, the error says why and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import runtime
from kernels.runtime import check

ROOT = Path(__file__).resolve().parents[1]
FLOATS = (torch.float32, torch.bfloat16)

BODY = """
import torch
from kernels import add, rms_norm, runtime
print(runtime.MODE)
x = torch.arange(5.0)
print(add.reference(x, x).tolist(), rms_norm.reference(x, x).shape, runtime.can_run(x.device))
try:
    print(add.add(x, x).tolist())
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
"""
HIDE = """
import sys, importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
sys.modules["triton"] = None
"""


def run(before="", interpret=None):
    """What a new process says that decides anew."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} | (
        {} if interpret is None else {"TRITON_INTERPRET": interpret}
    )
    done = subprocess.run(
        [sys.executable, "-c", before + BODY], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    mode, reference, kernel = done.stdout.splitlines()
    assert reference.startswith("[0.0, 2.0, 4.0, 6.0, 8.0] torch.Size([5])")
    return mode, reference.endswith("True"), kernel


@pytest.mark.slow
def test_without_a_gpu_kernels_are_interpreted():
    assert run() == ("interpreter", True, "[0.0, 2.0, 4.0, 6.0, 8.0]")
    assert run(interpret="1")[0] == "interpreter"


@pytest.mark.slow
def test_the_interpreter_can_be_forbidden():
    mode, runs, said = run(interpret="0")
    assert (mode, runs) == ("compiler", False)
    assert said.startswith("RuntimeError") and "TRITON_INTERPRET=0 forbids" in said


@pytest.mark.slow
def test_triton_imported_too_early_is_named():
    mode, runs, said = run("import triton\n")
    assert (mode, runs) == ("too late", False)
    assert "import minillm first" in said
    # control: not too early for a process that was told to interpret from the start
    assert run("import triton\n", interpret="1")[0] == "interpreter"


@pytest.mark.slow
def test_without_triton_references_run():
    mode, runs, said = run(HIDE)
    assert (mode, runs) == ("absent", False)
    assert said.startswith("RuntimeError") and "Triton is not installed" in said


@pytest.mark.skipif(runtime.MODE != "interpreter", reason=f"kernels run elsewhere: {runtime.MODE}")
@pytest.mark.parametrize(
    ("tensors", "dtypes", "match"),
    [
        ((torch.ones(1), torch.ones(1, device="meta")), None, r"one device, got \['cpu', 'meta'\]"),
        ((torch.ones(1, device="meta"),), None, "works on CPU tensors, these are on meta"),
        ((torch.ones(1).double(),), FLOATS, "dtype float64 must be one of float32, bfloat16"),
    ],
)
def test_bad_tensors_are_named(tensors, dtypes, match):
    with pytest.raises(ValueError, match=match):
        check(*tensors, dtypes=dtypes)


@pytest.mark.skipif(runtime.MODE != "interpreter", reason=f"kernels run elsewhere: {runtime.MODE}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_types_are_widened_for_the_interpreter_and_rounded_back(dtype):
    """Every number of the type, through a kernel that adds zero, and one that needs rounding."""
    from kernels.add import add

    if dtype == torch.bfloat16:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    else:
        bits = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)
    every = bits.view(dtype)
    every = every[every.float().isfinite()]
    zero = torch.zeros(len(every)).to(dtype)
    assert torch.equal(add(every, zero).float(), every.float())
    shift = torch.full((len(every),), 0.3).to(dtype)
    want = (every.float() + shift.float()).to(dtype)  # rounded to nearest even, by PyTorch
    got = add(every, shift)
    same = (got.float() == want.float()) | (got.float().isnan() & want.float().isnan())
    assert same.all()


def test_shared_storage_is_widened_once():
    """Two views of one tensor, of which a kernel writes the second."""
    from kernels.runtime import widened

    whole = torch.arange(8.0).bfloat16()
    with widened((whole[:4], whole[4:], 3), {"x": whole[::2]}) as ((a, b, three), named):
        assert a.dtype == b.dtype == torch.float32 and three == 3
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        assert named["x"].tolist() == [0.0, 2.0, 4.0, 6.0]
        b += 1.01
    assert whole.tolist() == torch.tensor([0, 1, 2, 3, 5.01, 6.01, 7.01, 8.01]).bfloat16().tolist()
