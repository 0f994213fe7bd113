"""Planted wrong answers for chapter 09's assignment: each must lose points in its task."""

ADD = """
@kernel
def scaled_add(x_ptr, y_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr):
    place = {place}
    inside = {inside}
    x = tl.load(x_ptr + place{load_mask})
    y = tl.load(y_ptr + place{load_mask})
    tl.store(out_ptr + place, {sum}, mask=inside)
"""
ADDS = {
    "place": "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
    "inside": "place < n",
    "load_mask": ", mask=inside",
    "sum": "alpha * x + y",
}

MAX = """
@kernel
def row_max(x_ptr, out_ptr, d, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    top = tl.full([BLOCK], {lowest}, tl.float32)
    for start in range(0, {end}, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * {stride} + cols, mask={mask}, other={other})
        top = {keep}
    tl.store(out_ptr + row, tl.max(top, axis=0))
"""
MAXIMUM = {
    "lowest": 'float("-inf")',
    "end": "d",
    "stride": "stride",
    "mask": "cols < d",
    "other": 'float("-inf")',
    "keep": "tl.maximum(top, x)",
}
LOADS_A_ROW_TWICE = """
@kernel
def row_max(x_ptr, out_ptr, d, stride, BLOCK: tl.constexpr):
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, 2 * d, BLOCK):
        cols = (start + tl.arange(0, BLOCK)) % d
        top = tl.maximum(top, tl.load(x_ptr + tl.program_id(0) * stride + cols))
    tl.store(out_ptr + tl.program_id(0), tl.max(top, axis=0))
"""

SOFTMAX = """
@kernel
def scaled_softmax(x_ptr, y_ptr, d, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0) * {row} + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < d
    x = tl.load(x_ptr + place, mask=inside, other={other}){scale}
    top = {top}
    e = tl.exp(x - tl.where(top == float("-inf"), {empty}, top)){after}
    total = tl.sum(e, axis=0)
    tl.store(y_ptr + place, e / {total}, mask=inside)
"""
SOFT = {
    "row": "d",
    "other": 'float("-inf")',
    "scale": " * scale",
    "top": "tl.max(x, axis=0)",
    "empty": "0.0",
    "after": "",
    "total": "tl.where(total == 0, 1.0, total)",
}
TWO_PASSES = """
@kernel
def scaled_softmax(x_ptr, y_ptr, d, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0) * d + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < d
    top = tl.max(tl.load(x_ptr + place, mask=inside, other=float("-inf")) * scale, axis=0)
    x = tl.load(x_ptr + place, mask=inside, other=float("-inf")) * scale
    e = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(e, axis=0)
    tl.store(y_ptr + place, e / tl.where(total == 0, 1.0, total), mask=inside)
"""

NORM = """
@kernel
def norm_backward(x_ptr, w_ptr, r_ptr, dy_ptr, dx_ptr, shares_ptr, n, d, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < d
    w = {one}tl.load(w_ptr + cols, mask=inside, other=0.0)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in {rows}:
        x = tl.load(x_ptr + row * d + cols, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * d + cols, mask=inside, other=0.0)
        r = tl.load(r_ptr + row)
        xhat = x * r
        {share}
        wdy = w * dy
        dx = r * (wdy - {hat} * (tl.sum(wdy * xhat, axis=0) / {width}))
        tl.store(dx_ptr + row * d + cols, dx, mask=inside)
    tl.store(shares_ptr + {line} * d + cols, dw, mask=inside)
"""
NORMS = {
    "one": "1 + ",
    "rows": "range(program, n, tl.num_programs(0))",
    "share": "dw += dy * xhat",
    "hat": "xhat",
    "width": "d",
    "line": "program",
}

