"""What a kernel declares about itself: the work it does and the bytes it moves."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """FLOPs (a multiply-add counts 2) and bytes read from and written to main memory."""

    flops: int
    bytes: int
