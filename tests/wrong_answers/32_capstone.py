"""Planted wrong answers for chapter 32's assignment: each must lose points in its task."""

BITS = """
def bits_per_byte(losses, tokens, texts):
    size = {size}
    if {refuse}:
        raise ValueError("lists")
    return {bits}


def loss_for(bits, tokens, texts):
    return {back}
"""
ALL = {
    "size": "sum(len(text.encode()) for text in texts)",
    "refuse": "not len(losses) == len(tokens) == len(texts) or not size",
    "bits": "sum(x * n for x, n in zip(losses, tokens)) / math.log(2) / size",
    "back": "bits * math.log(2) * sum(len(text.encode()) for text in texts) / sum(tokens)",
}

INT8 = """
def quantize(W):
    scale = {scale}
    scale = {zero}
    return {codes}, scale


def product(x, codes, scales):
    return {product}


def bound(x, scales):
    return {bound}
"""
ROWS = {
    "scale": "W.float().abs().amax(1) / 127",
    "zero": "scale.where(scale > 0, 1.0)",
    "codes": "(W.float() / scale[:, None]).round().to(torch.int8)",
    "product": "x @ codes.to(x.dtype).T * scales",
    "bound": "scales / 2 * x.abs().sum(-1, keepdim=True)",
}

RUN = """
def run(stages, folder):
    results = {{}}
    for stage in stages:
        path = folder / f"{{stage.name}}.json"
        key = {key}
        try:
            known = json.loads(path.read_bytes())
        except {errors}:
            known = None
        if {redo}:
            text = json.dumps({{"key": key, "result": (made := stage.work(stage.settings, results))}})
            {write}
            known = {known}
        results[stage.name] = known["result"]
    return results
"""
KEPT = {
    "key": "key_of(stage.name, stage.settings, results)",
    "errors": "(FileNotFoundError, ValueError)",
    "redo": "not isinstance(known, dict) or known.get('key') != key or 'result' not in known",
    "write": "write_atomically(path, text.encode())",
    "known": "json.loads(text)",
}
LAST = """
def run(stages, folder):
    results = {}
    for stage in stages:
        results[stage.name] = stage.work(stage.settings, results)
    for name, result in results.items():
        write_atomically(folder / f"{name}.json", json.dumps({"result": result}).encode())
    return results
"""

PICK = """
def allowed(checkpoints, max_kl, max_bits):
    kept = [c for c in checkpoints if {finite} and {within}]
    {none}
    return kept


def pick(checkpoints):
    best = max(checkpoints, key=lambda c: {best})
    kept = []
    for c in checkpoints:
        gap = best.rewards - c.rewards
        if c is best or gap.mean() <= {error}:
            kept.append(c)
    return min(kept, key=lambda c: {least})
"""
RULE = {
    "finite": "c.rewards.isfinite().all() and math.isfinite(c.kl) and math.isfinite(c.bits)",
    "within": "c.kl <= max_kl and c.bits <= max_bits",
    "none": "if not kept: raise ValueError('none')",
    "best": "(c.rewards.mean().item(), -c.step)",
    "error": "gap.std() / len(gap) ** 0.5",
    "least": "(c.kl, c.step)",
}

BLIND = """
def blind(requests, a, b, prefer):
    if {refuse}:
        raise ValueError("lists")
    found = []
    for request, x, y in zip(requests, a, b):
        asked = {asked}
        found.append({outcome})
    return found


def wilson(outcomes, z=1.96):
    wins, n = sum(x == 1 for x in outcomes), {n}
    if not n:
        raise ValueError("none")
    p = {share}
    middle = p + z**2 / (2 * n)
    half = {half}
    return p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
"""
TWICE = {
    "refuse": "not len(requests) == len(a) == len(b)",
    "asked": "(0, 0) if x == y else (prefer(request, x, y), prefer(request, y, x))",
    "outcome": "{(1, 2): 1, (2, 1): -1}.get(asked, 0)",
    "n": "sum(x != 0 for x in outcomes)",
    "share": "wins / n",
    "half": "z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))",
}


def variants(template: str, right: dict[str, str], *changes: dict[str, str]) -> list[str]:
    """The template with one thing wrong each time."""
    return [template.format(**(right | change)) for change in changes]


