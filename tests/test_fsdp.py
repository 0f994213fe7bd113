"""ZeRO-3 on real ranks against one process and PyTorch's FSDP2: weights, memory, traffic."""

import gc
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.accounting.memory import zero as formula
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel.collectives import all_gather, reduce_scatter
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Link, Tracer, world
from minillm.parallel.partition import held, storage_bytes
from minillm.parallel.units import Part, Unit
from minillm.recompute import recompute
from minillm.train.optim import AdamW, clip_grad_norm, decay_groups

pytestmark = pytest.mark.slow  # many ranks, many times

CFG = ModelConfig(29, 16, 3, 2, max_len=12, position="rope", norm="rms", mlp="swiglu")
CONFIGS = {"tied": replace(CFG, tie_embeddings=True), "untied": replace(CFG, tie_embeddings=False)}
EVEN = replace(CFG, vocab_size=32)  # all first axes are multiples of 4
STEPS, CLIP = 3, 0.5
FIRST, SECOND = slice(0, 2), slice(2, 4)  # rows of a rank's two passes


def model(name="tied", seed=0):
    lm = LM(CONFIGS[name], seed).double()
    lm.blocks[0].attn.q.weight.requires_grad_(False)
    return lm


def batch(rows, seed=0):
    """Tokens and targets [rows, 7]."""
    return torch.randint(29, (2, rows, 7), generator=torch.Generator().manual_seed(seed))


def mean_loss(lm, tokens, targets):
    return F.cross_entropy(lm(tokens).flatten(0, 1), targets.flatten())


def same(found, want, rtol=1e-9, atol=1e-12):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=rtol, atol=atol)


