"""Planted wrong answers for chapter 06's assignment: each must lose points in its task."""

ADAMW = """
def adamw_step(p, g, state, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    {none}
    if not state:
        state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
    state["step"] += 1
    (b1, b2), t = betas, state["step"]
    {before}
    m = state["m"].mul_(b1).add_(g, alpha=1 - b1) / {first}
    v = state["v"].mul_(b2).addcmul_(g, g, value=1 - b2) / {second}
    {decay}
    {update}
"""
ADAM = {
    "none": "if g is None: return",
    "before": "",
    "first": "(1 - b1**t)",
    "second": "(1 - b2**t)",
    "decay": "p.mul_(1 - lr * weight_decay)",
    "update": "p.sub_(lr * m / (v.sqrt() + eps))",
}
COUPLED = {"before": "g = g + weight_decay * p", "decay": ""}

SCHEDULE = """
def learning_rate(step, peak, warmup, total, floor=0.1):
    if {warm}:
        return peak * {rise}
    share = {share}
    return {fall}


def batch_rows(seen, start, full, over):
    return {rows}
"""
RATE = {
    "warm": "step <= warmup",
    "rise": "step / warmup",
    "share": "min(1.0, (step - warmup) / (total - warmup))",
    "fall": "peak * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)",
    "rows": "start + (full - start) * min(seen, over) // over",
}

ACCUMULATE = """
def accumulate(model, batches):
    count = sum(int(mask.sum()) for _, _, mask in batches)
    {check}
    {zero}
    whole = 0.0
    for inputs, targets, mask in batches:
        losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        loss = {loss}
        loss.backward()
        whole += loss.item()
    return whole
"""
SUM = {
    "check": "if count == 0: raise ValueError('nothing counts')",
    "zero": "model.zero_grad(set_to_none=True)",
    "loss": "losses[mask.flatten()].sum() / count",
}
TOGETHER = """
def accumulate(model, batches):
    rows = [(model(x)[m], y[m]) for x, y, m in batches]
    if not sum(len(y) for _, y in rows):
        raise ValueError("nothing counts")
    model.zero_grad()
    means = [F.cross_entropy(x, y) for x, y in rows if len(y)]
    loss = torch.stack(means).mean()
    loss.backward()
    return loss.item()
"""

SPANS = """
def corrupt(tokens, spans, sentinels):
    used = sentinels[: len(spans) + 1]
    if {refuse}:
        raise ValueError("sentinels")
    inputs, targets, done = [], [], 0
    for i, (start, end) in enumerate(spans):
        mark = {mark}
        inputs += [*tokens[done:start], mark]
        targets += [mark, *tokens[start:end]]
        done = end
    return inputs + tokens[done:], targets{last}


def join(inputs, targets, sentinels):
    marks, answers, current = set(sentinels), {{}}, None
    for token in targets:
        if token in marks:
            current = answers.setdefault(token, [])
        else:
            current.append(token)
    return [x for token in inputs for x in answers.get(token, [token])]


def random_spans(t, cut, count, generator):
    kept = t - cut
    if not 1 <= count <= min(cut, kept + 1):
        raise ValueError("does not fit")

    def parts(total, n):
        cuts = torch.randperm(total - 1, generator=generator)[: n - 1].sort().values + 1
        ends = [0, *cuts.tolist(), total]
        return [b - a for a, b in zip(ends, ends[1:], strict=False)]

    {gaps}
    spans, place = [], 0
    for gap, length in zip(gaps, parts(cut, count), strict=False):
        spans.append((place + gap, place + gap + length))
        place += gap + length
    return spans
"""
CUT = {
    "refuse": "len(used) <= len(spans) or set(used) & set(tokens)",
    "mark": "used[i]",
    "last": " + [used[-1]]",
    "gaps": "gaps = parts(kept + 2, count + 1); gaps[0] -= 1",
}
INDEPENDENT_STARTS = (
    SPANS.format(**CUT).split("def random_spans")[0]
    + """
def random_spans(t, cut, count, generator):
    if not 1 <= count <= min(cut, t - cut + 1):
        raise ValueError("does not fit")
    length = cut // count
    starts = torch.randperm(t - length, generator=generator)[:count].sort().values.tolist()
    return [(start, start + length) for start in starts]
"""
)

