"""Planted wrong answers for chapter 11's assignment: each must lose points in its task."""

FACTS = """
def facts(e, f):
    bias = {bias}
    spacing = 2.0**-f
    return {largest}, {normal}, {smallest}, {spacing}
"""
TRUE_FACTS = {
    "bias": "2 ** (e - 1) - 1",
    "largest": "(2 - spacing) * 2.0**bias",
    "normal": "2.0 ** (1 - bias)",
    "smallest": "2.0 ** (1 - bias - f)",
    "spacing": "spacing",
}

ENCODE = """
def encode(x, e, f):
    bias = 2 ** (e - 1) - 1
    infinity = (2**e - 1) * 2**f
    sign = ({negative}) * 2 ** (e + f)
    if math.isnan(x):
        return infinity + 2 ** (f - 1)
    if math.isinf(x):
        return sign + infinity
    exponent = {exponent}
    if exponent > bias:
        return sign + {overflow}
    n = {rounding}
    return sign + min((exponent - (1 - bias)) * 2**f + n, {overflow})
"""
TRUE_ENCODE = {
    "negative": "math.copysign(1.0, x) < 0",
    "exponent": "max(math.frexp(x)[1] - 1, 1 - bias) if x else 1 - bias",
    "overflow": "infinity",
    "rounding": "round(math.ldexp(abs(x), f - exponent))",
}
FLUSHED = """
def encode(x, e, f):
    bias = 2 ** (e - 1) - 1
    infinity = (2**e - 1) * 2**f
    sign = (math.copysign(1.0, x) < 0) * 2 ** (e + f)
    if math.isnan(x):
        return infinity + 1
    exponent = math.frexp(x)[1] - 1
    if x == 0 or exponent < 1 - bias:
        return sign
    if math.isinf(x) or exponent > bias:
        return sign + infinity
    n = round(math.ldexp(abs(x), f - exponent))
    return sign + min((exponent - (1 - bias)) * 2**f + n, infinity)
"""

SOFTMAX = """
def log_softmax(x):
    z = {shift}
    return {result}


def entropy(x):
    log_p = log_softmax(x)
    p = log_p.exp()
    return {entropy}
"""
TRUE_SOFTMAX = {
    "shift": "x - x.amax(-1, keepdim=True)",
    "result": "z - z.exp().sum(-1, keepdim=True).log()",
    "entropy": "-torch.where(p > 0, p * log_p, 0.0).sum(-1)",
}

SCALER = """
class Scaler:
    def __init__(self, scale, window):
        self.scale, self.window, self.clean = scale, window, 0

    def unscale(self, gradients):
        {unscale}

    def update(self, overflow):
        {update}
"""
UNSCALE = """for g in gradients:
            g.div_(self.scale)
        return not all(g.isfinite().all() for g in gradients)"""
UPDATE = """self.clean = 0 if overflow else self.clean + 1
        if overflow:
            self.scale = {smaller}
        elif self.clean == self.window:
            self.scale, self.clean = self.scale * 2, 0"""
HALVED = UPDATE.format(smaller="self.scale / 2")
STOPS_EARLY = """for g in gradients:
            if not g.isfinite().all():
                return True
            g.div_(self.scale)
        return False"""
NEW_TENSORS = """gradients = [g / self.scale for g in gradients]
        return not all(g.isfinite().all() for g in gradients)"""
ONLY_NAN = """for g in gradients:
            g.div_(self.scale)
        return any(g.isnan().any() for g in gradients)"""
NEVER_RESET = """self.clean += not overflow
        if overflow:
            self.scale /= 2
        elif self.clean == self.window:
            self.scale, self.clean = self.scale * 2, 0"""
KEEPS_GROWING = """self.clean = 0 if overflow else self.clean + 1
        if overflow:
            self.scale /= 2
        elif self.clean >= self.window:
            self.scale *= 2"""

MASTER = """
def master_step(weights, masters, gradients, scale, lr):
    if not all({fine} for g in gradients):
        return False
    for weight, master, g in zip(weights, masters, gradients):
        {move}
        {publish}
    return True
"""
TRUE_MASTER = {
    "fine": "g.isfinite().all()",
    "move": "master.sub_(lr * (g.float() / scale))",
    "publish": "weight.copy_(master)",
}
SKIPS_ONE = """
def master_step(weights, masters, gradients, scale, lr):
    for weight, master, g in zip(weights, masters, gradients):
        if not g.isfinite().all():
            return False
        master.sub_(lr * (g.float() / scale))
        weight.copy_(master)
    return True
"""

