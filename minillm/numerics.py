"""Number formats: what their bits mean, and rounding to them.

A binary floating-point number is a sign, an exponent and a fraction:

    value = (-1)^sign · 2^(exponent - bias) · (1 + fraction / 2^f)    exponent > 0, a normal number
    value = (-1)^sign · 2^(1 - bias) · fraction / 2^f                 exponent = 0, a subnormal one

Everything below is integer arithmetic on such patterns, so it does not care how the processor
rounds, nor whether it flushes subnormal numbers to zero (`torch.set_flush_denormal`).

Sources: IEEE Standard for Floating-Point Arithmetic (754), 2019; Kalamkar et al., A Study of
BFLOAT16 for Deep Learning Training, 2019; Micikevicius et al., FP8 Formats for Deep Learning, 2022.

NF4, at the end, is no floating-point format but a table of sixteen numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: one sign bit, `exponent_bits`, `fraction_bits`.

    With `infinities`, the largest exponent is kept for infinities and NaN, as in IEEE 754.
    Without, it holds ordinary numbers, and only the pattern of all ones is NaN ("fn" in names).

    >>> FORMATS["fp16"].largest, FORMATS["fp16"].smallest_subnormal
    (65504.0, 5.960464477539063e-08)
    >>> FORMATS["fp8e4m3"].largest  # 480 is NaN's pattern
    448.0
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    dtype: torch.dtype | None = None
    """PyTorch's name for it, if it has one"""
    infinities: bool = True

    @property
    def width(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """Subtracted from the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest_pattern(self) -> int:
        """The pattern of the largest finite number."""
        top = 2 ** (self.width - 1) - 1
        return top - 2**self.fraction_bits if self.infinities else top - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        exponent, fraction = divmod(self.largest_pattern, 2**self.fraction_bits)
        return (1 + fraction * self.epsilon) * 2.0 ** (exponent - self.bias)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all its significant bits, 2^(1 - bias)."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, 2^(1 - bias - f)."""
        return self.smallest_normal * self.epsilon

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next larger number, 2^-f (machine epsilon)."""
        return 2.0**-self.fraction_bits

    @property
    def finite_values(self) -> int:
        """How many different finite numbers there are; 0 and -0 are one.

        >>> FORMATS["fp16"].finite_values, FORMATS["fp8e4m3"].finite_values
        (63487, 253)
        """
        return 2 * self.largest_pattern + 1


FORMATS = {
    fmt.name: fmt
    for fmt in (
        Format("fp32", 8, 23, torch.float32),
        Format("tf32", 8, 10),
        Format("bf16", 8, 7, torch.bfloat16),
        Format("fp16", 5, 10, torch.float16),
        Format("fp8e4m3", 4, 3, torch.float8_e4m3fn, infinities=False),
        Format("fp8e5m2", 5, 2, torch.float8_e5m2),
    )
}
_FP64 = Format("fp64", 11, 52, torch.float64)  # to read from, never to round to
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_NAN, _INFINITE = -1, -2  # stand for the significand of what is not a finite number


def _format(fmt: str | Format) -> Format:
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise ValueError(f"format {fmt!r} is unknown; choose one of {list(FORMATS)}")
    return FORMATS[fmt]


def _split(pattern: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Patterns (int64) to (negative, significand, power): ±significand · 2^power."""
    magnitude = pattern & (2 ** (fmt.width - 1) - 1)
    fraction = magnitude & (2**fmt.fraction_bits - 1)
    exponent = magnitude >> fmt.fraction_bits
    significand = fraction + (exponent > 0) * 2**fmt.fraction_bits
    special = magnitude > fmt.largest_pattern
    infinite = special & (fraction == 0) & fmt.infinities
    significand = significand.where(~special, _NAN).where(~infinite, _INFINITE)
    power = exponent.clamp(min=1) - (fmt.bias + fmt.fraction_bits)
    return (pattern >> (fmt.width - 1)) & 1 == 1, significand, power


def _round(
    negative: Tensor, significand: Tensor, power: Tensor, fmt: Format, saturate: bool = False
) -> Tensor:
    """±significand · 2^power to the nearest pattern of `fmt`, ties to the even one (int64)."""
    m = significand.clamp(min=0)
    # The leading bit is bit `exponent - 1`: exact, since a significand is below 2^53.
    leading = torch.frexp(m.double()).exponent.long() - 1 + power
    binade = leading.clamp(min=1 - fmt.bias).where(m > 0, 1 - fmt.bias)
    drop = binade - fmt.fraction_bits - power  # bits that find no place, or minus those to add
    kept = m << (-drop).clamp(min=0)
    shift = drop.clamp(0, 62)
    up, half = kept >> shift, (1 << shift) >> 1
    rest = kept - (up << shift)
    up = up + ((rest > half) | ((rest == half) & (up % 2 == 1))) * (shift > 0)
    # The leading bit of a normal number adds 1 to the exponent field, a carry 1 more.
    pattern = ((binade - (1 - fmt.bias)) << fmt.fraction_bits) + up
    nan = 2 ** (fmt.width - 1) - 1
    if fmt.infinities:
        nan -= 2 ** (fmt.fraction_bits - 1) - 1  # a quiet NaN: the first bit of the fraction
    beyond = fmt.largest_pattern + 1  # infinity, or where there is none, NaN
    pattern = pattern.where(significand != _INFINITE, beyond)
    pattern = pattern.clamp(max=fmt.largest_pattern if saturate else beyond)
    pattern = pattern.where(significand != _NAN, nan)
    return pattern + negative * 2 ** (fmt.width - 1)


def encode(x: Tensor | float, fmt: str | Format, saturate: bool = False) -> Tensor:
    """The bit patterns (int64) of the numbers of `fmt` nearest to x; a tie goes to the even one.

    x: any shape, float64, float32 or one of PyTorch's types in FORMATS; a Python number counts as
    float64. What is too large becomes infinity, or NaN in a format without infinities; with
    `saturate`, the largest finite number.

    Raises ValueError for other types and unknown formats.

    >>> encode(1.0, "fp16").item() == 0b0_01111_0000000000
    True
    """
    fmt = _format(fmt)
    x = torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else torch.float64).detach()
    for source in (*FORMATS.values(), _FP64):
        if source.dtype == x.dtype:
            # A view, not a conversion: processors that flush would lose subnormal numbers in one.
            pattern = x.contiguous().view(_INTEGERS[source.width]).long()
            return _round(*_split(pattern, source), fmt, saturate)
    known = [str(f.dtype) for f in FORMATS.values() if f.dtype]
    raise ValueError(f"x is {x.dtype}, it must be torch.float64 or one of {known}")


