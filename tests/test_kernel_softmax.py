"""Softmax beside the common suite: bad input, properties, counted bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.softmax import WIDEST, cost, reference, softmax, tile

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
INF = float("inf")

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def test_reference_equals_pytorch_and_is_zero_where_nothing_is_allowed():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, generator=rng, dtype=torch.float64)
    x[2, 1:3] = -INF
    torch.testing.assert_close(reference(x), torch.softmax(x, -1))
    x[1] = -INF
    x.requires_grad_()
    y = reference(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert not y[1].any() and not grad[1].any() and grad.isfinite().all()
    assert grad[0].abs().max() > 0
    assert reference(x.bfloat16()).dtype == torch.bfloat16


@needs_triton
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 1100),
    shift=st.sampled_from([0.0, -1e3, 1e3]),
    forbidden=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_sum_to_one_or_to_nothing(n, d, shift, forbidden, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng).round(decimals=2)
    x.masked_fill_(torch.rand(n, d, generator=rng) < forbidden, -INF)
    x = x.to(DEVICE).requires_grad_()
    y = softmax(x)
    alive = (x > -INF).any(-1)
    torch.testing.assert_close(y.sum(-1), alive.float(), rtol=1e-5, atol=0)
    assert y.min() >= 0 and not y[x == -INF].any()
    # the same for all numbers of a row changes nothing, so its gradient sums to nothing
    torch.testing.assert_close(softmax(x.detach() + shift), y.detach(), rtol=1e-3, atol=1e-6)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.isfinite().all() and grad.sum(-1).abs().max() < 1e-5


@needs_triton
def test_nan_stays_in_its_row():
    x = torch.zeros(3, 41, device=DEVICE)
    x[1, 7] = float("nan")
    y = softmax(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert softmax(torch.full((1, 5), float("nan"), device=DEVICE)).isnan().all()


@needs_triton
def test_no_gradient_is_no_business_and_a_second_derivative_is_refused():
    x = torch.randn(3, 5, device=DEVICE)
    assert not softmax(x).requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not softmax(x).requires_grad
    (grad,) = torch.autograd.grad(softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_triton
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(()), r"x is \(\)"),
        (torch.zeros(3, 0), r"x is \(3, 0\)"),
        (torch.zeros(3, 5, dtype=torch.float64), "dtype float64 must be one of float32"),
        (torch.zeros(3, 5, dtype=torch.int64), "dtype int64"),
        (torch.zeros(3, 5, device="meta"), "meta"),
    ],
)
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        softmax(x if x.is_meta else x.to(DEVICE))


@needs_triton
@pytest.mark.parametrize("width", [1, 2, 41, 1024, 1025, 5000, WIDEST])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_tile_holds_a_row_and_its_warps_have_work(width, device):
    for n in (0, 1, 3, 10_000):
        size = tile(n, width, torch.device(device))
        assert size["BLOCK"] >= width > size["BLOCK"] // 2
        assert size["ROWS"] & (size["ROWS"] - 1) == 0 and 0 < size["ROWS"] < 2 * max(n, 1)
        assert 4 <= size["num_warps"] <= 16
    assert tile(3, 100_000, torch.device(device), 4096)["BLOCK"] == 4096


def test_fusing_moves_a_quarter_of_the_bytes_forward_and_a_third_backward():
    """The unfused count, by carrying it out: what each operation reads and writes."""
    rows, width = 64, 1000
    x, dy = torch.randn(2, rows, width)
    counted = []

    def run(operation, *inputs):
        out = operation(*inputs)
        counted.append(sum(t.nbytes for t in (*inputs, out)))
        return out

    top = run(lambda a: a.amax(-1, keepdim=True), x)
    e = run(torch.exp, run(torch.sub, x, top))
    y = run(torch.div, e, run(lambda a: a.sum(-1, keepdim=True), e))
    torch.testing.assert_close(y, reference(x))
    assert sum(counted) == cost(rows, width, fused=False).bytes
    counted.clear()
    mean = run(lambda a: a.sum(-1, keepdim=True), run(torch.mul, y, dy))
    run(torch.mul, y, run(torch.sub, dy, mean))
    assert sum(counted) == cost(rows, width, fused=False, backward=True).bytes

    assert cost(rows, width).bytes == 2 * x.nbytes
    assert cost(rows, width, backward=True).bytes == 3 * x.nbytes
    assert cost(rows, width, itemsize=2).bytes == x.nbytes
    assert cost(rows, width).flops == cost(rows, width, fused=False).flops  # moved, not computed
