"""Dropout whose mask is computed from a seed and each number's place, and so never stored.

PyTorch's keeps a byte for each number from the forward to the backward pass. A counter-based
generator needs no state: the random number of place i is a function of (seed, i), so the backward
pass computes the mask again, whoever holds which block.
"""

# n numbers; a counter yields four random words of 32 bits

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.spec import Spec

BLOCK = 2048
WORD = 2**32 - 1
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def _philox_rounds(counter: list[Tensor], key: list[int]) -> list[Tensor]:
    """Philox4x32-10: four words of counter (int64 below 2³²), two of key -> four random words."""
    a, b, c, d = counter
    for _ in range(10):
        # int64 multiplication wraps around, which leaves the 64 bits of the unsigned product
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            (q >> 32 & WORD) ^ b ^ key[0],
            q & WORD,
            (p >> 32 & WORD) ^ d ^ key[1],
            p & WORD,
        )
        key = [k + step & WORD for k, step in zip(key, KEY_STEPS, strict=True)]
    return [a, b, c, d]


def _philox4(seed: int, counters: Tensor) -> Tensor:
    """As Triton's `tl.rand4x`: counters [...] int64 -> [..., 4] float32 in [0, 1)."""
    counter = [counters & WORD, counters >> 32 & WORD, counters * 0, counters * 0]
    words = torch.stack(_philox_rounds(counter, [seed & WORD, seed >> 32 & WORD]), -1)
    signed = torch.where(words < 2**31, words, WORD - words)  # a negative int32 x becomes -x - 1
    return signed.float() * 4.6566127342e-10  # just below 2^-31: the largest word stays below 1


def philox_uniform(seed: int, counters: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1), each a function of the seed and its counter alone.

    The same numbers, bit for bit, as `tl.rand(seed, counters)` in a kernel: the first word of
    Philox4x32-10, its sign bit folded in, times 2^-31. counters [...] of an integer dtype, in
    [0, 2^63); seed in [0, 2^63); float32 of the counters' shape on their device.
    Raises ValueError when the seed is out of range or counters are no integers.
    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.

    >>> numbers = philox_uniform(5, torch.arange(4))
    >>> torch.equal(philox_uniform(5, torch.tensor([3, 0])), numbers[[3, 0]])
    True
    """
    check_seed(seed)
    if counters.is_floating_point() or counters.is_complex() or counters.dtype == torch.bool:
        raise ValueError(f"counters must be integers, not {counters.dtype}")
    return _philox4(seed, counters.long())[..., 0]


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is a whole number in [0, 2^63)."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")


def reference(x: Tensor, p: float, seed: int) -> Tensor:
    """x / (1 - p) where a uniform number is at least p, else 0; of any shape.

    The expectation is x. Number i, counted along the last axis first, is dropped by word i mod 4
    of counter i // 4: the mask depends on the seed and the number's place, not on strides.
    Raises ValueError unless p is in [0, 1] and the seed in [0, 2^63). Source: Srivastava et al.,
    Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014.
    """
    _check_options(p, seed)
    counters = torch.arange(-(-x.numel() // 4), device=x.device)
    uniform = _philox4(seed, counters).flatten()[: x.numel()].view(x.shape)
    keep = uniform >= torch.tensor(p, dtype=torch.float32, device=x.device)
    return torch.where(keep, x * _scale(p), 0.0)


def _check_options(p: float, seed: int) -> None:
    check_seed(seed)
    if not 0 <= p <= 1:
        raise ValueError(f"p={p} must be a probability, from 0 to 1")


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


@jit
def _dropout(x_ptr, out_ptr, n, seed, p, scale, BLOCK: tl.constexpr):
    # One counter yields four words: with one number from each counter the 10 rounds of integer
    # arithmetic, and not memory, would set the pace.
    program = tl.program_id(0).to(tl.int64)
    counters = program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    u0, u1, u2, u3 = tl.rand4x(seed, counters)
    uniform = tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    x = tl.load(x_ptr + place, mask=inside).to(tl.float32)
    keep = uniform >= p
    tl.store(out_ptr + place, tl.where(keep, x * scale, 0.0), mask=inside)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed  # all that the backward pass needs
        x = x.contiguous()
        out, n = torch.empty_like(x), x.numel()
        _dropout[(triton.cdiv(n, BLOCK),)](x, out, n, seed, p, _scale(p), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.p, ctx.seed), None, None


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """`reference`, with the same mask; nothing is stored for the backward pass.

    x of float32, float16 or bfloat16, of any shape and strides; p in [0, 1]; a seed in [0, 2^63),
    to be drawn anew for each call. Raises ValueError when p or the seed is out of range, and as
    `kernels.runtime.check` does.
    """
    check(x, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    _check_options(p, seed)
    return _Dropout.apply(x, float(p), seed)


def cost(numbers: int, itemsize: int = 4) -> Cost:
    """One multiplication for each number (the generator's integers are no FLOPs); read, written.

    Forward and backward alike: no mask moves.

    >>> cost(1000, itemsize=2)
    Cost(flops=1000, bytes=4000)
    """
    return Cost(flops=numbers, bytes=2 * numbers * itemsize)


def specs() -> list[Spec]:
    """Activations in bf16."""
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "seed": "i32"}
    types |= {"p": "fp32", "scale": "fp32"}
    return [Spec("dropout bf16", _dropout, types, {"BLOCK": BLOCK})]
