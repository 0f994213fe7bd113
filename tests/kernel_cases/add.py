"""Vector addition."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _two(shape, scale=1.0, strided_x=False):
    def inputs(rng):
        x, y = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale for _ in range(2))
        return {"x": strided(x) if strided_x else x, "y": y}

    return inputs


# one rounding: half a unit of the result, and the reference's inputs are the rounded ones
CASES = [
    *(Case(f"{n} numbers", "add", _two((n,)), ("x", "y"), slack=1) for n in shapes(1024, 1025)),
    Case("a matrix", "add", _two((3, 700)), ("x", "y"), slack=1),
    Case("large numbers", "add", _two((41,), 1e4), ("x", "y"), slack=1),
    Case("strided", "add", _two((5, 41), strided_x=True), ("x", "y"), slack=1),
    Case("no rows", "add", _two((0, 8)), ("x", "y")),
]

FAULTS = [
    Fault("the next block starts too late", "* BLOCK + tl", "* (BLOCK + 1) + tl", "1025 numbers"),
    Fault("one number too few", "place < n", "place < n - 1", "3 numbers"),
    Fault("one operand twice", "x + y, mask", "x + x, mask", "1 numbers"),
    Fault("strides ignored", "x, y = x.contiguous(), y.contiguous()", "pass", "strided"),
]
