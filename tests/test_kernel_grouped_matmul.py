"""Grouped matrix multiplication beside the common suite: properties, a loop, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_matmul as module
from kernels import runtime
from kernels.grouped_matmul import MOST, cost, grouped_matmul, reference
from kernels.matmul import cost as one_cost
from kernels.matmul import matmul

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(DEVICE)


def sizes_of(*numbers):
    return torch.tensor(numbers, device=DEVICE)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_reference_equals_a_loop_and_pads_with_zeros():
    x, weights = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 3, 2, dtype=torch.float64)
    y = reference(x, weights, torch.tensor([2, 0, 4]))
    torch.testing.assert_close(y[:2], x[:2] @ weights[0])
    torch.testing.assert_close(y[2:6], x[2:6] @ weights[2])
    assert not y[6:].any()
    assert reference(x.half(), weights.half(), torch.tensor([1, 1, 1])).dtype == torch.float16


@pytest.mark.slow
@needs_triton
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 3, 31, 64, 65]), min_size=1, max_size=4),
    behind=st.integers(0, 70),
    k=st.integers(1, 50),
    m=st.integers(1, 70),
)
def test_any_sizes_forward_and_backward(sizes, behind, k, m):
    x, weights = normal(sum(sizes) + behind, k), normal(len(sizes), k, m, seed=1)
    x.requires_grad_(), weights.requires_grad_()
    found = []
    for function in (grouped_matmul, reference):
        y = function(x, weights, sizes_of(*sizes))
        grads = torch.autograd.grad(y, (x, weights), normal(*y.shape, seed=2))
        found.append((y, *grads))
    for got, want in zip(*found, strict=True):
        close(got, want)


@needs_triton
def test_it_equals_one_launch_for_each_expert():
    x, weights, sizes = normal(75, 41), normal(4, 41, 66, seed=1), [3, 0, 65, 7]
    each = [matmul(rows, w) for rows, w in zip(x.split(sizes), weights, strict=True)]
    together = grouped_matmul(x, weights, sizes_of(*sizes))
    close(together, torch.cat(each))
    if DEVICE == "cpu":  # the same tiles, the same order of sums
        assert torch.equal(together, torch.cat(each))


@needs_triton
@pytest.mark.parametrize("bad", [(2**62, 2**62, 1), (-5, 3, 2**40), (-(2**63), 2, 100)])
def test_sizes_that_do_not_fit_lead_nowhere_else(bad):
    """As on a GPU, where the host does not look at them: what fits is multiplied, no more."""
    x, weights = normal(6, 5), normal(3, 5, 4, seed=1)
    ends = torch.tensor([min(max(size, 0), 6) for size in bad]).cumsum(0).clamp(max=6)
    real = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    close(module._multiply(x, weights, sizes_of(*bad)), reference(x, weights, real))
    dy = normal(6, 4, seed=2)
    starts = ends - real
    want = [x[s:e].T @ dy[s:e] for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]
    close(module._outer(x, dy, sizes_of(*bad)), torch.stack(want))


@needs_triton
def test_gradients_only_where_they_are_wanted():
    x, weights, sizes = normal(5, 3), normal(2, 3, 4, seed=1), sizes_of(2, 3)
    weights.requires_grad_()
    grouped_matmul(x, weights, sizes).sum().backward()
    assert x.grad is None
    close(weights.grad[0], x[:2].sum(0)[:, None].expand(3, 4))


@needs_triton
def test_many_experts():
    sizes = [i % 3 for i in range(31)]  # they and the rest fill the block that holds the sizes
    x, weights = normal(sum(sizes) + 2, 4), normal(31, 4, 3, seed=1)
    close(grouped_matmul(x, weights, sizes_of(*sizes)), reference(x, weights, sizes_of(*sizes)))


def test_cost_is_that_of_the_experts_one_by_one():
    each = [one_cost(rows, 3, 5, 2) for rows in (2, 4, 1)]
    assert cost(7, 5, 3, 3, 2).flops == sum(one.flops for one in each)
    assert cost(7, 5, 3, 3, 2).bytes == sum(one.bytes for one in each)


X, W, SIZES = torch.zeros(5, 3), torch.zeros(2, 3, 4), torch.tensor([2, 3])


@needs_triton
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.zeros(5, 4)}, r"x \(5, 4\) torch.float32 and weights \(2, 3, 4\)"),
        ({"x": torch.zeros(1, 5, 3)}, r"x \(1, 5, 3\)"),
        ({"weights": torch.zeros(3, 4)}, r"weights \(3, 4\)"),
        ({"x": X.half()}, "one dtype"),
        ({"x": X.double(), "weights": W.double()}, "float64 must be one of"),
        ({"x": X.to("meta")}, "one device"),
        ({"sizes": SIZES.to("meta")}, "one device"),
        ({"sizes": torch.tensor([2, 2, 1])}, r"sizes \(3,\).*2 experts"),
        ({"sizes": torch.tensor([[2, 3]])}, r"sizes \(1, 2\)"),
        ({"sizes": torch.tensor([2.0, 3.0])}, "float32, they must be int32 or int64"),
        (
            {"weights": torch.zeros(MOST + 1, 3, 4), "sizes": torch.zeros(MOST + 1).long()},
            f"1 to {MOST}",
        ),
        ({"weights": W[:0], "sizes": SIZES[:0]}, f"1 to {MOST}"),
    ],
)
def test_bad_input_is_refused(changes, says):
    given = {"x": X, "weights": W, "sizes": SIZES, **changes}
    given = {key: v if v.is_meta else v.to(DEVICE) for key, v in given.items()}
    with pytest.raises(ValueError, match=says):
        grouped_matmul(**given)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's host does not read the sizes")
@pytest.mark.parametrize("sizes", [[2, 4], [-1, 3]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="must not be negative, and x has 5 rows"):
        grouped_matmul(X, W, torch.tensor(sizes))
