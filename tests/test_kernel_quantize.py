"""Quantized matmuls beyond the common suite: grids, packing, exact integers, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import quantize, runtime
from kernels.quantize import (
    dequantize_int4,
    int4_matmul,
    int8_matmul,
    quantize_int4,
    quantize_int8,
    reference_int4,
    reference_int8,
)

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    axis=st.sampled_from([0, 1, -1]),
    power=st.integers(-30, 30),
    seed=st.integers(0, 999),
)
def test_int8_is_off_by_half_a_step_at_most(rows, width, axis, power, seed):
    x = numbers(rows, width, seed=seed, scale=2.0**power)
    q, scale = quantize_int8(x, axis)
    assert q.dtype == torch.int8 and q.min() >= -127
    assert (q.abs().amax(axis) == 127).all(), "the largest number uses the whole range"
    steps = scale.unsqueeze(axis)
    assert ((q * steps - x).abs() <= steps * (0.5 + 1e-4)).all()  # and the rounding of x / scale


def test_int8_agrees_with_a_loop_in_plain_python():
    x = numbers(3, 7)
    q, scale = quantize_int8(x)
    for row, line in enumerate(x.tolist()):
        step = max(abs(value) for value in line) / 127
        assert scale[row].item() == pytest.approx(step, rel=1e-6)
        assert q[row].tolist() == [round(value / step) for value in line]


def test_int8_of_zeros_and_of_what_is_not_finite():
    q, scale = quantize_int8(torch.tensor([[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]]))
    assert q[0].tolist() == [0, 0] and scale[0] == 1
    w_q, w_scale = quantize_int8(numbers(3, 2))
    y = reference_int8(q, scale, w_q, w_scale)
    assert y[0].tolist() == [0, 0, 0] and y[1:].isnan().all(), "what was not finite must show"


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    group=st.sampled_from(quantize.GROUPS),
    shift=st.sampled_from([0.0, 3.0, -3.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_int4_is_off_by_half_a_step_at_most(rows, groups, group, shift, seed):
    w = numbers(rows, groups * group, seed=seed) + shift
    packed, scales, zeros = quantize_int4(w, group)
    assert packed.shape == (rows, groups * group // 2) and packed.dtype == torch.uint8
    assert scales.shape == zeros.shape == (rows, groups) and int(zeros.max()) <= 15
    off = (dequantize_int4(packed, scales, zeros, group) - w).abs().unflatten(1, (-1, group))
    assert (off <= scales[..., None] * (0.5 + 1e-4)).all()


def test_int4_keeps_what_lies_on_the_grid_and_zero():
    q = torch.randint(0, 16, (3, 64), generator=torch.Generator().manual_seed(1))
    q[:, 0::32], q[:, 1::32] = 0, 15  # each group spans its grid
    w = (q - 6) * 0.25
    packed, scales, zeros = quantize_int4(w, 32)
    assert torch.equal(dequantize_int4(packed, scales, zeros, 32), w)
    assert (scales == 0.25).all() and (zeros == 6).all()
    assert torch.equal(packed[:, :16], (q[:, :16] + 16 * q[:, 16:32]).to(torch.uint8))
    assert dequantize_int4(*quantize_int4(torch.zeros(2, 32), 32), 32).abs().max() == 0


@pytest.mark.slow
@needs_triton
def test_the_integer_part_is_exact():
    """With scales of 1 and sums below 2^24 not one bit may be off, also at -128."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randint(-128, 128, (37, 300), generator=rng, dtype=torch.int8)
    w = torch.randint(-128, 128, (45, 300), generator=rng, dtype=torch.int8)
    y = int8_matmul(*(t.to(DEVICE) for t in (x, torch.ones(37), w, torch.ones(45)))).cpu()
    assert torch.equal(y.long(), x.long() @ w.long().T)
    ones = torch.full((1, 131_071), -128, dtype=torch.int8, device=DEVICE)
    longest = int8_matmul(ones, torch.ones(1).to(DEVICE), ones, torch.ones(1).to(DEVICE))
    assert longest.item() == 131_071 * 128**2, "the longest sum that surely fits"


@needs_triton
def test_int8_matmul_comes_close_to_the_wide_one():
    """Each operand is off by half a step of 1/127 of its row's maximum: about 1 % of the result."""
    x, w = numbers(16, 256, seed=3), numbers(32, 256, seed=4)
    given = [t.to(DEVICE) for t in (*quantize_int8(x), *quantize_int8(w))]
    y = int8_matmul(*given).cpu()
    off = (y - x @ w.T).norm() / (x @ w.T).norm()
    assert 1e-4 < off < 0.015


@needs_triton
def test_smaller_groups_follow_outliers_better():
    w = numbers(32, 256, seed=5)
    w[:, 7] *= 50
    x = numbers(4, 256, seed=6).half()
    x[:, 7] = 0
    off = []
    for group in (32, 128):
        given = [t.to(DEVICE) for t in (x, *quantize_int4(w, group))]
        off.append(float((int4_matmul(*given, group).cpu() - x.float() @ w.T).norm()))
    assert off[0] < off[1] / 2


