"""Bytes counted at each send, beside what the kernel says that the loopback carried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "traffic.py"
ALONE = (
    ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
)


@pytest.fixture(scope="module")
def found():
    """In a network of its own: the counter then sees nobody else's messages."""
    try:
        subprocess.run([*ALONE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine grants no network namespace: others would be counted too")
    command = [*ALONE, sys.executable, SCRIPT, "--quick", "--mib", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


@pytest.mark.slow
def test_counted_sends_are_the_formula_and_what_the_wire_carried(found):
    ours = {k: v for k, v in found["collectives"].items() if "sent" in v}
    assert len(ours) == 7
    for name, row in ours.items():
        assert row["sent"] == row["formula"], name
        assert 1 < row["wire"] / row["sent"] < 1.02, name


@pytest.mark.slow
def test_the_librarys_own_collectives_on_the_wire(found):
    shares = {
        k: v["wire"] / v["formula"] for k, v in found["collectives"].items() if "sent" not in v
    }
    assert 1 < shares["gloo all_reduce"] < 1.02 and 1 < shares["gloo all_gather"] < 1.02
    assert 1.9 < shares["gloo reduce_scatter"] < 2.1  # it reduces everything everywhere


@pytest.mark.slow
def test_what_pytorch_hands_to_collectives(found):
    ddp, fsdp = found["profiler"]["DDP"], found["profiler"]["FSDP2"]
    assert ddp["gloo:all_reduce"] == ddp["weights"]
    # the root's own parameters stay whole between forward and backward, blocks are gathered twice
    assert fsdp["weights"] / 4 < fsdp["gloo:all_gather"] < 2 * fsdp["weights"] / 4
