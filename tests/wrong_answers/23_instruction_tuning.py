"""Planted wrong answers for chapter 23's assignment: each must lose points in its task."""

RENDER = """
def render(messages, reply=False):
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if {unordered}:
        raise ValueError(f"the roles {{roles}} are out of order")
    if {alone}:
        raise ValueError("reply to whom?")
    marks, ids = {{"system": SYSTEM, "user": USER, "assistant": ASSISTANT}}, []
    for role, content in messages:
        ids += [marks[role], *tokenizer.{encode}]
        if {ends}:
            ids.append(END)
    return ids + [ASSISTANT] * reply
"""
CHAT = {
    "unordered": "not turns or any(r != ('user', 'assistant')[i % 2] for i, r in enumerate(turns))",
    "alone": "reply and turns[-1] != 'user'",
    "encode": "encode_ordinary(content)",
    "ends": "role == 'assistant'",
}
AS_STRING = """
def render(messages, reply=False):
    roles = [role for role, _ in messages if role != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(roles)
    text = ""
    for role, content in messages:
        text += f"<|{role}|>{content}" + "<|endoftext|>" * (role == "assistant")
    return tokenizer.encode(text + "<|assistant|>" * reply, allowed_special="all")
"""

MASK = """
def training_row(ids):
    speaking, learned = False, []
    for token in ids:
        marker = token in (USER, ASSISTANT, SYSTEM)
        learned.append({learns})
        if marker:
            speaking = token == ASSISTANT
        {stops}
    if not any(learned{shift}):
        raise ValueError("nothing to learn")
    return ids[:-1], ids[1:], learned{shift}


def mean_loss(logits, targets, mask, per="token"):
    if not mask.any():
        raise ValueError("no target counts")
    {clean}
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view(targets.shape) * mask
    sums, counts = losses.sum(-1), mask.sum(-1)
    if per == "token":
        return {token}
    {some}
    return (sums[some] / counts[some].clamp(min=1)).mean()
"""
LOSS = {
    "learns": "speaking and not marker",
    "stops": "if token == END: speaking = False",
    "shift": "[1:]",
    "clean": "targets = targets.masked_fill(~mask, 0)",
    "token": "sums.sum() / counts.sum()",
    "some": "some = counts > 0",
}

CAP = """
def times_seen(sizes, cap, budget):
    total = sum(min(size, cap) for size in sizes.values())
    return {{name: {seen} for name, size in sizes.items()}}


def smallest_cap(sizes, budget, most):
    ordered, below = sorted(sizes.values()), 0.0
    {refuse}
    for j, size in enumerate(ordered):
        if below + (len(ordered) - j) * size >= budget / most:
            return {found}
        below += size
    return float(ordered[-1])
"""
MIX = {
    "seen": "budget * min(size, cap) / total / size",
    "refuse": "if sum(ordered) * most < budget: raise ValueError('no cap helps')",
    "found": "max((budget / most - below) / (len(ordered) - j), float(ordered[0]))",
}

PACK = """
def pack(lengths, capacity):
    if lengths and max(lengths) > capacity:
        raise ValueError({says})
    rows, room = [], []
    for i in {order}:
        row = {where}
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def lay_out(conversations, groups, fill):
    width = max(sum(len(conversations[i]) for i in group) for group in groups)

    def filled(parts, empty):
        rows = [[x for i in group for x in parts[i]] for group in groups]
        return torch.tensor([row + [empty] * (width - len(row)) for row in rows])

    documents = [[i] * len(one) for i, one in enumerate(conversations)]
    positions = [list(range(len(one))) for one in conversations]
    tokens, owners = filled(conversations, fill), filled(documents, {nobody})
    return tokens, owners, {positions}


def sight(documents):
    same = documents[:, :, None] == documents[:, None, :]
    return {mask}
"""
ROWS = {
    "says": "f'{max(lengths) - capacity} too many'",
    "order": "sorted(range(len(lengths)), key=lambda i: -lengths[i])",
    "where": "next((r for r, left in enumerate(room) if lengths[i] <= left), len(rows))",
    "nobody": "-1",
    "positions": "filled(positions, 0)",
    "mask": "same.tril()[:, None]",
}

