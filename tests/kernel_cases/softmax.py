"""Softmax: forward, and backward through rows that may be empty."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided

INF = float("inf")


def _rows(*shape, scale=1.0, empty=None, strided_x=False):
    """`empty` gets x and puts -inf where it likes."""

    def inputs(rng):
        x = torch.randn(shape, generator=rng, dtype=torch.float64) * scale
        if empty is not None:
            empty(x)
        return {"x": strided(x) if strided_x else x}

    return inputs


def _some(x):
    x[:, ::3] = -INF


def _rows_and_places(x):
    x[::2] = -INF
    x[1, 1:] = -INF  # one place left: its weight is one


def _causal(x):
    x.masked_fill_(torch.ones(x.shape).triu(1).bool(), -INF)


def _case(name, inputs, **settings):
    # backward subtracts the mean of dy from dy, and has y rounded to the narrow type
    return Case(name, "softmax", inputs, ("x",), slack=8, **settings)


LOWS = {"dtypes": (torch.float32, torch.bfloat16)}
CASES = [
    # a single number has weight one whatever it is: the gradient is what is left of two equal terms
    _case("width 1", _rows(5, 1), terms=2.0),
    *(_case(f"width {d}", _rows(5, d)) for d in shapes(1024)[1:]),
    *(_case(f"{n} rows", _rows(n, 41)) for n in (1, 3, 127)),
    _case("many tiles", _rows(130, 1023), **LOWS),
    _case("more axes", _rows(2, 3, 5, 41)),
    _case("large numbers", _rows(5, 127, scale=1e4)),
    _case("some places -inf", _rows(5, 127, empty=_some)),
    _case("some rows -inf", _rows(5, 41, empty=_rows_and_places)),
    _case("every row -inf", _rows(3, 5, empty=lambda x: x.fill_(-INF))),
    _case("causal", _rows(41, 41, empty=_causal)),
    _case("only backward in a loop", _rows(2, 20_000), **LOWS),
    _case("in a loop of blocks", _rows(3, 33_000), **LOWS),
    _case("loop with -inf", _rows(3, 33_000, empty=lambda x: x[1:, :20_000].fill_(-INF)), **LOWS),
    _case("loop over nothing", _rows(2, 33_000, empty=lambda x: x[1].fill_(-INF)), **LOWS),
    _case("loop of large numbers", _rows(2, 33_000, scale=1e4), **LOWS),
    _case("strided", _rows(5, 41, strided_x=True)),
    _case("no rows", _rows(0, 8)),
]

FAULTS = [
    Fault(
        "padding counts as zero",
        'x = tl.load(x_ptr + place, mask=inside, other=float("-inf"))',
        "x = tl.load(x_ptr + place, mask=inside, other=0.0)",
        "width 41",
    ),
    Fault("maximum not removed", "tl.exp(x - top[:, None])\n", "tl.exp(x)\n", "large numbers"),
    Fault(
        "empty row divides by zero",
        "e = tl.exp(x - top[:, None])\n    total = tl.sum(e, axis=1)\n"
        "    share = tl.where(total == 0, 0.0, 1 / total)",
        "e = tl.exp(x - top[:, None])\n    total = tl.sum(e, axis=1)\n    share = 1 / total",
        "every row -inf",
    ),
    Fault(
        "next tile starts a row late",
        "rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)\n"
        "    cols = tl.arange(0, BLOCK)\n    inside = (rows < n)[:, None] & (cols < d)[None, :]\n"
        "    place = rows[:, None] * d + cols[None, :]\n    x =",
        "rows = tl.program_id(0).to(tl.int64) * (ROWS + 1) + tl.arange(0, ROWS)\n"
        "    cols = tl.arange(0, BLOCK)\n    inside = (rows < n)[:, None] & (cols < d)[None, :]\n"
        "    place = rows[:, None] * d + cols[None, :]\n    x =",
        "many tiles",
    ),
    Fault(
        "old sum keeps its old maximum",
        "total = total * tl.exp(top - base) +",
        "total = total +",
        "in a loop of blocks",
    ),
    Fault(
        "blocks of -inf",
        'base = tl.where(higher == float("-inf"), 0.0, higher)',
        "base = higher",
        "loop with -inf",
    ),
    Fault("mean missing backward", "y * (dy - mean[:, None])", "y * dy", "width 5"),
    Fault("y missing backward", "y * (dy - mean[:, None])", "dy - mean[:, None]", "width 5"),
    Fault("mean of the last block only", "mean += tl.sum", "mean = tl.sum", "in a loop of blocks"),
    Fault("strides ignored", "x, d = x.contiguous(), x", "x, d = x, x", "strided"),
]
