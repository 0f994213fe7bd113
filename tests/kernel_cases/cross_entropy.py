"""Cross-entropy: losses, and gradients both ways: computed backward, or in place on the way."""

import torch

from kernels.cross_entropy import reference
from tests.kernel_cases import FLOATS, Case, Fault, shapes, strided

INF = float("inf")
LEFT_OUT = -100


def exact(inplace=False, **inputs):
    """What is overwritten makes no difference to losses and gradients."""
    return reference(**inputs)


def _rows(n, v, scale=1.0, change=None, strided_logits=False, masked=False, **settings):
    """`change` gets logits and targets and may alter both."""

    def inputs(rng):
        logits = torch.randn(n, v, generator=rng, dtype=torch.float64) * scale
        targets = torch.randint(v, (n,), generator=rng)
        if change is not None:
            change(logits, targets)
        given = {"logits": strided(logits) if strided_logits else logits, "targets": targets}
        mask = {"mask": torch.rand(n, generator=rng) > 0.5} if masked else {}
        return given | settings | mask

    return inputs


def _padded(n, v):
    """Rows with a gap after each, as a slice of a wider matrix has them."""

    def inputs(rng):
        wide = torch.randn(n, v + 7, generator=rng, dtype=torch.float64)
        return {"logits": wide[:, :v], "targets": torch.randint(v, (n,), generator=rng)}

    return inputs


def _ignore(logits, targets):
    targets[::2] = LEFT_OUT


def _empty_but_ignored(logits, targets):
    logits[::2], targets[::2] = -INF, LEFT_OUT


def _most_forbidden(logits, targets):
    logits[:, : logits.shape[1] - 3] = -INF
    targets[:] = logits.shape[1] - 2


def _impossible_target(logits, targets):
    logits[0, targets[0]] = -INF


# The loss of a likely target is a small difference of numbers of the logits' size, in float32
# whatever the logits' type; a gradient is rounded to that type, in place once forward and once
# more when it is scaled.
def _case(name, inputs, **settings):
    return Case(name, "cross_entropy", inputs, ("logits",), exact, slack=8, **settings)


def _both(name, *sizes, dtypes=FLOATS, terms=0.0, **settings):
    """Out of place, and in place."""
    for way, inplace in (("", False), (" in place", True)):
        inputs = _rows(*sizes, inplace=inplace, **settings)
        yield _case(name + way, inputs, dtypes=dtypes, terms=terms)


LOWS = (torch.float32, torch.bfloat16)
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2}
CASES = [
    # of one entry the probability is one: what is left of two equal terms
    *_both("vocabulary 1", 5, 1, terms=4.0),
    *(case for v in shapes()[1:] for case in _both(f"vocabulary {v}", 5, v)),
    *(case for n in (1, 3, 127) for case in _both(f"{n} rows", n, 41, dtypes=LOWS)),
    *_both("many tiles", 130, 1023, dtypes=LOWS),
    *_both("in a loop of blocks", 3, 33_000, dtypes=LOWS, **ALL),
    *_both("ignored", 41, 127, change=_ignore),
    *_both("masked", 41, 127, masked=True),
    *_both("empty rows ignored", 5, 127, change=_empty_but_ignored, **ALL),
    *_both("all masked", 5, 41, change=lambda z, t: t.fill_(LEFT_OUT)),
    *_both("padding is entry 2", 41, 5, ignore_index=2),
    *_both("smoothing", 41, 127, label_smoothing=0.1),
    *_both("z-loss", 41, 127, z_loss=1e-2),
    *_both("both", 41, 127, **ALL),
    *_both("large numbers", 5, 127, scale=1e4),
    *_both("most places -inf", 5, 127, change=_most_forbidden),
    *_both("loop with -inf", 3, 33_000, change=_most_forbidden, dtypes=LOWS),
    *_both("target impossible", 3, 41, change=_impossible_target),
    _case("strided", _rows(5, 41, strided_logits=True)),
    _case("padded rows", _padded(5, 41)),
    _case("padded rows in place", lambda rng: {**_padded(5, 41)(rng), "inplace": True}),
    *_both("no rows", 0, 8),
]

FAULTS = [
    Fault(
        "padding counts as zero",
        'mask=inside, other=float("-inf")',
        "mask=inside, other=0.0",
        "vocabulary 41",
    ),
    Fault(
        "next tile late",
        "* ROWS + tl.arange(0, ROWS)\n    cols = tl.arange",
        "* (ROWS + 1) + tl.arange(0, ROWS)\n    cols = tl.arange",
        "many tiles",
    ),
    Fault(
        "last block again",
        "(v - 1) // BLOCK * BLOCK - done",
        "(v - 1) // BLOCK * BLOCK",
        "in a loop of blocks in place",
    ),
    Fault(
        "one entry too few backward", "cols < v)\n    z =", "cols < v - 1)\n    z =", "vocabulary 3"
    ),
    Fault("log Σ missing", "loss = log_sum + (", "loss = (", "vocabulary 5"),
    Fault("ignored rows count", "tl.where(counts, loss, 0.0)", "loss", "empty rows ignored"),
    Fault(
        "ignored rows learn",
        "tl.where(counts[:, None], slope, 0.0)",
        "slope",
        "empty rows ignored in place",
    ),
    Fault("target missing", "p - tl.where(hit, 1 - smoothing, 0.0)", "p", "vocabulary 5"),
    Fault("smoothing missing backward", " - smoothing / v\n", "\n", "smoothing"),
    Fault("smoothed mean over the block", "plain / v)", "plain / BLOCK)", "smoothing"),
    Fault("z-loss missing backward", "p *= 1 +", "p *= 1 + 0 *", "z-loss in place"),
    Fault(
        "z-loss not squared",
        "z_loss * (top + log_sum) * (top + log_sum)",
        "z_loss * (top + log_sum)",
        "z-loss",
    ),
    Fault("upstream missing", "slope * upstream[:, None]", "slope", "3 rows"),
    Fault("upstream missing in place", ".mul_(upstream[:, None])", "", "3 rows in place"),
    Fault("mask forgotten", "targets = targets.where(mask.bool(), ignore_index)", "pass", "masked"),
    Fault("strides ignored", "logits = logits.contiguous()", "pass", "strided"),
    Fault(
        "rows taken for neighbors",
        "n, v, logits.stride(0), ignore_index",
        "n, v, v, ignore_index",
        "padded rows in place",
    ),
]
