"""One matrix: every way to divide the work, with every feature, against one process.

Logits, loss, gradients and the weights after three steps in float64; gradients in float32; what
each rank holds; and that a fault in each way is found. The ways are in `tests/parallel_cases`.
"""

import re
from functools import cache

import pytest
import torch

from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel.context import zigzag
from minillm.parallel.group import world
from minillm.parallel.mesh import Mesh
from minillm.parallel.schedules import schedule
from minillm.parallel.sequence import sequence_parallel
from minillm.parallel.tensor import parallelize
from minillm.parallel.tensor2d import parallelize_2d
from tests.parallel_cases import (
    FEATURES,
    batch,
    compare,
    config,
    context,
    data,
    grid,
    late,
    mixed,
    one_process,
    pipeline,
    relative,
    run,
    tensor,
)

FILES = (data, tensor, grid, context, pipeline, mixed)
STRATEGIES = {strategy.name: strategy for file in FILES for strategy in file.STRATEGIES}
DTYPES = (torch.float64, torch.float32)


@cache
def launched(name):
    """All that a strategy has to show, in one launch: for each job what every rank found."""
    strategy = STRATEGIES[name]
    keys = [(feature, dtype, None) for dtype in DTYPES for feature in FEATURES]
    keys += [(fault.feature, torch.float64, fault.what) for fault in strategy.faults]
    faults = {fault.what: fault for fault in strategy.faults}
    jobs = [(FEATURES[f], dtype, faults.get(what)) for f, dtype, what in keys]
    found = launch(run, strategy, jobs, world_size=strategy.ranks, timeout=240)
    return dict(zip(keys, zip(*found, strict=True), strict=True))


# -- what is asked of every strategy, with every feature -----------------------------------------


def equals_one_process(name, feature):
    compare(launched(name)[feature, torch.float64, None], one_process(FEATURES[feature]))


def rounds_like_one_process(name, feature):
    """Gradients in float32 are about as far from those in float64 as one process's are."""
    exact, rounded = (one_process(FEATURES[feature], dtype) for dtype in DTYPES)
    names = set()
    for found in (x.gradients for x in launched(name)[feature, torch.float32, None]):
        assert all(x.dtype == torch.float32 for x in found.values())
        limit = 3 * relative({n: rounded.gradients[n] for n in found}, exact.gradients)
        assert relative(found, exact.gradients) < limit < 1e-5
        names |= set(found)
    assert names >= exact.names


def holds_its_shares(name, feature):
    """Modules are replaced; weights and moments after the last step are slices of the whole."""
    strategy, want, operations = STRATEGIES[name], one_process(FEATURES[feature]), set()
    for rank, found in enumerate(launched(name)[feature, torch.float64, None]):
        assert strategy.modules.items() <= found.modules.items()
        operations |= set(found.operations)
        for kind, whole in want.state.items():
            scale = max(float(x.abs().max()) for x in whole.values())
            held = {names: x for (k, names), x in found.held.items() if k == kind}
            assert {n for names in held for n in names} == strategy.names(rank, want.names)
            for names, x in held.items():
                share = strategy.share(names, [whole[n] for n in names], rank)
                torch.testing.assert_close(x, share, rtol=1e-9, atol=1e-11 * scale)
    assert operations == set(strategy.operations)


def finds(name, fault):
    """What lies before the part that the fault is in has to be right."""
    found = launched(name)[fault.feature, torch.float64, fault.what]
    with pytest.raises(AssertionError, match=f"^{fault.part}"):
        compare(found, one_process(FEATURES[fault.feature]))


def matrix():
    """One strategy after the other, so that a worker of pytest-xdist launches few of them."""
    for name, strategy in STRATEGIES.items():
        for feature in FEATURES:
            for check in (equals_one_process, rounds_like_one_process, holds_its_shares):
                yield pytest.param(check, name, feature, id=f"{name}-{feature}-{check.__name__}")
        for fault in strategy.faults:
            yield pytest.param(finds, name, fault, id=f"{name}-finds {fault.what}")


