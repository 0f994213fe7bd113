"""Number formats against PyTorch's types bit for bit, and against the definitions."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.numerics import FORMATS, Format, bits, cast, decode, encode

TYPED = [fmt for fmt in FORMATS.values() if fmt.dtype is not None]
NARROW = [fmt for fmt in FORMATS.values() if fmt.width <= 19]
INTEGER = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
each_typed = pytest.mark.parametrize("fmt", TYPED, ids=lambda f: f.name)
each_narrow = pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)


def theirs(pattern, fmt):
    """Patterns read by PyTorch, as float32."""
    wrapped = pattern - (pattern >> (fmt.width - 1) << fmt.width) * (fmt.width > 8)
    return wrapped.to(INTEGER[fmt.width]).view(fmt.dtype).float()


def pattern_of(x):
    """The bits of float32 numbers, one for all NaN."""
    x = x.where(~x.isnan(), torch.nan)
    return x.view(torch.int32)


def same(a, b):
    return torch.equal(pattern_of(a), pattern_of(b))


def exact(pattern, fmt):
    """The value of one finite pattern as a fraction, from the definition."""
    f, e = fmt.fraction_bits, fmt.exponent_bits
    sign = -1 if pattern >> (e + f) else 1
    exponent, fraction = (pattern >> f) % 2**e, pattern % 2**f
    bias = 2 ** (e - 1) - 1
    if exponent == 0:
        return sign * Fraction(fraction, 2**f) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(fraction, 2**f)) * Fraction(2) ** (exponent - bias)


def random_fp32(n, seed):
    """Uniform over bit patterns: all magnitudes, subnormal numbers, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).int().view(torch.float32)


