"""Gated linear units: five activations, the error function among them."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided

BOTH = ("gate", "up")


def _two(*shape, scale=1.0, form=lambda gate, up: (gate, up), **settings):
    """`form` may give gate and up other strides."""

    def inputs(rng):
        pair = (torch.randn(shape, generator=rng, dtype=torch.float64) * scale for _ in BOTH)
        return dict(zip(BOTH, form(*pair), strict=True)) | settings

    return inputs


def _halves(gate, up):
    return torch.cat([gate, up], -1).chunk(2, -1)


def _zero(gate, up):
    return gate * 0, up


def _large(gate, up):
    return gate * 1e4, up / 2  # products that float16 can hold


def _case(name, inputs, function="glu", **more):
    # float32: exp, 1 + ., 1 / . and up to five products; where slopes add up to about nothing
    # (gelu at -0.75), what matters is the size of their terms, which is one
    slack = {torch.float32: 12, torch.float16: 2, torch.bfloat16: 2}
    return Case(name, function, inputs, BOTH, slack=slack, **{"terms": 1.0} | more)


ALL = ("silu", "gelu", "gelu_tanh", "sigmoid", "relu")
CASES = [
    *(_case(f"{n} numbers", _two(n)) for n in shapes(65_536, 65_537)),
    *(_case(f"{a} of 1023", _two(1023, activation=a)) for a in ALL),
    *(_case(f"{a} of large numbers", _two(5, 41, form=_large, activation=a)) for a in ALL),
    _case("both large", _two(5, 41, scale=1e4), dtypes=(torch.float32, torch.bfloat16)),
    *(_case(f"{a} of zero", _two(3, 5, form=_zero, activation=a)) for a in ("relu", "gelu")),
    _case("swiglu", _two(3, 5, 41), "swiglu", reference="reference"),
    _case(
        "geglu",
        _two(3, 5, 41),
        "geglu",
        reference=lambda gate, up: torch.nn.functional.gelu(gate) * up,
    ),
    _case("halves of one projection", _two(3, 5, 41, form=_halves)),
    _case("halves of rows in several blocks", _two(2, 65_537, form=_halves)),
    _case("one strided", _two(5, 41, form=lambda gate, up: (gate, strided(up)))),
    _case("transposed", _two(41, 5, form=lambda gate, up: (gate.mT, up.mT))),
    _case("a scalar", _two()),
    _case("no rows", _two(0, 8)),
    _case("no numbers", _two(8, 0)),
]

FAULTS = [
    Fault(
        "a term of silu's slope missing",
        "slope = sigmoid + y * (1 - sigmoid)\n",
        "slope = sigmoid\n",
        "5 numbers",
    ),
    Fault("gelu's density missing", "normal + x * (", "normal + 0 * (", "gelu of 1023"),
    Fault("slope of the cubic term", "0.134145", "0.044715", "gelu_tanh of 1023"),
    Fault("relu has a slope at zero", "tl.where(x <= 0, 0.0, 1.0)", "1.0", "relu of zero"),
    Fault("up missing backward", "dout * up * slope", "dout * slope", "5 numbers"),
    Fault("one number too few", "cols < d", "cols < d - 1", "3 numbers"),
    Fault("next block starts too late", "* BLOCK + tl", "* (BLOCK + 1) + tl", "65537 numbers"),
    Fault(
        "gaps between rows ignored",
        "[x.stride(0) for x in ins]",
        "[d for x in ins]",
        "halves of one projection",
    ),
    Fault("strides ignored", "x if x.stride(-1) == 1 else x.contiguous()", "x", "one strided"),
]
