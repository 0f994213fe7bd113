"""Tiles of a matrix product on one processor of a GPU: what fits, and how many bytes they cost.

A program computes one tile [bm, bn] of C [m, n] = A [m, k] B [k, n], walking along k in steps of
bk. Its running sums live in registers, the tiles of A and B that it needs next in shared memory.
Source of the limits: NVIDIA, CUDA C++ Programming Guide, technical specifications per compute
capability (8.0 and 9.0), 2025.
"""

from __future__ import annotations

from typing import NamedTuple

REGISTERS = 65_536  # of 32 bits, on one processor
THREADS = 2048
PROGRAMS = 32
MOST_REGISTERS = 255  # that one thread can have; what it needs beyond them is spilled
RESERVED = 1024  # bytes of shared memory that the system takes for each program


class Processor(NamedTuple):
    """One streaming multiprocessor, of which a GPU has about a hundred."""

    shared: int
    """bytes of shared memory"""
    wide_products: bool
    """whether matrix units read shared memory themselves (wgmma), from 4 warps and bm = 64 on"""

    @property
    def shared_by_one(self) -> int:
        """Bytes of it that a single program may take."""
        return self.shared - RESERVED


PROCESSORS = {
    "A100": Processor(164 * 1024, wide_products=False),
    "H100": Processor(228 * 1024, wide_products=True),
}


class Tiling(NamedTuple):
    """What `matmul` found."""

    shared: int
    """bytes of shared memory of one program"""
    registers: int
    """that one thread needs; above 255 it spills"""
    programs: int
    """that run on one processor at a time; 0 if not even one fits"""
    limit: str
    """what keeps it from being more: "shared memory", "registers", "threads" or "programs" """
    occupancy: float
    """share of the threads that a processor can hold"""
    bytes: int
    """loaded and stored by all programs together, from main memory or the cache before it"""
    intensity: float
    """FLOPs per byte"""


def matmul(
    sides: tuple[int, int, int],
    tile: tuple[int, int, int],
    stages: int = 3,
    warps: int = 4,
    itemsize: int = 2,
    registers: int | None = None,
    processor: str = "A100",
) -> Tiling:
    """The tiling `tile` = (bm, bn, bk) of a product with `sides` (m, n, k).

    Loaded are m k for each column of tiles and k n for each row of them, and C is stored once:
    (m k ⌈n/bn⌉ + k n ⌈m/bm⌉ + m n) · itemsize bytes, which is m n k (1/bm + 1/bn) and m n numbers
    where tiles fit. Shared memory holds (bm bk + bk bn) · itemsize bytes as often as tiles are on
    their way: `stages` times where matrix units read them there, once less where the tiles at work
    are in registers. `registers` of a thread are known to the compiler; without them, the running
    sums and 64 more are assumed.

    Raises ValueError for numbers below 1, and an unknown processor.

    >>> matmul((4096, 4096, 4096), (128, 128, 32), stages=4, warps=8).shared
    49152
    """
    if processor not in PROCESSORS:
        raise ValueError(f"processor {processor!r} must be one of {list(PROCESSORS)}")
    (m, n, k), (bm, bn, bk), sm = sides, tile, PROCESSORS[processor]
    registers = -(-bm * bn // (32 * max(warps, 1))) + 64 if registers is None else registers
    if min(*sides, *tile, stages, warps, itemsize, registers) < 1:
        given = f"{sides=}, {tile=}, {stages=}, {warps=}, {itemsize=}, {registers=}"
        raise ValueError(f"all numbers must be at least 1, got {given}")
    by_eights = -(-min(registers, MOST_REGISTERS) // 8) * 8
    direct = sm.wide_products and warps >= 4 and bm >= 64
    shared = max(stages - (not direct), 1) * (bm * bk + bk * bn) * itemsize
    room = {
        "shared memory": sm.shared // (shared + RESERVED),
        "registers": REGISTERS // (by_eights * 32 * warps),
        "threads": THREADS // (32 * warps),
        "programs": PROGRAMS,
    }
    limit = min(room, key=room.__getitem__)
    moved = (-(-n // bn) * m * k + -(-m // bm) * k * n + m * n) * itemsize
    occupancy = room[limit] * 32 * warps / THREADS
    return Tiling(shared, registers, room[limit], limit, occupancy, moved, 2 * m * n * k / moved)
