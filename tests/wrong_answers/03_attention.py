"""Planted wrong answers for chapter 03's assignment: each must lose points in its task."""

ATTENTION = """
def attention(q, k, v, mask=None):
    scores = {scores}
    if mask is not None:
        scores = scores.masked_fill({forbidden}, -torch.inf)
    weights = scores.softmax({axis})
    {after}
    return weights @ v
"""
FINE = {
    "scores": "q @ k.mT / q.shape[-1] ** 0.5",
    "forbidden": "~mask",
    "axis": "-1",
    "after": "weights = weights if mask is None else weights.masked_fill(~mask, 0.0)",
}
MASKED_AFTER_SOFTMAX = """
def attention(q, k, v, mask=None):
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    if mask is not None:
        weights = weights * mask
    return weights @ v
"""
READY_MADE = """
def attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
"""

HEADS = """
def multi_head(x, w_q, w_k, w_v, w_out, heads, mask=None):
    if x.shape[-1] % heads:
        raise ValueError("heads do not divide the width")
    q, k, v = (rearrange(x @ w.T, "{split} -> b h t d", h=heads) for w in (w_q, w_k, w_v))
    return rearrange(attend(q, k, v, {mask}), "b h t d -> {join}"){out}
"""
VIEW_WITHOUT_TRANSPOSE = """
def multi_head(x, w_q, w_k, w_v, w_out, heads, mask=None):
    b, t, m = x.shape
    if m % heads:
        raise ValueError("heads do not divide the width")
    q, k, v = ((x @ w.T).view(b, heads, t, m // heads) for w in (w_q, w_k, w_v))
    return attend(q, k, v, mask).reshape(b, t, m) @ w_out.T
"""
BACK_WITHOUT_TRANSPOSE = """
def multi_head(x, w_q, w_k, w_v, w_out, heads, mask=None):
    if x.shape[-1] % heads:
        raise ValueError("heads do not divide the width")
    q, k, v = (rearrange(x @ w.T, "b t (h d) -> b h t d", h=heads) for w in (w_q, w_k, w_v))
    return attend(q, k, v, mask).reshape(x.shape) @ w_out.T
"""

GROUPED = """
def grouped(q, k, v, mask=None):
    h, g = q.shape[1], k.shape[1]
    {check}
    k, v = ({repeat} for x in (k, v))
    return attend(q, k, v, {mask})


def cache_bytes(layers, batch, kv_heads, tokens, d_head, itemsize):
    return {two} * layers * batch * kv_heads * tokens * d_head * itemsize
"""
REFUSES = "if h % g: raise ValueError('h must be a multiple of g')"
INTERLEAVE = "x.repeat_interleave(h // g, dim=1)"

CACHE = """
class Cache:
    def __init__(self, batch, heads, capacity, d_head):
        self.keys = torch.zeros(batch, heads, capacity, d_head, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(self, k, v):
        end, capacity = self.length + k.shape[2], self.keys.shape[2]
        {before}
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :{upto}], self.values[:, :, :{upto}]


def cached_attention(x, layer, cache):
    q, k, v = layer.project(x)
    mask = {mask}
    k, v = cache.append(k, v)
    return layer.out(rearrange(attend(q, k, v, mask), "b h t d -> b t (h d)"))
"""
CACHED = {
    "before": "if end > capacity: raise ValueError('the cache is full')",
    "upto": "end",
    "mask": "causal_mask(x.shape[1], offset=cache.length)",
}
HALF_STORED = "self.length = min(end, capacity)\n        " + CACHED["before"]
OFF_BY_ONE = "if end >= capacity: raise ValueError('the cache is full')"

WINDOW_MASK = """
def window_mask(t, window):
    distance = torch.arange(t)[:, None] - torch.arange(t)
    return {rule}
"""
RULE = "(distance >= 0) & (distance < window)"
WINDOWED = """
def windowed(q, k, v, window):
    b = q.shape[0]
    q, k, v = (rearrange(x, "b h (n w) d -> b h n w d", w=window) for x in (q, k, v))
    n = q.shape[2]
    k, v = (
        torch.cat([torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2), x], dim=3)
        for x in (k, v)
    )
    distance = torch.arange(window, 2 * window)[:, None] - torch.arange(2 * window)
    mask = ((distance >= 0) & (distance < window)).repeat(n, 1, 1)
    {first}
    q, k, v = (rearrange(x, "b h n w d -> (b n) h w d") for x in (q, k, v))
    out = attend(q, k, v, mask.{spread}[:, None])
    return rearrange(out, "(b n) h w d -> b h (n w) d", b=b)
"""
FIRST, SPREAD = "mask[0, :, :window] = False", "repeat(b, 1, 1)"
DENSE = """
def windowed(q, k, v, window):
    return attend(q, k, v, sliding_window_mask(q.shape[2], window))
"""
OWN_BLOCK_ONLY = """
def windowed(q, k, v, window):
    b = q.shape[0]
    q, k, v = (rearrange(x, "b h (n w) d -> (b n) h w d", w=window) for x in (q, k, v))
    return rearrange(attend(q, k, v, causal_mask(window)), "(b n) h w d -> b h (n w) d", b=b)
"""

