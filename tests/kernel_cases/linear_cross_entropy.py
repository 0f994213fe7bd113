"""Output matrix and loss in one, a chunk of logits at a time, against all logits at once."""

import torch

from kernels.linear_cross_entropy import reference
from tests.kernel_cases import FLOATS, Case, Fault, shapes, strided


def exact(chunk=None, **inputs):
    """All at once, whatever the chunk."""
    return reference(**inputs)


LOWS = (torch.float32, torch.bfloat16)


def _rows(n, d, v, size=1.0, masked=False, strided_x=False, **settings):
    """`size` is about that of the logits."""

    def inputs(rng):
        x = torch.randn(n, d, generator=rng, dtype=torch.float64)
        weight = torch.randn(v, d, generator=rng, dtype=torch.float64) * size / d**0.5
        given = {"x": strided(x) if strided_x else x, "weight": weight}
        given["targets"] = torch.randint(v, (n,), generator=rng)
        if masked:
            given["mask"] = torch.rand(n, generator=rng) > 0.5
        return given | settings

    return inputs


def _case(name, inputs, dtypes=LOWS, **settings):
    # In the narrow types logits are rounded before the exponential, then their gradient; the
    # weight's gradient is a sum over rows.
    settings = {"slack": 8, "norm_over": "all", **settings}
    return Case(
        name, "linear_cross_entropy", inputs, ("x", "weight"), exact, dtypes=dtypes, **settings
    )


CASES = [
    *(_case(f"vocabulary {v}", _rows(5, 8, v, chunk=2), FLOATS) for v in shapes()[1:]),
    # of one entry the probability is one: what is left of two equal terms
    _case("vocabulary 1", _rows(5, 8, 1, chunk=2), terms=4.0),
    *(_case(f"{n} rows", _rows(n, 5, 41, chunk=41)) for n in (1, 3, 127)),
    *(_case(f"width {d}", _rows(5, d, 41)) for d in (1, 3, 127)),
    _case("one chunk", _rows(41, 5, 127, chunk=41)),
    _case("chunks of one row", _rows(5, 5, 41, chunk=1)),
    _case("default chunk", _rows(300, 5, 41)),
    # x's gradient sums over the whole vocabulary
    _case("in a loop of blocks", _rows(3, 4, 33_000, chunk=2), slack=32),
    _case("masked", _rows(41, 5, 127, masked=True, chunk=7), FLOATS),
    _case("scale", _rows(41, 5, 127, scale=0.3, chunk=7), FLOATS),
    _case("large numbers", _rows(5, 8, 41, size=1e4, chunk=2), (torch.float32,)),
    _case("strided", _rows(5, 8, 41, strided_x=True, chunk=2)),
    _case("no rows", _rows(0, 8, 41), FLOATS),
]

FAULTS = [
    Fault("only the last chunk's loss", "total += loss", "total = loss", "127 rows"),
    Fault("last row of a chunk lost", "start + chunk)", "start + chunk - 1)", "127 rows"),
    Fault("no scale forward", "x[rows] * scale if scale != 1 else x[rows]", "x[rows]", "scale"),
    Fault("no scale backward", "grad * ctx.scale", "grad", "scale"),
    Fault("upstream missing", "(grad_w * grad).to", "grad_w.to", "3 rows"),
    Fault(
        "only the last chunk's gradient",
        "total.addmm_(a, b)",
        "torch.mm(a, b, out=total)",
        "masked",
    ),
    Fault("logits instead of their gradient", "in_place=learn", "in_place=False", "vocabulary 5"),
    Fault(
        "mask forgotten",
        "x, targets = x[mask.bool()], targets[mask.bool()]",
        "pass",
        "masked",
    ),
]
