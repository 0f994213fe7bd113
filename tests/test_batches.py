"""Packing against a stream built by hand, the loader against itself, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.batches import (
    document_mask,
    pack,
    packing_waste,
    pad,
    padding_waste,
    random_batches,
    stack,
)
from minillm.data.shards import Shard, ShardWriter

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = st.lists(st.lists(st.integers(1, 99), max_size=12), max_size=8)


@given(DOCUMENTS, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_packing_is_the_stream_cut_into_rows(documents, seq_len):
    stream = [token for d in documents for token in [*d, 0]]
    numbers = [n for n, d in enumerate(documents) for _ in [*d, 0]]
    rows = list(pack(documents, seq_len, eos=0))
    assert len(rows) == -(-len(stream) // seq_len)
    assert all(len(getattr(r, f)) == seq_len for r in rows for f in r.__annotations__)
    tokens = [t for r in rows for t in r.tokens.tolist()]
    assert tokens[: len(stream)] == stream  # nothing lost, nothing twice
    assert tokens[len(stream) :] == [0] * (len(tokens) - len(stream))
    assert [t for r in rows for t in r.targets.tolist()][: len(stream) - 1] == stream[1:]
    ids = [t for r in rows for t in r.documents.tolist()]
    assert ids == numbers + [-1] * (len(ids) - len(numbers))
    loss = [t for r in rows for t in r.loss_mask.tolist()]
    same = [a == b for a, b in zip(numbers, [*numbers[1:], None], strict=False)]
    assert loss == same[: len(numbers)] + [False] * (len(loss) - len(numbers))
    assert sum(loss) == sum(len(d) for d in documents)  # each token once, the end marker included
    for row in rows:
        for i, position in enumerate(row.positions.tolist()):
            begins = i == 0 or row.documents[i] != row.documents[i - 1]
            assert position == (0 if begins else row.positions[i - 1] + 1)


def test_packing_streams():
    def endless():
        while True:
            yield [1, 2, 3]

    rows = pack(endless(), 5, eos=0)
    assert [next(rows).tokens.tolist() for _ in range(3)] == [
        [1, 2, 3, 0, 1],
        [2, 3, 0, 1, 2],
        [3, 0, 1, 2, 3],
    ]
    with pytest.raises(ValueError, match="seq_len=0"):
        next(pack([[1]], 0, eos=0))


def test_document_mask_against_loops():
    batch = stack(list(pack([[1, 2], [3, 4, 5, 6], [7]], 5, eos=0)))
    mask = document_mask(batch.documents)
    assert mask.dtype == torch.bool and mask.shape == (2, 5, 5)
    for b in range(2):
        for q in range(5):
            for k in range(5):
                same = batch.documents[b, q] == batch.documents[b, k]
                assert mask[b, q, k] == bool(same and k <= q)
    assert mask.diagonal(dim1=-2, dim2=-1).all()  # no row is empty, so no softmax gives NaN
    with pytest.raises(ValueError, match="no rows"):
        stack([])


def test_padding():
    tokens, mask = pad([[1, 2, 3], [], [4]], pad_id=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    tokens, mask = pad([[1, 2, 3], [4]], pad_id=9, seq_len=2)
    assert tokens.tolist() == [[1, 2], [4, 9]]
    assert tokens.dtype == torch.int64
    assert pad([], pad_id=0)[0].shape == (0, 0)
    with pytest.raises(ValueError, match="seq_len=0"):
        pad([[1]], pad_id=0, seq_len=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_waste_is_what_the_layouts_really_waste(lengths, seq_len):
    documents = [[1] * n for n in lengths]
    _, mask = pad(documents, pad_id=0, seq_len=seq_len)
    waste = padding_waste(lengths, seq_len)
    assert waste.empty == pytest.approx(1 - mask.sum().item() / mask.numel(), abs=1e-12)
    assert waste.lost == pytest.approx(1 - mask.sum().item() / sum(lengths), abs=1e-12)
    rows = stack(list(pack(documents, seq_len, eos=0)))
    waste = packing_waste(lengths, seq_len)
    empty = (rows.documents < 0).float().mean().item()
    assert waste.empty == pytest.approx(empty, abs=1e-6) and waste.lost == 0


def test_random_batches_are_rows_of_the_text_and_cover_it():
    tokens = np.arange(50, dtype=np.uint16)
    batches = random_batches(tokens, batch=64, seq_len=8, seed=0)
    seen = set()
    for _ in range(20):
        inputs, targets = next(batches)
        assert inputs.shape == targets.shape == (64, 8) and inputs.dtype == torch.int64
        assert (targets == inputs + 1).all()
        assert (inputs[:, 1:] == inputs[:, :-1] + 1).all()
        seen |= set(inputs[:, 0].tolist())
    assert seen == set(range(42))  # every start that leaves room for the last target, no other


def test_seeds_differ_and_repeat():
    def first(seed):
        return [x.tolist() for x, _ in [next(random_batches(range(999), 4, 8, seed))]]

    assert first(0) == first(0) != first(1)


def test_state_continues_exactly_and_refuses_another_sequence():
    whole = random_batches(range(500), 3, 7, seed=5)
    want = [next(whole)[0].tolist() for _ in range(10)]
    half = random_batches(range(500), 3, 7, seed=5)
    got = [next(half)[0].tolist() for _ in range(4)]
    rest = random_batches(range(500), 3, 7, seed=5)
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))  # survives a text file
    assert got + [next(rest)[0].tolist() for _ in range(6)] == want
    for other in (
        random_batches(range(500), 3, 7, seed=6),
        random_batches(range(500), 4, 7, seed=5),
        random_batches(range(500), 3, 8, seed=5),
        random_batches(range(501), 3, 7, seed=5),
    ):
        with pytest.raises(ValueError, match="in the saved state"):
            other.load_state_dict(half.state_dict())
    with pytest.raises(ValueError, match="step=-1"):
        rest.load_state_dict({**half.state_dict(), "step": -1})


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="8 tokens are too few for a row of 8"):
        random_batches(range(8), 1, 8, seed=0)
    next(random_batches(range(9), 1, 8, seed=0))
    with pytest.raises(ValueError, match="batch=0"):
        random_batches(range(9), 0, 8, seed=0)


def test_batches_from_a_memory_map(tmp_path):
    with ShardWriter(tmp_path / "x") as out:
        out.add(list(range(300)))
    mapped = random_batches(Shard(tmp_path / "x").tokens, 2, 5, seed=1)
    plain = random_batches(range(300), 2, 5, seed=1)
    for _ in range(5):
        assert torch.equal(next(mapped)[0], next(plain)[0])


WORKER = """
import json, os, sys
from minillm.data.batches import random_batches
log, state = sys.argv[1:]
batches = random_batches(range(10_000), batch=2, seq_len=4, seed=3)
if os.path.exists(state):
    batches.load_state_dict(json.load(open(state)))
