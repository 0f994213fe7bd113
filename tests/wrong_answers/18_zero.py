"""Planted wrong answers for chapter 18's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


PARTITION = """
def flatten(tensors, n):
    row = torch.cat([x.reshape(-1) for x in tensors])
    return F.pad(row, (0, -len(row) % n))


def unflatten(row, tensors):
    sizes = [x.numel() for x in tensors]
    parts = row[: sum(sizes)].split(sizes)
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def pieces(sizes, n):
    k, found = -(-sum(sizes) // n), []
    for rank in range(n):
        first, mine = 0, []
        for i, size in enumerate(sizes):
            start, stop = max(rank * k, first), min((rank + 1) * k, first + size)
            if start < stop:
                mine.append((i, start - first, stop - first))
            first += size
        found.append(mine)
    return found
"""

BILL = """
Sizes = tuple[float, float, float]


def held(x, n, stage, sizes):
    return x * sum(b / (n if i >= 3 - stage else 1) for i, b in enumerate(sizes))


def largest(capacity, n, stage, sizes):
    return int(capacity / sum(b / (n if i >= 3 - stage else 1) for i, b in enumerate(sizes)))


def sent(x, n, stage, passes, weight, gradient):
    gradients = (2, 1, passes, passes)[stage]
    weights = (0, 1, 1, 2 * passes)[stage]
    return (n - 1) / n * x * (gradients * gradient + weights * weight)
"""

ZERO1 = """
class Zero1:
    def __init__(self, parameters, optimizer_cls, group, dtype=None, **options):
        self.group, self.bucket = group, Bucket(list(parameters), group, dtype)
        self.optimizer = optimizer_cls([self.bucket.part], **options)

    @torch.no_grad()
    def step(self):
        bucket = self.bucket
        mine = reduce_scatter(bucket.gradients(), self.group) / self.group.size
        bucket.part.grad = mine.to(bucket.part.dtype)
        self.optimizer.step()
        part = bucket.part.detach().to(bucket.row.dtype)
        bucket.row.copy_(all_gather(part, self.group))
"""

SHARDS = """
class GradientShards:
    def __init__(self, parameters, group):
        self.parameters, self.group = list(parameters), group
        lengths = [-(-p.numel() // group.size) for p in self.parameters]
        self.parts = [p.new_zeros(k) for p, k in zip(self.parameters, lengths, strict=True)]
        self._start_over()
        for i, p in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(lambda p, i=i: self._arrived(i))

    def _start_over(self):
        self.waiting, self.here = list(reversed(range(len(self.parameters)))), set()

    def _arrived(self, i):
        self.here.add(i)
        while self.waiting and self.waiting[0] in self.here:
            self._send(self.waiting.pop(0))

    @torch.no_grad()
    def _send(self, i):
        p = self.parameters[i]
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
        row = F.pad(grad.reshape(-1), (0, -p.numel() % self.group.size))
        self.parts[i] += reduce_scatter(row, self.group) / self.group.size

    def finish(self):
        while self.waiting:
            self._send(self.waiting.pop(0))
        self._start_over()
"""

SHARDED = """
class Sharded(nn.Module):
    def __init__(self, linear, group):
        super().__init__()
        self.group = group
        weight = linear.weight.detach()
        self.rows = nn.Parameter(weight.chunk(group.size)[group.index].clone())
        self.kept = [nn.Parameter(torch.empty_like(weight))]
        self.whole.untyped_storage().resize_(0)
        self.whole.register_post_accumulate_grad_hook(self._reduce)

    @property
    def whole(self):
        return self.kept[0]

    def gather(self):
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        with torch.no_grad():
            self.whole.data.copy_(all_gather(self.rows.detach(), self.group))

    def free(self):
        self.whole.untyped_storage().resize_(0)

    @torch.no_grad()
    def _reduce(self, whole):
        mine, whole.grad = reduce_scatter(whole.grad, self.group), None
        self.rows.grad = mine if self.rows.grad is None else self.rows.grad + mine
        self.free()

    def forward(self, x):
        self.gather()
        y = F.linear(x, self.whole)
        self.free()
        if y.requires_grad:
            y.register_hook(lambda grad: self.gather())
        return y
"""

REPAIR = """
def repaired_step(bucket, optimizer, max_norm, group):
    with torch.no_grad():
        mean = reduce_scatter(bucket.gradients(), group).float() / group.size
        norm = all_reduce(mean.square().sum()[None], group)[0].sqrt()
        bucket.part.grad = mean * (max_norm / norm).clamp(max=1.0)
        optimizer.step()
        bucket.row.copy_(all_gather(bucket.part.detach().to(bucket.row.dtype), group))
    return norm
"""
NORM = "norm = all_reduce(mean.square().sum()[None], group)[0].sqrt()"

WRONG = {
    "t1_partition": [
        # padding in front
        changed(PARTITION, "(0, -len(row) % n)", "(-len(row) % n, 0)"),
        # one number of padding too many where none is needed: a whole part of zeros
        changed(PARTITION, "-len(row) % n", "n - len(row) % n"),
        # copies instead of views
        changed(PARTITION, "part.view(x.shape)", "part.clone().view(x.shape)"),
        # places in the row instead of in the tensor
        changed(PARTITION, "(i, start - first, stop - first)", "(i, start, stop)"),
        # parts rounded down
        changed(PARTITION, "k, found = -(-sum(sizes) // n), []", "k, found = sum(sizes) // n, []"),
    ],
    "t2_bill": [
        # stages cut from the left: weights first
        changed(BILL, "i >= 3 - stage", "i < stage"),
        # the naive ZeRO-1
        changed(BILL, "(2, 1, passes, passes)", "(2, 2, passes, passes)"),
        # accumulation costs nothing in stage 2
        changed(BILL, "(2, 1, passes, passes)", "(2, 1, 1, passes)"),
        # one gather a pass
        changed(BILL, "2 * passes", "passes"),
        # one format for everything
        changed(BILL, "weights * weight", "weights * gradient"),
    ],
    "t3_zero1": [
        # the sum instead of the mean
        changed(ZERO1, " / self.group.size", ""),
        # everybody gets all gradients first: 3X
        changed(
            ZERO1,
            "reduce_scatter(bucket.gradients(), self.group) / self.group.size",
            "all_reduce(bucket.gradients(), self.group)[bucket.mine] / self.group.size",
        ),
        # float32 masters travel
        changed(ZERO1, "bucket.part.detach().to(bucket.row.dtype)", "bucket.part.detach()"),
    ],
    "t4_shards": [
        # nothing leaves before the end
        changed(SHARDS, "while self.waiting and self.waiting[0] in self.here:", "while False:"),
        # passes overwrite each other
        changed(SHARDS, "self.parts[i] += reduce", "self.parts[i] = reduce"),
        # sent in the order of arrival: ranks wait for different messages
        changed(
            SHARDS,
            "while self.waiting and self.waiting[0] in self.here:\n            self._send(self.waiting.pop(0))",
            "self.waiting.remove(i)\n        self._send(i)",
        ),
    ],
    "t5_sharded": [
        # gradients overwrite each other over passes
        changed(SHARDED, "mine if self.rows.grad is None else self.rows.grad + mine", "mine"),
        # the whole weight stays between forward and backward
        changed(
            SHARDED,
            "        self.free()\n        if y.requires_grad:",
            "        if y.requires_grad:",
        ),
        # its own part of its own gradient, never summed
        changed(
            SHARDED,
            "reduce_scatter(whole.grad, self.group)",
            "whole.grad.chunk(self.group.size)[self.group.index].clone()",
        ),
    ],
    "t6_repair": [
        # only the masters are mended
        changed(REPAIR, NORM, "norm = mean.square().sum().sqrt()"),
        # only the norm is
        changed(
            REPAIR,
            "        optimizer.step()",
            "        bucket.part.copy_(bucket.row[bucket.mine])\n        optimizer.step()",
        ),
    ],
}