def ties(fmt, n=4000, seed=0):
    """Numbers halfway between two neighbors of `fmt`, and one float64 step beside them."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, fmt.largest_pattern, (n,), generator=generator)
    middle = (decode(low, fmt).double() + decode(low + 1, fmt).double()) / 2
    up, down = (torch.nextafter(middle, torch.tensor(x).double()) for x in (math.inf, 0.0))
    return low, middle, up, down


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8e4m3", "fp8e5m2"])
def test_every_pattern_is_read_as_pytorch_reads_it(name):
    fmt = FORMATS[name]
    everything = torch.arange(2**fmt.width)
    assert same(decode(everything, fmt), theirs(everything, fmt))


@each_narrow
def test_every_pattern_round_trips(fmt):
    everything = torch.arange(2**fmt.width)
    values = decode(everything, fmt)
    number = ~values.isnan()
    assert torch.equal(encode(values, fmt)[number], everything[number])
    assert decode(encode(values[~number], fmt), fmt).isnan().all()
    assert same(cast(values, fmt), values)


@each_narrow
def test_values_are_those_of_the_definition(fmt):
    finite = [p for p in range(2**fmt.width) if p % 2 ** (fmt.width - 1) <= fmt.largest_pattern]
    finite = finite[:: max(1, len(finite) // 3000)]
    for pattern, value in zip(finite, decode(torch.tensor(finite), fmt).tolist(), strict=True):
        assert Fraction(value) == exact(pattern, fmt)


@each_typed
def test_cast_agrees_with_pytorch_on_random_float32(fmt):
    x = torch.cat([random_fp32(300_000, seed) for seed in (0, 1)])
    if not fmt.infinities:  # PyTorch's versions differ in whether this type saturates
        x = x[x.abs() < 464]
    assert same(cast(x, fmt), x.to(fmt.dtype).float())
    assert same(cast(x[:1000].view(10, 100).T, fmt), x[:1000].view(10, 100).T.to(fmt.dtype).float())


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8e4m3", "fp8e5m2"])
def test_cast_agrees_with_pytorch_on_ties_and_their_neighbors(name):
    low, *points = ties(FORMATS[name])
    fmt, even = FORMATS[name], low + low % 2
    for x, want in zip(points, (even, low + 1, low), strict=True):
        assert torch.equal(encode(x, fmt), want)
    middle = points[0].float()
    assert torch.equal(middle.double(), points[0]), "a tie of these formats is a float32"
    for x in (middle, -middle):
        assert same(cast(x, fmt), x.to(fmt.dtype).float())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_every_16_bit_pattern_casts_to_every_format_as_pytorch_casts_it(name):
    values = theirs(torch.arange(2**16), FORMATS[name]).to(FORMATS[name].dtype)
    for fmt in TYPED:
        x = values if fmt.infinities else values[values.float().abs() < 464]
        assert same(cast(x, fmt), x.float().to(fmt.dtype).float()), fmt.name


def test_tf32_is_float32_with_13_bits_rounded_away():
    x = random_fp32(300_000, seed=3)
    x = torch.cat([x[x.isfinite()], ties(FORMATS["tf32"])[1].float()])
    pattern = x.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    rounded = (pattern + 0xFFF + (pattern >> 13 & 1)) & ~0x1FFF
    want = torch.from_numpy(rounded.astype(np.uint32).view(np.float32))
    assert same(cast(x, "tf32"), want)
    assert same(cast(torch.tensor([math.inf, -math.inf, math.nan]), "tf32").abs(),
                torch.tensor([math.inf, math.inf, math.nan]))  # fmt: skip


@given(st.floats(width=64))
def test_one_rounding_of_float64(x):
    """Two roundings, over float32, would get some of these wrong."""
    assert same(cast(x, "fp32"), torch.tensor(x, dtype=torch.float64).float())
    with np.errstate(over="ignore"):
        half = np.array(x).astype(np.float16)  # numpy rounds once; PyTorch goes over float32
    assert encode(x, "fp16").item() == half.view(np.uint16).item() or math.isnan(x)


def test_double_rounding_is_avoided():
    x = 1 + 2**-11 + 2**-40  # just above a tie of fp16, a tie after rounding to float32
    assert cast(x, "fp16").item() == 1 + 2**-10
    assert cast(torch.tensor(x, dtype=torch.float32), "fp16").item() == 1.0


@given(st.sampled_from(NARROW), st.floats(-1e5, 1e5))
def test_rounding_is_to_the_nearest(fmt, x):
    pattern = encode(abs(x), fmt).item()
    if pattern > fmt.largest_pattern:
        assert Fraction(abs(x)) >= Fraction(fmt.largest) * (
            1 + Fraction(1, 2 ** (fmt.fraction_bits + 2))
        )
        return
    error = abs(exact(pattern, fmt) - Fraction(abs(x)))
    around = (p for p in (pattern - 1, pattern + 1) if 0 <= p <= fmt.largest_pattern)
    for other in around:
        distance = abs(exact(other, fmt) - Fraction(abs(x)))
        assert error < distance or (error == distance and pattern % 2 == 0)


@each_narrow
def test_overflow(fmt):
    """The first number that does not round down to the largest is halfway to the next one."""
    step = fmt.largest - decode(fmt.largest_pattern - 1, fmt).item()
    edge = fmt.largest + step / 2
    just_below = math.nextafter(edge, 0.0)
    assert cast(just_below, fmt).item() == fmt.largest
    # A tie goes to the even pattern: beyond the largest, or, if that is the even one, back to it.
    beyond = edge if fmt.largest_pattern % 2 else math.nextafter(edge, math.inf)
    assert cast(-just_below, fmt).item() == -fmt.largest
    for x in (beyond, 1e300, math.inf):
        got = cast(x, fmt).item()
        assert got == math.inf if fmt.infinities else math.isnan(got)
        assert cast(x, fmt, saturate=True).item() == fmt.largest
        assert cast(-x, fmt, saturate=True).item() == -fmt.largest
    assert math.isnan(cast(math.nan, fmt, saturate=True).item())


def test_saturation_of_e4m3_is_that_of_pytorch_where_it_saturates():
    x = torch.tensor([447.0, 464.0, 465.0, 480.0, 1e6, -1e6, math.inf, math.nan])
    want = x.to(torch.float8_e4m3fn).float()
    saturates = want[4].item() == 448.0
    assert same(cast(x, "fp8e4m3", saturate=saturates), want)


def test_facts_follow_from_patterns():
    for fmt in NARROW:
        values = decode(torch.arange(2**fmt.width), fmt).double()
        finite = values[values.isfinite()].unique()
        positive = finite[finite > 0]
        assert fmt.finite_values == len(finite)
        assert (fmt.largest, fmt.smallest_subnormal) == (finite.max(), positive.min())
        assert fmt.epsilon == positive[positive > 1].min() - 1
        spacing = positive.diff()  # constant up to the smallest normal number, then it grows
        assert fmt.smallest_normal == positive[:-1][spacing > spacing[0]].min() / 2
    for fmt in TYPED:
        info = torch.finfo(fmt.dtype)
        assert (fmt.largest, fmt.smallest_normal, fmt.epsilon) == (info.max, info.tiny, info.eps)
        assert fmt.smallest_subnormal == info.smallest_normal * info.eps


def test_bits_are_those_of_struct():
    for x in (1.0, -0.0, 0.1, 65504.0, 6e-8, 1e-8):
        (half,) = struct.unpack(">H", struct.pack(">e", x))
        (single,) = struct.unpack(">I", struct.pack(">f", x))
        assert bits(x, "fp16").replace(" ", "") == f"{half:016b}"
        assert bits(x, "fp32").replace(" ", "") == f"{single:032b}"
    assert [len(part) for part in bits(1.0, "tf32").split()] == [1, 8, 10]
    assert bits(torch.tensor(448.0), FORMATS["fp8e4m3"]) == "0 1111 110"


def test_flushing_processors_change_nothing():
    """The lectures flush subnormal numbers; patterns are integers and stay."""
    small = torch.arange(1, 2000, 7, dtype=torch.int32).view(torch.float32)
    everything = torch.arange(2**16)
    before = encode(small, "fp32"), decode(everything, "bf16").view(torch.int32)
    flushes = torch.set_flush_denormal(True)
    after = encode(small, "fp32"), decode(everything, "bf16").view(torch.int32)
    lost = (small * 1.0).view(torch.int32).eq(0).all().item()
    torch.set_flush_denormal(False)
    assert lost == flushes, "the control: ordinary arithmetic does lose them"
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[0].gt(0).all()


def test_shapes_and_kinds_of_input():
    assert cast(torch.empty(0, 3), "fp16").shape == (0, 3)
    assert cast(torch.tensor(2.0), "fp16").shape == ()
    assert cast(torch.ones(2, 3, dtype=torch.bfloat16), "fp8e5m2").shape == (2, 3)
    assert cast(torch.tensor([0.1], requires_grad=True), "fp16").requires_grad is False
    made_up = Format("four bits", 2, 1, infinities=False)
    assert cast(torch.tensor([0.4, 2.4]), made_up).tolist() == [0.5, 2.0]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"'fp12' is unknown; choose one of \['fp32', 'tf32'"):
        cast(1.0, "fp12")
    with pytest.raises(ValueError, match="int64"):
        encode(torch.tensor([1, 2]), "fp16")
    with pytest.raises(ValueError, match="patterns from -1 to 3; fp16 has 0 to 65535"):
        decode(torch.tensor([-1, 3]), "fp16")
    with pytest.raises(ValueError, match="256"):
        decode(256, "fp8e5m2")