def one_process(name, n, steps=STEPS):
    """The last gradients, before clipping, and weights after all steps on all ranks' rows."""
    lm = model(name)
    optimizer = AdamW(decay_groups(lm, 0.1), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        mean_loss(lm, *batch(4 * n, step)).backward()
        grads = {k: p.grad.clone() for k, p in lm.named_parameters() if p.requires_grad}
        clip_grad_norm(lm.parameters(), CLIP)
        optimizer.step()
    return grads, lm.state_dict()


def whole(fsdp):
    """A copy of all weights, under the names of the module."""
    with fsdp.gather_full_params() as lm:
        return {name: x.clone() for name, x in lm.state_dict().items()}


def whole_gradients(fsdp, group):
    """Rows of all ranks, one after the other, without the padding."""
    shapes = {name: x.shape for name, x in whole(fsdp).items()}
    shards = {k: p for k, p in fsdp.module.named_parameters() if p.requires_grad}
    return {k: all_gather(p.grad, group)[: shapes[k][0]] for k, p in shards.items()}


def on_ranks(name, how, steps=STEPS):
    """Each rank takes 4 rows a step in two passes; its own first weights do not count."""
    rank, n = dist.get_rank(), dist.get_world_size()
    group = world(algorithm=how.get("algorithm", "ring"))
    lm = model(name, seed=rank)
    if how.get("recompute"):
        recompute(lm, how["recompute"])
    fsdp = FSDP(lm, group, prefetch=how.get("prefetch", True))
    optimizer = AdamW(decay_groups(fsdp, 0.1), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        tokens, targets = batch(4 * n, step)[:, 4 * rank : 4 * rank + 4]
        for rows in (FIRST, SECOND):
            (mean_loss(fsdp, tokens[rows], targets[rows]) / 2).backward()
        fsdp.finish_gradient_synchronization()
        assert fsdp.gathered_bytes == 0
        if step == steps - 1:
            grads = whole_gradients(fsdp, group)
        fsdp.clip_grad_norm(CLIP)
        optimizer.step()
    return grads, whole(fsdp)


HOWS = [
    {},
    {"prefetch": False, "algorithm": "native"},
    {"recompute": "full"},
]


def all_ways(name):
    return [on_ranks(name, how) for how in HOWS]


@pytest.mark.parametrize(("n", "name"), [(2, "tied"), (3, "untied"), (4, "tied")])
def test_gradients_and_weights_are_those_of_one_process(n, name):
    grads, weights = one_process(name, n)
    for ways in launch(all_ways, name, world_size=n, timeout=200):
        assert len(ways) == len(HOWS)
        for found_grads, found in ways:
            same(found_grads, grads)
            same(found, weights)


# -- faults --------------------------------------------------------------------------------------


pad, enter, collect = Part.pad, FSDP._enter, FSDP._collect


def padding_in_front(self, x):
    table = pad(self, x)
    return table.view(-1).roll(table.numel() - self.size).view(table.shape)


def not_divided(self, keep):
    self.factor = 1.0
    collect(self, keep)


def old_numbers(self, unit, *args):
    """What was gathered for the last step serves again."""
    self.kept = getattr(self, "kept", {})
    start = FSDP._start
    with patch.object(FSDP, "_start", lambda self, u: self.kept.setdefault(u, start(self, u))):
        return enter(self, unit, *args)


FAULTS = [
    ("minillm.parallel.units.Part.pad", padding_in_front),
    ("minillm.parallel.fsdp.all_gather", lambda x, group: all_gather(x, group).roll(1, 0)),
    ("minillm.parallel.fsdp.reduce_scatter", lambda x, g: reduce_scatter(x.roll(1, 0), g)),
    ("minillm.parallel.fsdp.FSDP._collect", not_divided),
    ("minillm.parallel.fsdp.FSDP._enter", old_numbers),
    ("minillm.parallel.units.broadcast", lambda x, group: x),  # no common start
]


def with_faults():
    found = [on_ranks("tied", {}, 2)]
    for target, wrong in FAULTS:
        with patch(target, wrong):
            found.append(on_ranks("tied", {}, 2))
    return [*found, on_ranks("tied", {}, 2)]


def test_planted_faults_are_seen():
    grads, weights = one_process("tied", 3, 2)
    good, *bad, again = zip(*launch(with_faults, world_size=3, timeout=200), strict=True)
    assert len(bad) == len(FAULTS)
    for found_grads, found_weights in (*good, *again):
        same(found_grads, grads)
        same(found_weights, weights)
    for ranks in bad:
        with pytest.raises(AssertionError):
            for found_grads, found_weights in ranks:
                same(found_grads, grads)
                same(found_weights, weights)


# -- memory and traffic --------------------------------------------------------------------------


def most_at_once(link):
    """The most bytes of whole parameters seen from within; what may be, and what there are."""
    gc.collect()  # an earlier model, which is a circle of references
    before = [p for p in gc.get_objects() if type(p) is nn.Parameter]  # not of this model
    lm = LM(replace(EVEN, n_layers=6), 0)
    every, block = (sum(p.nbytes for p in m.parameters()) for m in (lm, lm.blocks[0]))
    group = world(link=link)
    fsdp = FSDP(lm, group)
    del lm
    # everything that came to live since, but the shards: also what somebody forgot to free
    known = {id(p) for p in [*before, *fsdp.parameters()]}
    others = [p for p in gc.get_objects() if type(p) is nn.Parameter and id(p) not in known]
    seen, grads = [], []

    def look(*args):
        ahead = sum(u.coming is not None for u in fsdp.units)
        seen.append((storage_bytes(others) + ahead * block, fsdp.gathered_bytes))
        grads.append(sum(p.grad.nbytes for p in others if p.grad is not None))

    for m in fsdp.module.modules():
        m.register_forward_hook(look)
        if not list(m.children()):
            m.register_full_backward_pre_hook(look)
    for step in range(2):
        loss = mean_loss(fsdp, *batch(2, step))
        loss.backward()
        look()
        fsdp.finish_gradient_synchronization()
        look()
    return seen, max(grads), every, block, storage_bytes(others)


def memory():
    good = [most_at_once(None), most_at_once(Link(0.002, 1e9))]
    free = Unit.free

    def keep(self):  # shards are put back, but memory stays
        with patch("torch.UntypedStorage.resize_", lambda *args: None):
            free(self)

    with patch("minillm.parallel.units.Unit.free", keep):
        return [*good, most_at_once(None)]


def test_a_rank_never_holds_all_parameters():
    for one, slow, (bad, _, everything, *_) in launch(memory, world_size=2):
        for seen, grads, every, block, left in (one, slow):
            root = every - 6 * block
            assert len(seen) > 100 and left == 0
            assert all(a == b for a, b in seen)  # what FSDP says is what there is
            assert 0 < grads <= root + block
            assert max(a for a, _ in seen) == root + 2 * block < every / 2
        assert max(a for a, _ in bad) >= everything


def bytes_and_traffic(dtype):
    group = world(tracer=Tracer())
    lm = LM(EVEN, 0)
    fsdp = FSDP(lm, group, dtype)
    optimizer = AdamW(decay_groups(fsdp, 0.1), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        group.tracer.clear()
        mean_loss(fsdp, *batch(2, step)).backward()
        fsdp.finish_gradient_synchronization()
        sent = {op: group.tracer.sent(op) for op in ("all_gather", "reduce_scatter")}
        assert sum(sent.values()) == group.tracer.sent()
        now = held(fsdp, optimizer)
        optimizer.step()
    return now, sent


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_a_parameter_and_traffic_are_the_published_ones(n):
    lm = LM(EVEN, 0)
    x, states = sum(p.numel() for p in lm.parameters()), len(list(lm.parameters()))
    for full, half in launch(
        lambda: [bytes_and_traffic(dtype) for dtype in (None, torch.bfloat16)], world_size=n
    ):
        for now, sent in (full, half):
            # 4 master + 4 gradient + 8 Adam; 4 for each step counter
            assert now.total == formula(x, n, 3) + 4 * states
            assert now.parameters == now.gradients == 4 * x // n
            size = 4 if sent is full[1] else 2
            share = (n - 1) * size * x // n
            assert sent == {"all_gather": 2 * share, "reduce_scatter": share}  # 3X


def gathers_while_computing(prefetch):
    """How many gathers were on their way while a block computed (it sleeps for as long)."""
    group = world(link=Link(0.03, 1e9), tracer=Tracer())
    fsdp, busy = FSDP(LM(replace(EVEN, n_layers=6), 0), group, prefetch=prefetch), []

    def compute(*args):
        start = time.monotonic()
        time.sleep(0.03)
        busy.append((start, time.monotonic()))

    for block in fsdp.module.blocks:
        block.mlp.register_forward_hook(compute)
    with torch.no_grad():
        fsdp(batch(1)[0])  # the first pass learns the order of the units
        group.tracer.clear()
        busy.clear()
        fsdp(batch(1)[0])
    gathers = [e for e in group.tracer.events if e.op == "all_gather"]
    return sum(any(e.start < b and a < e.end for a, b in busy) for e in gathers)


def test_the_next_unit_is_gathered_while_one_computes():
    found = launch(
        lambda: [gathers_while_computing(True), gathers_while_computing(False)], world_size=2
    )
    for ahead, one_by_one in found:
        assert ahead >= 3 and one_by_one == 0


# -- 16 bits -------------------------------------------------------------------------------------


def in_bf16():
    """All ranks have the same rows, so that the mean over 2 of them is exact."""
    fsdp = FSDP(LM(CFG, 0), world(), torch.bfloat16)
    optimizer = AdamW(fsdp.parameters(), lr=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = fsdp(batch(4, step)[0])
        F.cross_entropy(logits.flatten(0, 1), batch(4, step)[1].flatten()).backward()
        fsdp.finish_gradient_synchronization()
        optimizer.step()
    layer = FSDP(nn.Linear(3, 2), world(), torch.bfloat16, units=())
    out = layer(torch.ones(1, 3, requires_grad=True))
    return whole(fsdp), logits.dtype, out.dtype


def test_bf16_compute_with_float32_masters():
    masters, lm = LM(CFG, 0), LM(CFG, 0).bfloat16()
    optimizer = AdamW(masters.parameters(), lr=1e-5)
    for step in range(STEPS):
        lm.zero_grad()
        mean_loss(lm, *batch(4, step)).backward()
        for p, master in zip(lm.parameters(), masters.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        for p, master in zip(lm.parameters(), masters.parameters(), strict=True):
            p.data.copy_(master.data)
    for found, *dtypes in launch(in_bf16, world_size=2):
        same(found, masters.state_dict(), rtol=1e-6, atol=1e-9)
        assert dtypes == [torch.bfloat16] * 2
        assert any((x != x.bfloat16()).any() for x in found.values())


# -- odd modules and bad use ---------------------------------------------------------------------


class Odd(nn.Module):
    """Blocks called twice, side by side and not fully used; shared weights, a scalar, a buffer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.blocks[1].weight = self.blocks[0].weight
        self.blocks[2].spare = nn.Parameter(torch.ones(5))
        self.frozen = nn.Parameter(torch.full((2,), 1.0), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x, spare=False):
        a, b, c, d = self.blocks
        x = a(x) + b(x).sin()
        x = c(c(x).tanh())  # once behind the other
        if spare:
            x = x * c.spare.sum() if c.spare.numel() == 5 else x
        return {"y": d(x) * self.scale * self.frozen.sum() + d(x.cos()) + self.shift}


def make_odd(seed=0):
    torch.manual_seed(seed)
    odd = Odd().double()
    odd.shift += seed
    return odd


def odd_module():
    rank, n = dist.get_rank(), dist.get_world_size()
    fsdp = FSDP(make_odd(rank), world(), reduce="sum")
    optimizer = torch.optim.SGD(fsdp.parameters(), lr=0.1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        optimizer.zero_grad()
        # two forward passes before the backward pass
        loss = sum(fsdp(x[rank] * k)["y"].square().sum() for k in (1, 2))
        loss.backward()
        fsdp.finish_gradient_synchronization()
        shapes = {k: tuple(p.shape) for k, p in fsdp.module.named_parameters()}
        spare = fsdp.module.blocks[2].spare.grad
        optimizer.step()
    tied = fsdp.module.blocks[0].weight is fsdp.module.blocks[1].weight
    homes = [len(u.parts) for u in fsdp.units]
    return whole(fsdp), shapes, spare, tied, homes, fsdp.gathered_bytes


def test_shared_repeated_unused_frozen_and_scalar_parameters():
    n = 2
    odd = make_odd()
    optimizer = torch.optim.SGD(odd.parameters(), lr=0.1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        optimizer.zero_grad()
        sum(odd(x * k)["y"].square().sum() for k in (1, 2)).backward()
        optimizer.step()
    for found, shapes, spare, tied, homes, left in launch(odd_module, world_size=n):
        same(found, odd.state_dict())
        assert shapes["blocks.3.weight"] == (2, 3) and shapes["scale"] == (1,)
        assert torch.equal(spare, torch.zeros(3, dtype=torch.float64))
        # what two units share is in the one around them, with the frozen vector and the scalar
        assert tied and homes == [3, 1, 1, 3, 2] and left == 0


def some_ranks_use_it():
    """Rank 0 uses a parameter that rank 1 does not, within a unit that both use."""

    class Layer(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias if dist.get_rank() == 0 else None)

    torch.manual_seed(0)
    fsdp = FSDP(nn.Sequential(*(Layer(3, 3) for _ in range(4))), world(), units=r"\d")
    fsdp(torch.ones(1, 3)).sum().backward()
    fsdp.finish_gradient_synchronization()
    return [p.grad for p in fsdp.module[3].parameters()]


class Again(nn.Module):
    """Units whose forward runs a second time within backward, from around them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def checkpoints_around_units():
    """Gradients of the first layer, of one process and of the shards."""
    torch.manual_seed(0)
    alone = Again().double()
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    alone(x).sum().backward()
    want = alone.blocks[0][0].weight.grad.chunk(2)[dist.get_rank()]
    fsdp = FSDP(alone, world())
    for _ in range(2):
        fsdp.zero_grad()
        fsdp(x).sum().backward()
        fsdp.finish_gradient_synchronization()
    return alone.blocks[0][0].weight.grad, want, fsdp.gathered_bytes


def inside_and_outside():
    """Whole parameters: names, changes that stay, no messages, a broken pass before."""
    group = world(tracer=Tracer())
    lm = model()
    names, before = list(lm.state_dict()), {k: v.clone() for k, v in lm.state_dict().items()}
    fsdp = FSDP(lm, group)
    tokens = batch(2)[0]
    with torch.no_grad():
        first = fsdp(tokens)  # from now on the order of units is known
    with pytest.raises(ValueError, match="tokens run from"):
        fsdp(tokens + 100)  # breaks off when the next unit is on its way
    with fsdp.gather_full_params() as inner:
        assert inner is lm is fsdp.module and list(inner.state_dict()) == names
        same(inner.state_dict(), before)
        group.tracer.clear()
        with torch.no_grad():
            assert torch.equal(fsdp(tokens), first)
            inner.blocks[0].mlp.up.weight.mul_(2)
            want = fsdp(tokens)
        assert not group.tracer.events
    assert lm.tokens.weight.shape == (15, 16)  # 29 rows over 2 ranks
    with torch.no_grad():
        found = fsdp(tokens)
    assert fsdp.gathered_bytes == 0
    assert torch.equal(found, want) and not torch.equal(found, first)
    after = whole(fsdp)
    assert torch.equal(after["blocks.0.mlp.up.weight"], 2 * before["blocks.0.mlp.up.weight"])
    same(after | {"blocks.0.mlp.up.weight": before["blocks.0.mlp.up.weight"]}, before)
    return after["tokens.weight"].shape


def test_uneven_use_and_whole_parameters():
    def all_of_it():
        return some_ranks_use_it(), inside_and_outside(), checkpoints_around_units()

    for grads, shape, (found, want, left) in launch(all_of_it, world_size=2):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
        assert left == 0
        assert shape == (29, 16)
        assert torch.equal(grads[1][:1], torch.full((1,), 0.5))  # half of ones, from rank 0 alone


class Mixed(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.bias = nn.Parameter(self.bias.detach().double())


BAD = [
    (lambda: FSDP(model(), world(), reduce="median"), "'median' must be 'mean' or 'sum'"),
    (lambda: FSDP(model(), world(), units="layers.*"), r"units='layers\.\*' matches none of"),
    (lambda: FSDP(model(), world(), units=r"blocks\.0(\.attn)?"), "must not overlap"),
    (lambda: FSDP(model(), world(), units=[nn.Linear(1, 1)]), "modules within the module"),
    (lambda: FSDP(nn.ReLU(), world(), units=()), "no parameter of the module requires"),
    (lambda: FSDP(Mixed(), world(), units=()), "one unit must have one dtype"),
]


def test_bad_use_is_named():
    def all_of_it():
        for call, match in BAD:
            with pytest.raises(ValueError, match=match):
                call()
        return len(BAD)

    assert launch(all_of_it, world_size=1) == [6]
