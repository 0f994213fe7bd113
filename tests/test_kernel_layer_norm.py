"""LayerNorm's kernel: bad input, dtypes in mixture, and what a normalization has to fulfill."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import layer_norm as file
from kernels.layer_norm import cost, layer_norm, reference
from tests.test_kernels import DEVICE, needs_triton


def draw(*shape, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(DEVICE, dtype)


def test_the_reference_is_pytorchs():
    x, w, b = (draw(*shape, dtype=torch.float64) for shape in ((3, 4, 7), (7,), (7,)))
    for bias in (b, None):
        expected = F.layer_norm(x, (7,), w, bias, eps=0.1)
        torch.testing.assert_close(reference(x, w, bias, eps=0.1), expected)


@needs_triton
@pytest.mark.parametrize("bias", [True, False])
def test_axes_in_front_are_rows(bias):
    x, w, b = draw(2, 3, 7), draw(7), draw(7) if bias else None
    torch.testing.assert_close(layer_norm(x, w, b), F.layer_norm(x, (7,), w, b))


@needs_triton
def test_each_gradient_has_the_dtype_of_its_input():
    x, w, b = draw(4, 9, dtype=torch.bfloat16), draw(9), draw(9, dtype=torch.float16)
    inputs = [v.requires_grad_() for v in (x, w, b)]
    found = torch.autograd.grad(layer_norm(*inputs).sum(), inputs)
    expected = torch.autograd.grad(reference(*inputs).sum(), inputs)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, atol=1e-2, rtol=1e-2)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.integers(2, 80),
    shift=st.floats(-1e3, 1e3),
    factor=st.floats(0.1, 100),
    seed=st.integers(0, 1000),
)
def test_shift_and_scale_of_a_row_do_not_matter(rows, width, shift, factor, seed):
    x = draw(rows, width, seed=seed).double()
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    ones = torch.ones(width, device=DEVICE)
    # rounding the shifted row to float32 is an error of its own, which no kernel can mend
    moved = (factor * x + shift).float()
    allowed = 4e-6 + 2 * 2.0**-24 * (abs(shift) + 8 * factor) / factor
    found, expected = (layer_norm(v, ones, eps=0.0) for v in (moved, x.float()))
    assert (found - expected).abs().max() <= allowed * width**0.5


@needs_triton
def test_the_gradient_has_no_part_along_shift_and_scale():
    x, w = draw(3, 50).requires_grad_(), torch.ones(50, device=DEVICE)
    y = layer_norm(x, w, eps=0.0)
    (dx,) = torch.autograd.grad(y, x, draw(3, 50, seed=1))
    assert dx.sum(-1).abs().max() < 1e-5
    assert (dx * y.detach()).sum(-1).abs().max() < 1e-5
    assert dx.norm() > 1


@needs_triton
def test_two_runs_agree_to_the_last_bit():
    x, w, b = draw(37, 20).requires_grad_(), draw(20).requires_grad_(), draw(20).requires_grad_()
    runs = [torch.autograd.grad(layer_norm(x, w, b).square().sum(), (x, w, b)) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@needs_triton
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((3, 8), (7,), None),
            r"x \(3, 8\) needs weight and bias of its last axis.*\(7,\) and None",
        ),
        (((3, 8), (8,), (3,)), r"got \(8,\) and \(3,\)"),
        (((3, 8), (8, 1), None), r"got \(8, 1\)"),
        (((), (1,), None), r"x \(\)"),
        (((3, 0), (0,), None), r"x \(3, 0\)"),
        (((1, file.WIDEST + 1), (file.WIDEST + 1,), None), "at most 65536 wide"),
    ],
)
def test_widths_that_do_not_fit_are_refused(shapes, message):
    x, w, b = (None if shape is None else torch.zeros(shape, device=DEVICE) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        layer_norm(x, w, b)


@needs_triton
def test_dtypes_and_devices_are_checked():
    x, w = draw(2, 8), draw(8)
    with pytest.raises(ValueError, match="dtype float64 must be one of float32"):
        layer_norm(x.double(), w)
    with pytest.raises(ValueError, match="dtype int64"):
        layer_norm(x, w, torch.zeros(8, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="on one device"):
        layer_norm(x, w, w.to("meta"))


def test_cost_of_the_backward_pass():
    n, d = 10, 64
    assert cost(n, d, 2).bytes == 2 * (n * d * 2 + 2 * d) + 12 * n
    assert cost(n, d, 2, backward=True).bytes == 2 * (n * d * 3 + 3 * d) + 12 * n
