"""Sharded checkpoints: any layout to any other, whole or refused, and nothing that runs."""

import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from minillm.parallel import RankError, launch, storage
from minillm.parallel.checkpoint import (
    CheckpointError,
    Piece,
    checkpoints,
    flat_pieces,
    keep_newest,
    load,
    newest,
    rectangles,
    save,
    verify,
)
from minillm.parallel.storage import FORMAT


@given(st.lists(st.integers(1, 4), max_size=3), st.data())
def test_rectangles_cover_a_run_of_numbers_in_order(shape, data):
    n = math.prod(shape)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    numbers = torch.arange(n).view(shape)
    parts = list(rectangles(shape, start, stop))
    found = [
        numbers[tuple(slice(a, a + k) for a, k in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in parts
    ]
    assert torch.cat([numbers.new_zeros(0), *found]).tolist() == list(range(start, stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


SHAPE = (7, 5)
WHOLE = torch.arange(35.0).view(SHAPE)


def layout(kind, fill=True):
    """What this rank has of one tensor under several layouts, with the right numbers or none."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    i = dist.get_rank() if dist.is_initialized() else 0
    if kind == "copies":
        parts = [((0, 0), WHOLE.clone())]
    elif kind in ("rows", "columns"):
        axis = ("rows", "columns").index(kind)
        a, b = (SHAPE[axis] * k // n for k in (i, i + 1))
        parts = [((a, 0) if axis == 0 else (0, a), WHOLE.narrow(axis, a, b - a).clone())]
    else:
        k = -(-WHOLE.numel() // n)
        flat = WHOLE.flatten()[i * k : (i + 1) * k].clone()
        pieces = [*flat_pieces(Piece("w", SHAPE, (0, 0), WHOLE), flat, i * k)]
        parts = [(p.offsets, p.tensor) for p in pieces]
    found = [Piece("w", SHAPE, offsets, x if fill else x.zero_()) for offsets, x in parts]
    return [*found, Piece("scalar", (), (), torch.tensor(3.0 if fill else 0.0))]


KINDS = ("copies", "rows", "columns", "flat")


def write_all(folder):
    for kind in KINDS:
        save(folder / f"step_0000000{KINDS.index(kind)}", layout(kind), {"kind": kind})


def read_all(folder):
    for saved, here in itertools.product(KINDS, KINDS):
        pieces = layout(here, fill=False)
        assert load(folder / f"step_0000000{KINDS.index(saved)}", pieces) == {"kind": saved}
        for got, want in zip(pieces, layout(here), strict=True):
            assert torch.equal(got.tensor, want.tensor), (saved, here)
    return newest(folder).name


@pytest.mark.slow
def test_every_layout_loads_under_every_other_and_another_number_of_ranks(tmp_path):
    launch(write_all, tmp_path, world_size=3, timeout=120)
    assert launch(read_all, tmp_path, world_size=2, timeout=120) == ["step_00000003"] * 2
    assert read_all(tmp_path) == "step_00000003"
    # what several ranks hold was written by one of them
    for path in checkpoints(tmp_path):
        payload = sum(
            math.prod(sizes)
            for saved in verify(path)["tensors"].values()
            for _, sizes, _ in saved["chunks"]
        )
        assert payload == 36
        assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def one(folder, number, value=1.0):
    save(folder / f"step_{number:08d}", [Piece("w", (3,), (0,), torch.full((3,), value))], {})


def torn(path):
    file = path / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def changed(path):
    file = path / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def edited(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"w"', '"v"'))


def cut(path):
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-20])


def without(path):
    (path / "rank_0.safetensors").unlink()


def foreign(path):
    (path / "manifest.json").write_text(json.dumps({"files": {}, "tensors": {}}))


def leading_out(path):
    """With a right seal: who made it could read any file of that kind."""
    file = path / "manifest.json"
    body = file.read_text().splitlines()[1].replace("rank_0", "../rank_0")
    seal = {"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    file.write_text(f"{json.dumps(seal)}\n{body}\n")


FAULTS = {
    leading_out: "leads to files that no rank wrote",
    torn: "bytes of",
    changed: "SHA-256 differs",
    edited: "torn or changed",
    cut: "torn or changed",
    without: "No such file",
    foreign: "does not begin as",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_is_refused_and_the_previous_one_taken(tmp_path, fault):
    one(tmp_path, 10), one(tmp_path, 20)
    assert newest(tmp_path).name == "step_00000020"
    fault(tmp_path / "step_00000020")
    with pytest.warns(UserWarning, match=f"{FAULTS[fault]}.*going back to step_00000010"):
        assert newest(tmp_path).name == "step_00000010"
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="is refused"):
        load(tmp_path / "step_00000020", [Piece("w", (3,), (0,), x)])
    assert not x.any()
    fault(tmp_path / "step_00000010")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        newest(tmp_path)


class Bomb:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_not_read(tmp_path):
    """The file that DCP's own reader would run."""
    trace = tmp_path / "trace"
    one(tmp_path, 10)
    path = tmp_path / "step_00000010"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    load(path, [Piece("w", (3,), (0,), torch.zeros(3))])
    shutil.copy(path / ".metadata", path / "rank_0.safetensors")
    with pytest.raises(ValueError, match="is refused"):
        load(path, [Piece("w", (3,), (0,), torch.zeros(3))])
    assert not trace.exists()
    pickle.loads((path / ".metadata").read_bytes()).close()  # the control: it does
    assert trace.exists()


def test_another_model_is_named_and_nothing_is_changed(tmp_path):
    one(tmp_path, 10)
    x, y = torch.zeros(3), torch.zeros(4)
    pieces = [Piece("w", (3,), (0,), x), Piece("u", (4,), (0,), y)]
    with pytest.raises(CheckpointError, match=r"rank 0: .* of another model: u is not in it"):
        load(tmp_path / "step_00000010", pieces)
    with pytest.raises(CheckpointError, match=r"w is \(3,\) in it, \(4,\) here"):
        load(tmp_path / "step_00000010", [Piece("w", (4,), (0,), y)])
    assert not x.any() and not y.any()


def test_half_a_tensor_is_found_out_at_loading(tmp_path):
    path = tmp_path / "step_00000001"
    save(path, [Piece("w", (4,), (0,), torch.ones(2))])
    with pytest.raises(CheckpointError, match="w: 2 of 4 numbers are in it"):
        load(path, [Piece("w", (4,), (0,), torch.zeros(4))])


def overlapping(folder):
    start = dist.get_rank()  # places 0 to 2 and 1 to 3 of four
    save(folder / "step_00000001", [Piece("w", (4,), (start,), torch.ones(3))])


def test_overlapping_pieces_are_refused(tmp_path):
    with pytest.raises(RankError, match="overlapping chunks"):
        launch(overlapping, tmp_path, world_size=2, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_old_ones_go(tmp_path):
    for number in (8, 9, 10, 11):
        one(tmp_path, number)
    one(tmp_path, 10, value=2.0)
    x = torch.zeros(3)
    load(tmp_path / "step_00000010", [Piece("w", (3,), (0,), x)])
    assert x.tolist() == [2.0] * 3
    (tmp_path / ".step_00000012.new").mkdir()  # a save that was killed
    one(tmp_path, 12)
    assert [p.name[-2:] for p in checkpoints(tmp_path)] == ["08", "09", "10", "11", "12"]
    keep_newest(tmp_path, 2, tmp_path / "step_00000010")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000009", "step_00000010"]


def killed_while_writing(folder):
    """Rank 1 is killed when its file of the second checkpoint is half written."""
    one_of_two = [Piece("w", (4,), (2 * dist.get_rank(),), torch.ones(2))]
    save(folder / "step_00000001", one_of_two)

    def half(tensors, file):
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        storage.save_file = half
    save(folder / "step_00000002", one_of_two)


def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(RankError, match=r"rank 1 failed.*\n.*killed by signal 9"):
        launch(killed_while_writing, tmp_path, world_size=2, timeout=120)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000001"]
    assert newest(tmp_path).name == "step_00000001"
    one(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.skipif(os.name != "posix", reason="limits on files are POSIX")
def test_one_process_with_a_full_disk_keeps_what_it_had(tmp_path):
    import resource

    one(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match=r"rank 0: .*(too large|27)"):
            one(tmp_path, 1, value=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path).name == "step_00000001"
