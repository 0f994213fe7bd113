"""The kernels' benchmark as far as it goes without a GPU: each race at a tiny size, once."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import runtime
from kernels.cost import Cost

FOLDER = Path(__file__).parent / "benchmarks"
FILES = {path.stem for path in (Path(__file__).parent / "kernel_cases").glob("[!_]*.py")}
PARTS = {"attention_backward"}  # measured as the backward pass of another

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def load():
    """The script as a module; its folder holds a kernels.py, so it does not stay on the path."""
    sys.path.append(str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_kernels", FOLDER / "kernels.py")
        sys.modules["bench_kernels"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


bench = load()
ON = bench.Setting("cuda" if runtime.MODE == "gpu" else "cpu", compile=lambda f: f)


def test_every_kernel_is_raced():
    assert set(bench.TABLE) == FILES - PARTS
    for name, (_, sizes, _) in bench.TABLE.items():
        assert len(set(sizes)) == len(sizes) >= 2, f"{name}: several sizes"


@needs_triton
@pytest.mark.parametrize("name", bench.TABLE)
def test_all_contestants_give_the_same_numbers(name):
    builder, _, tiny = bench.TABLE[name]
    titles = []
    for title, race in builder(ON, *tiny):
        titles.append(title)
        assert {"ours", race.judge} <= set(race.contestants), title
        assert bench.judged(race) == {}, title
        assert race.cost.flops > 0 and race.cost.bytes > 0
    assert titles and len(set(titles)) == len(titles)


@pytest.mark.slow
@needs_triton
def test_backward_can_be_called_again_and_again_also_when_compiled(monkeypatch):
    from torch._functorch import config  # imports Triton, which must come after kernels.runtime

    monkeypatch.setattr(config, "donated_buffer", False)
    on = bench.Setting(ON.device, compile=partial(torch.compile, backend="aot_eager"))
    builder, _, tiny = bench.TABLE["swiglu"]
    for _, race in builder(on, *tiny):
        assert bench.judged(race) == {}
        first, again = (bench.leaves(race.contestants["compiled"]()) for _ in range(2))
        assert bench.distance(first, again) == 0


@needs_triton
def test_units_and_shares(monkeypatch):
    """1,000 bf16 numbers read twice and written once, in a millisecond: 6,000 bytes, 0.006 GB/s."""
    times = {"ms": 1.0, "low": 1.0, "high": 2.0, "extra_mb": 0.0}
    monkeypatch.setattr(bench, "timed", lambda call, runs, flush: times)
    monkeypatch.setattr(bench, "TABLE", {
        "add": (bench.TABLE["add"][0], ((1000,),), ()),
        "matmul": (bench.TABLE["matmul"][0], ((10, 20, 50),), ()),
    })  # fmt: skip
    rows, problems = bench.measure(["add", "matmul"], 3, {"copy": 0.012}, None, ON)
    assert [(row.who, row.rate, row.share) for row in rows[:3]] == [
        (who, pytest.approx(0.006), pytest.approx(0.5)) for who in ("ours", "eager", "compiled")
    ]
    product = rows[3]
    assert (product.kernel, product.race, product.size) == ("matmul", "forward", (10, 20, 50))
    assert product.rate == pytest.approx(2 * 10 * 20 * 50 / 1e9) and product.share is None
    assert all(not text.startswith("add") for text in problems)


def race(**contestants):
    return bench.Race({"eager": lambda: torch.ones(3), **contestants}, Cost(1, 1))


def test_a_wrong_contestant_is_not_timed():
    def missing():
        raise RuntimeError("no such back end")

    wrong = bench.judged(
        race(ours=lambda: torch.ones(3) * 1.01, a=missing, b=lambda: torch.ones(4))
    )
    assert wrong == {"a": "RuntimeError: no such back end", "b": "off by inf, allowed 0.03"}
    for result in (torch.ones(3) * 1.1, torch.ones(3) * float("nan")):
        with pytest.raises(ValueError, match="ours is wrong: off by"):
            bench.judged(race(ours=lambda result=result: result))
    with pytest.raises(RuntimeError, match="no such back end"):
        bench.judged(race(ours=missing))


def test_without_a_gpu_nothing_is_measured_or_written(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "MODE", "interpreter")
    monkeypatch.setattr(bench, "record", lambda *given: pytest.fail("there is nothing to record"))
    bench.main()
    assert "kernels are not measured: there is no GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no kernel is called nope; there are add"):
        bench.main(("nope",))


def test_a_partial_run_replaces_its_rows_only():
    def result(device, *kernels, ms=1.0):
        rows = [{"kernel": name, "ms": ms} for name in kernels]
        left = [f"{name} (3,) forward, Liger: no" for name in kernels]
        return {"device": device, "versions": {}, "runs": 5, "rows": rows, "left_out": left}

    old, new = result("A", "add", "softmax", "rope"), result("A", "softmax", ms=2.0)
    together = bench.merged(old, new, ["softmax"])
    assert [(row["kernel"], row["ms"]) for row in together["rows"]] == [
        ("add", 1.0), ("softmax", 2.0), ("rope", 1.0)
    ]  # fmt: skip
    assert [text.split()[0] for text in together["left_out"]] == ["add", "rope", "softmax"]
    assert bench.merged(result("B", "add"), new, ["softmax"]) == new, "another device"
    assert bench.merged(None, new, ["softmax"]) == new
