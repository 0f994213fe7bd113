"""Planted wrong answers for chapter 10's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


MERGE = """
def start(scores, values):
    m = scores.amax(1)
    p = (scores - m.masked_fill(m == -torch.inf, 0.0)[:, None]).exp()
    return m, p.sum(1), p @ values


def merge(a, b):
    m = torch.maximum(a[0], b[0])
    base = m.masked_fill(m == -torch.inf, 0.0)
    x, y = (a[0] - base).exp(), (b[0] - base).exp()
    return m, x * a[1] + y * b[1], x[:, None] * a[2] + y[:, None] * b[2]


def finish(state):
    m, l, o = state
    return o / torch.where(l > 0, l, 1.0)[:, None], m + l.log()
"""
SHARES = "x, y = (a[0] - base).exp(), (b[0] - base).exp()"

FORWARD = """
def flash_forward(q, k, v, block_q, block_k, causal=False):
    (t, d), s = q.shape, len(k)
    out, lse = torch.empty_like(q), q.new_empty(t)
    for rows in torch.arange(t).split(block_q):
        last = rows + s - t
        top = q.new_full((len(rows), 1), -torch.inf)
        total, acc = torch.zeros_like(top), q.new_zeros(len(rows), d)
        for cols in torch.arange(s).split(block_k):
            if causal and cols[0] > last[-1]:
                break
            scores = q[rows] @ k[cols].T / d**0.5
            if causal:
                scores = scores.masked_fill(cols > last[:, None], -torch.inf)
            new = torch.maximum(top, scores.amax(1, keepdim=True))
            p, shrink = (scores - new).exp(), (top - new).exp()
            total = shrink * total + p.sum(1, keepdim=True)
            acc = shrink * acc + p @ v[cols]
            top = new
        out[rows], lse[rows] = acc / total, (top + total.log())[:, 0]
    return out, lse
"""
WHOLE_MATRIX = """
def flash_forward(q, k, v, block_q, block_k, causal=False):
    t, s = len(q), len(k)
    return explicit(q, k, v, causal_mask(t, offset=s - t) if causal else None)