WRONG = {
    "t1_bits": variants(
        *(BITS, ALL),
        {"size": "sum(len(text) for text in texts)"},  # characters
        {"bits": "sum(x * n for x, n in zip(losses, tokens)) / size"},  # nats per byte
        {
            "bits": "sum(x * n / math.log(2) / max(len(t.encode()), 1) for x, n, t in "
            "zip(losses, tokens, texts)) / len(texts)"
        },  # a mean of means
        {"bits": "sum(losses) / len(losses) * sum(tokens) / math.log(2) / size"},
        {"refuse": "not size"},
        {"refuse": "len(losses) != len(texts)"},  # divides by zero
        {"back": "bits * math.log(2) * sum(len(text) for text in texts) / sum(tokens)"},
        {"back": "bits / math.log(2) * sum(len(t.encode()) for t in texts) / sum(tokens)"},
    ),
    "t2_int8": variants(
        *(INT8, ROWS),
        {"scale": "W.float().abs().amax().expand(len(W)).clone() / 127"},  # one for the matrix
        {"zero": "scale"},  # 0 / 0
        {"scale": "W.float().abs().amax(1) / 128"},  # 128 does not fit into int8
        {"scale": "W.float().amax(1) / 127"},  # forgets the sign
        {"codes": "(W.float() / scale[:, None]).to(torch.int8)"},  # cuts instead of rounding
        {"product": "x @ codes.to(x.dtype).T"},
        {"product": "x @ codes.float().T * scales"},  # fails for x of another type
        {"bound": "scales * x.abs().sum(-1, keepdim=True)"},  # twice too large
        {"bound": "scales / 2 * x.sum(-1, keepdim=True).abs()"},
        {"bound": "scales / 2 * x.norm(dim=-1, keepdim=True)"},
    ),
    "t3_run": [
        LAST,
        *variants(
            *(RUN, KEPT),
            {"key": "key_of(stage.name, stage.settings, {})"},  # blind to earlier results
            {"key": "key_of(stage.name, {}, results)"},  # blind to settings
            {"redo": "known is None"},  # takes any file
            {"errors": "FileNotFoundError"},  # a torn file ends it for good
            {"redo": "known is None or known.get('key') != key"},
            {"redo": "not isinstance(known, dict) or known.get('key') != key"},
            {"write": "path.write_text(text)"},  # half a file if it is killed
            {"known": "{'result': made}"},  # keeps tuples, which a later run does not
        ),
    ],
    "t4_pick": variants(
        *(PICK, RULE),
        {"finite": "True"},
        {"finite": "c.rewards.isfinite().all()"},
        {"finite": "not c.rewards.isnan().any()"},
        {"within": "c.kl < max_kl and c.bits <= max_bits"},
        {"within": "c.kl <= max_kl"},
        {"none": ""},
        {"error": "-1"},  # simply the best
        {"error": "gap.std()"},  # without the number of requests
        {"error": "best.rewards.std() / len(gap) ** 0.5"},  # not paired
        {"error": "gap.std(correction=0) / len(gap) ** 0.5"},
        {"least": "c.step"},
        {"least": "(c.kl, -c.step)"},
        {"best": "(-c.kl, c.rewards.mean().item())"},
    ),
    "t5_blind": variants(
        *(BLIND, TWICE),
        {"asked": "(prefer(request, x, y), 3 - prefer(request, x, y))"},  # asks in one order
        {"outcome": "{1: 1, 2: -1}.get(asked[0], 0)"},  # and so does this one
        {"outcome": "{(1, 1): 1, (2, 2): -1}.get(asked, 0)"},  # forgets that roles are exchanged
        {"outcome": "{(1, 2): 1, (2, 1): -1, (1, 0): 1, (2, 0): -1}.get(asked, 0)"},
        {"asked": "(prefer(request, x, y), prefer(request, y, x))"},  # asks about equal texts
        {"refuse": "len(a) != len(b)"},
        {"n": "len(outcomes)"},  # ties count as defeats
        {"half": "z * math.sqrt(p * (1 - p) / n)"},
        {"share": "(wins + 1) / (n + 2)"},
    ),
}
