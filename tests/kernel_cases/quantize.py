"""Matmuls with int8 and int4 weights."""

import torch

from kernels.quantize import quantize_int4, quantize_int8, reference_int8
from tests.kernel_cases import Case, Fault, strided


def _int8(m, n, k, out_dtype=torch.float32, scale=1.0, strided_x=False, lead=()):
    def inputs(rng):
        x, w = (torch.randn(*s, k, generator=rng, dtype=torch.float64) for s in ((*lead, m), (n,)))
        (x_q, x_scale), (w_q, w_scale) = quantize_int8(x * scale), quantize_int8(w)
        x_q = strided(x_q) if strided_x else x_q
        given = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale}
        return given | {"out_dtype": out_dtype}

    return inputs


def _exact(out_dtype, **given):
    return reference_int8(**given, out_dtype=torch.float64)


def _int4(m, n, k, group=32, scale=1.0, strided_x=False, lead=()):
    def inputs(rng):
        x = torch.randn(*lead, m, k, generator=rng, dtype=torch.float64) * scale
        w = torch.randn(n, k, generator=rng, dtype=torch.float64) / scale
        packed, scales, zeros = quantize_int4(w, group)
        x = strided(x) if strided_x else x
        return {"x": x, "packed": packed, "scales": scales, "zeros": zeros, "group": group}

    return inputs


def _int8_case(name, *sizes, dtype=torch.float32, **more):
    # integers up to 2^24, the scales' two products and the result: four roundings of half a unit
    inputs = _int8(*sizes, out_dtype=dtype, **more)
    return Case(name, "int8_matmul", inputs, reference=_exact, slack=4, dtypes=(dtype,))


# The result is rounded, and on the way back the weights: sums of k errors of half a unit, up to √k
# times the size of a product, which is that of a result.
def _int4_case(name, *sizes, **more):
    sixteen = (torch.float16, torch.bfloat16)
    return Case(name, "int4_matmul", _int4(*sizes, **more), ("x",), "reference_int4", 4, sixteen)


CASES = [
    *(_int8_case(f"int8 {n}x5x{n}", n, 5, n) for n in (1, 3, 41, 127)),
    _int8_case("int8 1023 inputs", 3, 130, 1023),
    _int8_case("int8 tiles", 130, 260, 64),
    _int8_case("int8 to bf16", 5, 41, 127, dtype=torch.bfloat16),
    _int8_case("int8 to fp16", 5, 41, 127, dtype=torch.float16),
    _int8_case("int8 large", 5, 41, 127, scale=1e4),
    _int8_case("int8 zeros", 3, 5, 41, scale=0.0),
    _int8_case("int8 strided", 5, 7, 41, strided_x=True),
    _int8_case("int8 batch", 3, 5, 41, lead=(2,)),
    _int8_case("int8 no rows", 0, 5, 8),
    *(_int4_case(f"int4 {n} rows", n, 41, 64) for n in (1, 3, 127)),
    *(_int4_case(f"int4 {n} outputs", 5, n, 64) for n in (1, 5, 1023)),
    _int4_case("int4 group 128", 5, 41, 256, group=128),
    _int4_case("int4 large", 5, 41, 64, scale=1e4),
    _int4_case("int4 strided", 5, 7, 64, strided_x=True),
    _int4_case("int4 batch", 3, 5, 64, lead=(2,)),
    _int4_case("int4 no rows", 0, 5, 64),
]

FAULTS = [
    Fault("last input left out", "steps < k - start", "steps < k - start - 1", "int8 41x5x41"),
    Fault("activation scale missing", " * x_scale[:, None] * w", " * w", "int8 3x5x3"),
    Fault(
        "scale of the wrong column",
        "w_scale_ptr + cols % n",
        "w_scale_ptr + 0 * cols",
        "int8 3x5x3",
    ),
    Fault(
        "last step left out", "range(0, k, BLOCK_K)", "range(0, k - BLOCK_K, BLOCK_K)", "int8 tiles"
    ),
    Fault(
        "last row not stored",
        "(rows < m)[:, None] & ",
        "(rows < m - 1)[:, None] & ",
        "int8 batch",
    ),
    Fault("halves swapped", "(packed & 15).to", "(packed >> 4).to", "int4 3 rows", torch.float16),
    Fault(
        "zero point missing",
        "first = ((packed & 15).to(tl.int8) - zero)",
        "first = ((packed & 15).to(tl.int8))",
        "int4 3 rows",
        torch.float16,
    ),
    Fault(
        "first group's scale for all",
        "line * (k // GROUP) + g)[:, None]\n    inside",
        "line * (k // GROUP))[:, None]\n    inside",
        "int4 3 rows",
        torch.float16,
    ),
    Fault(
        "last group left out",
        "range(k // GROUP)",
        "range(k // GROUP - 1)",
        "int4 3 rows",
        torch.float16,
    ),
    Fault(
        "second half of x read from the first",
        "x_ptrs + g * GROUP + HALF",
        "x_ptrs + g * GROUP",
        "int4 group 128",
        torch.float16,
    ),
    Fault("strides ignored", "*(x.contiguous() for x in tensors)", "*tensors", "int8 strided"),
    Fault(
        "zero point missing backward",
        "return dy @ dequantize_int4(*ctx.saved_tensors, ctx.group)",
        "p, s, z = ctx.saved_tensors\n        return dy @ dequantize_int4(p, s, 0 * z, ctx.group)",
        "int4 5 outputs",
        torch.float16,
    ),
]