"""

KERNEL = """
@kernel
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, t, s, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, D)
    place = head * t * D + rows[:, None] * D + cols[None, :]
    q = tl.load(q_ptr + place, mask=(rows < t)[:, None], other=0.0)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for first in range(0, s, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        there = head * s * D + keys[:, None] * D + cols[None, :]
        k = tl.load(k_ptr + there, mask=(keys < s)[:, None], other=0.0)
        v = tl.load(v_ptr + there, mask=(keys < s)[:, None], other=0.0)
        scores = tl.where((keys < s)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        total = shrink * total + tl.sum(p, axis=1)
        acc = shrink[:, None] * acc + tl.dot(p, v)
        top = new
    tl.store(out_ptr + place, acc / total[:, None], mask=(rows < t)[:, None])
    tl.store(lse_ptr + head * t + rows, top + tl.log(total), mask=rows < t)
"""
# The maximum in a first walk along the keys, the rest in a second: right, but k is loaded twice.
TWO_PASSES = changed(
    KERNEL,
    "    total = tl.zeros(",
    """\
    for first in range(0, s, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        there = head * s * D + keys[:, None] * D + cols[None, :]
        k = tl.load(k_ptr + there, mask=(keys < s)[:, None], other=0.0)
        scores = tl.where((keys < s)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        top = tl.maximum(top, tl.max(scores, axis=1))
    total = tl.zeros(""",
)

BACKWARD = """
def row_correction(out, dout):
    return (out * dout).sum(1)


def flash_backward(q, k, v, out, lse, dout, block):
    scale, correction = q.shape[1] ** -0.5, (out * dout).sum(1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for cols in torch.arange(len(k)).split(block):
        for rows in torch.arange(len(q)).split(block):
            p = (q[rows] @ k[cols].T * scale - lse[rows, None]).exp()
            dp = dout[rows] @ v[cols].T
            ds = p * (dp - correction[rows, None]) * scale
            dv[cols] += p.T @ dout[rows]
            dk[cols] += ds.T @ q[rows]
            dq[rows] += ds @ k[cols]
    return dq, dk, dv
"""
CORRECTED = "ds = p * (dp - correction[rows, None]) * scale"
WEIGHTS = "p = (q[rows] @ k[cols].T * scale - lse[rows, None]).exp()"
BY_AUTOGRAD = """
def row_correction(out, dout):
    return (out * dout).sum(1)


def flash_backward(q, k, v, out, lse, dout, block):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(explicit(*leaves)[0], leaves, dout)
"""

BLOCKS = """
def key_blocks(i, block_q, block_k, t, s, window):
    first = i * block_q + s - t
    last = min((i + 1) * block_q, t) - 1 + s - t
    found = []
    for j in range(max(0, first - window + 1) // block_k, last // block_k + 1):
        start, end = j * block_k, min((j + 1) * block_k, s) - 1
        found.append((j, start < last - window + 1 or end > first))
    return found
"""
DENSE_BLOCKS = """
def key_blocks(i, block_q, block_k, t, s, window):
    rows = sliding_window_mask(t, window, s - t)[i * block_q : (i + 1) * block_q]
    blocks = rows.split(block_k, dim=1)
    return [(j, not bool(x.all())) for j, x in enumerate(blocks) if x.any()]
"""
CUT = "start < last - window + 1 or end > first"

WRONG = {
    "t1_merge": [
        changed(MERGE, SHARES, "x = y = torch.ones_like(base)"),
        changed(MERGE, SHARES, "y, x = (a[0] - base).exp(), (b[0] - base).exp()"),
        changed(MERGE, "base = m.masked_fill(m == -torch.inf, 0.0)", "base = m"),
        changed(MERGE, "m.masked_fill(m == -torch.inf, 0.0)[:, None]", "m[:, None]"),
        changed(MERGE, "p @ values", "p @ values / p.sum(1, keepdim=True)"),
        changed(MERGE, "m + l.log()", "l.log()"),
        changed(MERGE, "torch.where(l > 0, l, 1.0)[:, None]", "l[:, None]"),
    ],
    "t2_forward": [
        changed(FORWARD, "shrink * acc", "acc"),
        changed(FORWARD, "shrink * total", "total"),
        changed(FORWARD, " / d**0.5", ""),
        changed(FORWARD, "last = rows + s - t", "last = rows"),
        changed(FORWARD, "cols[0] > last[-1]", "cols[0] >= last[-1]"),
        changed(FORWARD, "cols > last[:, None]", "cols >= last[:, None]"),
        changed(FORWARD, "top + total.log()", "total.log()"),
        WHOLE_MATRIX,
    ],
    "t3_kernel": [
        changed(KERNEL, "shrink[:, None] * acc", "acc"),
        changed(KERNEL, "tl.where((keys < s)[None, :], ", "(", ', float("-inf"))', ")"),
        changed(KERNEL, "head * s * D + ", ""),
        changed(KERNEL, "place, mask=(rows < t)[:, None], other=0.0", "place"),
        changed(KERNEL, "acc / total[:, None], mask=(rows < t)[:, None]", "acc / total[:, None]"),
        changed(KERNEL, "acc / total[:, None]", "acc"),
        changed(KERNEL, "top + tl.log(total)", "tl.log(total)"),
        changed(KERNEL, "head * t + rows", "rows"),
        changed(KERNEL, "range(0, s, BLOCK_K)", "range(0, s - BLOCK_K + 1, BLOCK_K)"),
        TWO_PASSES,
    ],
    "t4_backward": [
        changed(BACKWARD, CORRECTED, "ds = p * dp * scale"),
        changed(BACKWARD, CORRECTED, "ds = p * (dp - (p * dp).sum(1, keepdim=True)) * scale"),
        changed(BACKWARD, "ds.T @ q[rows]", "ds.T @ q[rows] / scale"),
        changed(BACKWARD, "dk[cols] +=", "dk[cols] ="),
        changed(BACKWARD, WEIGHTS, "p = (q[rows] @ k[cols].T * scale).softmax(1)"),
        changed(BACKWARD, "return (out * dout).sum(1)", "return (out @ dout.T).diagonal()"),
        BY_AUTOGRAD,
    ],
    "t5_blocks": [
        changed(BLOCKS, "max(0, first - window + 1)", "max(0, first - window)"),
        changed(BLOCKS, CUT, "end > first"),
        changed(BLOCKS, CUT, "start < first - window + 1 or end > first"),
        changed(BLOCKS, CUT, "True"),
        changed(BLOCKS, " + s - t", ""),
        changed(BLOCKS, "min((i + 1) * block_q, t) - 1", "(i + 1) * block_q - 1"),
        changed(BLOCKS, "min((j + 1) * block_k, s) - 1", "(j + 1) * block_k"),
        DENSE_BLOCKS,
    ],
}
