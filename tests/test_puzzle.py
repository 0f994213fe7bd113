"""Kernels of notebook cells, the record of their accesses, and the picture of what is wrong."""

import linecache

import matplotlib
import numpy as np
import pytest
import torch

from kernels import add, rms_norm, runtime
from kernels.runtime import tl, triton
from minillm.teach import puzzle, show
from minillm.teach.kernel_cell import kernel, record

matplotlib.use("Agg")
interpreted = pytest.mark.skipif(runtime.MODE != "interpreter", reason="needs the interpreter")
pytestmark = pytest.mark.skipif(runtime.MODE == "absent", reason="Triton is not installed")
DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
can_run = pytest.mark.skipif(runtime.MODE not in ("gpu", "interpreter"), reason="nothing can run")

if runtime.MODE != "absent":
    FACTOR = tl.constexpr(3)
    OUTSIDE = 7

    @kernel
    def times(x):
        """Used by `scale`."""
        return x * FACTOR

    @kernel
    def scale(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        """out = 3 x."""
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place, mask=place < n)
        tl.store(out_ptr + place, times(x), mask=place < n)

    @kernel
    def no_mask(x_ptr, out_ptr, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + place, tl.load(x_ptr + place))

    @kernel
    def unfinished(x_ptr):
        raise NotImplementedError("write this kernel")

    @kernel
    def count(x_ptr, total_ptr):
        tl.atomic_add(total_ptr, tl.load(x_ptr + tl.program_id(0)))


def run_scale(n, block, dtype=torch.float32):
    x = torch.arange(n, device=DEVICE).to(dtype)
    out = torch.full_like(x, torch.nan)
    scale[(triton.cdiv(n, block),)](x, out, n, BLOCK=block)
    return x, out


# --- kernels of cells


@can_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_kernel_runs_and_calls_another(dtype):
    x, out = run_scale(41, 16, dtype)
    assert torch.equal(out, (x.float() * 3).to(dtype))


@can_run
def test_a_kernel_leaves_nothing_in_the_module_that_defines_it():
    before = set(globals())
    run_scale(5, 8)
    assert set(globals()) == before


def test_its_source_can_be_shown():
    assert show(scale).code.startswith("@kernel\ndef scale(x_ptr")


def test_names_from_outside_are_refused_where_the_kernel_is_defined():
    with pytest.raises(ValueError, match="'OUTSIDE', which is none of its arguments and"):

        @kernel
        def reads_a_global(x_ptr):
            tl.store(x_ptr, OUTSIDE)

    with pytest.raises(ValueError, match="'torch'"):

        @kernel
        def uses_torch(x_ptr):
            return torch.zeros(3)


def test_names_of_its_own_are_not_taken_for_outside_ones():
    @kernel
    def fine(x_ptr, n, BLOCK: tl.constexpr):
        OUTSIDE = 3  # a local name hides the module's
        for i in range(n):
            tl.store(x_ptr + i, OUTSIDE + max(i, 1))

    assert fine.fn.__name__ == "fine"


def test_a_function_without_source_is_refused():
    space = {"tl": tl}
    exec("def f(x_ptr):\n    pass", space)
    with pytest.raises(OSError):
        kernel(space["f"])


def test_two_versions_of_a_kernel_keep_their_own_source():
    """A cell that is run again after an edit defines a kernel of the same name."""

    @kernel
    def version(x_ptr):
        tl.store(x_ptr, 1.0)

    first = version

    @kernel
    def version(x_ptr):
        tl.store(x_ptr, 2.0)

    names = {k.jitted.fn.__code__.co_filename for k in (first, version)}
    texts = {"".join(linecache.getlines(name)) for name in names}
    assert len(names) == len(texts) == 2
    if runtime.MODE in ("gpu", "interpreter"):
        x = torch.zeros(1, device=DEVICE)
        first[(1,)](x)
        assert x.item() == 1.0
        version[(1,)](x)
        assert x.item() == 2.0


@interpreted
def test_what_a_kernel_raises_arrives_as_it_was_raised():
    with pytest.raises(NotImplementedError, match="write this kernel"):
        unfinished[(2,)](torch.zeros(4))


@interpreted
def test_an_access_beyond_a_tensor_is_stopped_before_it_happens():
    x, memory = torch.ones(100), torch.zeros(128)
    with pytest.raises(IndexError, match=r"program \(3, 0, 0\) wants to load x_ptr .* 96 to 127"):
        no_mask[(4,)](x, memory, BLOCK=32)
    with pytest.raises(IndexError, match="store out_ptr"):
        no_mask[(4,)](torch.ones(128), memory[:100], BLOCK=32)
    assert (memory[:96] == 1).all() and (memory[96:] == 0).all()
    no_mask[(4,)](torch.ones(128), memory, BLOCK=32)  # with enough room it is fine
    assert (memory == 1).all()


