"""Attention against PyTorch's, against loops in fp64, and against its own masked dense form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import cost, reference
from minillm.config import ModelConfig
from minillm.model import (
    Attention,
    KVCache,
    attend,
    attend_chunked,
    attend_local,
    attend_strided,
    causal_mask,
    prefix_mask,
    sliding_window_mask,
    strided_mask,
)
from minillm.model.attention import merge
from minillm.ops import op


def qkv(b=2, h=4, g=None, t=7, s=None, d=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    g, s = g or h, s or t
    shapes = (b, h, t, d), (b, g, s, d), (b, g, s, d)
    return [torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes]


def by_loops(q, k, v, allowed, scale=None):
    """One query, one key at a time, plain Python floats; `allowed(i, j)` is the mask."""
    b, h, t, d = q.shape
    per_group = h // k.shape[1]
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, h, t, v.shape[3], dtype=torch.float64)
    for n in range(b):
        for head in range(h):
            g = head // per_group
            for i in range(t):
                keys = [j for j in range(k.shape[2]) if allowed(i, j)]
                scores = [scale * float(q[n, head, i].double() @ k[n, g, j].double()) for j in keys]
                top = max(scores, default=0.0)
                e = [math.exp(x - top) for x in scores]
                for weight, j in zip(e, keys, strict=True):
                    out[n, head, i] += weight / sum(e) * v[n, g, j].double()
    return out


RULES = {
    "none": (lambda t: None, lambda i, j: True),
    "causal": (causal_mask, lambda i, j: j <= i),
    "prefix": (lambda t: prefix_mask(t, min(3, t)), lambda i, j: j <= i or j < 3),
    "window": (lambda t: sliding_window_mask(t, 3), lambda i, j: i - 3 < j <= i),
    "strided": (
        lambda t: strided_mask(t, 3),
        lambda i, j: j <= i and (i - j < 3 or (i - j) % 3 == 0),
    ),
}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("g", [4, 2, 1])
@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("rule", RULES)
def test_attend_equals_loops(rule, t, g, impl):
    make, allowed = RULES[rule]
    q, k, v = qkv(t=t, g=g)
    torch.testing.assert_close(attend(q, k, v, make(t), impl=impl), by_loops(q, k, v, allowed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_attend_equals_pytorch(rule, dtype):
    mask = RULES[rule][0](33)
    q, k, v = qkv(t=33, dtype=dtype)
    got, want = attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    assert got.dtype == want.dtype == dtype
    tolerance = {"rtol": 0.02, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, **tolerance)


def test_half_precision_does_not_overflow():
    q, k, v = (x * 200 for x in qkv(d=64, dtype=torch.float16))
    exact = attend(q.double(), k.double(), v.double())
    assert attend(q, k, v).isfinite().all()
    torch.testing.assert_close(attend(q, k, v).double(), exact, rtol=2e-3, atol=2)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_scale_and_values_of_another_width(impl):
    q, k, v = qkv()
    v = v[..., :5].contiguous()
    got = attend(q, k, v, scale=0.7, impl=impl)
    torch.testing.assert_close(got, by_loops(q, k, v, lambda i, j: True, scale=0.7))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_row_without_keys_is_zero_and_has_no_nan_gradient(impl):
    q, k, v = (x.requires_grad_() for x in qkv(t=4))
    mask = causal_mask(4)
    mask[2] = False
    out = attend(q, k, v, mask, impl=impl)
    assert (out[:, :, 2] == 0).all() and (out[:, :, 3] != 0).any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=2, g=1, t=5, d=3))
    for mask in (None, causal_mask(5)):
        assert torch.autograd.gradcheck(lambda *x, m=mask: attend(*x, m), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend_local(*x, window=2), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attend_strided(*x, stride=2), (q, k, v))


def test_fused_gradients_equal_the_reference_with_groups():
    grads = {}
    for impl in ("reference", "auto"):
        q, k, v = (x.requires_grad_() for x in qkv(h=4, g=2, t=9))
        attend(q, k, v, causal_mask(9), impl=impl).square().sum().backward()
        grads[impl] = [x.grad for x in (q, k, v)]
    for a, b in zip(grads["reference"], grads["auto"], strict=True):
        torch.testing.assert_close(a, b)


def test_masks_by_their_rules():
    for t in (1, 2, 5, 12):
        for make, allowed in (RULES["causal"], RULES["window"], RULES["strided"]):
            want = [[allowed(i, j) for j in range(t)] for i in range(t)]
            assert make(t).tolist() == want
    want = [[j <= i or j < 2 for j in range(5)] for i in range(5)]
    assert prefix_mask(5, 2).tolist() == want
    assert (prefix_mask(4, 0) == causal_mask(4)).all() and prefix_mask(4, 4).all()


@pytest.mark.parametrize(
    "make",
    [
        causal_mask,
        lambda t, o: prefix_mask(t, 2, o),
        lambda t, o: sliding_window_mask(t, 3, o),
        lambda t, o: strided_mask(t, 3, o),
    ],
)
def test_offset_masks_are_the_last_rows(make):
    whole = make(9, 0)
    for new in (1, 2, 8):
        assert torch.equal(make(new, 9 - new), whole[9 - new :])


def test_mask_broadcasting_per_example_and_per_head():
    q, k, v = qkv(b=2, h=4, t=5)
    rng = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 4, 5, 5, generator=rng) > 0.4
    want = [
        [by_loops(q[n, h][None, None], k[n, h][None, None], v[n, h][None, None],
                  lambda i, j, m=mask[n, h]: bool(m[i, j]))[0, 0] for h in range(4)]
        for n in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(attend(q, k, v, mask), torch.stack([torch.stack(w) for w in want]))
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)[:, None, None]
    short = attend(q[1:], k[1:, :, :3], v[1:, :, :3])
    torch.testing.assert_close(attend(q, k, v, padding)[1:], short)


@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (9, 9), (4, 9), (12, 12)])
def test_chunked_equals_dense(t, s, chunk, g):
    q, k, v = qkv(t=t, s=s, g=g)
    dense = attend(q, k, v, causal_mask(t, s - t))
    torch.testing.assert_close(attend_chunked(q, k, v, causal=True, chunk=chunk), dense)
    torch.testing.assert_close(attend_chunked(q, k, v, chunk=chunk), attend(q, k, v))
    got = attend_chunked(q, k, v, scale=0.1, chunk=chunk)
    torch.testing.assert_close(got, attend(q, k, v, scale=0.1))


def test_chunked_survives_large_scores_and_keeps_memory_linear():
    q, k, v = (x.float() for x in qkv(t=64))
    exact = attend(300 * q.double(), k.double(), v.double()).float()
    got = attend_chunked(300 * q, k, v, chunk=8)
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    for causal in (False, True):
        for n in (512, 1024):
            q, k, v = qkv(b=1, h=1, t=n, d=16, dtype=torch.float32)
            with Largest() as seen:
                attend_chunked(q, k, v, causal=causal, chunk=32)
            assert seen.numel == n * 32  # q kᵀ of one chunk: linear in n
            with Largest() as seen:
                attend(q, k, v)
            assert seen.numel == n * n


def test_merge_is_order_free_and_ignores_an_empty_part():
    q, k, v = qkv(t=6)
    whole = reference(q, k, v, return_lse=True)
    a = reference(q, k[:, :, :2], v[:, :, :2], return_lse=True)
    b = reference(q, k[:, :, 2:], v[:, :, 2:], return_lse=True)
    for x, y in ((a, b), (b, a)):
        for got, want in zip(merge(*x, *y), whole, strict=True):
            torch.testing.assert_close(got, want)
    nothing = torch.zeros(6, 2, dtype=torch.bool)
    empty = reference(q, k[:, :, :2], v[:, :, :2], nothing, return_lse=True)
    torch.testing.assert_close(merge(*empty, *b)[0], b[0])
    assert (merge(*empty, *empty)[0] == 0).all()


def test_a_mask_holds_against_any_score():
    q, k, v = qkv(t=6)
    for make in (causal_mask, lambda t: sliding_window_mask(t, 2)):
        got = attend(1e6 * q, k, v, make(6))
        want = F.scaled_dot_product_attention(1e6 * q, k, v, make(6))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("t", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("width", [1, 2, 4, 5, 40])
def test_sparse_forms_equal_masked_dense(t, width, g):
    q, k, v = qkv(t=t, g=g)
    dense = attend(q, k, v, sliding_window_mask(t, width))
    torch.testing.assert_close(attend_local(q, k, v, width), dense)
    dense = attend(q, k, v, strided_mask(t, width))
    torch.testing.assert_close(attend_strided(q, k, v, width), dense)


def flops(f, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        f(*args, **kwargs)
    return counter.get_total_flops()


def test_flops_of_the_explicit_form_are_the_declared_cost():
    q, k, v = qkv(b=2, h=4, g=2, t=5, s=9, d=8, dtype=torch.float32)
    declared = cost(batch=2, heads=4, queries=5, keys=9, d_head=8, kv_heads=2)
    assert flops(attend, q, k, v) == declared.flops == 2 * (2 * 2 * 4 * 5 * 9 * 8)
    ends = 2 * (2 * 4 * 5 * 8) + 2 * (2 * 2 * 9 * 8)
    assert declared.bytes == 4 * (ends + 4 * 2 * 4 * 5 * 9)
    with sdpa_kernel(SDPBackend.MATH):
        assert flops(F.scaled_dot_product_attention, q, k, v, enable_gqa=True) == declared.flops


def test_sparse_forms_cost_what_they_promise():
    d = 8
    for n in (64, 256):
        q, k, v = qkv(b=1, h=1, t=n, d=d, dtype=torch.float32)
        for w in (4, 16):
            assert flops(attend_local, q, k, v, w) == 4 * n * (2 * w) * d
        root = int(n**0.5)
        assert flops(attend_strided, q, k, v, root) == 4 * n * (2 * root + n // root) * d


def test_layer_flops_count_projections_and_the_whole_square():
    b, t, d = 2, 24, 32
    layer = Attention(ModelConfig(16, d, 1, n_heads=4, impl="reference"))
    x = torch.randn(b, t, d)
    assert flops(layer, x, mask=causal_mask(t)) == 8 * b * t * d**2 + 4 * b * t**2 * d


def with_groups(heads, groups, d=32, seed=0, impl="auto"):
    torch.manual_seed(seed)
    return Attention(ModelConfig(16, d, 1, heads, n_kv_heads=groups, impl=impl)).double()


def test_grouped_queries_equal_repeated_key_heads():
    gqa, mha = with_groups(8, 2), with_groups(8, None)
    mha.q.weight.data, mha.out.weight.data = gqa.q.weight.data, gqa.out.weight.data
    for name in ("k", "v"):
        weight = getattr(gqa, name).weight.data.view(2, 4, 32)  # [group, d_head, d_model]
        getattr(mha, name).weight.data = weight.repeat_interleave(4, dim=0).reshape(32, 32)
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(gqa(x, causal_mask(6)), mha(x, causal_mask(6)))


def test_layer_equals_pytorch_multihead_attention():
    layer = with_groups(4, None)
    theirs = torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True).double()
    theirs.in_proj_weight.data = torch.cat([layer.q.weight, layer.k.weight, layer.v.weight])
    theirs.out_proj.weight.data = layer.out.weight
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    want, weights = theirs(
        x, x, x, attn_mask=~causal_mask(6), need_weights=True, average_attn_weights=False
    )
    torch.testing.assert_close(layer(x, causal_mask(6)), want)
    torch.testing.assert_close(layer.weights(x, causal_mask(6)), weights)


def test_head_count_follows_the_width_of_the_projections():
    whole = with_groups(4, 2)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    parts = []
    for rank in range(2):  # two of four query heads and one of two key heads each
        half = with_groups(4, 2)
        for name in ("q", "k", "v"):
            linear = getattr(half, name)
            linear.weight.data = getattr(whole, name).weight.data.chunk(2)[rank]
        half.out.weight.data = whole.out.weight.data.chunk(2, dim=1)[rank]
        parts.append(half(x, causal_mask(5)))
    torch.testing.assert_close(sum(parts), whole(x, causal_mask(5)))


@pytest.mark.parametrize("heads", [1, 4])
def test_permutation_equivariance_ends_with_a_causal_mask(heads):
    layer = with_groups(heads, None)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
    moved = layer(x[:, order], causal_mask(9)) - layer(x, causal_mask(9))[:, order]
    assert moved.abs().max() > 0.05


def test_cached_layer_equals_whole_pass_and_rejects_what_does_not_fit():
    layer = with_groups(4, 2)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    want = layer(x, causal_mask(7))
    cache = KVCache(1, 2, kv_heads=2, capacity=7, d_head=8, dtype=torch.float64)
    with torch.no_grad():
        a = layer(x[:, :3], causal_mask(3), cache.layers[0])
        b = layer(x[:, 3:6], causal_mask(3, offset=3), cache.layers[0])
        c = layer(x[:, 6:], None, cache.layers[0])
    torch.testing.assert_close(torch.cat([a, b, c], dim=1), want)
    assert cache.length == cache.capacity == 7
    assert cache.bytes() == 2 * 2 * 2 * 7 * 8 * 8

    before = cache.layers[0].keys.clone()
    with torch.no_grad(), pytest.raises(ValueError, match="7 of 7 tokens, 2 more are 2 too many"):
        layer(x[:, :2], None, cache.layers[0])
    assert cache.length == 7 and torch.equal(before, cache.layers[0].keys)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        layer(x[:, :1], None, KVCache(1, 2, 2, 7, 8, torch.float64).layers[0])
    with torch.no_grad(), pytest.raises(ValueError, match="batch=2, kv_heads=4"):
        layer(x[:, :1], None, KVCache(1, 2, 4, 7, 8).layers[0])
    with pytest.raises(ValueError, match="capacity=0"):
        KVCache(1, 2, 4, 0, 8)


def test_cache_size_shrinks_with_the_groups():
    sizes = {
        g: KVCache.for_config(ModelConfig(16, 64, 3, 8, n_kv_heads=g), batch=2).bytes()
        for g in (8, 2, 1)
    }
    assert sizes[8] == 2 * 3 * 2 * 256 * 64 * 4
    assert sizes[8] == 4 * sizes[2] == 8 * sizes[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: attend(q, k, v, causal_mask(6)), r"\(6, 6\) does .*\(2, 4, 7, 7\)"),
        (lambda q, k, v: attend(q, k, v, causal_mask(7).float()), r"boolean, .* torch\.float32"),
        (lambda q, k, v: attend(q, k, v, causal_mask(7).expand(2, 7, 7)), r"mask\[:, None\]"),
        (lambda q, k, v: attend(q, k, v, torch.ones(1, 1, 1, 7, 7).bool()), "does not fit"),
        (lambda q, k, v: attend(q[0], k, v), r"q \(4, 7, 8\)"),
        (lambda q, k, v: attend(q, k[..., :4], v), "must agree"),
        (lambda q, k, v: attend(q, k[:, :3], v[:, :3]), "4 query heads cannot share 3"),
        (lambda q, k, v: attend(q, k, v, impl="flash"), r"'flash'.*\['auto', 'reference', 't"),
        (lambda q, k, v: attend_chunked(q, k, v, chunk=0), "chunk=0"),
        (lambda q, k, v: attend_chunked(q, k[:, :, :3], v[:, :, :3], causal=True), "7 queries"),
        (lambda q, k, v: attend_chunked(q.clone().requires_grad_(), k, v), r"torch\.no_grad"),
        (lambda q, k, v: attend_local(q, k, v, 0), "window=0"),
        (lambda q, k, v: attend_local(q[:, :, :3], k, v, 2), "as many keys"),
        (lambda q, k, v: attend_strided(q, k, v, 0), "stride=0"),
        (lambda q, k, v: op("softmax"), r"'softmax'.*\['attention', 'attention_weights', "),
        (lambda q, k, v: causal_mask(0), "t=0"),
        (lambda q, k, v: sliding_window_mask(3, 0), "window=0"),
        (lambda q, k, v: strided_mask(3, 0), "stride=0"),
        (lambda q, k, v: prefix_mask(3, 4), "prefix=4"),
        (lambda q, k, v: ModelConfig(16, 30, 1, 4), "d_model=30 must be a multiple of n_heads=4"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv())
