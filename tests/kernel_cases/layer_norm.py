"""LayerNorm."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _rows(n, d, scale=1.0, eps=1e-5, offset=0.0, bias=True, strided_x=False):
    def inputs(rng):
        def draw(*shape):
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        x = draw(n, d) * scale + offset
        found = {"x": strided(x) if strided_x else x, "weight": 1 + draw(d) / 4}
        return found | {"bias": draw(d) if bias else None, "eps": eps}

    return inputs


BOTH = ("x", "weight")
ALL = (*BOTH, "bias")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# dx is a difference of three terms of its own size; dw and db sum over rows
CASES = [
    *(Case(f"width {d}", "layer_norm", _rows(5, d), ALL, slack=8) for d in shapes(1024)[2:]),
    # of one number's gradient nothing is left, of three numbers' one direction out of three: the
    # rest of terms of size 1 that cancel
    *(Case(f"width {d}", "layer_norm", _rows(5, d), ALL, slack=8, terms=4.0) for d in (1, 3)),
    *(Case(f"{n} rows", "layer_norm", _rows(n, 41), ALL, slack=8) for n in (1, 3, 41)),
    Case("no bias", "layer_norm", _rows(5, 41, bias=False), BOTH, slack=8),
    Case("large numbers", "layer_norm", _rows(5, 41, 1e4), ALL, slack=8),
    # noise of 1 upon 10,000, which float32 holds in steps of 0.001, float16 of 8, bfloat16 of 64
    Case("a large mean", "layer_norm", _rows(5, 1023, 1, offset=1e4), ALL, slack=8, dtypes=(F32,)),
    Case(
        "a mean and few steps",
        "layer_norm",
        _rows(5, 127, 99, offset=1e4),
        ALL,
        slack=8,
        dtypes=(F16, BF16),
    ),
    Case("a row of zeros", "layer_norm", _rows(2, 41, 0.0), ALL, slack=8),
    Case("a constant row", "layer_norm", _rows(2, 41, 0.0, offset=0.3), ALL, slack=8),
    Case("large eps", "layer_norm", _rows(5, 41, eps=10.0), ALL, slack=8),
    Case("strided", "layer_norm", _rows(5, 41, strided_x=True), ALL, slack=8),
    Case("no rows", "layer_norm", _rows(0, 8), ALL),
]

FAULTS = [
    Fault(
        "variance over the padded row",
        "centered, axis=0) / d + eps",
        "centered, axis=0) / B + eps",
        "width 41",
    ),
    Fault("the padding counts", "tl.where(inside, x - mean, 0.0)", "x - mean", "a large mean"),
    Fault("no second mean", "tl.where(inside, centered - rest, 0.0)", "centered", "a large mean"),
    Fault("no second mean backward", "(x - mean - rest)", "(x - mean)", "a large mean"),
    Fault("no eps", "/ d + eps)", "/ d)", "large eps"),
    Fault("weight missing", "rstd * w\n", "rstd\n", "width 5"),
    Fault("bias missing", "y += tl.load(b_ptr", "y += 0 * tl.load(b_ptr", "width 5"),
    Fault("bias where none is", "_settings(d, bias is not None)", "_settings(d, True)", "no bias"),
    Fault("the mean's gradient", "(wdy - tl.sum(wdy, axis=0) / d -", "(wdy -", "width 5"),
    Fault("the variance's gradient", " - xhat * along)", ")", "width 5"),
    Fault("weight missing backward", "wdy = w * dy", "wdy = dy", "width 5"),
    Fault("one row's share of dw", "dw += dy * xhat", "dw = dy * xhat", "41 rows"),
    Fault(
        "last row left out", "program * rows + rows, n)", "program * rows + rows, n - 1)", "3 rows"
    ),
    Fault("strides ignored", "x, weight = x.contiguous(), weight.contiguous()", "pass", "strided"),
]
