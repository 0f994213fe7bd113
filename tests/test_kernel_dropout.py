"""Dropout's kernel: its random numbers, what they do on average, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dropout as file
from kernels.dropout import dropout, philox_uniform, reference
from kernels.runtime import jit, tl
from tests.test_kernels import DEVICE, needs_triton

F = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # the digits of pi
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """Known answers that come with its authors' library, Random123."""
    found = file._philox_rounds([torch.tensor([c]) for c in counter], list(key))
    assert tuple(int(word) for word in found) == words


@jit
def _rand(counters_ptr, out_ptr, n, seed, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    counters = tl.load(counters_ptr + place, mask=place < n, other=0)
    tl.store(out_ptr + place, tl.rand(seed, counters), mask=place < n)


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1]),
    counters=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 100), min_size=1, max_size=30),
)
def test_philox_uniform_is_what_a_kernel_draws(seed, counters):
    counters = torch.tensor(counters, device=DEVICE)
    out = torch.full((len(counters),), -1.0, device=DEVICE)
    _rand[(1,)](counters, out, len(counters), seed, BLOCK=32)
    assert torch.equal(out, philox_uniform(seed, counters))


def test_counters_of_any_shape_and_integer_dtype():
    counters = torch.arange(12, dtype=torch.int32).view(3, 4).t()
    found = philox_uniform(3, counters)
    assert found.shape == (4, 3) and found.dtype == torch.float32
    assert torch.equal(found.t().flatten(), philox_uniform(3, torch.arange(12)))
    assert philox_uniform(3, torch.arange(0)).shape == (0,)


def test_uniform_numbers_are_uniform():
    """400,000 numbers in 100 bins: χ² of 99 degrees of freedom exceeds 160 once in 10,000 seeds."""
    numbers = philox_uniform(11, torch.arange(400_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    seen = torch.histc(numbers, 100, 0, 1)
    assert ((seen - 4000) ** 2 / 4000).sum() < 160
    pairs = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(pairs) < 4 / 400_000**0.5  # four standard deviations


def test_the_largest_word_stays_below_one():
    words = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "_philox_rounds", lambda counter, key: [words] * 4)
        found = philox_uniform(0, torch.arange(4))
    assert found[0] == 0 and found[3] == 0
    assert found[1] == found[2] == found.max() < 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_expectation(p):
    """n independent numbers: the share dropped is p within 4 √(p(1-p)/n), 1 in 16,000 misses."""
    n = 200_000
    kept = reference(torch.ones(n), p, seed=2)
    assert abs((kept == 0).float().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert abs(kept.mean() - 1) < 4 * (p / (1 - p) / n) ** 0.5
    other = reference(torch.ones(n), p, seed=3)
    both = ((kept == 0) & (other == 0)).float().mean()  # another seed: an independent mask
    assert abs(both - p * p) < 4 * (p * p * (1 - p * p) / n) ** 0.5


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    p=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**63 - 1),
    block=st.sampled_from([32, 64, 1024]),
    data=st.data(),
)
def test_the_mask_depends_on_seed_and_place_alone(shape, p, seed, block, data):
    """Not on the block size, nor on strides, dtype or values; backward it is the same one."""
    ones = torch.ones(shape, device=DEVICE)
    expected = reference(ones, p, seed) != 0
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.empty([shape[axis] for axis in order], device=DEVICE).permute(
        [order.index(axis) for axis in range(len(shape))]
    )
    x = x.copy_(2 * ones).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "BLOCK", block)
        y = dropout(x, p, seed)
        (dx,) = torch.autograd.grad(y, x, torch.full_like(y, -3.0))
        half = dropout(ones.half(), p, seed)
    for found in (y, dx, half):
        assert torch.equal(found != 0, expected)


@needs_triton
def test_nothing_is_kept_for_the_backward_pass():
    x = torch.ones(1000, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.5, 1).sum().backward()
    assert kept == []
    assert torch.equal(x.grad, reference(torch.ones_like(x), 0.5, 1))


@needs_triton
def test_p_0_changes_nothing_and_p_1_leaves_nothing():
    x = torch.tensor([1.0, -2.5, torch.inf, torch.nan], device=DEVICE)
    assert torch.equal(dropout(x, 0, 9).nan_to_num(7.0), x.nan_to_num(7.0))
    assert torch.equal(dropout(x, 1, 9), torch.zeros_like(x))


@needs_triton
def test_the_gradient_can_be_differentiated_again():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    v = torch.ones_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(dropout(x, 0.5, 4), x, v, create_graph=True)
    (again,) = torch.autograd.grad(g.sum(), v)
    assert torch.equal(again, reference(torch.ones_like(x), 0.5, 4))


@pytest.mark.parametrize("function", [pytest.param(dropout, marks=needs_triton), reference])
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_is_a_probability(function, p):
    with pytest.raises(ValueError, match=rf"p={p} must be a probability"):
        function(torch.ones(3, device=DEVICE), p, 0)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="must be a whole number from 0"):
        philox_uniform(seed, torch.arange(3))
    with pytest.raises(ValueError, match="seed="):
        file.check_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_counters_are_integers(dtype):
    with pytest.raises(ValueError, match="counters must be integers"):
        philox_uniform(0, torch.zeros(3, dtype=dtype))


@needs_triton
def test_dtype_seed_and_device_are_checked():
    with pytest.raises(ValueError, match="dtype int64 must be one of"):
        dropout(torch.arange(3, device=DEVICE), 0.5, 0)
    with pytest.raises(ValueError, match="seed=-1"):
        dropout(torch.ones(3, device=DEVICE), 0.5, -1)
    with pytest.raises(ValueError, match="meta"):
        dropout(torch.ones(3, device="meta"), 0.5, 0)