@needs_triton
def test_a_frozen_int4_layer_passes_its_gradient_on():
    x = numbers(5, 64, seed=7).half().to(DEVICE).requires_grad_()
    packed = [t.to(DEVICE) for t in quantize_int4(numbers(6, 64, seed=8), 32)]
    (got,) = torch.autograd.grad(int4_matmul(x, *packed, 32).square().sum(), x)
    (want,) = torch.autograd.grad(reference_int4(x, *packed, 32).square().sum(), x)
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def eight(**changed):
    (x_q, x_scale), (w_q, w_scale) = quantize_int8(numbers(3, 8)), quantize_int8(numbers(4, 8))
    given = {"x_q": x_q, "x_scale": x_scale, "w_q": w_q, "w_scale": w_scale}
    return {name: x.to(DEVICE) for name, x in given.items()} | changed


def four(**changed):
    packed, scales, zeros = quantize_int4(numbers(4, 64), 32)
    given = {"x": numbers(3, 64).half(), "packed": packed, "scales": scales, "zeros": zeros}
    return {name: x.to(DEVICE) for name, x in given.items()} | {"group": 32} | changed


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(*shape, dtype=dtype, device=device)


@needs_triton
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_q": zeros(3, 8)}, "dtype float32 must be one of int8"),
        ({"w_scale": zeros(4, dtype=torch.float16)}, "dtype float16 must be one of float32"),
        ({"w_q": zeros(4, 8, dtype=torch.int8, device="meta")}, "must be on one device"),
        ({"x_q": zeros(3, 9, dtype=torch.int8)}, r"\(3, 9\) must be as wide as w_q \(4, 8\)"),
        ({"w_q": zeros(8, dtype=torch.int8)}, "must be as wide"),
        ({"x_scale": zeros(1)}, r"one scale a row: x_q \(3, 8\), x_scale \(1,\)"),
        ({"w_scale": zeros(8)}, r"w_q \(4, 8\), w_scale \(8,\)"),
        ({"w_scale": zeros(4).requires_grad_()}, "scales get no gradient"),
        ({"out_dtype": torch.int32}, "out_dtype torch.int32 must be one of"),
        (
            {
                "x_q": zeros(3, 131_072, dtype=torch.int8),
                "w_q": zeros(4, 131_072, dtype=torch.int8),
            },
            "k=131072 must be 1 to 131071",
        ),
        (
            {"x_q": zeros(3, 0, dtype=torch.int8), "w_q": zeros(4, 0, dtype=torch.int8)},
            "k=0 must be 1 to 131071",
        ),
    ],
)
def test_int8_matmul_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        int8_matmul(**eight(**changed))


@needs_triton
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": zeros(3, 64)}, "dtype float32 must be one of float16, bfloat16"),
        ({"packed": zeros(4, 32, dtype=torch.int8)}, "dtype int8 must be one of uint8"),
        ({"zeros": zeros(4, 2)}, "dtype float32 must be one of uint8"),
        ({"scales": zeros(4, 2, dtype=torch.float16)}, "dtype float16 must be one of float32"),
        ({"x": zeros(3, 64, device="meta")}, "must be on one device"),
        (
            {"x": zeros(3, 65, dtype=torch.float16)},
            r"\(3, 65\) must be twice as wide as packed \(4, 32\)",
        ),
        ({"group": 48}, r"group=48 must be one of \(32, 64, 128\)"),
        ({"group": 128}, "k=64 must be a multiple of group=128"),
        ({"group": 64}, r"must be \(4, 1\): one for each group of 64"),
        ({"scales": zeros(4, 2).requires_grad_()}, "scales get no gradient"),
    ],
)
def test_int4_matmul_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        int4_matmul(**four(**changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_int8(torch.zeros(3, dtype=torch.int32)), "must be floats"),
        (lambda: quantize_int8(torch.zeros(3, 0)), "at least one along -1"),
        (lambda: quantize_int8(torch.tensor(1.0)), "must be floats"),
        (lambda: quantize_int4(torch.zeros(3, 40), 32), "k=40 must be a multiple of group=32"),
        (lambda: quantize_int4(torch.zeros(3, 0), 32), "k=0 must be a multiple"),
        (lambda: quantize_int4(torch.zeros(64), 32), r"must be a matrix \[n, k\]"),
        (lambda: quantize_int4(torch.full((1, 32), float("nan")), 32), "NaN or inf"),
        (lambda: quantize_int4(torch.zeros(3, 32), 16), "group=16 must be one of"),
        (lambda: quantize.cost(1, 1, 1, bits=3), "bits=3 must be 4 or 8"),
    ],
)
def test_quantizing_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cost_counts_the_tensors():
    x, w = numbers(3, 64), numbers(5, 64)
    tensors = (x.bfloat16(), *quantize_int4(w, 32), torch.empty(3, 5, dtype=torch.bfloat16))
    moved = sum(t.numel() * t.itemsize for t in tensors)
    assert quantize.cost(3, 5, 64, bits=4, group=32) == (2 * 3 * 5 * 64, moved)
    tensors = (*quantize_int8(x), *quantize_int8(w), torch.empty(3, 5))
    moved = sum(t.numel() * t.itemsize for t in tensors)
    assert quantize.cost(3, 5, 64, bits=8, itemsize=4).bytes == moved