@interpreted
def test_an_access_before_a_tensor_is_stopped_too():
    @kernel
    def before(x_ptr):
        tl.store(x_ptr - 1, 1.0)

    memory = torch.zeros(64)
    with pytest.raises(IndexError, match="-1"):
        before[(1,)](memory[1:])
    assert (memory == 0).all()


# --- the record


@interpreted
def test_the_record_knows_program_tensor_places_and_bytes():
    with record() as tape:
        run_scale(41, 16)
    assert tape.launches == [("scale", (3,))]
    loads = tape.select("load", "x_ptr")
    assert [a.program for a in loads] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert np.array_equal(np.concatenate([a.places for a in loads]), np.arange(41))
    assert [a.lanes for a in loads] == [16, 16, 16] and loads[-1].bytes == 4 * 9
    assert tape.bytes("load") == tape.bytes("store", "out_ptr") == 4 * 41
    assert tape.bytes() == 2 * 4 * 41 and tape.select("store", "x_ptr") == []


@interpreted
def test_places_of_a_part_of_a_tensor_count_from_its_first_number():
    with record(strict=True) as tape:
        no_mask[(1,)](torch.ones(64)[32:], torch.zeros(64)[16:], BLOCK=32)
    assert [(a.places[0], a.places[-1]) for a in tape.accesses] == [(0, 31), (0, 31)]


@interpreted
def test_kernels_of_the_package_are_recorded_and_move_what_they_declare():
    x = torch.randn(3, 700)
    with record(strict=True) as tape:
        add.add(x, x)
    assert tape.bytes() == add.cost(2100).bytes and tape.launches == [("_add", (3,))]
    with record(strict=True) as tape:
        rms_norm.rms_norm(x[:1], torch.ones(700))
    assert tape.bytes() == rms_norm.cost(1, 700).bytes


@interpreted
def test_atomics_are_seen():
    total = torch.zeros(1)
    with record() as tape:
        count[(5,)](torch.ones(5), total)
    assert total.item() == 5 and len(tape.select("atomic", "total_ptr")) == 5


@interpreted
def test_records_nest_and_end():
    with record() as outer:
        with record() as inner:
            run_scale(8, 8)
        run_scale(8, 8)
    run_scale(8, 8)
    assert (len(inner.accesses), len(outer.accesses)) == (2, 4)
    assert (len(inner.launches), len(outer.launches)) == (1, 2)
    with pytest.raises(ZeroDivisionError), record() as broken:
        raise ZeroDivisionError
    run_scale(8, 8)
    assert broken.accesses == []


@interpreted
def test_a_grid_may_be_a_function():
    x, out = torch.ones(20), torch.zeros(20)
    with record() as tape:
        scale[lambda meta: (triton.cdiv(20, meta["BLOCK"]),)](x, out, 20, BLOCK=8)
    assert tape.launches == [("scale", (3,))] and (out == 3).all()


# --- the picture


def test_numbers_are_judged():
    want = torch.tensor([1.0, 2.0, torch.nan, 4.0, torch.inf])
    got = torch.tensor([1.0, 2.1, torch.nan, torch.nan, torch.inf])
    assert puzzle.judge(got, want).tolist() == [0, 1, 0, 2, 0]
    assert puzzle.judge(got, want, rtol=0.1).tolist() == [0, 0, 0, 2, 0]
    with pytest.raises(AssertionError, match="shape"):
        puzzle.judge(got, want[:4])


def drawn(figure):
    (image,) = figure.axes[0].get_images()
    plot = figure.axes[0]
    lines = {len(c.get_segments()) for c in plot.collections}
    return np.ma.filled(image.get_array().astype(float), np.nan), lines


def test_a_vector_is_drawn_in_rows_of_one_program():
    want = torch.zeros(11)
    got = want.clone()
    got[6], got[9] = 1.0, torch.nan
    picture, _ = drawn(puzzle.compare(got, want, 4))
    expected = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 2, 0, np.nan]])
    assert np.array_equal(picture, expected, equal_nan=True)


def test_a_matrix_is_drawn_with_its_tiles():
    want = torch.zeros(2, 3, 8)
    got = want.clone()
    got[1, 2, 7] = 5.0
    picture, lines = drawn(puzzle.compare(got, want, (2, 4)))
    assert picture.shape == (6, 8) and picture.sum() == picture[5, 7] == 1
    assert lines == {2, 3}  # frames begin at columns 0, 4 and at rows 0, 2, 4


def test_nothing_is_drawn_when_all_is_right(monkeypatch):
    shown = []
    monkeypatch.setattr(puzzle.plt, "show", lambda: shown.append(True))
    puzzle.expect(torch.ones(3), torch.ones(3, dtype=torch.float64), "the same", 2)
    assert shown == []
    with pytest.raises(AssertionError, match=r"the second(.|\n)*1 of 3 values differ"):
        puzzle.expect(torch.tensor([1.0, 9.0, 1.0]), torch.ones(3), "the second", 2)
    assert shown == [True]
    matplotlib.pyplot.close("all")
