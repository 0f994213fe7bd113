"""Planted wrong answers for chapter 04's assignment: each must lose points in its task."""

MATRIX = """
def rotation_matrix(position, d, theta=10_000.0):
    matrix = torch.zeros(d, d, dtype=torch.float64)
    for i in range(0, d, 2):
        angle = {angle}
        c, s = math.cos(angle), math.sin(angle)
        matrix[i : i + 2, i : i + 2] = torch.tensor({block})
    return matrix
"""
ROPE = """
def rope(x, positions, theta=10_000.0):
    d = x.shape[-1]
    speeds = {speeds}
    angles = {positions}[:, None] * speeds
    cos, sin, first, second = angles.cos(), angles.sin(), {members}
    return {joined}
"""
RIGHT_MATRIX = {"angle": "position * theta ** (-i / d)", "block": "[[c, -s], [s, c]]"}
RIGHT_ROPE = {
    "speeds": "theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)",
    "positions": "positions",
    "members": "x[..., 0::2], x[..., 1::2]",
    "joined": "torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)",
}
BY_MATRICES = """
def rope(x, positions, theta=10_000.0):
    whole = torch.stack([rotation_matrix(float(p), x.shape[-1], theta) for p in positions])
    return (whole @ x[..., None])[..., 0]
"""


def task1(**changes):
    matrix = {k: changes.get(k, v) for k, v in RIGHT_MATRIX.items()}
    return MATRIX.format(**matrix) + ROPE.format(
        **{k: changes.get(k, v) for k, v in RIGHT_ROPE.items()}
    )


LAYOUT = """
def to_interleaved(weight, d_head):
    {check}
    return {result}
"""
REFUSES = "if d_head % 2 or weight.shape[0] % d_head: raise ValueError('not whole heads')"

ALIBI = """
def slopes(heads):
    power = 2 ** int(math.log2(heads))
    if {special}:
        return torch.cat([slopes(power), slopes(2 * power){pick}[: heads - power]])
    return 2.0 ** (-8 * {count} / heads)


def alibi_bias(queries, keys, heads):
    return {sign}slopes(heads)[:, None, None] * {distance}
"""
RIGHT_ALIBI = {
    "special": "power < heads",
    "pick": "[0::2]",
    "count": "torch.arange(1, heads + 1, dtype=torch.float64)",
    "sign": "-",
    "distance": "(queries[:, None] - keys).abs()",
}

BUCKET = """
def bucket(distance, bidirectional=False, buckets=32, max_distance=128):
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = buckets * ({ahead})
        n = distance.abs()
    else:
        n = {behind}
    exact = buckets // 2
    share = (n.clamp(min=1).double() / exact).log() / {range}
    far = exact + ((buckets - exact) * share){whole}
    return offset + torch.where(n < exact, n, {capped})
"""
RIGHT_BUCKET = {
    "ahead": "distance > 0",
    "behind": "(-distance).clamp(min=0)",
    "range": "math.log(max_distance / exact)",
    "whole": ".long()",
    "capped": "far.clamp(max=buckets - 1)",
}

STRETCH = """
def speeds(d, theta=10_000.0, scaling="none", factor=1.0):
    {check}
    base = {base} if scaling == "ntk" else theta
    plain = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / {width})
    return {linear} if scaling == "linear" else plain


def unfinished_pairs(d, theta, trained):
    return int((trained * speeds(d, theta) < {turn}).sum())
"""
RIGHT_STRETCH = {
    "check": "if scaling not in ('none', 'linear', 'ntk'): raise ValueError(scaling)",
    "base": "theta * factor ** (d / (d - 2))",
    "width": "d",
    "linear": "plain / factor",
    "turn": "2 * math.pi",
}

WRONG = {
    "t1_rope": [
        task1(block="[[c, s], [-s, c]]"),  # turned the other way
        task1(joined=RIGHT_ROPE["joined"].replace("- second", "+ second").replace("in +", "in -")),
        task1(members="x.chunk(2, -1)[0], x.chunk(2, -1)[1]"),  # the other layout
        task1(joined="torch.cat([first * cos - second * sin, first * sin + second * cos], -1)"),
        task1(positions="torch.arange(x.shape[-2])"),  # the positions given are ignored
        task1(speeds="theta ** (-torch.arange(d // 2, dtype=torch.float64) / d)"),  # no 2 in 2i
        task1(angle="position * 10_000.0 ** (-i / d)"),  # the base given is ignored
        MATRIX.format(**RIGHT_MATRIX) + BY_MATRICES,
    ],
    "t2_layout": [
        LAYOUT.format(
            check=REFUSES,
            result='rearrange(weight, "(h i two) ... -> (h two i) ...", two=2, i=d_head // 2)',
        ),  # the way back
        LAYOUT.format(
            check=REFUSES, result='rearrange(weight, "(two i) ... -> (i two) ...", two=2)'
        ),  # all heads as one
        LAYOUT.format(
            check="pass",
            result="weight.unflatten(0, (-1, 2, d_head // 2)).transpose(1, 2).flatten(0, 2)",
        ),  # an odd width is not refused in so many words
        LAYOUT.format(check=REFUSES, result="weight"),
    ],
    "t3_alibi": [
        ALIBI.format(**RIGHT_ALIBI | {"special": "False"}),  # the formula everywhere
        ALIBI.format(**RIGHT_ALIBI | {"pick": ""}),  # not every other one
        ALIBI.format(**RIGHT_ALIBI | {"count": "torch.arange(heads, dtype=torch.float64)"}),
        ALIBI.format(**RIGHT_ALIBI | {"sign": ""}),
        ALIBI.format(**RIGHT_ALIBI | {"distance": "(keys - queries[:, None])"}),
        ALIBI.format(
            **RIGHT_ALIBI
            | {"distance": "(torch.arange(len(queries))[:, None] - torch.arange(len(keys))).abs()"}
        ),
    ],
    "t4_bucket": [
        BUCKET.format(**RIGHT_BUCKET | {"behind": "distance.clamp(min=0)"}),  # the wrong sign
        BUCKET.format(**RIGHT_BUCKET | {"behind": "distance.abs()"}),
        BUCKET.format(**RIGHT_BUCKET | {"ahead": "distance < 0"}),
        BUCKET.format(**RIGHT_BUCKET | {"ahead": "distance >= 0"}),
        BUCKET.format(**RIGHT_BUCKET | {"range": "math.log(max_distance)"}),
        BUCKET.format(**RIGHT_BUCKET | {"whole": ".round().long()"}),
        BUCKET.format(**RIGHT_BUCKET | {"capped": "far"}),
    ],
    "t5_stretch": [
        STRETCH.format(**RIGHT_STRETCH | {"base": "theta * factor"}),
        STRETCH.format(**RIGHT_STRETCH | {"linear": "plain * factor"}),
        STRETCH.format(**RIGHT_STRETCH | {"turn": "1"}),
        STRETCH.format(**RIGHT_STRETCH | {"width": "(d // 2)"}),
        STRETCH.format(**RIGHT_STRETCH | {"check": "pass"}),
        STRETCH.format(**RIGHT_STRETCH | {"turn": "math.pi"}),
    ],
}
