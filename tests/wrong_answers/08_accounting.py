"""Planted wrong answers for chapter 08's assignment: each must lose points in its task."""

PARAMETERS = """
def gpt_parameters(vocab, d, layers, context):
    block = {block}
    return {tables} * d + layers * block + {last}


def llama_parameters(vocab, d, layers, heads, kv_heads, hidden):
    narrow = {narrow}
    block = 2 * d * d + 2 * d * narrow + {gate} * d * hidden + 2 * d
    return {two} * vocab * d + layers * block + d
"""
P = {
    "block": "12 * d * d + 13 * d",
    "tables": "(vocab + context)",
    "last": "2 * d",
    "narrow": "kv_heads * (d // heads)",
    "gate": "3",
    "two": "2",
}

FLOPS = """
def forward_flops(vocab, d, layers, batch, seq):
    return layers * ({block}) + {logits} * batch * seq * d * vocab


def step_flops(vocab, d, layers, batch, seq, recompute="none"):
    matrices, scores = layers * 24 * batch * seq * d**2, layers * 4 * batch * seq**2 * d
    logits = 2 * batch * seq * d * vocab
    more = {{"none": 0, "selective": {selective}, "full": {full}}}
    {check}
    return {times} * (matrices + scores + logits) + {added}
"""
F = {
    "block": "24 * batch * seq * d**2 + 4 * batch * seq**2 * d",
    "logits": "2",
    "selective": "scores",
    "full": "matrices + scores",
    "check": "if recompute not in more: raise ValueError('unknown')",
    "times": "3",
    "added": "more[recompute]",
}

CACHE = """
def rows_that_fit(n, layers, kv_heads, d_head, context, room, itemsize=2):
    row = {two} * layers * kv_heads * d_head * context * itemsize
    return {rows}


def heads_to_keep(n, layers, heads, d_head, context, room, itemsize, rows):
    for g in {order}:
        fits = rows_that_fit(n, layers, g, d_head, context, room, itemsize) {enough} rows
        if {divides} and fits:
            return g
    return {nothing}
"""
C = {
    "two": "2",
    "rows": "max(0, room - n * itemsize) // row",
    "order": "range(heads, 0, -1)",
    "enough": ">=",
    "divides": "heads % g == 0",
    "nothing": "None",
}

BEND = """
def tokens_per_second(b, flops_per_row, weight_bytes, row_bytes, device):
    compute = b * flops_per_row / device.flops
    moving = {moving} / device.bandwidth
    return b / {time}


def bend(flops_per_row, weight_bytes, row_bytes, device):
    import math

    gain = flops_per_row / device.flops - {cache}
    {never}
    return max({least}, {round}(weight_bytes / device.bandwidth / gain))
"""
B = {
    "moving": "(weight_bytes + b * row_bytes)",
    "time": "max(compute, moving)",
    "cache": "row_bytes / device.bandwidth",
    "never": "if gain <= 0: return None",
    "least": "1",
    "round": "math.ceil",
}
SEARCH = """
def tokens_per_second(b, flops_per_row, weight_bytes, row_bytes, device):
    compute = b * flops_per_row / device.flops
    return b / max(compute, (weight_bytes + b * row_bytes) / device.bandwidth)


def bend(flops_per_row, weight_bytes, row_bytes, device):
    for b in range(1, 10_000):
        if b * flops_per_row / device.flops >= (weight_bytes + b * row_bytes) / device.bandwidth:
            return b
    return None
"""

SAVED = """
def saved_bytes(model, x):
    own = {own}
    found = {{}}

    def pack(t):
        storage = t.untyped_storage()
        if {mine}:
            found[{key}] = {size}
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    return sum(found.values())
"""
S = {
    "own": "{t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}",
    "mine": "storage.data_ptr() not in own",
    "key": "storage.data_ptr()",
    "size": "storage.nbytes()",
}

AUDIT = """
def utilization(run):
    active = {active}
    return {factor} * active * run["tokens"] / (run["devices"] * run["peak"] * run["days"] * {day})


def impossible(runs):
    return {answer}
"""
A = {
    "active": 'run["parameters"] if run["active"] is None else run["active"]',
    "factor": "6",
    "day": "86_400",
    "answer": '[run["name"] for run in runs if utilization(run) >= 1]',
}

WRONG = {
    "t1_parameters": [
        PARAMETERS.format(**P | {"block": "12 * d * d + 9 * d"}),  # norms of the block forgotten
        PARAMETERS.format(**P | {"tables": "(2 * vocab + context)"}),  # a tied matrix counted twice
        PARAMETERS.format(**P | {"last": "0"}),  # no final norm
        PARAMETERS.format(**P | {"narrow": "d"}),  # key/value heads ignored
        PARAMETERS.format(**P | {"gate": "2"}),  # the gate forgotten
        PARAMETERS.format(**P | {"two": "1"}),  # no output matrix of its own
    ],
    "t2_flops": [
        FLOPS.format(**F | {"times": "2"}),  # backward as cheap as forward
        FLOPS.format(**F | {"block": "24 * batch * seq * d**2 + 2 * batch * seq**2 * d"}),
        FLOPS.format(**F | {"logits": "1"}),  # a multiply-add counted once
        FLOPS.format(**F | {"full": "matrices + scores + logits"}),  # logits are not repeated
        FLOPS.format(**F | {"selective": "scores // 2"}),  # one of the two products
        FLOPS.format(**F | {"check": "", "added": "more.get(recompute, 0)"}),  # takes any word
    ],
    "t3_cache": [
        CACHE.format(**C | {"two": "1"}),  # keys without values
        CACHE.format(**C | {"rows": "max(0, room - n) // row"}),  # weights of one byte
        CACHE.format(**C | {"rows": "(room - n * itemsize) // row"}),  # fewer than no rows
        CACHE.format(**C | {"divides": "True"}),  # heads that do not divide
        CACHE.format(**C | {"order": "range(1, heads + 1)"}),  # the fewest heads, not the most
        CACHE.format(**C | {"nothing": "1"}),  # always an answer
        CACHE.format(**C | {"enough": ">"}),
    ],
    "t4_bend": [
        BEND.format(**B | {"cache": "0"}),  # every bend exists
        BEND.format(**B | {"moving": "(weight_bytes + row_bytes)"}),  # one cache for all rows
        BEND.format(**B | {"time": "(compute + moving)"}),  # one after the other
        BEND.format(**B | {"never": ""}),  # a negative gain
        BEND.format(**B | {"least": "0"}).replace("math.ceil", "math.floor"),
        SEARCH,
    ],
    "t5_saved": [
        SAVED.format(**S | {"key": "len(found)"}),  # each tensor, also twice
        SAVED.format(**S | {"size": "t.numel() * t.element_size()"}),  # views instead of storages
        SAVED.format(**S | {"mine": "True"}),  # parameters too
        SAVED.format(**S | {"own": "{p.data_ptr() for p in model.parameters()}"}),  # not buffers
        SAVED.format(**S | {"size": "4 * t.numel()"}),
        SAVED.format(**S | {"mine": "storage.data_ptr() not in own | {x.data_ptr()}"}),
    ],
    "t6_audit": [
        AUDIT.format(**A | {"active": 'run["parameters"]'}),  # every expert for every token
        AUDIT.format(**A | {"factor": "2"}),  # the forward pass only
        AUDIT.format(**A | {"day": "3_600"}),
        AUDIT.format(**A | {"answer": '[run["name"] for run in runs if utilization(run) > 0.3]'}),
        AUDIT.format(**A | {"answer": "[run for run in runs if utilization(run) >= 1]"}),
    ],
}