LINEAR = """
@kernel
def linear(
    a_ptr, b_ptr, bias_ptr, c_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = (tl.program_id({first}) * BM + tl.arange(0, BM))[:, None]
    cols = (tl.program_id({second}) * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, {end}, BK):
        across = start + tl.arange(0, BK)[None, :]
        down = start + tl.arange(0, BK)[:, None]
        x = tl.load(a_ptr + rows * k + across, mask={a_mask}, other=0.0)
        y = tl.load(b_ptr + down * n + cols, mask=(down < k) & (cols < n), other=0.0)
        acc = tl.dot(x, y, {acc}, input_precision="ieee"){bias_inside}
    {bias}
    tl.store(c_ptr + rows * n + cols, acc, mask={c_mask})
"""
BIAS = "tl.load(bias_ptr + cols, mask=cols < n, other=0.0)"
PRODUCT = {
    "first": 0,
    "second": 1,
    "end": "k",
    "a_mask": "(rows < m) & (across < k)",
    "acc": "acc",
    "bias_inside": "",
    "bias": f"acc += {BIAS}",
    "c_mask": "(rows < m) & (cols < n)",
}
STRIPS_TWICE = """
@kernel
def linear(
    a_ptr, b_ptr, bias_ptr, c_ptr, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    cols = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        for half in range(2):
            across = start + tl.arange(0, BK)[None, :]
            down = start + tl.arange(0, BK)[:, None]
            x = tl.load(a_ptr + rows * k + across, mask=(rows < m) & (across < k), other=0.0)
            y = tl.load(b_ptr + down * n + cols, mask=(down < k) & (cols < n), other=0.0)
            acc = tl.dot(x, y / 2, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0)
    tl.store(c_ptr + rows * n + cols, acc, mask=(rows < m) & (cols < n))
"""

WRONG = {
    "t1_add": [
        ADD.format(**ADDS | {"inside": "place < n - 1"}),
        ADD.format(**ADDS | {"inside": "place <= n"}),
        ADD.format(**ADDS | {"load_mask": ""}),
        ADD.format(**ADDS | {"place": "tl.arange(0, BLOCK)"}),
        ADD.format(**ADDS | {"place": "tl.program_id(0) + tl.arange(0, BLOCK)"}),
        ADD.format(**ADDS | {"sum": "alpha * (x + y)"}),
    ],
    "t2_max": [
        MAX.format(**MAXIMUM | {"other": "0.0"}),
        MAX.format(**MAXIMUM | {"lowest": "0.0"}),
        MAX.format(**MAXIMUM | {"stride": "d"}),
        MAX.format(**MAXIMUM | {"end": "BLOCK"}),
        MAX.format(**MAXIMUM | {"keep": "x"}),
        MAX.format(**MAXIMUM | {"mask": "cols < stride"}),
        LOADS_A_ROW_TWICE,
    ],
    "t3_softmax": [
        SOFTMAX.format(**SOFT | {"top": "tl.max(x, axis=0) * 0"}),
        SOFTMAX.format(**SOFT | {"other": "0.0"}),
        SOFTMAX.format(**SOFT | {"empty": "top", "total": "total"}),
        SOFTMAX.format(**SOFT | {"row": "BLOCK"}),
        SOFTMAX.format(**SOFT | {"scale": "", "after": " * scale"}),
        SOFTMAX.format(**SOFT | {"scale": ""}),
        TWO_PASSES,
    ],
    "t4_norm": [
        NORM.format(**NORMS | {"one": ""}),
        NORM.format(**NORMS | {"hat": "x"}),
        NORM.format(**NORMS | {"hat": "0.0"}),
        NORM.format(**NORMS | {"width": "BLOCK"}),
        NORM.format(**NORMS | {"share": "dw = dy * xhat"}),
        NORM.format(**NORMS | {"share": "dw += dy * x"}),
        NORM.format(**NORMS | {"rows": "range(program, n - 1, tl.num_programs(0))"}),
        NORM.format(**NORMS | {"line": "0"}),
    ],
    "t5_linear": [
        LINEAR.format(**PRODUCT | {"first": 1, "second": 0}),
        LINEAR.format(**PRODUCT | {"acc": "tl.zeros([BM, BN], tl.float32)"}),
        LINEAR.format(**PRODUCT | {"a_mask": "rows < m"}),
        LINEAR.format(**PRODUCT | {"end": "k - BK + 1"}),
        LINEAR.format(**PRODUCT | {"bias": "pass", "bias_inside": f" + {BIAS}"}),
        LINEAR.format(**PRODUCT | {"bias": "pass"}),
        LINEAR.format(**PRODUCT | {"c_mask": "rows < m"}),
        STRIPS_TWICE,
    ],
}
