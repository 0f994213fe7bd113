"""Attention over a cache in splits, beside the common suite: bad input, properties, bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import decode_attention as module
from kernels import runtime
from kernels.decode_attention import cost, decode_attention, reference

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def cache(b=2, h=4, g=2, s=9, d=8, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((b, h, 1, d), (b, g, s, d), (b, g, s, d))
    return tuple(torch.randn(shape, generator=rng, dtype=dtype).to(DEVICE) for shape in shapes)


def test_reference_equals_pytorch_over_each_row_cut_to_its_length():
    q, k, v = cache(b=3, dtype=torch.float64)
    lengths = torch.tensor([4, 9, 0], device=DEVICE)
    found = reference(q, k, v, lengths, scale=0.3)
    for row, n in enumerate([4, 9]):
        one = slice(row, row + 1)
        want = F.scaled_dot_product_attention(
            q[one], k[one, :, :n], v[one, :, :n], scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found[one], want)
    assert not found[2].any() and found[0].any()


@pytest.mark.slow
@needs_triton
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    g=st.integers(1, 2),
    group=st.integers(1, 3),
    s=st.integers(1, 200),
    d=st.integers(1, 40),
    splits=st.integers(1, 9),
    part=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_number_of_splits_and_the_order_of_keys_do_not_matter(
    g, group, s, d, splits, part, seed
):
    q, k, v = cache(1, g * group, g, s, d, seed)
    n = round(part * s)
    lengths = torch.tensor([n], device=DEVICE)
    whole = decode_attention(q, k, v, lengths, splits=1)
    torch.testing.assert_close(whole, reference(q, k, v, lengths), rtol=1e-4, atol=2e-6)
    cut = decode_attention(q, k, v, lengths, splits=splits)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=2e-6)
    assert torch.equal(cut, decode_attention(q, k, v, lengths, splits=splits))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    mixed = decode_attention(q, k[:, :, order], v[:, :, order], splits=splits)
    torch.testing.assert_close(mixed, whole, rtol=1e-4, atol=2e-6)


@needs_triton
def test_splits_are_chosen_to_fill_the_device(monkeypatch):
    q, k, v = cache(b=1, h=2, g=1, s=1000, d=128)
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_split", Recorder())
    monkeypatch.setattr(module, "_merge", Recorder())
    for busy, expected in ((1, 1), (4, 4), (8, 8), (10_000, 32)):  # 1,000 keys are 32 blocks of 32
        monkeypatch.setattr(module, "programs", lambda device, busy=busy: busy)
        decode_attention(q, k, v)
        assert launched[-2:] == [(expected,), (2,)]
        decode_attention(q.repeat(3, 1, 1, 1), k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1))
        assert launched[-2][0] <= max(2 * busy, 3)


@needs_triton
def test_lengths_that_nobody_looked_at_read_nothing_outside(monkeypatch):
    """As on a GPU, where the values are not looked at before the launch."""
    monkeypatch.setattr(module, "_fit", lambda *args: None)
    q, k, v = cache(b=2, s=12)
    shorter = decode_attention(q, k[:, :, :9], v[:, :, :9], torch.tensor([2**40, -7]).to(DEVICE))
    want = reference(q, k[:, :, :9], v[:, :, :9], torch.tensor([9, 0]).to(DEVICE))
    torch.testing.assert_close(shorter, want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_either_type_and_with_strides(dtype):
    q, k, v = cache(b=3)
    lengths = torch.tensor([[9, 0], [3, 0], [5, 0]], dtype=dtype, device=DEVICE)[:, 0]
    torch.testing.assert_close(
        decode_attention(q, k, v, lengths, splits=2), reference(q, k, v, lengths)
    )


@needs_triton
def test_bad_input_is_refused_by_name():
    q, k, v = cache()
    for wrong in ((q[0], k, v), (q, k[0], v), (q, k, v[:, :, :8]), (q.expand(2, 4, 3, 8), k, v)):
        with pytest.raises(ValueError, match=r"must be \[b, h, 1, d\], \[b, g, s, d\]"):
            decode_attention(*wrong)
    for wrong in ((q[:1], k, v), (q[..., :4], k, v), cache(d=257), cache(d=0)):
        with pytest.raises(ValueError, match="must share b and a head width d of 1 to 256"):
            decode_attention(*wrong)
    for wrong in ((q[:, :3], k, v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(ValueError, match="query heads must be a multiple of"):
            decode_attention(*wrong)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32, torch.float16"):
        decode_attention(q, k.half(), v)
    with pytest.raises(ValueError, match="float64 must be one of"):
        decode_attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="splits=0 must be at least 1"):
        decode_attention(q, k, v, splits=0)
    with pytest.raises(ValueError, match="no backward: take attention"):
        decode_attention(q, k.clone().requires_grad_(), v)
    with pytest.raises(ValueError, match="one device"):
        decode_attention(q, k, v, torch.zeros(2, dtype=torch.int64, device="meta"))


@needs_triton
def test_bad_lengths_are_refused_by_value():
    q, k, v = cache()
    for wrong in ([3], [[3, 4]], [3.0, 4.0]):
        with pytest.raises(ValueError, match=r"must be \[2\] of int32 or int64"):
            decode_attention(q, k, v, torch.tensor(wrong, device=DEVICE))
    if DEVICE == "cpu":
        for wrong in ([3, 10], [-1, 4]):
            with pytest.raises(ValueError, match="must lie between 0 and the cache's 9 keys"):
                decode_attention(q, k, v, torch.tensor(wrong))


def test_cost_is_nearly_all_cache():
    q, k, v = cache(2, 8, 2, 500, 16)
    splits = 3
    parts = torch.empty(2, 8, splits, 16 + 1)
    moved = (q, k, v, reference(q, k, v), parts, parts)
    counted = cost(2, 8, 500, 16, kv_heads=2, splits=splits)
    assert counted.bytes == sum(x.nbytes for x in moved)
    assert 0.9 < (k.nbytes + v.nbytes) / counted.bytes < 1
    # once for each group: without grouped heads the same query heads would read four times as much
    assert cost(2, 8, 500, 16).bytes > 3.5 * counted.bytes
