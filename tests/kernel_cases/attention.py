"""FlashAttention's forward pass, and its gradients through autograd."""

import torch

from kernels.attention import reference
from kernels.attention_tiles import kept, mask
from tests.kernel_cases import FLOATS, Case, Fault, strided

FP32, FP16, BF16 = FLOATS
QKV = ("q", "k", "v")


def explicit(q, k, v, causal=False, window=None, scale=None, dropout=0.0, seed=None,
             return_lse=False, rows=None):  # fmt: skip
    """The reference, with windows as masks; dropout's factor multiplies the values' weights."""
    seen = mask(q.shape[2], k.shape[2], causal, window or 0)
    out, lse = reference(q, k, v, seen, scale, return_lse=True)
    if dropout:
        one = torch.eye(k.shape[2], dtype=q.dtype)[None, None].expand(*k.shape[:2], -1, -1)
        p = reference(q, k, one, seen, scale)  # the weights: attention to unit vectors
        rows = torch.arange(lse.numel()).view(lse.shape) if rows is None else rows
        spread = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        out = (p * kept(dropout, seed, rows, k.shape[2])) @ spread
    return (out, lse) if return_lse else out


def one_by_one(q, k, v, offsets_q, offsets_k, return_lse=False, **settings):
    """Packed sequences, each for itself; a row is numbered by its place among all of them."""
    n, h, _ = q.shape
    rows = torch.arange(h * n).view(1, h, n)
    parts = []
    for i in range(len(offsets_q) - 1):
        a, b, c, d = (int(x) for x in (*offsets_q[i : i + 2], *offsets_k[i : i + 2]))
        one = (x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d]))
        out, lse = explicit(*one, **settings, return_lse=True, rows=rows[:, :, a:b])
        parts.append((out[0].transpose(0, 1), lse[0].T))
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def qkv(t, s=None, d=16, h=1, g=None, b=1, size=(1.0, 1.0, 1.0), view=None, **settings):
    """Inputs with these shapes; q, k and v are multiplied by `size`."""

    def inputs(rng):
        s_, g_ = t if s is None else s, g or h
        shapes = (b, h, t, d), (b, g_, s_, d), (b, g_, s_, d)
        made = [torch.randn(x, generator=rng, dtype=torch.float64) for x in shapes]
        made = [x * factor for x, factor in zip(made, size, strict=True)]
        if view == "strided":
            made = [strided(x) for x in made]
        elif view == "tokens first":  # as the projections of a model leave them
            made = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
        elif view == "one table":  # columns of one tensor [b, t, 3 · h · d]
            table = torch.cat([x.transpose(1, 2).flatten(2) for x in made], -1)
            made = [x.unflatten(2, (-1, d)).transpose(1, 2) for x in table.chunk(3, -1)]
        return dict(zip(QKV, made, strict=True)) | settings

    return inputs


def packed(queries, keys, d=16, h=2, g=1, **settings):
    def inputs(rng):
        shapes = (sum(queries), h, d), (sum(keys), g, d), (sum(keys), g, d)
        made = [torch.randn(x, generator=rng, dtype=torch.float64) for x in shapes]
        offsets = [torch.tensor([0, *x]).cumsum(0) for x in (queries, keys)]
        both = dict(zip(("offsets_q", "offsets_k"), offsets, strict=True))
        return dict(zip(QKV, made, strict=True)) | both | settings

    return inputs


def case(name, inputs, slack=None, terms=1.0, function="attention", **rest):
    # Products of d numbers and sums over up to 300 keys, in float32: slack 32. Narrow types round
    # the weights and dS once more before they are multiplied. A row that sees one key has the
    # gradient zero, as the difference of two terms near 1.
    slack = {FP32: 32, FP16: 4, BF16: 4} | (slack or {})
    how = explicit if function == "attention" else one_by_one
    return Case(name, function, inputs, QKV, how, slack, terms=terms, **rest)


