"""Grouped matrix multiplication: experts with no rows, one, a tile, more; rows of no expert."""

import torch

from tests.kernel_cases import Case, Fault, strided

BOTH = ("x", "weights")
WIDE = (torch.float32, torch.bfloat16)


def _of(sizes, k, m, *, behind=0, turned=False, gaps=False, kind=torch.int64, scale=1.0):
    """`behind`: rows of no expert; `turned`: matrices kept [e, m, k], as Linear layers do."""

    def inputs(rng):
        def numbers(*shape):
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        x, e = numbers(sum(sizes) + behind, k), len(sizes)
        weights = numbers(e, m, k).mT if turned else numbers(e, k, m)
        weights = weights / max(k, 1) ** 0.5 * scale
        x = strided(x) if gaps else x
        return {"x": x, "weights": weights, "sizes": torch.tensor(sizes, dtype=kind)}

    return inputs


def _case(name, inputs, **settings):
    """As in `matmul`: sums of products of size 1, which can come out smaller by chance."""
    settings = {"slack": 8, "terms": 1.0, **settings}
    return Case(name, "grouped_matmul", inputs, BOTH, **settings)


CASES = [
    _case("one expert, one number", _of([1], 1, 1)),
    _case("few rows", _of([3, 1, 5], 5, 3)),
    _case("some without rows", _of([0, 3, 0, 0, 2, 0], 41, 5)),
    _case("tiles", _of([70, 0, 64, 1], 41, 66), dtypes=WIDE),
    _case("long sums", _of([2, 1], 127, 3), dtypes=WIDE),
    _case("1023 rows", _of([1, 1022], 3, 5), dtypes=WIDE),
    _case("rows of no expert", _of([3, 2], 5, 41, behind=70)),
    _case("all rows of no expert", _of([0, 0], 5, 3, behind=4), dtypes=WIDE),
    _case("turned", _of([3, 0, 41], 41, 70, turned=True), dtypes=WIDE),
    _case("strided", _of([3, 2], 5, 3, gaps=True), dtypes=WIDE),
    _case("int32 sizes", _of([3, 2], 5, 3, kind=torch.int32), dtypes=(torch.float32,)),
    _case("large numbers", _of([3, 2], 41, 5, scale=1e4)),
    _case("no rows", _of([0, 0, 0], 5, 3), dtypes=WIDE),
    _case("no columns", _of([3, 2], 5, 0), dtypes=WIDE),
    _case("nothing to add", _of([3, 2], 0, 5), dtypes=WIDE),
]

FAULTS = [
    Fault("one tile per expert", "(i - until + tiles) * BLOCK_M", "0 * tiles", "tiles"),
    Fault("the first expert for all", "tl.minimum(group, experts - 1)", "(group * 0)", "few rows"),
    Fault("too few programs", "+ experts + 1) * triton", "+ 1) * triton", "few rows"),
    Fault(
        "stored beyond the expert's rows",
        "inside = (rows < end)[:, None] & (cols < m)",
        "inside = (rows < n)[:, None] & (cols < m)",
        "few rows",
    ),
    Fault(
        "rows of no expert forgotten",
        "tl.where(each == experts, n, ends)",
        "ends",
        "rows of no expert",
    ),
    Fault("k not masked", "inside = steps < k - start", "inside = steps >= 0", "few rows"),
    Fault(
        "always the first block of k",
        "w_ptrs += tl.cast(w_k, tl.int64)",
        "w_ptrs += 0 * tl.cast(w_k, tl.int64)",
        "tiles",
    ),
    Fault(
        "another expert's rows in the sums", "inside = rows < end", "inside = rows < n", "few rows"
    ),
    Fault(
        "the last row missing backward",
        "inside = rows < end",
        "inside = rows < end - 1",
        "few rows",
    ),
    Fault(
        "transposed matrices left out backward",
        "weights.transpose(1, 2), sizes",
        "weights.flip(0).transpose(1, 2), sizes",
        "few rows",
    ),
    Fault("strides ignored", "x = x.contiguous()", "pass", "strided"),
]
