"""Planted wrong answers for chapter 21's assignment: each must lose points in its task."""

LORA = """
def start(outputs, inputs, r, generator):
    if {refuse}:
        raise ValueError("rank")
    a = torch.randn(r, inputs, generator=generator) * {std}
    return a, {b}


def lora_linear(x, W, A, B, alpha):
    return {y}
"""
RIGHT = {
    "refuse": "not 1 <= r <= min(outputs, inputs)",
    "std": "inputs**-0.5",
    "b": "torch.zeros(outputs, r)",
    "y": "F.linear(x, W) + alpha / len(A) * F.linear(F.linear(x, A), B)",
}

MERGE = """
def merged(W, adapters):
    {merge}


def best_update(delta, r):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return {best}


def rank_for(delta, share):
    values = torch.linalg.svdvals(delta){power}
    left = [values[r:].sum().item() for r in range(len(values) + 1)]
    return next(r for r, rest in enumerate(left) if rest {compare} share * left[0])
"""
PLUS = {
    "merge": "return W + sum(alpha / len(A) * (B @ A) for A, B, alpha in adapters)",
    "best": "(Vh[:r], U[:, :r] * S[:r])",
    "power": ".square()",
    "compare": "<=",
}
IN_PLACE = """for A, B, alpha in adapters:
        W += alpha / len(A) * (B @ A)
    return W"""
ALIAS = """if not adapters:
        return W
    return W + sum(alpha / len(A) * (B @ A) for A, B, alpha in adapters)"""

MIXED = """
def mixed(x, W, A, B, scales, which):
    scale = {scale}
    return {y}
"""
ROWS = {
    "scale": "torch.where(which < 0, 0.0, scales[which])[:, None, None]",
    "y": "F.linear(x, W) + scale * (x @ A[which].mT @ B[which].mT)",
}

PREFIX = """
def prefix_attention(q, k, v, pk, pv, real):
    b, h, t, d = q.shape
    n = pk.shape[1]
    k, v = (torch.cat([x.expand(b, h, n, d), y], 2) for x, y in ((pk, k), (pv, v)))
    text = {text}
    scores = q @ k.mT{scale}
    return scores.masked_fill(~({mask}), -math.inf).softmax(-1) @ v


def prefix_share(q, k, pk):
    b, h, t, d = q.shape
    n = pk.shape[1]
    scores = {scores}
    mask = F.pad(torch.ones(t, t, dtype=torch.bool).tril(), (n, 0), value=True)
    return {share}
"""
BEHIND = {
    "text": "torch.ones(t, t, dtype=torch.bool).tril() & real[:, None, None, :]",
    "scale": " / math.sqrt(d)",
    "mask": "F.pad(text, (n, 0), value=True)",
    "scores": "q @ torch.cat([pk.expand(b, h, n, d), k], 2).mT / math.sqrt(d)",
    "share": "scores.masked_fill(~mask, -math.inf).softmax(-1)[..., :n].sum(-1)",
}

BUDGET = """
def largest(budget, w, f, layers):
    costs = {{
        "lora": (0, {lora}),
        "lora all": (0, {everywhere}),
        "adapter": {adapter},
        "prefix": (0, {prefix}),
        "prompt": (0, w),
    }}
    return {{name: {fit} for name, (fixed, slope) in costs.items()}}


def shootout(runs, budget):
    seeds, groups = {{run["seed"] for run in runs}}, {{}}
    for run in runs:
        if run["parameters"] {within} budget:
            key = run["method"], run["setting"], run["lr"]
            groups.setdefault(key, []).append(run)
    best = {{}}
    for (method, *_), group in groups.items():
        if {partial}:
            continue
        valid = {judge}
        if method not in best or valid < best[method][0]:
            best[method] = valid, [run["test"] for run in group]
    {empty}
    found = {{
        name: (statistics.mean(test), {spread}) for name, (_, test) in best.items()
    }}
    return {order}
"""
FAIR = {
    "lora": "layers * 2 * 2 * w",
    "everywhere": "layers * (4 * 2 * w + 3 * (w + f))",
    "adapter": "(layers * 2 * w, layers * 2 * (2 * w + 1))",
    "prefix": "layers * 2 * w",
    "fit": "max(0, (budget - fixed) // slope)",
    "within": "<=",
    "partial": "{run['seed'] for run in group} != seeds",
    "judge": "statistics.mean(run['valid'] for run in group)",
    "empty": "if not best: raise ValueError('nothing fits')",
    "spread": "(max(test) - min(test)) / 2",
    "order": "dict(sorted(found.items(), key=lambda item: item[1][0]))",
}