LEAKS = """
def leaks(f, x):
    before = f(x)
    for j in {positions}:
        changed = {copy}
        changed[:, j] += 1 + torch.arange(x.shape[2])
        if {test}:
            return True
    return False
"""
EVERY, MOVED = "range(1, x.shape[1])", "(f(changed) - before)[:, :j].abs().max() > 1e-9"
MASK = """
def repaired_mask(real):
    return {rule}
"""
MEANT = "causal_mask(real.shape[1]) & real[:, None, None, :]"

right_grouped = {"check": REFUSES, "repeat": INTERLEAVE, "mask": "mask", "two": 2}
right_heads = {
    "split": "b t (h d)",
    "join": "b t (h d)",
    "mask": "mask",
    "out": " @ w_out.T",
}

WRONG = {
    "t1_attention": [
        ATTENTION.format(**FINE | {"scores": "q @ k.mT"}),
        MASKED_AFTER_SOFTMAX,
        ATTENTION.format(**FINE | {"axis": "-2"}),
        ATTENTION.format(**FINE | {"forbidden": "mask"}),
        ATTENTION.format(**FINE | {"after": "pass"}),
        READY_MADE,
    ],
    "t2_heads": [
        HEADS.format(**right_heads | {"split": "b t (d h)", "join": "b t (d h)"}),
        VIEW_WITHOUT_TRANSPOSE,
        BACK_WITHOUT_TRANSPOSE,
        HEADS.format(**right_heads | {"mask": "None"}),
        HEADS.format(**right_heads | {"out": ""}),
        HEADS.format(**right_heads | {"out": " @ w_out"}),
    ],
    "t3_grouped": [
        GROUPED.format(**right_grouped | {"repeat": "x.repeat(1, h // g, 1, 1)"}),
        GROUPED.format(**right_grouped | {"two": 1}),
        GROUPED.format(**right_grouped | {"mask": "None"}),
    ],
    "t4_cache": [
        CACHE.format(**CACHED | {"before": OFF_BY_ONE}),
        CACHE.format(**CACHED | {"before": HALF_STORED}),
        CACHE.format(**CACHED | {"before": "pass"}),
        CACHE.format(**CACHED | {"upto": ""}),
        CACHE.format(**CACHED | {"mask": "None"}),
        CACHE.format(
            **CACHED | {"mask": "causal_mask(x.shape[1], offset=max(0, cache.length - 1))"}
        ),
    ],
    "t5_window": [
        WINDOW_MASK.format(rule=RULE) + DENSE,
        WINDOW_MASK.format(rule=RULE) + OWN_BLOCK_ONLY,
        WINDOW_MASK.format(rule=RULE) + WINDOWED.format(first="pass", spread=SPREAD),
        WINDOW_MASK.format(rule=RULE)
        + WINDOWED.format(first=FIRST, spread="repeat_interleave(b, dim=0)"),
        WINDOW_MASK.format(rule="(distance >= 0) & (distance <= window)")
        + WINDOWED.format(first=FIRST, spread=SPREAD),
        WINDOW_MASK.format(rule="distance.abs() < window")
        + WINDOWED.format(first=FIRST, spread=SPREAD),
    ],
    "t6_leak": [
        LEAKS.format(positions="[x.shape[1] - 1]", copy="x.clone()", test=MOVED)
        + MASK.format(rule=MEANT),
        LEAKS.format(positions=EVERY, copy="x.clone()", test=MOVED)
        + MASK.format(rule="causal_mask(real.shape[1]) & real[:, None, :, None]"),
        LEAKS.format(positions=EVERY, copy="x", test=MOVED) + MASK.format(rule=MEANT),
        LEAKS.format(positions=EVERY, copy="x.clone()", test="not torch.equal(f(changed), before)")
        + MASK.format(rule=MEANT),
        LEAKS.format(positions=EVERY, copy="x.clone()", test=MOVED)
        + MASK.format(rule="(causal_mask(real.shape[1]) & real[:, None, :])"),
    ],
}
