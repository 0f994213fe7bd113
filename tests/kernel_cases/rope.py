"""Rotary positions, in both layouts, against their definition and products of complex numbers."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _heads(b, h, t, d, layout="half", scale=1.0, rows=None, angles=torch.float64, form=None):
    """`rows` sequences of angles, or one [t, d/2] that all share; `form` changes x's strides."""

    def inputs(rng):
        x = torch.randn(b, h, t, d, generator=rng, dtype=torch.float64) * scale
        shape = (t, d // 2) if rows is None else (rows, 1, t, d // 2)
        angle = torch.rand(shape, generator=rng, dtype=torch.float64) * 100
        turn = {"cos": angle.cos().to(angles), "sin": angle.sin().to(angles)}
        return {"x": x if form is None else form(x), **turn, "layout": layout}

    return inputs


def _complex(x, cos, sin, layout):
    """Pairs as complex numbers, a turn as a product."""
    pairs = x.unflatten(-1, (2, -1)).mT if layout == "half" else x.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * (cos + 1j * sin))
    return (turned.mT if layout == "half" else turned).flatten(-2)


def _transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _third(x):
    """As a slice of one projection to queries, keys and values [b, t, 3, h, d]."""
    return torch.stack([x, x, x]).permute(1, 3, 0, 2, 4).contiguous()[:, :, 1].transpose(1, 2)


def _case(name, inputs, **more):
    # two products, a sum, one rounding; the larger number of a pair is what the smaller one is of
    return Case(name, "rope", inputs, ("x",), slack=2, **more)


F32 = {"dtypes": (torch.float32,)}
TWO = {"dtypes": (torch.float32, torch.bfloat16)}
BOTH = ("half", "interleaved")
CASES = [
    *(_case(f"{t} tokens", _heads(2, 3, t, 8)) for t in shapes()),
    *(_case(f"width {d}, {n}", _heads(2, 3, 5, d, n)) for d in (2, 6, 80) for n in BOTH),
    *(_case(f"{h} heads, {n}", _heads(2, h, 3, 8, n), **TWO) for h in (1, 8, 9) for n in BOTH),
    *(_case(f"blocks of tokens, {n}", _heads(1, 8, 259, 128, n), **F32) for n in BOTH),
    *(
        _case(f"as complex numbers, {n}", _heads(2, 3, 5, 24, n), reference=_complex, **TWO)
        for n in BOTH
    ),
    *(_case(f"positions of each, {n}", _heads(3, 2, 5, 6, n, rows=3), **TWO) for n in BOTH),
    _case(
        "positions of each, as complex numbers",
        _heads(3, 2, 5, 6, rows=3),
        reference=_complex,
        **TWO,
    ),
    _case("positions of one for all", _heads(3, 2, 5, 6, rows=1), **TWO),
    *(
        _case(f"fp32 angles, {n}", _heads(2, 3, 5, 80, n, angles=torch.float32), **TWO)
        for n in BOTH
    ),
    *(_case(f"large numbers, {n}", _heads(2, 3, 5, 8, n, scale=1e4)) for n in BOTH),
    *(_case(f"transposed, {n}", _heads(2, 3, 5, 6, n, form=_transposed), **TWO) for n in BOTH),
    *(_case(f"one of three, {n}", _heads(2, 3, 5, 6, n, form=_third), **TWO) for n in BOTH),
    _case("strided", _heads(2, 3, 5, 6, form=strided)),
    _case("no tokens", _heads(2, 3, 0, 6), **F32),
    _case("no sequences", _heads(0, 3, 5, 6), **F32),
    _case("no heads", _heads(2, 0, 5, 6), **F32),
]

FAULTS = [
    Fault("turned forward in the backward pass", "sin = -sin", "sin = sin", "3 tokens"),
    Fault("wrong sign", "a * cos - b * sin, mask", "a * cos + b * sin, mask", "3 tokens"),
    Fault(
        "wrong sign, interleaved",
        "tl.join(a * cos - b",
        "tl.join(a * cos + b",
        "width 6, interleaved",
    ),
    Fault("a pair too few", "(pair < half)", "(pair < half - 1)", "width 6, half"),
    Fault(
        "half a pair too few", "place < 2 * half", "place < 2 * half - 1", "width 6, interleaved"
    ),
    Fault(
        "the next tokens start too late",
        "* TOKENS + tl",
        "* (TOKENS + 1) + tl",
        "blocks of tokens, half",
    ),
    Fault("the next heads start too late", "* HEADS + tl", "* (HEADS + 1) + tl", "9 heads, half"),
    Fault("heads in the wrong order", "head * x_h", "(h - 1 - head) * x_h", "8 heads, half"),
    Fault(
        "positions of the first for all",
        "0 if len(cos) == 1 else cos.stride(0)",
        "0",
        "positions of each, half",
    ),
    Fault(
        "strides ignored",
        "x if x.stride(-1) == 1 else x.contiguous()",
        "x",
        "strided",
    ),
]