while True:
    rows, _ = next(batches)
    with open(log, "a") as out:
        print(json.dumps([batches.step, rows.tolist()]), file=out)
    with open(state + ".part", "w") as out:
        json.dump(batches.state_dict(), out)
    os.replace(state + ".part", state)
"""


@pytest.mark.slow
def test_a_killed_loader_continues_exactly(tmp_path):
    """kill -9 at a random moment, twice; each batch in the log must be the one of its step."""
    log, state = tmp_path / "log", tmp_path / "state"
    for turn in range(1, 3):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(log), str(state)], cwd=ROOT)
        while not log.exists() or log.read_bytes().count(b"\n") < 40 * turn:
            assert worker.poll() is None
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    lines = log.read_bytes().split(b"\n")
    whole = [line for line in lines if line.startswith(b"[") and line.endswith(b"]]]")]
    entries = [json.loads(line) for line in whole]
    assert len(entries) >= 80
    reference = random_batches(range(10_000), batch=2, seq_len=4, seed=3)
    want = {reference.step: None}
    while reference.step < max(step for step, _ in entries):
        rows, _ = next(reference)
        want[reference.step] = rows.tolist()
    assert all(want[step] == rows for step, rows in entries)
    assert {step for step, _ in entries} == set(range(1, len(want)))  # no step was skipped
    assert len(entries) - len(want) + 1 <= 2  # at most the batch in flight is repeated, per kill
