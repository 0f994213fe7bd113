"""Matrix multiplication: one tile and several, every orientation, epilogues, split k."""

import torch

from kernels import runtime
from kernels.matmul import reference
from tests.kernel_cases import Case, Fault, strided

A_B, ALL = ("a", "b"), ("a", "b", "bias")
WIDE = (torch.float32, torch.bfloat16)


def _of(m, k, n, *, batch=(), bias=False, turned="", scale=1.0, **options):
    """Columns of unit variance times `scale`; `turned`: which of a and b are transposed views."""

    def inputs(rng):
        def matrix(*shape):
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        a = matrix(*batch, k, m).mT if "a" in turned else matrix(*batch, m, k)
        b = matrix(n, k).mT if "b" in turned else matrix(k, n)
        found = {"a": a, "b": b / max(k, 1) ** 0.5 * scale, **options}
        return {**found, "bias": matrix(n)} if bias else found

    return inputs


def _between(rng):
    """Every second row and column of larger matrices."""
    a, b = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((41, 70), (5, 70)))
    return {"a": strided(a), "b": strided(b).T}


def _fp8(first, second):
    """fp8 numbers are handed as they are; the result is asked for in the dtype under test."""

    def inputs(rng):
        a, b = torch.randn(41, 70, generator=rng), torch.randn(70, 66, generator=rng)
        return {"a": a.to(first), "b": b.to(second), "out_dtype": torch.bfloat16}

    return inputs


def _exact(a, b, out_dtype):
    return reference(a.double(), b.double())


def _wide(a, b, out_dtype):
    return reference(a, b)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _case(name, inputs, gradients=A_B, **settings):
    """In the narrow types a result is rounded once, with an activation z as well before its slope
    is taken. In float32 sums of k products are off by √k units or so of the products' size, which
    is about 1 in all, and results can be smaller by chance."""
    return Case(name, "matmul", inputs, gradients, **{"slack": 8, "terms": 1.0, **settings})


NARROW = (torch.float16, torch.bfloat16)
# the interpreter multiplies in full: only on a GPU are the bits from the 11th of each fraction on
# cut off, 2^13 units of float32
TF32 = {"dtypes": (torch.float32,), "slack": 4 * 2**13 if runtime.MODE == "gpu" else 8}
ONCE = {"slack": 0.02, "dtypes": NARROW, "reference": _wide}
WIDER = _of(41, 70, 66, out_dtype=torch.float32)

CASES = [
    _case("one number", _of(1, 1, 1)),
    _case("3 5 1", _of(3, 5, 1)),
    _case("41 127 5", _of(41, 127, 5)),
    _case("tiles", _of(130, 70, 66)),
    _case("1 1023 41", _of(1, 1023, 41), dtypes=WIDE),
    _case("a turned", _of(70, 41, 66, turned="a"), dtypes=WIDE),
    _case("both turned", _of(66, 41, 70, turned="ab"), dtypes=WIDE),
    _case("strided", _between, dtypes=WIDE),
    _case("batches", _of(5, 41, 3, batch=(2, 3), bias=True), ALL),
    _case("large numbers", _of(5, 41, 66, scale=1e4)),
    *(
        _case(f"{name} and bias", _of(41, 66, 70, bias=True, activation=name), ALL)
        for name in ("relu", "silu", "gelu_tanh")
    ),
    *(
        _case(f"{name} far out", _of(3, 5, 41, scale=1e4, activation=name), dtypes=WIDE)
        for name in ("silu", "gelu_tanh")
    ),
    _case("split", _of(5, 300, 41, split_k=2)),
    _case(
        "split, silu and bias",
        _of(41, 300, 70, bias=True, split_k=3, activation="silu"),
        ALL,
        dtypes=WIDE,
    ),
    _case("more parts than k", _of(3, 5, 3, split_k=4), dtypes=WIDE),
    _case("precision tf32", _of(41, 70, 66, precision="tf32"), **TF32),
    _case("precision tf32x3", _of(41, 70, 66, precision="tf32x3"), dtypes=(torch.float32,)),
    # float32's roundoff, not that of the narrow types: the sums are never rounded to these
    _case("wider result", WIDER, (), **ONCE),
    _case("wider result back", WIDER, reference=_wide, dtypes=NARROW),
    *(
        _case(f"fp8 {i}", _fp8(*types), (), reference=_exact, dtypes=(torch.bfloat16,))
        for i, types in enumerate(((E4M3, E4M3), (E4M3, E5M2), (E5M2, E5M2)))
    ),
    _case("no rows", _of(0, 5, 3, bias=True, activation="silu"), ALL, dtypes=WIDE),
    _case("no columns", _of(3, 5, 0), dtypes=WIDE),
    _case("nothing to add", _of(3, 0, 5, bias=True), ALL, dtypes=WIDE),
]

FAULTS = [
    Fault("k not masked", "inside = steps < last - start", "inside = steps >= 0", "41 127 5"),
    Fault(
        "the next block of k too early",
        "a_k, tl.int64) * BLOCK_K",
        "a_k, tl.int64) * (BLOCK_K - 1)",
        "41 127 5",
    ),
    Fault("sums start anew", "acc = tl.dot(a, b, acc,", "acc = tl.dot(a, b, acc * 0,", "41 127 5"),
    Fault(
        "a tile too far",
        "place(tl.program_id(0), tl.cdiv(m, BLOCK_M)",
        "place(tl.program_id(0) + 1, tl.cdiv(m, BLOCK_M)",
        "tiles",
    ),
    Fault(
        "the last group as high as the others",
        "height = min(programs_m - first, group)",
        "height = group",
        "tiles",
    ),
    Fault("the last row is lost", "(rows < m)[:, None]", "(rows < m - 1)[:, None]", "3 5 1"),
    Fault("bias missing", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr", "batches"),
    Fault(
        "relu for negative numbers",
        "tl.where(z < 0, 0.0, z)",
        "tl.where(z < 0, z, 0.0)",
        "relu and bias",
    ),
    Fault("another GELU", "1.5957691216057308", "1.702", "gelu_tanh and bias"),
    Fault(
        "a part of k left out",
        "first, last = i * BLOCK_M, j * BLOCK_N, part * share",
        "first, last = i * BLOCK_M, j * BLOCK_N, 0 * share",
        "split",
    ),
    Fault(
        "bias in no part",
        "z = _finish(parts.sum(0), bias, None)",
        "z = _finish(parts.sum(0), None, None)",
        "split, silu and bias",
    ),
    Fault("slope missing", "dy = torch.ops.aten.silu_backward(dy, z)", "pass", "silu and bias"),
    Fault(
        "b not transposed back", "_run(dz, b.T, a.dtype", "_run(dz, b.flip(0).T, a.dtype", "3 5 1"
    ),
    Fault("strides ignored", "*a.stride(), *b.stride(), share", "k, 1, n, 1, share", "both turned"),
    Fault(
        "result in the dtype of a",
        "torch.empty(m, n, dtype=out_dtype",
        "torch.empty(m, n, dtype=a.dtype",
        "wider result",
        torch.float16,
    ),
]