@pytest.mark.slow
@pytest.mark.parametrize(("check", "name", "what"), list(matrix()))
def test_matrix(check, name, what):
    check(name, what)


@pytest.mark.parametrize(
    ("name", "ranks"), [("ddp", 2), ("zero-3", 2), ("tp", 2), ("context", 2), ("1f1b", 3)]
)
def test_a_quick_look(name, ranks):
    """One model with every feature."""
    feature = FEATURES["all at once"]
    jobs = [(feature, torch.float64, None)]
    ranks = launch(run, STRATEGIES[name], jobs, world_size=ranks, timeout=120)
    compare([found for (found,) in ranks], one_process(feature))


# -- weights that are late -----------------------------------------------------------------------

NO_STASH = "no stash"


@cache
def launched_late(name):
    """What ranks found by feature and fault."""
    features = [f for f in FEATURES if f not in late.IMPOSSIBLE[name]]
    keys = [(f, None) for f in features] + [("untied", fault) for fault in late.FAULTS]
    jobs = [(FEATURES[f], late.FAULTS.get(fault, {})) for f, fault in keys]

    def both():
        lost = late.run(name, [(FEATURES["untied"], {})], stash=False)
        return late.run(name, jobs) + lost

    found = launch(both, world_size=late.DEVICES, timeout=240)
    return dict(zip([*keys, ("untied", NO_STASH)], zip(*found, strict=True), strict=True))


def late_matrix():
    for name in late.IMPOSSIBLE:
        for feature in FEATURES:
            why = late.IMPOSSIBLE[name].get(feature)
            marks = [pytest.mark.skip(reason=why)] if why else []
            yield pytest.param(name, feature, None, id=f"{name}-{feature}", marks=marks)
        for fault in (NO_STASH, *late.FAULTS):
            yield pytest.param(name, "untied", fault, id=f"{name}-finds {fault}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "feature", "fault"), list(late_matrix()))
def test_late_weights_are_those_of_one_process_as_late(name, feature, fault):
    found = launched_late(name)[feature, fault]
    want = late.one_process(name, FEATURES[feature])
    if fault is None:
        late.compare(found, want)
        want = late.one_process(name, FEATURES[feature], late.UP_TO_DATE[name])
    with pytest.raises(AssertionError):
        late.compare(found, want)


# -- what cannot be ------------------------------------------------------------------------------

_TWO = config(n_kv_heads=2)
REFUSED = [
    (lambda: parallelize(LM(_TWO), world()), "4 query and 2 key/value heads cannot be divided"),
    (lambda: sequence_parallel(LM(_TWO), world()), "2 key/value heads cannot be divided"),
    (
        lambda: sequence_parallel(LM(config()), world())(batch(0)[0][:, :7]),
        "7 tokens cannot be divided",
    ),
    (
        lambda: parallelize_2d(LM(config(n_kv_heads=1)), Mesh({"row": 2, "column": 2})),
        "1 key/value heads cannot be divided",
    ),
    (
        lambda: parallelize_2d(LM(config(vocab_size=37)), Mesh({"row": 2, "column": 2})),
        r"axis 0 of \(37, 16\) must be a multiple of 2",
    ),
    (lambda: zigzag(7, world().size), "7 tokens are too few for two chunks on each of 4"),
    (lambda: schedule("interleaved", 4, 6, 2), "come in groups of stages=4, got 6"),
    (lambda: schedule("2bw", 4, 3), "2bw needs micro_batches >= stages, got 3 < 4"),
]


def refused():
    said = []
    for call, _ in REFUSED:
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    return said


@pytest.mark.slow
def test_what_cannot_be_is_refused():
    for said in launch(refused, world_size=4, timeout=120):
        for text, (_, match) in zip(said, REFUSED, strict=True):
            assert re.search(match, text), (text, match)
