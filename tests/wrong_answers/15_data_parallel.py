"""Planted wrong answers for chapter 15's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


COLLECTIVES = """
def after(op, x, root=0):
    n = len(x)
    if op == "broadcast":
        return [x[root].clone() for _ in x]
    if op == "scatter":
        return list(x[root].chunk(n))
    if op in ("gather", "all_gather"):
        joined = torch.cat(x)
        return [joined if op == "all_gather" or r == root else 0 * joined for r in range(n)]
    if op == "all_to_all":
        return [torch.cat([y.chunk(n)[r] for y in x]) for r in range(n)]
    if op == "reduce_scatter":
        return list(sum(x).chunk(n))
    if op in ("reduce", "all_reduce"):
        return [sum(x) if op == "all_reduce" or r == root else 0 * x[r] for r in range(n)]
    raise ValueError(f"op={op!r} is no collective")
"""

RING = """
def ring_all_reduce(x, group):
    n, i = group.size, group.index
    y = x.clone().reshape(-1)
    chunks = cut(y, n)
    for step in range(2 * (n - 1)):
        out, into = chunks[(i - step - 1) % n], chunks[(i - step - 2) % n]
        box = torch.empty_like(into)
        group.exchange(out, (i + 1) % n, box, (i - 1) % n)
        if step < n - 1:
            into += box
        else:
            into.copy_(box)
    return y.view_as(x)
"""
EVERYTHING_TO_EVERYONE = """
def ring_all_reduce(x, group):
    n, i = group.size, group.index
    total, travels = x.clone(), x.clone()
    for _ in range(n - 1):
        box = torch.empty_like(travels)
        group.exchange(travels, (i + 1) % n, box, (i - 1) % n)
        total, travels = total + box, box
    return total
"""

BUCKETS = """
def fill_buckets(sizes, limit):
    buckets, used = [], 0
    for i in reversed(range(len(sizes))):
        if not buckets or used + sizes[i] > limit:
            buckets.append([])
            used = 0
        buckets[-1].append(i)
        used += sizes[i]
    return buckets


def last_through(buckets, sizes, ready, n, latency, bandwidth):
    free = 0.0
    for bucket in buckets:
        size = sum(sizes[i] for i in bucket)
        start = max(free, max(ready[i] for i in bucket))
        free = start + 2 * (n - 1) * (latency + size / n / bandwidth)
    return free
"""

HOOKS = """
class Averaged(nn.Module):
    def __init__(self, module, group):
        super().__init__()
        self.module, self.group, self.quiet = module, group, False
        self.messages = []
        for p in module.parameters():
            with torch.no_grad():
                p.copy_(C.broadcast(p, group))
            p.register_post_accumulate_grad_hook(self.send)

    def forward(self, *args):
        return self.module(*args)

    def send(self, p):
        if not self.quiet:
            message = self.group.later(lambda: C.all_reduce(p.grad, self.group))
            self.messages.append((p, message))

    def finish(self):
        for p, message in self.messages:
            p.grad = message.result() / self.group.size
        self.messages = []
"""
AT_THE_END = changed(
    HOOKS,
    "message = self.group.later(lambda: C.all_reduce(p.grad, self.group))",
    "message = None",
    "p.grad = message.result() / self.group.size",
    "p.grad = C.all_reduce(p.grad, self.group) / self.group.size",
)
WAITING = changed(
    HOOKS,
    "self.messages.append((p, message))",
    "self.messages.append((p, message))\n            message.result()",
)

TOKENS = """
def set_gradients(model, micro_batches, group):
    model.zero_grad()
    parameters, count = list(model.parameters()), 0
    for x, y in micro_batches:
        F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum").backward()
        count += int((y != -100).sum())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    own = torch.cat([*(g.flatten() for g in grads), grads[0].new_tensor([count])])
    *parts, total = C.all_reduce(own, group).split([*(p.numel() for p in parameters), 1])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p) / total
"""
MEAN_OF_MEANS = changed(
    TOKENS,
    "    own = ",
    "    grads = [g / max(count, 1) for g in grads]\n    own = ",
    "/ total",
    "/ group.size",
)
ONE_MESSAGE_EACH = """
def set_gradients(model, micro_batches, group):
    model.zero_grad()
    most = max(C.all_gather(torch.tensor([len(micro_batches)]), group).tolist())
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    count = torch.zeros(1)
    for i in range(most):
        model.zero_grad()
        if i < len(micro_batches):
            x, y = micro_batches[i]
            F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum").backward()
            count += (y != -100).sum()
        for t, p in zip(total, parameters, strict=True):
            t += C.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad, group)
    count = C.all_reduce(count, group)
    for t, p in zip(total, parameters, strict=True):
        p.grad = t / count