EVALUATE = """
def hold_out(examples, families, share):
    found, known = {{"train": [], "inputs": [], "families": []}}, set()
    for held in (True, False):
        for {number}example in {pool}:
            question = key(example)
            if (example[0] in families) != held or {skip}:
                continue
            known.add(question)
            side = "families" if held else "inputs" if {draw} < share else "train"
            found[side].append(example)
    return found


def judge(results):
    by_family = {{}}
    for family, right in results:
        by_family.setdefault(family, []).append(right)
    shares = [sum(rights) / len(rights) for rights in by_family.values()]
    spread = sum(p * (1 - p) / len(n) for p, n in zip(shares, by_family.values()))
    micro = sum(right for _, right in results) / len(results)
    return micro, {macro}, math.sqrt(spread) / {families}


def compare(ours, theirs):
    n = len(ours)
    if n != len(theirs) or n < 2:
        raise ValueError("two lists of the same length, at least 2")
    differences = [int(a) - int(b) for a, b in zip(ours, theirs)]
    mean = sum(differences) / n
    return mean, {error}
"""
HELD = {
    "number": "",
    "pool": "examples",
    "skip": "question in known",
    "draw": "checksum(question)",
    "macro": "sum(shares) / len(shares)",
    "families": "len(shares)",
    "error": "math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)",
}
UNPAIRED = "math.sqrt(sum(p * (1 - p) for p in (sum(ours) / n, sum(theirs) / n)) / (n - 1))"


def variants(template, right, *changes):
    """The template filled with the right parts, but for the changed ones, once for each change."""
    return [template.format(**(right | change)) for change in changes]


WRONG = {
    "t1_render": [
        AS_STRING,  # a user who types a marker takes the word, and a system message may come late
        *variants(
            *(RENDER, CHAT),
            {"encode": "encode(content, allowed_special='all')"},
            {"ends": "True"},  # every message ends with the marker
            {"ends": "role == 'assistant' and (role, content) == messages[-1]"},  # only the last
            {"unordered": "not turns or turns[0] != 'user'"},
            {"unordered": "any(r != ('user', 'assistant')[i % 2] for i, r in enumerate(turns))"},
            {"alone": "False"},
        ),
    ],
    "t2_mask": variants(
        *(MASK, LOSS),
        {"shift": "[:-1]"},  # the mask of the inputs, not that of the targets
        {"learns": "speaking or token == ASSISTANT"},
        {"learns": "speaking and token != END and not marker"},  # never learns to stop
        {"stops": ""},  # goes on behind the end marker
        {"clean": ""},  # looks up targets that do not count
        {"token": "losses.mean()"},  # divides by all places
        {"token": "sums.sum() / (targets != 0).sum()"},
        {"some": "some = counts >= 0"},  # empty rows count as 0
        {"some": "return sums.sum() / counts.sum()"},  # both means are the same one
    ),
    "t3_cap": variants(
        *(CAP, MIX),
        {"seen": "budget * min(size, cap) / total"},  # draws, not times seen
        {"seen": "budget / total"},  # as if all were below the cap
        {"seen": "budget * size / sum(sizes.values()) / size"},  # without the cap
        {"refuse": ""},
        {"found": "float(size)"},  # one of the sizes
        {"found": "(budget / most - below) / (len(ordered) - j)"},  # below the smallest task
        {"found": "max((budget / most - below) / len(ordered), float(ordered[0]))"},
    ),
    "t4_packing": variants(
        *(PACK, ROWS),
        {"mask": "same[:, None]"},  # sees what comes later
        {"mask": "torch.ones_like(same).tril()[:, None]"},  # sees the neighbors
        {"mask": "same.triu()[:, None]"},  # queries and keys exchanged
        {"positions": "torch.arange(width).repeat(len(groups), 1)"},  # positions run on
        {"nobody": "0"},  # filling belongs to the first conversation
        {"order": "range(len(lengths))", "where": "len(rows) - (room[-1:] >= [lengths[i]])"},
        {"where": "len(rows)"},  # a row each
        {"where": "next((r for r, left in enumerate(room) if lengths[i] < left), len(rows))"},
        {"says": "'too long'"},
    ),
    "t5_evaluation": variants(
        *(EVALUATE, HELD),
        {"skip": "False"},  # questions twice, and in training what is held out
        {"pool": "examples if held else reversed(examples)"},  # the last one stays
        {"skip": "question in [key(x) for x in found['train'] + found['inputs']]"},  # leaks
        {"draw": "random.Random(0).random()"},  # all on one side
        {"draw": "checksum(repr(example))"},  # by more than the question
        {"number": "number, ", "pool": "enumerate(examples)", "draw": "number / len(examples)"},
        {"macro": "micro"},
        {"families": "len(shares) ** 0.5"},
        {"error": UNPAIRED},  # as if each model had been asked other examples
        {"error": "math.sqrt(sum((d - mean) ** 2 for d in differences) / n / n)"},
    ),
}