C = {"causal": True}
LARGE = (FP32, BF16)  # float16 has no numbers beyond 65,504, and dS needs them here
CASES = [
    *(case(f"width {d}", qkv(70, d=d, **C)) for d in (1, 16, 41, 64, 128)),
    case("width 256", qkv(41, d=256, **C), dtypes=(FP32, BF16)),
    *(case(f"{t} tokens", qkv(t, **C)) for t in (1, 3, 5, 41, 127)),
    case("1023 tokens, window of 200", qkv(1023, window=200, **C), dtypes=(FP32,)),
    case("one query, 130 keys", qkv(1, 130, h=2, **C)),
    case("5 queries, 131 keys", qkv(5, 131, d=41, h=2, g=1, return_lse=True)),
    case("more keys than queries", qkv(130, 200, b=2, **C)),
    case("queries before the first key", qkv(200, 70, **C), dtypes=(FP32, FP16)),
    case("shared keys", qkv(70, h=4, g=2, return_lse=True, **C)),
    case("one key head for all", qkv(41, h=3, g=1)),
    *(case(f"window of {w}", qkv(200, h=2, g=1, window=w, **C), dtypes=(FP32,)) for w in (1, 300)),
    case("window of 50", qkv(200, 270, d=41, window=50, **C)),
    case("scale", qkv(41, scale=0.7), dtypes=(FP32,)),
    case("dropout", qkv(41, 70, h=2, b=2, dropout=0.3, seed=5, **C)),
    case("dropout without a mask", qkv(41, dropout=0.5, seed=2**40 + 1), dtypes=(FP32,)),
    case("large values", qkv(41, size=(1, 1, 1e4), **C), terms=1e4, dtypes=LARGE),
    # a score of 1e4 is known to one part in 2^24, so its exponential to 1e4 · 2^-24 at best
    case("large scores", qkv(41, size=(1e4, 1, 1), **C), terms=1e4, dtypes=(FP32,)),
    *(case(x, qkv(41, h=2, g=2, b=2, view=x, **C)) for x in ("strided", "tokens first")),
    case("one table", qkv(41, h=2, b=2, view="one table", **C), dtypes=(FP32,)),
    case("no batch", qkv(5, b=0), dtypes=(FP32,)),
    case("no queries", qkv(0, 5, **C), dtypes=(FP32,)),
    case("no keys", qkv(5, 0), dtypes=(FP32,)),
    *(
        case(name, packed(*lengths, **settings), function="attention_varlen", dtypes=(FP32, BF16))
        for name, lengths, settings in (
            ("packed", ((5, 0, 70, 41), (5, 3, 70, 41)), C | {"return_lse": True}),
            ("packed, unlike lengths", ((5, 130, 1), (131, 70, 41)), C | {"window": 60}),
            ("packed with dropout", ((41, 5), (41, 70)), {"dropout": 0.3, "seed": 7}),
        )
    ),
]
FAULTS = [
    Fault("the diagonal's tile unmasked", "if part != 1", "if part == 0", "127 tokens"),
    Fault("masked only on the diagonal", "if part != 1", "if part == 2",
          "1023 tokens, window of 200"),
    Fault("full tiles begin too early", "s - t - WINDOW + 1, s - t,", "-s, s - t,", "window of 50"),
    Fault("full tiles end too late", "WINDOW + 1, s - t, B", "WINDOW + 1, s - t + 64, B",
          "width 16"),
    Fault("key 0 at query 0", "[None, :], s - t, s,", "[None, :], 0, s,", "more keys than queries"),
    Fault("a tile left out", "edges[part + 1], B", "edges[part + 1] - BLOCK_N, B", "127 tokens"),
    Fault("scale missing", "log2_scale = scale * 1.4426", "log2_scale = 1.4426", "scale"),
    Fault("e for 2", "log2_scale = scale * 1.4426950408889634", "log2_scale = scale", "width 16"),
    Fault("old sums not shrunk", "total = total * shrink", "total = total",
          "more keys than queries"),
    Fault("old output not shrunk", "v, out * shrink[:, None]", "v, out", "more keys than queries"),
    Fault("nothing seen, divided by", "total == 0, 1.0, total", "total == 0, 0.0, total",
          "queries before the first key"),
    Fault("lse without the sum", "(top + tl.log2(total)) * ", "top * ", "shared keys"),
    Fault("lse in base 2", ") * 0.6931471805599453)", "))", "shared keys"),
    Fault("heads dealt out in turn", "stride_kb + head // group", "stride_kb + head % group",
          "shared keys"),
    Fault("dropout not made up for", "total) * (1 - DROPOUT)", "total)", "dropout"),
    Fault("dropout alike in all rows", "keep((row + m)[", "keep((row + m * 0)[", "dropout"),
    Fault("packed keys not found", "+ k_start * stride_vt", "", "packed"),
    Fault("packed rows not found", "row += q_start", "pass", "packed"),
    Fault("strides ignored", "shared.readable(q), shared.readable(k), shared.readable(v)",
          "q, k, v", "strided"),
    Fault("the diagonal hidden", "n <= m + ahead", "n < m + ahead", "width 16",
          file="attention_tiles"),
    Fault("one key too many in the window", "n > m + ahead", "n >= m + ahead", "window of 50",
          file="attention_tiles"),
    Fault("keys beyond the last", "seen = n < s", "seen = n < s + 1", "scale",
          file="attention_tiles"),
    Fault("the window's first tile left out", "start = tl.maximum(first + low, 0)",
          "start = tl.maximum(first + low, 0) + COLS", "window of 50", file="attention_tiles"),
    Fault("heads mixed up", "program // tiles % heads", "program // tiles % 1", "shared keys",
          file="attention_tiles"),
    Fault("other random numbers", "(row.to(tl.int64) << 32)", "(row.to(tl.int64) << 31)",
          "dropout", file="attention_tiles"),
    Fault("gradient of lse forgotten", "dout, dlse, ctx.how", "dout, None, ctx.how", "shared keys"),
]  # fmt: skip