def variants(template: str, right: dict[str, str], *changes: dict[str, str]) -> list[str]:
    """The template with one thing wrong each time."""
    return [template.format(**(right | change)) for change in changes]


WRONG = {
    "t1_lora": variants(
        *(LORA, RIGHT),
        {"b": "torch.randn(outputs, r, generator=generator)"},  # changes the model at the start
        {"y": "F.linear(x, W) + alpha * F.linear(F.linear(x, A), B)"},  # scale without the rank
        {"y": "F.linear(x, W + alpha / len(A) * (B @ A))"},  # builds the whole matrix
        {"std": "r**-0.5"},
        {"refuse": "r < 1"},
        {"y": "F.linear(x, W) + alpha / len(B) * F.linear(F.linear(x, A), B)"},
    ),
    "t2_merge": variants(
        *(MERGE, PLUS),
        {"merge": IN_PLACE},
        {"merge": "return W + sum(alpha * (B @ A) for A, B, alpha in adapters)"},
        {"best": "(Vh[:r], U[:, :r])"},  # without the singular values
        {"best": "(Vh[-r:], U[:, -r:] * S[-r:])"},  # the smallest ones
        {"power": ""},  # shares of the sum of singular values, not of squares
        {"compare": "<"},
        {"merge": ALIAS},
    ),
    "t3_mixed": variants(
        *(MIXED, ROWS),
        {"scale": "scales[which][:, None, None]"},  # -1 is the last adapter
        {"y": "x @ (W + scale * (B[which] @ A[which])).mT"},  # a matrix for every row
        {"scale": "torch.where(which < 0, 0.0, 1.0)[:, None, None].double()"},
        {"y": "F.linear(x, W) + scale * (x @ A[which[0]].mT @ B[which[0]].mT)"},
        {
            "y": "torch.where(which < 0, 0.0, 1.0)[:, None, None] * F.linear(x, W) + scale * (x @ "
            "A[which].mT @ B[which].mT)"
        },
    ),
    "t4_prefix": variants(
        *(PREFIX, BEHIND),
        {"text": "torch.ones(t, t, dtype=torch.bool).tril().expand(b, 1, t, t)"},  # sees padding
        {"mask": "torch.ones(t, n + t, dtype=torch.bool).tril() & F.pad(text, (n, 0), value=True)"},
        {"scale": ""},
        {"text": "torch.ones(t, t, dtype=torch.bool) & real[:, None, None, :]"},  # looks ahead
        {"mask": "F.pad(text, (n, 0), value=True) & real[:, None, :, None]"},  # NaN at padding
        {"share": "scores.softmax(-1)[..., :n].sum(-1)"},
        {"share": "scores.masked_fill(~mask, -math.inf).softmax(-1)[..., :n].mean(-1)"},
        {"scores": "q @ torch.cat([pk.expand(b, h, n, d), k], 2).mT"},
    ),
    "t5_budget": variants(
        *(BUDGET, FAIR),
        {"judge": "statistics.mean(run['test'] for run in group)"},  # peeks at the test
        {"lora": "layers * 2 * w * w"},
        {"adapter": "(0, layers * 2 * 2 * w)"},  # no biases
        {"everywhere": "layers * 7 * 2 * w"},
        {"prefix": "2 * w"},
        {"fit": "(budget - fixed) // slope"},  # below zero
        {"fit": "max(1, (budget - fixed) // slope)"},
        {"judge": "min(run['valid'] for run in group)"},  # the luckiest seed
        {"partial": "False"},
        {"within": "<"},
        {"spread": "max(test) - min(test)"},
        {"empty": ""},
        {"order": "found"},
    ),
}