def decode(pattern: Tensor | int, fmt: str | Format) -> Tensor:
    """The numbers behind bit patterns, as float32, which holds all formats here exactly.

    Raises ValueError for patterns that the format does not have.

    >>> decode(0b0_11110_1111111111, "fp16").item()
    65504.0
    """
    fmt, pattern = _format(fmt), torch.as_tensor(pattern).long()
    if pattern.numel() and not 0 <= pattern.min() <= pattern.max() < 2**fmt.width:
        raise ValueError(
            f"patterns from {pattern.min()} to {pattern.max()}; {fmt.name} has 0 to "
            f"{2**fmt.width - 1}"
        )
    wide = _round(*_split(pattern, fmt), FORMATS["fp32"])
    return (wide - (wide >> 31 << 32)).to(torch.int32).view(torch.float32)


def cast(x: Tensor | float, fmt: str | Format, saturate: bool = False) -> Tensor:
    """x rounded to the nearest numbers of `fmt`, kept in float32; see `encode`. No gradient passes.

    >>> cast(torch.tensor([0.1, 1e-8, 70000.0]), "fp16").tolist()
    [0.0999755859375, 0.0, inf]
    >>> cast(torch.tensor([300.0, 1e6]), "fp8e4m3").tolist()
    [288.0, nan]
    """
    return decode(encode(x, fmt, saturate), fmt)


def bits(x: Tensor | float, fmt: str | Format) -> str:
    """One number's pattern in `fmt`, written as sign, exponent and fraction.

    >>> bits(-1.5, "bf16")
    '1 01111111 1000000'
    >>> bits(1e-8, "fp16")  # too small: every bit is zero
    '0 00000 0000000000'
    """
    fmt = _format(fmt)
    text = format(encode(x, fmt).item(), f"0{fmt.width}b")
    return f"{text[0]} {text[1 : 1 + fmt.exponent_bits]} {text[1 + fmt.exponent_bits :]}"


def _nf4() -> tuple[float, ...]:
    """Seven quantiles of the normal distribution below 0, eight above; 0 itself is exact."""
    edge = (1 / 32 + 1 / 30) / 2  # how far the outermost quantiles stay from 0 and 1
    low = [NormalDist().inv_cdf(edge + i / 7 * (0.5 - edge)) for i in range(7)]
    high = [NormalDist().inv_cdf(0.5 + i / 8 * (0.5 - edge)) for i in range(1, 9)]
    return tuple(x / high[-1] for x in (*low, 0.0, *high))


NF4 = _nf4()
"""NF4's sixteen levels in [-1, 1]. Source: Dettmers et al., QLoRA, 2023."""


def to_nf4(x: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """x in four bits a number: (codes, absmax).

    Every `block` numbers are divided by the largest of their absolute values, `absmax`
    [ceil(n / block)] in float32, and become the number of the nearest level of `NF4`; codes
    [ceil(n / 2)] uint8 hold two, the first in the upper four bits.

    Raises ValueError for an odd block, and for values that are not finite.

    >>> codes, absmax = to_nf4(torch.tensor([0.5, -2.0, 0.0, 2.0]))
    >>> codes.tolist(), absmax.tolist()  # levels 10 and 0, 7 and 15
    ([160, 127], [2.0])
    """
    if block < 2 or block % 2:
        raise ValueError(f"block={block} must be even and at least 2: a byte holds two codes")
    if not x.isfinite().all():
        raise ValueError("x has values that are not finite: they have no place among the levels")
    flat = x.detach().float().flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = rows.abs().amax(1)
    levels = torch.tensor(NF4, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    scaled = rows / absmax.where(absmax > 0, 1.0)[:, None]
    codes = torch.bucketize(scaled, middles).to(torch.uint8).view(-1, 2)
    return (codes[:, 0] * 16 + codes[:, 1])[: -(-len(flat) // 2)], absmax


def from_nf4(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], block: int = 64) -> Tensor:
    """The numbers behind `to_nf4`, float32 of the given shape."""
    levels = torch.tensor(NF4, device=codes.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # by byte
    flat = pairs[codes.int()].flatten()
    rows = torch.nn.functional.pad(flat, (0, len(absmax) * block - len(flat))).view(-1, block)
    return (rows * absmax[:, None]).flatten()[: torch.Size(shape).numel()].view(shape)