RESUME = """
def snapshot(run):
    return {{
        "model": {copy}(run.model.state_dict()),
        "optimizer": {copy}(run.optimizer.state_dict()),
        "data": run.data.get_state(),
        "random": torch.get_rng_state(),
        "step": run.step,
    }}


def restore(run, state):
    run.model.load_state_dict(state["model"])
    {optimizer}
    {data}
    {random}
    {step}


def write(path, state):
    {write}


def read(path):
    try:
        return torch.load(path, weights_only={safe})
    except {caught} as error:
        raise ValueError(f"{{path}} is torn") from error
"""
STATE = {
    "copy": "copy.deepcopy",
    "optimizer": "run.optimizer.load_state_dict(copy.deepcopy(state['optimizer']))",
    "data": "run.data.set_state(state['data'])",
    "random": "torch.set_rng_state(state['random'])",
    "step": "run.step = state['step']",
    "write": "torch.save(state, path.with_suffix('.new')); os.replace(path.with_suffix('.new'), path)",
    "safe": "True",
    "caught": "Exception",
}
DELETES_FIRST = (
    "torch.save(state, path.with_suffix('.new')); path.unlink(missing_ok=True); "
    "os.replace(path.with_suffix('.new'), path)"
)

WRONG = {
    "t1_adamw": [
        ADAMW.format(**ADAM | {"first": "1", "second": "1"}),
        ADAMW.format(**ADAM | COUPLED),
        ADAMW.format(**ADAM | {"update": "p.sub_(lr * m / (v + eps).sqrt())"}),
        ADAMW.format(**ADAM | {"second": "(1 - b1**t)"}),
        ADAMW.format(**ADAM | {"decay": "p.mul_(1 - weight_decay)"}),
        ADAMW.format(**ADAM | {"none": "g = torch.zeros_like(p) if g is None else g"}),
        ADAMW.format(**ADAM | {"update": "p = p - lr * m / (v.sqrt() + eps)"}),
    ],
    "t2_schedule": [
        SCHEDULE.format(**RATE | {"share": "min(1.0, step / total)"}),
        SCHEDULE.format(**RATE | {"share": "(step - warmup) / (total - warmup)"}),
        SCHEDULE.format(**RATE | {"rise": "(step - 1) / warmup"}),
        SCHEDULE.format(**RATE | {"fall": "peak * (1 + math.cos(math.pi * share)) / 2"}),
        SCHEDULE.format(**RATE | {"rows": "start + round((full - start) * min(1, seen / over))"}),
        SCHEDULE.format(**RATE | {"rows": "start + (full - start) * seen // over"}),
    ],
    "t3_accumulate": [
        ACCUMULATE.format(**SUM | {"loss": "losses[mask.flatten()].mean() / len(batches)"}),
        ACCUMULATE.format(**SUM | {"zero": ""}),
        ACCUMULATE.format(**SUM | {"loss": "losses.sum() / losses.numel() / len(batches)"}),
        ACCUMULATE.format(**SUM | {"check": ""}),
        TOGETHER,
    ],
    "t4_spans": [
        SPANS.format(**CUT | {"last": ""}),
        SPANS.format(**CUT | {"mark": "used[0]"}),
        SPANS.format(**CUT | {"refuse": "len(used) < len(spans)"}),
        SPANS.format(**CUT | {"refuse": "len(used) <= len(spans) or set(sentinels) & set(tokens)"}),
        SPANS.format(
            **CUT | {"gaps": "gaps = parts(kept + 1, count + 1) if count < kept else [0] * count"}
        ),
        INDEPENDENT_STARTS,
        SPANS.format(**CUT).replace(", generator=generator)", ")"),
    ],
    "t5_resume": [
        RESUME.format(**STATE | {"optimizer": ""}),
        RESUME.format(**STATE | {"random": ""}),
        RESUME.format(**STATE | {"data": ""}),
        RESUME.format(**STATE | {"step": ""}),
        RESUME.format(**STATE | {"copy": "dict"}),
        RESUME.format(**STATE | {"write": "torch.save(state, path)"}),
        RESUME.format(**STATE | {"write": DELETES_FIRST}),
        RESUME.format(**STATE | {"safe": "False"}),
        RESUME.format(**STATE | {"caught": "FileNotFoundError"}),
    ],
}
