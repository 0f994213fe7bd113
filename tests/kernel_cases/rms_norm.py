"""RMSNorm."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _rows(n, d, scale=1.0, eps=1e-5, strided_x=False):
    def inputs(rng):
        x = torch.randn(n, d, generator=rng, dtype=torch.float64) * scale
        weight = 1 + torch.randn(d, generator=rng, dtype=torch.float64) / 4
        return {"x": strided(x) if strided_x else x, "weight": weight, "eps": eps}

    return inputs


BOTH = ("x", "weight")
# dx is a difference of two terms of its own size; dw sums over rows
CASES = [
    *(Case(f"width {d}", "rms_norm", _rows(5, d), BOTH, slack=8) for d in shapes(1024)[1:]),
    # one number normalized is ±1 whatever it was: its gradient is what is left of two equal terms
    Case("width 1", "rms_norm", _rows(5, 1), BOTH, slack=8, terms=4.0),
    *(Case(f"{n} rows", "rms_norm", _rows(n, 41), BOTH, slack=8) for n in (1, 3, 127)),
    Case("large numbers", "rms_norm", _rows(5, 41, 1e4), BOTH, slack=8),
    Case("a row of zeros", "rms_norm", _rows(2, 41, 0.0), BOTH, slack=8),
    Case("large eps", "rms_norm", _rows(5, 41, eps=10.0), BOTH, slack=8),
    Case("strided", "rms_norm", _rows(5, 41, strided_x=True), BOTH, slack=8),
    Case("no rows", "rms_norm", _rows(0, 8), BOTH),
]

FAULTS = [
    Fault("mean over the padded row", "axis=0) / d + eps", "axis=0) / BLOCK + eps", "width 41"),
    Fault("no eps", "/ d + eps)", "/ d)", "large eps"),
    Fault("weight missing", "x * rstd * w", "x * rstd", "width 5"),
    Fault("x hat's share missing", "(wdy - xhat * (", "(wdy - 0 * xhat * (", "width 5"),
    Fault("weight missing backward", "wdy = w * dy", "wdy = dy", "width 5"),
    Fault(
        "last row left out", "program * rows + rows, n)", "program * rows + rows, n - 1)", "3 rows"
    ),
    Fault("strides ignored", "x, weight = x.contiguous(), weight.contiguous()", "pass", "strided"),
]
