"""The planner against brute force, and what it says about published plans."""

import itertools
import math
from dataclasses import replace

import pytest

from minillm.accounting import memory, parameters
from minillm.config import ModelConfig
from minillm.parallel.actions import in_flight
from minillm.parallel.costs import SELENE, Plan, check, stage_parameters
from minillm.parallel.plan import chunks_in_flight, device_bytes, legal, rank, search
from minillm.parallel.schedules import schedule
from minillm.parallel.simulate import fit, published, simulate

CFG = ModelConfig(
    1024, d_model=512, n_layers=12, n_heads=4, max_len=256, bias=True, mlp="gelu_tanh"
)


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b", "interleaved", "zb-h1"])
def test_chunks_in_flight_are_those_of_the_schedule(name):
    for k, m, v in itertools.product((1, 2, 3, 5), (1, 2, 3, 6, 10), (1, 2, 3)):
        if (v > 1) != (name == "interleaved") or (v > 1 and (m % k or k == 1)):
            continue
        plan = Plan(pp=k, schedule=name, chunks=v)
        counted = in_flight(schedule(name, k, m, v))
        found = [chunks_in_flight(plan, m, device) for device in range(k)]
        if name == "zb-h1":  # what is yet to be multiplied for weights counts as well: at most K
            assert all(f >= c for f, c in zip(found, counted, strict=True))
        else:
            assert found == counted, (k, m, v)


def test_stages_hold_the_model_once():
    for tp, pp, v in [(1, 1, 1), (4, 3, 1), (2, 2, 3), (1, 12, 1)]:
        plan = Plan(tp=tp, pp=pp, chunks=v, schedule="interleaved" if v > 1 else "1f1b")
        held = stage_parameters(CFG, plan)
        count = parameters.count(CFG)
        once = (count.total - count.norms - count.positions) / tp + count.norms + count.positions
        again = count.tokens / tp if pp > 1 else 0  # a tied table is on the last stage, too
        assert sum(held) == pytest.approx(once + again, rel=1e-12)
        assert len(held) == pp * v


@pytest.mark.parametrize("stage", range(4))
def test_bytes_of_one_device_by_hand(stage):
    plan = Plan(dp=4, micro_batch=2, zero=stage, recompute="none")
    n = parameters.count(CFG).total
    kept = 12 * memory.layer_activations(2, 256, 512, 4)
    logits = 2 * 256 * 1024 * 10
    gathered = 4 * n / 12 if stage == 3 else 0
    expected = memory.zero(n, 4, stage) + kept + logits + gathered
    assert device_bytes(CFG, plan, batch=8) == pytest.approx(expected, rel=1e-9)


def test_recomputation_and_cuts_save_bytes():
    plan = Plan(micro_batch=4, recompute="none")
    kinds = [device_bytes(CFG, replace(plan, recompute=r), 16) for r in memory.RECOMPUTE]
    assert kinds[0] > kinds[1] > kinds[2]
    assert device_bytes(CFG, replace(plan, tp=4), 16) < kinds[0] / 2
    # GPipe keeps all micro-batches, 1F1B as many as stages
    piped = Plan(pp=2, recompute="none", schedule="gpipe")
    assert device_bytes(CFG, piped, 16) > 2 * device_bytes(CFG, replace(piped, schedule="1f1b"), 16)


def test_legal_plans_are_all_that_pass_the_check():
    gpus, batch, sizes = 8, 24, (1, 2, 3)
    found = list(legal(CFG, gpus, batch, tensor=(1, 2, 8), micro_batches=sizes, zero=(0, 2)))
    brute = set()
    for tp, pp, dp, b, v in itertools.product(
        (1, 2, 8), range(1, 9), range(1, 9), sizes, range(1, 5)
    ):
        plan = Plan(dp, tp, pp, b, "interleaved" if v > 1 else "1f1b", v)
        if plan.gpus != gpus or (pp == 1 and v > 1):
            continue
        try:
            check(CFG, plan, batch)
        except ValueError:
            continue
        for zero, kind in itertools.product((0, 2), memory.RECOMPUTE):
            if not (zero == 2 and (pp > 1 or dp == 1)):
                brute.add(replace(plan, zero=zero, recompute=kind))
    assert len(found) == len(set(found)) and set(found) == brute
    assert not any(p.tp == 8 for p in found)  # four heads


def test_search_ranks_what_fits():
    small = replace(SELENE, hardware=replace(SELENE.hardware, memory=3e8))
    found = search(CFG, 8, 32, small, like=Plan(overlap=True))
    assert found == sorted(found, key=lambda r: (r.seconds, r.bytes))
    assert all(r.bytes <= 0.9 * 3e8 and r.plan.overlap and r.plan.gpus == 8 for r in found)
    everything = list(legal(CFG, 8, 32, like=Plan(overlap=True)))
    fits = [p for p in everything if device_bytes(CFG, p, 32) <= 0.9 * 3e8]
    assert 0 < len(fits) < len(everything) and {r.plan for r in found} == set(fits)
    assert rank(found, found[0].plan) == 1
    again = simulate(CFG, found[0].plan, small, 32)
    assert again.seconds == pytest.approx(found[0].seconds, rel=0.01)
    with pytest.raises(ValueError, match="not among"):
        rank(found, Plan())
    tiny = replace(SELENE, hardware=replace(SELENE.hardware, memory=1e6))
    with pytest.raises(ValueError, match="no plan for gpus=8, batch=32 fits into"):
        search(CFG, 8, 32, tiny)


def test_published_plans_among_those_of_their_time():
    """Everything recomputed and no ZeRO, as in the published runs: most rank in the first tenth."""
    runs = published()
    cluster, first_tenth = fit(runs[::2], SELENE), []
    for run in runs:
        assert device_bytes(run.cfg, run.plan, run.batch) < 0.9 * 80e9
        space = {"zero": (0,), "recompute": ("full",), "like": Plan(overlap=run.plan.overlap)}
        found = search(run.cfg, run.plan.gpus, run.batch, cluster, **space)
        if rank(found, run.plan) <= math.ceil(0.1 * len(found)):
            first_tenth.append(run.name)
    assert len(first_tenth) >= 6
    assert {"1.7", "145.6", "529.6"} <= set(first_tenth)
