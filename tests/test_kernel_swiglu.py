"""Gated linear units beside the common suite: bad input, properties, counted bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import runtime, swiglu
from kernels.swiglu import ACTIVATIONS, cost, geglu, glu, reference

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def test_reference_equals_the_formulas_number_by_number():
    formulas = {
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: (
            x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
        ),
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "relu": lambda x: max(x, 0.0),
    }
    assert formulas.keys() == ACTIVATIONS.keys()
    gate = torch.linspace(-9, 9, 37, dtype=torch.float64)
    for name, formula in formulas.items():
        want = torch.tensor([3 * formula(x) for x in gate.tolist()], dtype=torch.float64)
        found = reference(gate, torch.full_like(gate, 3.0), name)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert reference(gate.bfloat16(), gate.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    last=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_order_of_axes(shape, activation, last, seed):
    rng = torch.Generator().manual_seed(seed)
    gate, up, dout = (torch.randn(shape, generator=rng).to(DEVICE) for _ in range(3))
    if shape:
        gate = gate.transpose(last % len(shape), -1).contiguous().transpose(last % len(shape), -1)
    gate.requires_grad_(), up.requires_grad_()
    got, want = glu(gate, up, activation), reference(gate, up, activation)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for g, w in zip(*(torch.autograd.grad(y, (gate, up), dout) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=2e-6)
    # linear in up, to the last bit where the factor is a power of two
    assert torch.equal(glu(gate, -4 * up, activation), -4 * got)


@needs_triton
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_extreme_numbers_give_no_nan_and_a_nan_stays_where_it_is(activation):
    gate = torch.tensor([-1e4, -300.0, -89.0, 0.0, 89.0, 300.0, 1e4], device=DEVICE)
    up = torch.full_like(gate, 1e4).requires_grad_()
    gate.requires_grad_()
    y = glu(gate, up, activation)
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert y.isfinite().all() and dgate.isfinite().all() and dup.isfinite().all()
    saturated = torch.tensor([0.0, 1.0]) if activation == "sigmoid" else torch.tensor([0.0, 1e4])
    torch.testing.assert_close(dup[[0, -1]].cpu(), saturated)
    slopes = torch.zeros(2) if activation == "sigmoid" else torch.tensor([0.0, 1e4])
    torch.testing.assert_close(dgate[[0, -1]].cpu(), slopes)
    broken = torch.tensor([1.0, float("nan"), -1.0], device=DEVICE)
    assert glu(broken, torch.ones_like(broken), activation).isnan().tolist() == [False, True, False]


@needs_triton
def test_geglu_is_the_exact_gelu_and_not_its_tanh_form():
    gate = torch.linspace(-4, 4, 81, device=DEVICE)
    up = torch.ones_like(gate)
    torch.testing.assert_close(geglu(gate, up), F.gelu(gate), rtol=0, atol=1e-6)
    off = geglu(gate, up) - F.gelu(gate, approximate="tanh")
    assert 1e-4 < off.abs().max() < 1e-3


def test_the_halves_of_a_projection_are_read_where_they_are():
    both = torch.randn(2, 3, 82)
    gate, up = both.chunk(2, -1)
    rows = swiglu._rows(gate, up)
    assert [x.data_ptr() for x in rows] == [gate.data_ptr(), up.data_ptr()]
    assert [x.shape for x in rows] == [(6, 41), (6, 41)] and rows[0].stride() == (82, 1)
    whole = swiglu._rows(gate.contiguous(), up.contiguous())
    assert [x.shape for x in whole] == [(1, 246), (1, 246)]


@needs_triton
def test_gradients_where_only_one_is_asked_for_and_where_none_is_known():
    gate, up = (torch.randn(5, 7, device=DEVICE) for _ in range(2))
    for one in (gate, up):
        one.requires_grad_()
        (got,) = torch.autograd.grad(glu(gate, up).sum(), one)
        (want,) = torch.autograd.grad(reference(gate, up).sum(), one)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        one.requires_grad_(False)
    gate.requires_grad_()
    (grad,) = torch.autograd.grad(glu(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_triton
def test_bad_input_is_refused_by_name():
    x = torch.zeros(3, 5, device=DEVICE)
    with pytest.raises(ValueError, match="activation='swish' must be one of silu, gelu"):
        glu(x, x, "swish")
    with pytest.raises(ValueError, match=r"gate \(3, 5\).*up \(5,\).*does not broadcast"):
        glu(x, x[0])
    with pytest.raises(ValueError, match=r"float32 and up \(3, 5\) torch.bfloat16 must be alike"):
        glu(x, x.bfloat16())
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(ValueError, match=f"{dtype}".removeprefix("torch.")):
            glu(x.to(dtype), x.to(dtype))
    with pytest.raises(ValueError, match="one device"):
        glu(x, x.to("meta"))


def test_cost_counts_the_tensors_that_move():
    gate, up, dout = (torch.empty(3, 41, dtype=torch.bfloat16) for _ in range(3))
    out = reference(gate, up)
    assert cost(123, itemsize=2).bytes == sum(x.nbytes for x in (gate, up, out))
    moved = (gate, up, dout, gate, up)  # the last two as their gradients
    assert cost(123, itemsize=2, backward=True).bytes == sum(x.nbytes for x in moved)
