"""Numbers that cross between a small fast memory and a large slow one, counted block by block.

The model: arithmetic happens only on numbers in fast memory, which has room for m of them, and is
free; what costs is each number read from or written to slow memory (HBM on a GPU). The algorithms
below are the loops of attention with the arithmetic left out: every load, every result that needs
room and every store is announced to a `FastMemory`, which counts and refuses what does not fit.

Source: Hong and Kung, I/O Complexity: The Red-Blue Pebble Game, 1981; Dao et al., FlashAttention:
Fast and Memory-Efficient Exact Attention with IO-Awareness, 2022, section 3.2.
"""

# n tokens (queries and keys), d head width, m numbers that fit into fast memory

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple


class Traffic(NamedTuple):
    """Numbers read from and written to slow memory, and the most that fast memory held."""

    read: int
    written: int
    peak: int

    @property
    def total(self) -> int:
        """Both directions together: the "HBM accesses" of the literature."""
        return self.read + self.written


class FastMemory:
    """Room for `capacity` numbers; counts what crosses, and refuses what does not fit.

    >>> fast = FastMemory(10)
    >>> fast.load(x=4)
    >>> fast.make(y=4)  # computed here: takes room, crosses nothing
    >>> fast.store("y")
    >>> fast.traffic
    Traffic(read=4, written=4, peak=8)
    >>> fast.load(z=3)
    Traceback (most recent call last):
        ...
    ValueError: m=10 numbers of fast memory cannot hold {'x': 4, 'y': 4, 'z': 3}
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, {}
        self.read = self.written = self.peak = 0

    def load(self, **numbers: int) -> None:
        """Bring so many numbers in under each name."""
        self.make(**numbers)
        self.read += sum(numbers.values())

    def make(self, **numbers: int) -> None:
        """Reserve room for what is computed here; the same name again replaces what it held."""
        self.held.update(numbers)
        needed = sum(self.held.values())
        if needed > self.capacity:
            raise ValueError(f"m={self.capacity} numbers of fast memory cannot hold {self.held}")
        self.peak = max(self.peak, needed)

    def store(self, *names: str) -> None:
        """Write out what is held under these names; it stays here, too."""
        self.written += sum(self.held[name] for name in names)

    def clear(self) -> None:
        """Give all room back."""
        self.held.clear()

    @property
    def traffic(self) -> Traffic:
        """What has crossed so far."""
        return Traffic(self.read, self.written, self.peak)


def _cut(total: int, block: int) -> Iterator[range]:
    return (range(i, min(i + block, total)) for i in range(0, total, block))


def _product(fast: FastMemory, rows: int, inner: int, cols: int) -> None:
    """[rows, inner] times [inner, cols]: a tile of the result stays while its factors stream by."""
    wide = min(cols, max(1, isqrt(fast.capacity + 1) - 1))
    high = max(1, (fast.capacity - wide) // (wide + 1))
    for i in _cut(rows, high):
        for j in _cut(cols, wide):
            fast.make(tile=len(i) * len(j))
            for _ in range(inner):
                fast.load(column=len(i), row=len(j))
            fast.store("tile")
            fast.clear()


def standard(n: int, d: int, m: int) -> Traffic:
    """Three steps, each through slow memory: S = Q Kᵀ, P = softmax(S) by rows, O = P V.

    The products keep the squarest tile of their result that fits. The softmax keeps a row, if one
    fits, or reads it twice: for its maximum and sum, then for the weights.
    """
    if min(n, d) < 1 or m < 3:
        raise ValueError(f"n={n} and d={d} must be at least 1, and m={m} at least 3")
    fast = FastMemory(m)
    _product(fast, n, d, n)
    for _ in range(n):
        fast.make(statistics=2)
        for again in range(1 if n + 2 <= m else 2):
            for part in _cut(n, m - 2):
                fast.load(scores=len(part))
                if again or n + 2 <= m:
                    fast.store("scores")
        fast.clear()
    _product(fast, n, n, d)
    return fast.traffic


def tiles(n: int, d: int, m: int, outer: str = "queries") -> tuple[int, int]:
    """Rows of Q and rows of K in a block: those that make `flash` move least within m numbers.

    The side of the outer loop takes all the room, since the other side is read again for each of
    its blocks. Raises ValueError where not even one row each of q, k, v and output fits.

    >>> tiles(1024, 64, 16384)
    (124, 1)
    """
    if outer not in ("queries", "keys") or min(n, d) < 1:
        raise ValueError(f"outer={outer!r} is 'queries' or 'keys', n={n} and d={d} at least 1")
    if m < 4 * d + 3:  # with a maximum, a sum and a score
        raise ValueError(f"m={m} cannot hold a row each of q, k, v and output: {4 * d + 3} numbers")
    if outer == "queries":
        return min(n, (m - 2 * d) // (2 * d + 3)), 1
    return 1, min(n, (m - 2 * d - 2) // (2 * d + 1))


def flash(
    n: int,
    d: int,
    m: int,
    outer: str = "queries",
    block: tuple[int, int] | None = None,
    causal: bool = False,
) -> Traffic:
    """Blockwise attention: the score matrix is in fast memory only, a block at a time.

    `outer="queries"`: a block of queries stays with its output, keys and values stream by
    (FlashAttention-2). `outer="keys"`: keys and values stay, queries and unfinished outputs stream
    by (FlashAttention). `block` is rows of queries and of keys, by default `tiles`; with `causal`
    blocks of the future are skipped. Raises ValueError when a block does not fit.

    Source: Dao et al., FlashAttention, 2022, algorithm 1; Dao, FlashAttention-2, 2023.
    """
    best = tiles(n, d, m, outer)
    high, wide = best if block is None else block
    if min(high, wide) < 1:
        raise ValueError(f"block={block} must be at least (1, 1)")
    fast = FastMemory(m)
    if outer == "queries":
        for i in _cut(n, high):
            fast.load(q=len(i) * d)
            fast.make(out=len(i) * d, statistics=2 * len(i))
            for j in _cut(n, wide):
                if not causal or j[0] <= i[-1]:
                    fast.load(k=len(j) * d, v=len(j) * d)
                    fast.make(scores=len(i) * len(j))
            fast.make(statistics=len(i))  # now the log-sum-exp, which the backward pass needs
            fast.store("out", "statistics")
            fast.clear()
        return fast.traffic
    for j in _cut(n, wide):
        fast.load(k=len(j) * d, v=len(j) * d)
        for i in _cut(n, high):
            if not causal or j[0] <= i[-1]:
                bring = fast.load if j[0] else fast.make  # the first visit starts from zeros
                fast.load(q=len(i) * d)
                bring(out=len(i) * d, statistics=2 * len(i))
                fast.make(scores=len(i) * len(j))
                fast.store("out", "statistics")
        fast.clear()
    return fast.traffic