DIAGNOSE = """
def diagnose(log):
    losses = [row["loss"] for row in log]
    usual = sorted(losses[100:150])[25]
    if {nan}:
        return "nan"
    if {underflow}:
        return "underflow"
    if {diverging}:
        return "diverging"
    return "bad batch" if {bad} else "healthy"


def culprit(log):
    if diagnose(log) == "bad batch":
        return {worst}
    if diagnose(log) == "nan":
        return {first}
    return None
"""
TRUE_DIAGNOSE = {
    "nan": 'all(row["skipped"] for row in log[-50:])',
    "underflow": 'log[-1]["grad_norm"] == 0',
    "diverging": "sorted(losses[-10:])[5] > 10 * usual",
    "bad": "max(losses[100:]) > 50 * usual",
    "worst": 'max(range(100, len(log)), key=lambda i: log[i]["loss"])',
    "first": '1 + max(i for i, row in enumerate(log) if not row["skipped"])',
}

WRONG = {
    "t1_facts": [
        FACTS.format(**TRUE_FACTS | {"bias": "2 ** (e - 1)"}),
        FACTS.format(**TRUE_FACTS | {"largest": "2 * 2.0**bias"}),
        FACTS.format(**TRUE_FACTS | {"largest": "(2 - spacing) * 2.0 ** (bias + 1)"}),
        FACTS.format(**TRUE_FACTS | {"smallest": "2.0 ** (1 - bias)"}),
        FACTS.format(**TRUE_FACTS | {"spacing": "spacing / 2"}),
    ],
    "t2_encode": [
        ENCODE.format(
            **TRUE_ENCODE | {"rounding": "math.floor(math.ldexp(abs(x), f - exponent) + 0.5)"}
        ),
        ENCODE.format(**TRUE_ENCODE | {"rounding": "int(math.ldexp(abs(x), f - exponent))"}),
        ENCODE.format(**TRUE_ENCODE | {"negative": "x < 0"}),
        ENCODE.format(**TRUE_ENCODE | {"overflow": "(infinity - 1)"}),
        ENCODE.format(**TRUE_ENCODE | {"exponent": "max(math.frexp(x)[1] - 1, 1 - bias)"}),
        FLUSHED,
    ],
    "t3_softmax": [
        SOFTMAX.format(**TRUE_SOFTMAX | {"shift": "x"}),
        SOFTMAX.format(**TRUE_SOFTMAX | {"shift": "x - x.max()"}),
        SOFTMAX.format(
            **TRUE_SOFTMAX | {"result": "(z.exp() / z.exp().sum(-1, keepdim=True)).log()"}
        ),
        SOFTMAX.format(**TRUE_SOFTMAX | {"entropy": "-(p * log_p).sum(-1)"}),
        SOFTMAX.format(
            **TRUE_SOFTMAX | {"result": "(z - z.exp().sum(-1, keepdim=True).log()).float()"}
        ),
    ],
    "t4_scaler": [
        SCALER.format(unscale=UNSCALE, update=NEVER_RESET),
        SCALER.format(unscale=UNSCALE, update=KEEPS_GROWING),
        SCALER.format(unscale=UNSCALE, update=UPDATE.format(smaller="max(self.scale / 2, 1.0)")),
        SCALER.format(unscale=STOPS_EARLY, update=HALVED),
        SCALER.format(unscale=NEW_TENSORS, update=HALVED),
        SCALER.format(unscale=ONLY_NAN, update=HALVED),
    ],
    "t5_master": [
        MASTER.format(**TRUE_MASTER | {"move": "master.sub_(lr * (g / scale).float())"}),
        MASTER.format(**TRUE_MASTER | {"move": "master.sub_(lr * g.float())"}),
        MASTER.format(
            **TRUE_MASTER
            | {
                "move": "weight.sub_((lr * g.float() / scale).to(weight.dtype))",
                "publish": "master.copy_(weight)",
            }
        ),
        MASTER.format(**TRUE_MASTER | {"publish": "pass"}),
        MASTER.format(**TRUE_MASTER | {"fine": "not g.isnan().any()"}),
        SKIPS_ONE,
    ],
    "t6_diagnose": [
        DIAGNOSE.format(**TRUE_DIAGNOSE | {"nan": 'any(row["skipped"] for row in log[-50:])'}),
        DIAGNOSE.format(**TRUE_DIAGNOSE | {"underflow": 'log[-1]["grad_norm"] < 1e-8'}).replace(
            '"grad_norm"', '"scale"'
        ),
        DIAGNOSE.format(**TRUE_DIAGNOSE | {"diverging": "max(losses[100:]) > 10 * usual"}),
        DIAGNOSE.format(**TRUE_DIAGNOSE | {"bad": "max(losses) > 5 * usual"}),
        DIAGNOSE.format(
            **TRUE_DIAGNOSE | {"first": 'next(i for i, row in enumerate(log) if row["skipped"])'}
        ),
        DIAGNOSE.format(
            **TRUE_DIAGNOSE
            | {"worst": 'max(range(100, len(log)), key=lambda i: log[i]["grad_norm"])'}
        ),
    ],
}
