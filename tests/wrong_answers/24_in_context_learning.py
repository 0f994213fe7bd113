"""Planted wrong answers for chapter 24's assignment: each must lose points in its task."""

BUILD = """
def build(demonstrations, question, labels, words, encode, limit):
    options = [{option} for label in labels]
    first = [{first} for option in options]
    if len(set(first)) < len(first):
        raise ValueError("first token")
    lines = [f"{{text}} -> {{words[label]}}" for text, label in demonstrations]
    prompt = "\\n".join([*lines, {last}])
    excess = {excess}
    if excess > 0:
        raise ValueError({message})
    return prompt, options
"""
BUILT = {
    "option": "f' {words[label]}'",
    "first": "encode(option)[0]",
    "last": "f'{question} ->'",
    "excess": "len(encode(prompt)) + max(len(encode(x)) for x in options) - limit",
    "message": "f'{excess} too many'",
}

CHOOSE = """
def nearest(question, pool, k):
    {unit}
    cosine = pool @ question
    return {nearest}


def mmr(question, pool, k, weight):
    {unit}
    cosine, between, chosen = pool @ question, pool @ pool.T, []
    for _ in range(k):
        near = {near} if chosen else 0.0
        gain = weight * cosine - (1 - weight) * near
        {taken}
        chosen.append(int(gain.argmax()))
    return {order}
"""
CHOSEN = {
    "unit": (
        "pool, question = (torch.nn.functional.normalize(x, dim=-1) for x in (pool, question))"
    ),
    "nearest": "cosine.argsort(descending=True, stable=True)[:k].tolist()[::-1]",
    "near": "between[:, chosen].max(-1).values",
    "taken": "gain[chosen] = -math.inf",
    "order": "chosen[::-1]",
}

CALIBRATE = """
def calibrated(score, demonstrations, texts, labels, blanks):
    def ask(shown, some):
        prompts = [template.prompt(shown, text) for text in some]
        return {ask}

    lifted = ask(demonstrations, texts) / {prior}
    return {normal}
"""
CALIBRATED = {
    "ask": "score(prompts, template.options(labels)).double().softmax(-1)",
    "prior": "ask(demonstrations, blanks).mean(0)",
    "normal": "lifted / lifted.sum(-1, keepdim=True)",
}

ORDER = """
def entropies(probs):
    wins = {wins}
    overall = torch.special.entr(wins.mean(1)).sum(-1)
    return overall, {local}


def best_order(score, demonstrations, probes, labels, measure):
    ways = {ways}
    shown = [[demonstrations[i] for i in way] for way in ways]
    prompts = {prompts}
    probs = {probs}
    overall, local = entropies(probs.view(len(ways), len(probes), len(labels)))
    return ways[int(({pick}).{best}())]
"""
ORDERED = {
    "wins": "torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).double()",
    "local": "torch.special.entr(probs).sum(-1).mean(-1)",
    "ways": "list(itertools.permutations(range(len(demonstrations))))",
    "prompts": "[template.prompt(some, probe) for some in shown for probe in probes]",
    "probs": "score(prompts, template.options(labels)).double().softmax(-1)",
    "pick": "overall if measure == 'global' else local",
    "best": "argmax",
}

INDUCTION = """
def induction_score(maps, tokens):
    behind = torch.zeros(*tokens.shape, tokens.shape[1], dtype=torch.bool)
    {behind}
    behind = behind.tril({below})
    asked = {asked}
    {refuse}
    weight = (maps * behind[:, None, None]).{reduce}
    return {mean}
"""
MEASURED = {
    "behind": "behind[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]",
    "below": "-1",
    "asked": "behind.any(-1)",
    "refuse": "if not asked.any(): raise ValueError('nothing comes back')",
    "reduce": "sum(-1)",
    "mean": "weight.movedim(3, 1)[asked].mean(0)",
}
LAST_ONLY = """
def induction_score(maps, tokens):
    total, queries = 0, 0
    for row, x in zip(maps, tokens.tolist()):
        for i in range(len(x)):
            places = [j + 1 for j in range(i - 1) if x[j] == x[i]]
            if places:
                total, queries = total + row[:, :, i, places[-1]], queries + 1
    if not queries:
        raise ValueError("nothing comes back")
    return total / queries
"""