"""

DEADLOCK = """
def means(batches, names, group):
    own = torch.zeros(len(names), 2, dtype=torch.float64)
    for i, name in enumerate(sorted(names)):
        for batch in batches:
            own[i, 0] += batch[name].double().sum()
            own[i, 1] += batch[name].numel()
    total = C.all_reduce(own, group)
    return {name: float(s / n) for name, (s, n) in zip(sorted(names), total, strict=True)}
"""
BATCH_BY_BATCH = """
def means(batches, names, group):
    total = torch.zeros(len(names), 2, dtype=torch.float64)
    for batch in batches:
        own = [[batch[name].double().sum(), batch[name].numel()] for name in sorted(names)]
        total += C.all_reduce(torch.tensor(own, dtype=torch.float64), group)
    return {name: float(s / n) for name, (s, n) in zip(sorted(names), total, strict=True)}
"""
MEANS_OF_MEANS = """
def means(batches, names, group):
    own = [[float(torch.cat([b[name] for b in batches]).double().mean()) if batches else 0.0]
           for name in sorted(names)]
    total = C.all_reduce(torch.tensor(own, dtype=torch.float64), group) / group.size
    return {name: float(mean) for name, mean in zip(sorted(names), total, strict=True)}
"""

WRONG = {
    "t1_collectives": [
        changed(COLLECTIVES, "[torch.cat([y.chunk(n)[r] for y in x]) for r in range(n)]", "x"),
        changed(COLLECTIVES, "return list(sum(x).chunk(n))", "return [sum(x) for _ in x]"),
        changed(COLLECTIVES, "else 0 * x[r]", "else x[r]"),
        changed(COLLECTIVES, "else 0 * joined", "else joined"),
        changed(COLLECTIVES, "list(x[root].chunk(n))", "list(x[0].chunk(n))"),
        changed(COLLECTIVES, "list(x[root].chunk(n))", "[x[r].chunk(n)[r] for r in range(n)]"),
        changed(COLLECTIVES, 'raise ValueError(f"op={op!r} is no collective")', "return x"),
    ],
    "t2_ring": [
        EVERYTHING_TO_EVERYONE,
        changed(RING, "range(2 * (n - 1))", "range(n - 1)"),
        changed(RING, "into.copy_(box)", "into += box"),
        changed(RING, "x.clone().reshape(-1)", "x.reshape(-1)"),
        changed(RING, "cut(y, n)", "list(y.view(n, -1))"),
        "def ring_all_reduce(x, group):\n    return C.all_reduce(x, group)\n",
    ],
    "t3_buckets": [
        changed(BUCKETS, "reversed(range(len(sizes)))", "range(len(sizes))"),
        changed(BUCKETS, "sizes[i] > limit", "sizes[i] >= limit"),
        changed(BUCKETS, "            used = 0\n", ""),
        changed(BUCKETS, "max(ready[i] for i in bucket)", "min(ready[i] for i in bucket)"),
        changed(BUCKETS, "max(free, max(ready[i] for i in bucket))", "free + max(ready)"),
        changed(BUCKETS, "size / n / bandwidth", "size / bandwidth"),
        changed(BUCKETS, "2 * (n - 1) * (", "(n - 1) * ("),
        changed(BUCKETS, "2 * (n - 1) * (latency + size", "latency + (2 * (n - 1) * size"),
    ],
    "t4_hooks": [
        AT_THE_END,
        changed(HOOKS, " / self.group.size", ""),
        changed(HOOKS, "p.copy_(C.broadcast(p, group))", "pass"),
        changed(HOOKS, "if not self.quiet:", "if True:"),
        WAITING,
        changed(HOOKS, "self.messages.append((p, message))", "message.result()"),
    ],
    "t5_tokens": [
        MEAN_OF_MEANS,
        ONE_MESSAGE_EACH,
        changed(TOKENS, "int((y != -100).sum())", "len(y)"),
        changed(TOKENS, "    model.zero_grad()\n", ""),
        changed(TOKENS, "/ total", "/ count"),
        changed(TOKENS, "torch.zeros_like(p) if p.grad is None else p.grad", "p.grad"),
    ],
    "t6_deadlock": [
        MEANS_OF_MEANS,
        BATCH_BY_BATCH,
        changed(DEADLOCK, "sorted(names)", "names"),
        changed(DEADLOCK, "C.all_reduce(own, group)", "own"),
    ],
}
