"""Dropout: the mask is a function of seed and place, so even it must agree number by number."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _drop(shape, p=0.3, seed=5, scale=1.0, strided_x=False, infinite=False):
    def inputs(rng):
        x = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        if infinite:
            x[::3] = -torch.inf  # is dropped like any other number: 0, not NaN
        return {"x": strided(x) if strided_x else x, "p": p, "seed": seed}

    return inputs


F32 = torch.float32
# a product of x and 1 / (1 - p), itself rounded to float32, is rounded: one unit of float32 and
# half a unit of a narrow type; a number dropped in one place only would be off by all its size
CASES = [
    *(Case(f"{n} numbers", "dropout", _drop((n,)), ("x",), slack=2) for n in shapes(2049)),
    Case("several programs", "dropout", _drop((2, 3, 700)), ("x",), slack=2),
    *(
        Case(f"seed {seed}", "dropout", _drop((127,), seed=seed), slack=2, dtypes=(F32,))
        for seed in (0, 1, 2**31, 2**32 - 1, 2**32 + 7, 2**63 - 1)
    ),
    *(Case(f"p {p}", "dropout", _drop((127,), p), ("x",), slack=2) for p in (0, 0.5, 0.999, 1)),
    Case("large numbers", "dropout", _drop((41,), scale=1e4), ("x",), slack=2),
    Case("minus infinity", "dropout", _drop((41,), infinite=True), ("x",), slack=2),
    Case("strided", "dropout", _drop((5, 41), strided_x=True), ("x",), slack=2),
    Case("one number alone", "dropout", _drop(()), ("x",), slack=2),
    Case("no rows", "dropout", _drop((0, 8)), ("x",)),
]

FAULTS = [
    Fault("scale missing", "keep, x * scale, 0.0), mask", "keep, x, 0.0), mask", "41 numbers"),
    Fault(
        "the mask inverted",
        "keep = uniform >= p\n    tl",
        "keep = uniform < p\n    tl",
        "41 numbers",
    ),
    Fault("words in another order", "interleave(u0, u2)", "interleave(u0, u1)", "41 numbers"),
    Fault("programs share counters", "(BLOCK // 4) + tl", "(BLOCK // 8) + tl", "2049 numbers"),
    Fault(
        "one number too few",
        "x_ptr + place, mask=inside",
        "x_ptr + place, mask=place < n - 1, other=7.0",
        "p 0",
    ),
    Fault("another mask backward", "ctx.p, ctx.seed)", "ctx.p, ctx.seed + 1)", "41 numbers"),
    Fault("no mask backward", "ctx.p, ctx.seed)", "0.0, ctx.seed)", "41 numbers"),
    Fault(
        "seeds of 32 bits", "n, seed, p, _scale", "n, seed % 2**32, p, _scale", "seed 4294967303"
    ),
    Fault("strides ignored", "x = x.contiguous()", "pass", "strided"),
]