WRONG = {
    "t1_build": [
        BUILD.format(**BUILT | {"last": "f'{question} -> '", "option": "words[label]"}),
        BUILD.format(**BUILT | {"option": "words[label]"}),
        BUILD.format(**BUILT | {"first": "option"}),
        BUILD.format(**BUILT | {"first": "encode(option)[-1]"}),
        BUILD.format(**BUILT | {"excess": "len(encode(prompt)) - limit"}),
        BUILD.format(**BUILT | {"excess": "0"}),
        BUILD.format(**BUILT | {"message": "'too long'"}),
        BUILD.format(**BUILT | {"excess": "len(encode(prompt)) + len(encode(options[0])) - limit"}),
        BUILD.format(**BUILT).replace("-> {words[label]}", "-> {label}"),
    ],
    "t2_choose": [
        CHOOSE.format(**CHOSEN | {"unit": "pass"}),
        CHOOSE.format(
            **CHOSEN
            | {
                "unit": "pool, question = (x / x.norm(dim=-1, keepdim=True) for x in (pool, question))"
            }
        ),
        CHOOSE.format(
            **CHOSEN | {"nearest": "cosine.argsort(descending=True, stable=True)[:k].tolist()"}
        ),
        CHOOSE.format(**CHOSEN | {"nearest": "cosine.argsort(stable=True)[-k:].tolist()"}),
        CHOOSE.format(**CHOSEN | {"near": "between[:, chosen].mean(-1)"}),
        CHOOSE.format(**CHOSEN | {"near": "between[:, chosen[-1]]"}),
        CHOOSE.format(**CHOSEN | {"taken": ""}),
        CHOOSE.format(**CHOSEN | {"order": "chosen"}),
    ],
    "t3_calibrated": [
        CALIBRATE.format(**CALIBRATED | {"prior": "1"}),
        CALIBRATE.format(
            **CALIBRATED | {"ask": "score(prompts, template.options(labels)).double().exp()"}
        ),
        CALIBRATE.format(**CALIBRATED | {"prior": "ask([], blanks).mean(0)"}),
        CALIBRATE.format(
            **CALIBRATED | {"prior": "ask(demonstrations, blanks).log().mean(0).exp()"}
        ),
        CALIBRATE.format(**CALIBRATED | {"prior": "ask(demonstrations, blanks)[0]"}),
        CALIBRATE.format(**CALIBRATED | {"normal": "lifted"}),
        CALIBRATE.format(**CALIBRATED | {"normal": "lifted.softmax(-1)"}),
        CALIBRATE.format(**CALIBRATED | {"prior": "ask(demonstrations, texts).mean(0)"}),
    ],
    "t4_order": [
        ORDER.format(**ORDERED | {"best": "argmin"}),
        ORDER.format(**ORDERED | {"wins": "probs"}),
        ORDER.format(**ORDERED | {"local": "torch.special.entr(probs.mean(1)).sum(-1)"}),
        ORDER.format(**ORDERED | {"local": "-(probs * probs.log()).sum(-1).mean(-1)"}),
        ORDER.format(**ORDERED | {"local": "torch.special.entr(probs).sum(-1).mean(-1) / 0.6931"}),
        ORDER.format(
            **ORDERED
            | {"prompts": "[template.prompt(s, probe) for probe in probes for s in shown]"}
        ),
        ORDER.format(
            **ORDERED | {"probs": "score(prompts, template.options(labels)).double().exp()"}
        ),
        ORDER.format(**ORDERED | {"pick": "local"}),
        ORDER.format(**ORDERED | {"ways": "[tuple(range(len(demonstrations)))]"}),
    ],
    "t5_induction": [
        INDUCTION.format(
            **MEASURED | {"behind": "behind = tokens[:, :, None] == tokens[:, None, :]"}
        ),
        INDUCTION.format(**MEASURED | {"below": ""}),
        INDUCTION.format(**MEASURED | {"mean": "weight.mean((0, 3))"}),
        INDUCTION.format(
            **MEASURED
            | {"mean": "torch.stack([w[..., a].mean(-1) for w, a in zip(weight, asked)]).mean(0)"}
        ),
        INDUCTION.format(**MEASURED | {"refuse": ""}),
        INDUCTION.format(**MEASURED | {"reduce": "amax(-1)"}),
        INDUCTION.format(
            **MEASURED | {"behind": "behind[:, :, :-1] = tokens[:, :, None] == tokens[:, None, 1:]"}
        ),
        LAST_ONLY,
    ],
}
