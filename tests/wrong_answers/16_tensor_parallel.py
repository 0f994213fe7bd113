"""Planted wrong answers for chapter 16's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


ENDS = """
class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return C.all_reduce(grad, ctx.group), None


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return C.all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def my_f(x, group):
    return CopyToRanks.apply(x, group)


def my_g(x, group):
    return SumOverRanks.apply(x, group)
"""
BACK, FORTH = "return C.all_reduce(grad, ctx.group), None", "return C.all_reduce(x, group)"

LINEARS = """
from minillm.parallel.slices import f, g


class ColumnLinear(nn.Module):
    def __init__(self, full, group):
        super().__init__()
        n, i = group.size, group.index
        self.weight = nn.Parameter(share(full.weight.detach(), 0, n, i).clone())
        self.bias = None
        if full.bias is not None:
            self.bias = nn.Parameter(share(full.bias.detach(), 0, n, i).clone())

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    def __init__(self, full, group):
        super().__init__()
        self.group = group
        part = share(full.weight.detach(), 1, group.size, group.index)
        self.weight = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
        self.bias = None if full.bias is None else nn.Parameter(full.bias.detach().clone())

    def forward(self, x):
        y = g(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


def gated_mlp(x, up, gate, down, group):
    x = f(x, group)
    return down(F.silu(gate(x)) * up(x))
"""
SUMMED = "y = g(F.linear(x, self.weight), self.group)"

VOCABULARY = """
from minillm.parallel.slices import f, g


def embed(tokens, table, start, group):
    here = (tokens >= start) & (tokens < start + len(table))
    rows = F.embedding((tokens - start).where(here, 0), table)
    return g(rows.masked_fill(~here[..., None], 0.0), group)


def cross_entropy(logits, targets, start, group):
    largest = C.all_gather(logits.detach().amax(-1)[None], group).amax(0)
    logits = logits - largest[..., None]
    here = (targets >= start) & (targets < start + logits.shape[-1])
    index = (targets - start).where(here, 0)
    own = logits.gather(-1, index[..., None])[..., 0].masked_fill(~here, 0.0)
    return g(logits.exp().sum(-1), group).log() - g(own, group)
"""
LARGEST = "C.all_gather(logits.detach().amax(-1)[None], group).amax(0)"
LOSS = "g(logits.exp().sum(-1), group).log() - g(own, group)"
# Right, but every logit travels: joined, then the loss of one process, counted once.
ALL_LOGITS = """
from minillm.parallel.slices import f, g


def embed(tokens, table, start, group):
    here = (tokens >= start) & (tokens < start + len(table))
    rows = F.embedding((tokens - start).where(here, 0), table)
    return g(rows.masked_fill(~here[..., None], 0.0), group)


def cross_entropy(logits, targets, start, group):
    ends = C.all_gather(torch.tensor([start + logits.shape[-1]]), group)
    full = torch.zeros(*logits.shape[:-1], int(ends.max()), dtype=logits.dtype)
    full = g(torch.cat([full[..., :start], logits, full[..., start + logits.shape[-1] :]], -1), group)
    return full.logsumexp(-1) - full.gather(-1, targets[..., None])[..., 0]
"""

HEADS = """
def head_slices(h, kv, d_head, n, rank):
    if h % n or (kv % n and n % kv):
        raise ValueError(f"{h} query and {kv} key/value heads cannot be divided among {n} ranks")
    first = rank * h // n
    last = first + h // n - 1
    own = slice(first * d_head, (last + 1) * d_head)
    read = slice(first // (h // kv) * d_head, (last // (h // kv) + 1) * d_head)
    return {"q": own, "k": read, "v": read, "out": own}
"""
READ = "read = slice(first // (h // kv) * d_head, (last // (h // kv) + 1) * d_head)"

MASKS = """
def masks(inside, outside, p, seed, step, group):
    found = []
    for shape, who in ((inside, 1 + group.index), (outside, 0)):
        rng = torch.Generator().manual_seed((seed * 1000 + step) * 1001 + who)
        found.append(torch.rand(shape, generator=rng) >= p)
    return tuple(found)
"""
ONE_ROW = """

def one_row_for_all(shape, rng):
    return torch.rand((*shape[:-1], 1), generator=rng).expand(shape)
"""
NUMBER = "(seed * 1000 + step) * 1001 + who"
AS_SHOWN = """
def masks(inside, outside, p, seed, step, group):
    torch.manual_seed(seed + step + group.index)
    return torch.rand(inside) >= p, torch.rand(outside) >= p
"""
# One generator, kept between calls: a recomputed layer meets other numbers.
STATEFUL = """
generators = {}


def masks(inside, outside, p, seed, step, group):
    found = []
    for shape, who in ((inside, 1 + group.index), (outside, 0)):
        if who not in generators:
            generators[who] = torch.Generator().manual_seed(seed * 1001 + who)
        found.append(torch.rand(shape, generator=generators[who]) >= p)
    return tuple(found)
"""

SUMMA = """
def summa(a, b, row, column):
    c = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for step in range(row.size):
        c += C.broadcast(a, row, step) @ C.broadcast(b, column, step)
    return c


def summa_transposed(a, b, row, column):
    for step in range(row.size):
        total = C.reduce(a @ C.broadcast(b, column, step).T, row, step)
        if row.index == step:
            c = total
    return c
"""
STEP = "c += C.broadcast(a, row, step) @ C.broadcast(b, column, step)"
# Who has the block does not call: the others wait for it until they are stopped.
ROOT_STAYS_AWAY = changed(
    SUMMA, "C.broadcast(a, row, step)", "(a if row.index == step else C.broadcast(a, row, step))"
)
# The right blocks, all at once: as many bytes, but a rank holds whole rows of A and columns of B.
GATHERED = changed(
    SUMMA,
    "    c = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)\n",
    """\
    a_blocks, b_blocks = C.all_gather(a[None], row), C.all_gather(b[None], column)
    return sum(x @ y for x, y in zip(a_blocks, b_blocks, strict=True))
""",
)

WRONG = {
    "t1_f_and_g": [
        changed(ENDS, "return grad, None", BACK),
        changed(
            ENDS, "CopyToRanks.apply", "Swapped.apply", "SumOverRanks.apply", "CopyToRanks.apply"
        ).replace("Swapped", "SumOverRanks"),
        changed(ENDS, BACK, "return grad, None"),
        changed(ENDS, FORTH, "return C.all_reduce(x, group) / group.size"),
        changed(ENDS, "return x.view_as(x)", "return C.all_reduce(x, group) / group.size"),
        changed(ENDS, "return grad, None", "return grad / ctx.group.size, None"),
    ],
    "t2_linears": [
        changed(LINEARS, SUMMED, "y = F.linear(x, self.weight)"),
        changed(LINEARS, SUMMED, "return g(F.linear(x, self.weight, self.bias), self.group)"),
        changed(LINEARS, "    x = f(x, group)\n", ""),
        changed(LINEARS, "x = f(x, group)", "y = f(x, group)", "* up(x)", "* up(y)"),
        changed(
            LINEARS,
            "    x = f(x, group)\n",
            "",
            "gate(x)) * up(x)",
            "gate(f(x, group))) * up(f(x, group))",
        ),
        changed(LINEARS, "y = g(", "y = C.all_reduce("),
        changed(LINEARS, "part.clone(memory_format=torch.contiguous_format)", "part"),
        changed(LINEARS, "share(full.weight.detach(), 0, n, i)", "full.weight.detach()[i::n]"),
        changed(LINEARS, "nn.Parameter(full.bias.detach().clone())", "full.bias.detach().clone()"),
    ],
    "t3_vocabulary": [
        changed(VOCABULARY, LARGEST, "logits.detach().amax(-1)"),
        changed(VOCABULARY, LARGEST, "torch.zeros_like(logits[..., 0])"),
        changed(VOCABULARY, LOSS, LOSS.replace("g(logits", "C.all_reduce(logits")),
        changed(VOCABULARY, LOSS, LOSS.replace("g(own, group)", "own")),
        changed(VOCABULARY, "[..., 0].masked_fill(~here, 0.0)", "[..., 0]"),
        changed(VOCABULARY, "rows.masked_fill(~here[..., None], 0.0)", "rows"),
        changed(VOCABULARY, "return g(rows.", "return C.all_reduce(rows."),
        changed(VOCABULARY, "tokens < start + len(table)", "tokens <= start + len(table)"),
        changed(
            VOCABULARY, "g(logits.exp().sum(-1), group).log()", "g(logits.logsumexp(-1), group)"
        ),
        ALL_LOGITS,
    ],
    "t4_heads": [
        changed(
            HEADS, READ, "read = slice(rank * kv // n * d_head, (rank + 1) * kv // n * d_head)"
        ),
        changed(HEADS, READ, "read = slice(rank % kv * d_head, (rank % kv + 1) * d_head)"),
        changed(HEADS, READ, "read = own"),
        changed(HEADS, READ, "read = slice(0, kv * d_head)"),
        changed(HEADS, '"out": own', '"out": read'),
        changed(HEADS, "h % n or (kv % n and n % kv)", "h % n"),
        changed(HEADS, "(last + 1) * d_head)\n", "last * d_head)\n"),
    ],
    "t5_masks": [
        AS_SHOWN,
        changed(MASKS, NUMBER, "seed + step + 10_000_000 * who"),
        changed(MASKS, NUMBER, "seed * 10_000 + step + who"),
        changed(MASKS, "1 + group.index", "group.index"),
        changed(MASKS, NUMBER, "seed * 10_000 + who"),
        changed(MASKS, NUMBER, "(seed << 32) + (step << 16) + who"),  # 32 bits are looked at
        changed(MASKS, ">= p", "< p"),
        changed(MASKS, "torch.rand(shape, generator=rng) >= p", "one_row_for_all(shape, rng) >= p")
        + ONE_ROW,
        changed(MASKS, "(outside, 0)", "(outside, 5000 + group.index)"),
        changed(
            MASKS,
            "rng = torch.Generator().manual_seed(",
            "torch.manual_seed(",
            ", generator=rng",
            "",
        ),
        STATEFUL,
    ],
    "t6_summa": [
        changed(SUMMA, "C.broadcast(a, row, step)", "C.broadcast(a, row, column.index)"),
        changed(SUMMA, STEP, "c += C.broadcast(a, column, step) @ C.broadcast(b, row, step)"),
        changed(SUMMA, "c += ", "c = "),
        changed(SUMMA, STEP, "c += a @ C.broadcast(b, column, step)"),
        changed(
            SUMMA,
            "C.reduce(a @ C.broadcast(b, column, step).T, row, step)",
            "a @ C.broadcast(b, column, step).T",
        ),
        changed(
            SUMMA,
            "C.reduce(a @ C.broadcast(b, column, step).T, row, step)",
            "C.all_reduce(a @ C.broadcast(b, column, step).T, row)",
        ),
        changed(SUMMA, "if row.index == step", "if column.index == step"),
        GATHERED,
        ROOT_STAYS_AWAY,
    ],
}
