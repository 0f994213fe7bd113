"""FlashAttention beyond the suite's cases: bad input, PyTorch's own, edges of tiles, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from kernels import attention_backward, runtime
from kernels.attention import attention, attention_varlen, cost, reference
from kernels.attention_tiles import fitting, kept, mask, pairs, span, visible
from kernels.runtime import jit, tl
from minillm.model.attention import merge

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
LOWEST = torch.finfo(torch.float32).min


def qkv(t=9, s=None, h=2, g=None, b=1, d=16, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (b, h, t, d), (b, g or h, s or t, d), (b, g or h, s or t, d)
    return [torch.randn(x, generator=rng).to(DEVICE, dtype) for x in shapes]


@jit
def _edges(out_ptr, first, length, low, high, ROWS: tl.constexpr, COLS: tl.constexpr,
           LOW: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    edges = span(first, length, low, high, ROWS, COLS, LOW, HIGH)
    for i in tl.static_range(4):
        tl.store(out_ptr + i, edges[i])


@jit
def _visible(out_ptr, t, s, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    m, n = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    seen = visible(m, n, s - t, s, CAUSAL, WINDOW)
    tl.store(out_ptr + m * 16 + n, seen.to(tl.int32))


def edges(first, length, low, high, rows, columns):
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    bounds = low is not None, high is not None
    _edges[(1,)](out, first, length, low or 0, high or 0, rows, columns, *bounds)
    return out.tolist()


@needs_triton
@settings(max_examples=100, deadline=None)
@example(first=0, length=40, low=None, width=1, columns=16)  # one column of the last tile is seen
@example(first=16, length=17, low=None, width=0, columns=16)
@given(
    first=st.integers(0, 2).map(lambda i: 16 * i), length=st.integers(0, 60),
    low=st.none() | st.integers(-40, 20), width=st.none() | st.integers(0, 30),
    columns=st.sampled_from([8, 16]),
)  # fmt: skip
def test_a_tile_visits_all_that_it_sees_and_masks_where_it_must(first, length, low, width, columns):
    high = None if width is None else width + (low or 0)
    start, full, last, end = edges(first, length, low, high, 16, columns)
    assert start % columns == full % columns == last % columns == 0
    row, column = torch.arange(first, first + 16)[:, None], torch.arange(length)
    seen = torch.ones(16, length, dtype=torch.bool)
    if low is not None:
        seen &= column >= row + low
    if high is not None:
        seen &= column <= row + high
    here = [i for i in range(length) if seen[:, i].any()]
    parts = [range(a, b, columns) for a, b in ((start, full), (full, last), (last, end))]
    visited = [n for part in parts for first_n in part for n in range(first_n, first_n + columns)]
    assert len(visited) == len(set(visited)) and set(here) <= set(visited)
    assert min(visited, default=0) >= 0 and max(visited, default=-1) < length + columns
    for n in parts[1]:
        assert n + columns <= length and seen[:, n : n + columns].all()
    for n in [*parts[0], *parts[2]]:  # nothing is masked for nothing
        assert n + columns > length or not seen[:, n : n + columns].all()


@needs_triton
@pytest.mark.parametrize("sizes", [(5, 5), (3, 9), (9, 3)])
@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 1), (True, 3)])
def test_the_kernels_mask_is_the_plain_one(sizes, causal, window):
    t, s = sizes
    out = torch.zeros(16, 16, dtype=torch.int32, device=DEVICE)
    _visible[(1,)](out, t, s, causal, window)
    assert torch.equal(out[:t, :s].cpu().bool(), mask(t, s, causal, window))
    assert not out[:, s:].any()
    assert mask(t, s, causal, window).sum() == pairs(t, s, causal, window or None)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients_are_pytorchs(causal, dtype):
    ours = [x.requires_grad_() for x in qkv(70, h=4, g=2, d=32, dtype=dtype)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out = attention(*ours, causal=causal)
    want = F.scaled_dot_product_attention(*theirs, is_causal=causal, enable_gqa=True)
    out.float().square().sum().backward()
    want.float().square().sum().backward()
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for x, y in ((out, want), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))):
        torch.testing.assert_close(x, y, **tolerance)


@needs_triton
def test_queries_before_the_first_key_give_zeros_everywhere():
    q, k, v = (x.requires_grad_() for x in qkv(70, 41))
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :29] == 0).all() and (lse[:, :, :29] == LOWEST).all()
    want = reference(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), want)
    (out.sum() + lse[:, :, 29:].sum()).backward()
    assert (q.grad[:, :, :29] == 0).all() and all(x.grad.isfinite().all() for x in (q, k, v))


@needs_triton
def test_a_nan_is_not_hidden():
    q, k, v = qkv(9)
    q[0, 0, 4, 3] = float("nan")
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    for x in (out, lse[..., None]):
        rows = x.isnan()
        assert rows[0, 0, 4].all() and rows.sum() == x.shape[-1]


@needs_triton
def test_parts_of_the_keys_can_be_merged():
    q, k, v = qkv(41, 70)
    parts = [attention(q, k[:, :, i], v[:, :, i], return_lse=True)
             for i in (slice(0, 30), slice(30, 70))]  # fmt: skip
    out, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close((out, lse), attention(q, k, v, return_lse=True))


@needs_triton
def test_one_of_two_results_is_enough_for_a_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(9))
    p = reference(q, k, torch.eye(9, device=DEVICE).expand(1, 2, 9, 9)).detach()
    _, lse = attention(q, k, v, return_lse=True)
    dk, dv = torch.autograd.grad(lse.sum(), (k, v))
    torch.testing.assert_close(dk, p.mT @ q.detach() / 4)  # the gradient of lse is the softmax
    assert (dv == 0).all()
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


@needs_triton
def test_nothing_of_the_matrix_is_saved_and_nothing_is_copied():
    t = 300
    x = torch.randn(1, t, 3 * 16, device=DEVICE, requires_grad=True)
    q, k, v = (part.unflatten(2, (1, 16)).transpose(1, 2) for part in x.chunk(3, -1))
    saved = []
    with saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        out = attention(q, k, v, causal=True)
    assert max(y.numel() for y in saved) == t * 16 and len(saved) == 5
    storage = x.untyped_storage().data_ptr()
    assert sum(y.untyped_storage().data_ptr() == storage for y in saved) == 3
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.slow
@needs_triton
def test_the_same_numbers_every_time():
    def once():
        q, k, v = (x.requires_grad_() for x in qkv(70, h=3, g=1))
        attention(q, k, v, causal=True, dropout=0.2, seed=3).sum().backward()
        return q.grad, k.grad, v.grad

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@needs_triton
def test_dropout_chooses_by_seed_row_and_key():
    q = torch.zeros(1, 2, 64, 64, device=DEVICE)  # all weights alike: 1/64
    one = torch.eye(64, device=DEVICE).expand(1, 2, 64, 64)
    seen = attention(q, q, one, dropout=0.25, seed=5) * 64
    rows = torch.arange(2 * 64, device=DEVICE).view(1, 2, 64)
    torch.testing.assert_close(seen, kept(0.25, 5, rows, 64))
    assert not torch.equal(seen, attention(q, q, one, dropout=0.25, seed=6) * 64)


@needs_triton
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.booleans())
def test_packed_sequences_do_not_see_each_other(lengths, causal):
    n = sum(lengths)
    q, k, v = (x[0].transpose(0, 1) for x in qkv(max(n, 1)))
    q, k, v = q[:n], k[:n], v[:n]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out, lse = attention_varlen(q, k, v, offsets, offsets.int(), causal, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:2]
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        want, want_lse = attention(*alone, causal=causal, return_lse=True)
        torch.testing.assert_close(out[a:b], want[0].transpose(0, 1))
        torch.testing.assert_close(lse[a:b], want_lse[0].T)


def test_the_backward_formulas_are_autograds():
    q, k, v = (x.cpu().double().requires_grad_() for x in qkv(7, 9, h=4, g=2, d=8))
    out, lse = reference(q, k, v, mask(7, 9, True, 5), return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    got = attention_backward.reference(
        *(x.detach() for x in (q, k, v, out, lse)), dout, dlse, causal=True, window=5
    )
    torch.testing.assert_close(got, want)


def test_costs_count_what_the_mask_leaves():
    seen = int(mask(7, 9, True, 3).sum())
    size = {"batch": 2, "heads": 4, "queries": 7, "keys": 9, "d_head": 8, "kv_heads": 2}
    rule = {"causal": True, "window": 3}
    forward, backward = cost(**size, fused=True, **rule), attention_backward.cost(**size, **rule)
    assert forward.flops == 2 * 2 * 8 * 2 * 4 * seen and backward.flops == 2.5 * forward.flops
    q, k = 2 * 4 * 7 * 8, 2 * 2 * 9 * 8
    assert forward.bytes == 4 * (2 * q + 2 * k) + 4 * q // 8
    assert backward.bytes == 4 * (4 * q + 4 * k) + 2 * 4 * q // 8
    assert cost(**size, fused=True).flops == cost(**size).flops
    assert cost(1, 1, 1024, 1024, 64).bytes > 8 * cost(1, 1, 1024, 1024, 64, fused=True).bytes


@pytest.mark.skipif(runtime.triton is None, reason="configurations are Triton's")
@pytest.mark.parametrize("wide", [16, 64, 128, 256])
def test_configurations_worth_a_trial(wide):
    tiles = ((128, 64), (128, 128), (64, 64), (32, 32), (16, 16))
    choice = [runtime.config(BLOCK_M=m, BLOCK_N=n) for m, n in tiles]

    def left(dtype):
        q = torch.empty(1, dtype=dtype)
        return [choice.index(c) for c in fitting(choice, {"q_ptr": q}, WIDTH=wide, D=wide)]

    assert left(torch.float32) == [4 if wide == 256 else 3]
    assert left(torch.bfloat16) == {16: [1], 64: [0, 1, 2], 128: [0, 1, 2], 256: [0, 2, 3]}[wide]


def test_the_plain_dropout_factor():
    z = kept(0.25, 7, torch.arange(200), 300)
    assert z.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(z.mean() - 1) < 0.01  # 60,000 numbers: a standard deviation of 0.0024
    assert torch.equal(z[5:9], kept(0.25, 7, torch.arange(5, 9), 300))
    assert not torch.equal(z, kept(0.25, 8, torch.arange(200), 300))


def wide(d):
    return torch.zeros(1, 2, 3, d, device=DEVICE)


@needs_triton
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attention(q[0], k[0], v[0]), r"q \(2, 9, 16\)"),
        (lambda q, k, v: attention(q, k, v[:, :, :4]), r"v \(1, 2, 4, 16\)"),
        (lambda q, k, v: attention(q, k[..., :8], v[..., :8]), "head width of q, k and v"),
        (lambda q, k, v: attention(q.repeat(2, 1, 1, 1), k, v), "batch"),
        (lambda q, k, v: attention(q[:, :1], k, v), "1 query heads cannot share 2"),
        (lambda q, k, v: attention(q, k[:, :0], v[:, :0]), "2 query heads cannot share 0"),
        (lambda q, k, v: attention(*[wide(257)] * 3), "head width 257 .* 256"),
        (lambda q, k, v: attention(*[wide(0)] * 3), "head width 0"),
        (lambda q, k, v: attention(q, k.half(), v), "float32, k torch.float16"),
        (lambda q, k, v: attention(*(x.double() for x in (q, k, v))), "float64 must be one of"),
        (lambda q, k, v: attention(*(x.to("meta") for x in (q, k, v))), "meta"),
        (lambda q, k, v: attention(q, k, v.to("meta")), "one device"),
        (lambda q, k, v: attention(q, k, v, window=3), "window=3 .* causal=False"),
        (lambda q, k, v: attention(q, k, v, causal=True, window=0), "window=0 must be at least 1"),
        (lambda q, k, v: attention(q, k, v, scale=0.0), "scale=0.0"),
        (lambda q, k, v: attention(q, k, v, scale=float("nan")), "scale=nan"),
        (lambda q, k, v: attention(q, k, v, dropout=1.0, seed=0), "dropout=1.0"),
        (lambda q, k, v: attention(q, k, v, dropout=-0.1, seed=0), "dropout=-0.1"),
        (lambda q, k, v: attention(q, k, v, dropout=0.1), "seed=None"),
        (lambda q, k, v: attention_backward.attention_backward(q, k, v, q, q[..., 0], k.half()),
         "dout .* torch.float16"),
        (lambda q, k, v: attention_backward.attention_backward(q, k, v, q, q, q), "lse .*16"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv())


@needs_triton
@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ([0, 4, 8], [0, 4, 9], r"offsets_q must rise from 0 to 9 rows, got \[0, 4, 8\]"),
        ([0, 4, 9], [1, 4, 9], "offsets_k must rise from 0"),
        ([0, 6, 4, 9], [0, 4, 5, 9], "offsets_q must rise"),
        ([0, 9], [0, 4, 9], "1 and 2 sequences"),
        ([], [], r"offsets_q must be \[sequences \+ 1\]"),
        ([0.0, 9.0], [0, 9], "float32"),
    ],
)
def test_bad_offsets_are_named(queries, keys, message):
    packed = (x[0].transpose(0, 1) for x in qkv())
    with pytest.raises(ValueError, match=message):
        attention_varlen(*packed, torch.tensor(queries), torch.tensor(keys))
    with pytest.raises(ValueError, match=r"packed sequences .*q \(1, 2, 9, 16\)"):
        attention_varlen(*qkv(), torch.tensor([0, 9]), torch.tensor([0, 9]))
