"""What fits on a processor of a GPU: against hand counts, brute force and the compiler."""

import itertools

import pytest

from kernels import runtime
from kernels.compile import report
from kernels.matmul import CONFIGS, loads
from minillm.accounting import HARDWARE, occupancy
from minillm.accounting.occupancy import PROCESSORS, matmul

BIG = (4096, 4096, 4096)


def bytes_by_brute_force(sides, tile, itemsize):
    """Add up what each program loads, step by step, and stores."""
    (m, n, k), (bm, bn, bk) = sides, tile
    numbers = 0
    for i, j in itertools.product(range(0, m, bm), range(0, n, bn)):
        rows, columns = min(bm, m - i), min(bn, n - j)
        for start in range(0, k, bk):
            numbers += (rows + columns) * min(bk, k - start)
        numbers += rows * columns
    return numbers * itemsize


@pytest.mark.parametrize("sides", [(64, 64, 64), (100, 70, 50), (1, 1, 1), (33, 128, 7)])
@pytest.mark.parametrize("tile", [(16, 16, 16), (32, 64, 32), (8, 128, 16)])
def test_bytes_are_those_of_every_program_added_up(sides, tile):
    found = matmul(sides, tile, itemsize=4)
    assert found.bytes == bytes_by_brute_force(sides, tile, 4)
    assert found.bytes - 4 * sides[0] * sides[1] == loads(*sides, *tile[:2], 4)
    assert found.intensity == pytest.approx(2 * sides[0] * sides[1] * sides[2] / found.bytes)


def test_a_square_tile_does_half_its_side_in_flops_per_byte():
    """2 b² k FLOPs for 2 b k numbers of two bytes; C's own bytes are few when k is long."""
    for side in (16, 64, 256):
        found = matmul((1024, 1024, 2**20), (side, side, 32))
        assert found.intensity == pytest.approx(side / 2, rel=0.01)


def test_a_hand_count():
    """A100, 128 x 128 x 32 in bf16: 16 kB a stage; three stages keep two in shared memory."""
    found = matmul(BIG, (128, 128, 32), stages=3, warps=8, registers=128)
    assert found.shared == 2 * (128 * 32 + 32 * 128) * 2 == 32_768
    assert found.programs == 2 and found.limit == "registers"  # 65,536 / (128 · 256)
    assert found.occupancy == 2 * 256 / 2048
    hopper = matmul(BIG, (128, 128, 32), stages=3, warps=8, registers=128, processor="H100")
    assert hopper.shared == 3 * 16_384


@pytest.mark.parametrize(
    ("options", "limit", "programs"),
    [
        ({"tile": (128, 128, 64), "stages": 4, "warps": 4, "registers": 64}, "shared memory", 1),
        ({"tile": (16, 16, 16), "stages": 1, "warps": 4, "registers": 128}, "registers", 4),
        ({"tile": (16, 16, 16), "stages": 1, "warps": 16, "registers": 16}, "threads", 4),
        ({"tile": (16, 16, 16), "stages": 1, "warps": 1, "registers": 16}, "programs", 32),
        ({"tile": (256, 256, 64), "stages": 4, "warps": 8, "registers": 64}, "shared memory", 0),
    ],
)
def test_each_limit_can_be_the_one(options, limit, programs):
    found = matmul(BIG, **options)
    assert (found.limit, found.programs) == (limit, programs)
    assert found.occupancy == programs * 32 * options["warps"] / 2048


def test_the_system_takes_its_share_of_each_program():
    """41 kB would fit four times into 164 kB, 42 kB fit three times."""
    found = matmul(BIG, (256, 256, 41), stages=2, registers=16)
    assert (found.shared, found.programs) == (41 * 1024, 3)


def test_registers_are_handed_out_by_eights():
    assert matmul(BIG, (16, 16, 16), registers=65).programs == 65_536 // (72 * 128)
    assert matmul(BIG, (16, 16, 16), registers=72).programs == 65_536 // (72 * 128)
    assert matmul(BIG, (16, 16, 16), registers=73).programs == 65_536 // (80 * 128)


def test_what_a_thread_cannot_have_shows():
    """A thread gets 255 registers at most; the number says how many it would need."""
    found = matmul(BIG, (256, 256, 32), stages=2, warps=8)
    assert found.registers == 256 * 256 // 256 + 64 > occupancy.MOST_REGISTERS
    assert found.programs == 1


def test_limits_are_those_of_the_published_tables():
    """gpus.csv holds memory and first-level cache together; a program leaves 1 kB to the system."""
    assert set(PROCESSORS) <= set(HARDWARE)
    from kernels.compile import SHARED_LIMIT

    assert PROCESSORS["A100"].shared_by_one == SHARED_LIMIT["sm_80"]
    assert PROCESSORS["H100"].shared_by_one == SHARED_LIMIT["sm_90"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sides": (0, 1, 1)}, "at least 1"),
        ({"tile": (16, 0, 16)}, "at least 1"),
        ({"stages": 0}, "stages=0"),
        ({"warps": 0}, "warps=0"),
        ({"registers": 0}, "registers=0"),
        ({"processor": "B200"}, "'B200' must be one of"),
    ],
)
def test_bad_input_says_what_is_wrong(options, says):
    with pytest.raises(ValueError, match=says):
        matmul(**{"sides": BIG, "tile": (16, 16, 16)} | options)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(runtime.MODE == "absent", reason="Triton is not installed")
def test_shared_memory_is_what_the_compiler_reserves():
    default = CONFIGS[0]
    tile = tuple(default.kwargs[f"BLOCK_{side}"] for side in "MNK")
    rows = report(["matmul bf16", "matmul fp32 tf32"], ["sm_80", "sm_90"])
    assert len(rows) == 4 and not any(row.error for row in rows)
    for row in rows:
        processor = {"sm_80": "A100", "sm_90": "H100"}[row.target]
        itemsize = 2 if "bf16" in row.kernel else 4
        found = matmul(
            BIG, tile, default.num_stages, default.num_warps, itemsize, row.registers, processor
        )
        assert found.shared == row.shared, (row.kernel, row.target)
        assert found.programs >= 1
