"""ZeRO-1 and ZeRO-2 on real ranks against one process: weights, gradients, bytes, traffic."""

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from minillm.accounting.memory import zero as formula
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel.collectives import all_gather
from minillm.parallel.data import DDP
from minillm.parallel.group import Group, Link, Tracer, split, world
from minillm.parallel.partition import Bucket, held
from minillm.parallel.zero import ShardedOptimizer
from minillm.train.optim import AdamW, clip_grad_norm, decay_groups
from minillm.train.precision import MasterWeights

pytestmark = pytest.mark.slow  # many ranks, many times

CFG = ModelConfig(29, 16, 2, 2, max_len=12, position="rope", norm="rms", mlp="swiglu")
# tied or not, and 29 · 16 + ... numbers that neither 3 nor 4 divides
CONFIGS = {"tied": replace(CFG, tie_embeddings=True), "untied": replace(CFG, tie_embeddings=False)}
STEPS, CLIP = 3, 0.5
FIRST, SECOND = slice(0, 2), slice(2, 4)  # rows of a rank's two passes


def model(name="tied", seed=0):
    lm = LM(CONFIGS[name], seed).double()
    with torch.no_grad():  # the optimizer sees to those that it trains
        lm.blocks[0].attn.q.weight.requires_grad_(False).fill_(0.02)
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


def rate(step):
    return 0.01 / (step + 1)


def one_process(name, n, steps=STEPS):
    """The last gradients, before clipping, and weights after all steps on all ranks' rows."""
    lm = model(name)
    optimizer = AdamW(decay_groups(lm, 0.1), lr=1.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        mean_loss(lm, *batch(4 * n, step)).backward()
        grads = {k: p.grad.clone() for k, p in lm.named_parameters() if p.requires_grad}
        clip_grad_norm(lm.parameters(), CLIP)
        optimizer.step()
    return grads, lm.state_dict()


def whole_gradients(lm, optimizer, group):
    """Gathered from the parts of all ranks."""
    names = {p: name for name, p in lm.named_parameters()}
    pieces = ((b, b.cut(all_gather(b.grad, group))) for b in optimizer.buckets)
    return {names[p]: g for b, gs in pieces for p, g in zip(b.parameters, gs, strict=True)}


def on_ranks(name, how, steps=STEPS):
    """Each rank takes 4 rows a step in two passes; its own first weights do not count."""
    rank, n = dist.get_rank(), dist.get_world_size()
    how = {"stage": 2, "ddp": False, "algorithm": "ring", "bucket_bytes": 5000} | how
    group = world(algorithm=how["algorithm"])
    lm = model(name, seed=rank)
    wrapped = DDP(lm, group) if how["ddp"] else lm
    settings = {"stage": how["stage"], "bucket_bytes": how["bucket_bytes"]}
    settings |= {"reduce": None} if how["ddp"] else {}
    optimizer = ShardedOptimizer(decay_groups(lm, 0.1), AdamW, group, **settings, lr=1.0)
    for step in range(steps):
        for options in optimizer.param_groups:
            options["lr"] = rate(step)
        optimizer.zero_grad()
        tokens, targets = batch(4 * n, step)[:, 4 * rank : 4 * rank + 4]
        first, second = (mean_loss(wrapped, tokens[i], targets[i]) / 2 for i in (FIRST, SECOND))
        if how["ddp"]:
            with wrapped.no_sync():
                first.backward()
            second.backward()
            wrapped.finish_gradient_synchronization()
        else:
            first.backward()
            if how["stage"] == 2:
                optimizer.finish_gradient_synchronization()
            second.backward()
        optimizer.finish_gradient_synchronization()
        if step == steps - 1:
            grads = whole_gradients(lm, optimizer, group)
        optimizer.clip_grad_norm(CLIP)
        optimizer.step()
    return grads, {k: v.clone() for k, v in lm.state_dict().items()}


HOWS = [
    {"stage": 1},
    {"stage": 1, "ddp": True, "bucket_bytes": 2**20},
    {"stage": 2, "bucket_bytes": 1},
    {"stage": 2, "algorithm": "native"},
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


flatten, collect = Bucket.flatten, ShardedOptimizer._collect


def padding_in_front(self, tensors):
    row, size = flatten(self, tensors), sum(x.numel() for x in tensors)
    return row.roll(len(row) - size)


def no_padding(self, tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def wrong_order(x, group):
    return all_gather(x, group).roll(len(x))


def not_divided(self, keep):
    self.reduce = "sum"
    collect(self, keep)


def parts_not_exchanged(self):
    for bucket in self.buckets:
        bucket.message.result()


FAULTS = [
    ("minillm.parallel.partition.Bucket.flatten", padding_in_front),
    ("minillm.parallel.zero.all_gather", wrong_order),
    ("minillm.parallel.zero.ShardedOptimizer._collect", not_divided),
    ("minillm.parallel.zero.ShardedOptimizer._receive", parts_not_exchanged),
    ("minillm.parallel.partition.broadcast", lambda x, group: x),  # no common start
]


def with_faults():
    found = [on_ranks("tied", {}, 2)]
    for target, wrong in FAULTS:
        with patch(target, wrong):
            found.append(on_ranks("tied", {}, 2))
    with (
        patch("minillm.parallel.partition.Bucket.flatten", no_padding),
        pytest.raises(ValueError, match="rows cannot be scattered evenly over 3 ranks"),
    ):
        on_ranks("tied", {}, 2)
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


# -- bytes ---------------------------------------------------------------------------------------


def bytes_held(stage):
    """Of a bf16 model with float32 masters, when backward is through, and its buckets.

    Stage 0 is what a group of one rank has.
    """
    rank = dist.get_rank()
    lm = LM(CFG, 0)
    group = world() if stage else Group((rank,))
    optimizer = ShardedOptimizer(
        decay_groups(lm, 0.1), AdamW, group, max(stage, 1), dtype=torch.bfloat16, lr=0.01
    )
    for step in range(2):
        optimizer.zero_grad()
        mean_loss(lm, *batch(2, 2 * step + rank)).backward()
        if stage == 2:
            optimizer.finish_gradient_synchronization()
        now = held(lm, optimizer)
        optimizer.step()
    return now, len(optimizer.buckets)


def traffic(stage, ddp):
    """Bytes sent in a step, by operation."""
    group = world(tracer=Tracer())
    lm = LM(CFG, 0)
    wrapped = DDP(lm, group) if ddp else lm
    optimizer = AdamW(lm.parameters(), lr=0.01)
    if stage:
        reduce = None if ddp else "mean"
        optimizer = ShardedOptimizer(lm.parameters(), AdamW, group, stage, reduce, lr=0.01)
    group.tracer.clear()
    mean_loss(wrapped, *batch(2, dist.get_rank())).backward()
    if ddp:
        wrapped.finish_gradient_synchronization()
    optimizer.step()
    return {op: group.tracer.sent(op) for op in {e.op for e in group.tracer.events}}


WAYS = [(0, True), (1, True), (1, False), (2, False)]


def memory_and_traffic():
    return [bytes_held(stage) for stage in (0, 1, 2)], [traffic(*way) for way in WAYS]


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_a_parameter_and_traffic_are_the_published_ones(n):
    lm = LM(CFG, 0)
    x = sum(p.numel() for p in lm.parameters())
    share = (n - 1) * 4 * x // n
    assert x % n == 0
    both = {"reduce_scatter": share, "all_gather": share}
    for memory, sent in launch(memory_and_traffic, world_size=n):
        for stage, (now, buckets) in enumerate(memory):
            want = formula(x, n, stage)
            assert 0 <= now.total - want <= buckets * (4 + 16 * n)  # step counters and padding
            assert now.parameters == pytest.approx(2 * x, abs=2 * n * buckets)
            parts = n if stage == 2 else 1
            assert now.gradients == pytest.approx(2 * x / parts, abs=2 * n * buckets)
        assert sent[0] == {"all_reduce": 2 * share}
        assert sent[1] == {"all_reduce": 2 * share, "all_gather": share}  # 3X, the naive way
        assert sent[2] == sent[3] == both


def gradients_during_backward(stage, link):
    """The most bytes of whole gradients that were alive at once, on a wire of our making."""
    group = world(tracer=Tracer(), link=link)
    lm = LM(replace(CFG, n_layers=6), 0)
    options = {"stage": stage, "bucket_bytes": 4000, "lr": 0.01}
    optimizer = ShardedOptimizer(lm.parameters(), AdamW, group, **options)
    alive = []

    def look(p):
        rows = sum(b.row.nbytes for b in optimizer.buckets if b.message is not None)
        alive.append(rows + sum(p.grad.nbytes for p in lm.parameters() if p.grad is not None))

    for p in lm.parameters():
        p.register_post_accumulate_grad_hook(look)
    group.tracer.clear()
    mean_loss(lm, *batch(2)).backward()
    left = sum(p.grad is not None for p in lm.parameters())
    early = sum(e.op == "reduce_scatter" for e in group.tracer.events)
    optimizer.finish_gradient_synchronization()
    return max(alive), left, early, sum(p.nbytes for p in lm.parameters())


def each_stage():
    return [gradients_during_backward(s, x) for s in (1, 2) for x in (None, Link(0.003, 1e9))]


def test_stage_2_never_holds_all_gradients():
    for one, one_slow, two, two_slow in launch(each_stage, world_size=2):
        for most, left, early, every in (one, one_slow):
            assert most == every and left > 20 and early == 0
        for most, left, early, every in (two, two_slow):
            # two messages on their way and a bucket that fills up
            assert most <= 3 * 4100 < every / 4
            assert left == 0 and early > 5


# -- saving and loading --------------------------------------------------------------------------


def train(lm, optimizer, rows, steps):
    for step in steps:
        optimizer.zero_grad()
        mean_loss(lm, *(x[rows] for x in batch(12, step))).backward()
        optimizer.step()


def part_of_run(group, steps, saved=None, dtype=None, bucket_bytes=5000):
    """Weights and consolidated and own states after `steps`, going on from `saved` of them."""
    rows = 12 // group.size
    lm = model() if dtype is None else model().float()
    optimizer = ShardedOptimizer(
        decay_groups(lm, 0.1), AdamW, group, bucket_bytes=bucket_bytes, dtype=dtype, lr=0.01
    )
    lm.to(dtype)  # what is frozen
    if saved is not None:
        if dtype is None:  # else masters set what is trained
            lm.load_state_dict(saved[0])
        for options in optimizer.param_groups:
            options["lr"] = 7.0  # to be restored
        optimizer.load_state_dict(saved[1])
    train(lm, optimizer, slice(rows * group.index, rows * (group.index + 1)), steps)
    weights = {k: v.clone() for k, v in lm.state_dict().items()}
    return weights, optimizer.consolidated_state_dict(), copy.deepcopy(optimizer.state_dict())


def save_and_load():
    pairs, three = split([[0, 1], [2, 3]]), split([[0, 1, 2], [3]])
    weights, state, own = part_of_run(world(), range(2))
    later = [
        part_of_run(pairs, [2], (weights, state))[0],
        part_of_run(three, [2], (weights, state), bucket_bytes=1)[0],  # 3 ranks, or 1
        part_of_run(world(), [2], (weights, state), bucket_bytes=2**20)[0],
        part_of_run(world(), [2], (weights, own))[0],
    ]
    with pytest.raises(ValueError, match=r"a state of place \d of 4 does not fit place \d of 2"):
        part_of_run(pairs, [2], (weights, own))
    low = part_of_run(world(), range(2), dtype=torch.bfloat16)
    again = part_of_run(three, [], low, dtype=torch.bfloat16)
    return weights, state, later, low, again


def test_a_state_fits_any_number_of_ranks_and_one_process():
    lm = model()
    optimizer = AdamW(decay_groups(lm, 0.1), lr=0.01)
    train(lm, optimizer, slice(0, 12), range(2))
    middle, want = copy.deepcopy(lm.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(lm, optimizer, slice(0, 12), [2])
    for weights, state, later, low, again in launch(save_and_load, world_size=4):
        same(weights, middle)
        assert state["state"].keys() == want["state"].keys()
        assert state["param_groups"] == want["param_groups"]
        for i, entry in want["state"].items():
            same(state["state"][i], entry)
        for found in later:
            same(found, lm.state_dict())
        masters = {i: s["master"] for i, s in low[1]["state"].items()}
        assert all(m.dtype == torch.float32 for m in masters.values())
        assert all((m != m.bfloat16()).any() for m in masters.values() if m.ndim == 2)
        assert all(torch.equal(again[1]["state"][i]["master"], m) for i, m in masters.items())
        assert all(torch.equal(again[0][k], low[0][k]) for k in weights)
    alone = model()
    alone.load_state_dict(weights)
    optimizer = torch.optim.AdamW(decay_groups(alone, 0.1), lr=7.0)
    optimizer.load_state_dict(state)
    train(alone, optimizer, slice(0, 12), [2])
    same(alone.state_dict(), lm.state_dict())


# -- 16 bits -------------------------------------------------------------------------------------


def in_bf16(stage):
    """All ranks have the same rows, so that the mean over 2 of them is exact."""
    lm = LM(CONFIGS["untied"], 0)
    optimizer = ShardedOptimizer(
        decay_groups(lm, 0.1), AdamW, world(), stage=stage, dtype=torch.bfloat16, lr=1e-5
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_loss(lm, *batch(4, step)).backward()
        optimizer.step()
    masters = [s["master"] for s in optimizer.consolidated_state_dict()["state"].values()]
    return masters, [p.detach() for p in lm.parameters()]


def test_bf16_with_masters_is_what_one_process_does():
    lm = LM(CONFIGS["untied"], 0)
    start = [p.detach().clone() for p in lm.parameters()]
    optimizer = MasterWeights(decay_groups(lm, 0.1), AdamW, torch.bfloat16, lr=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        mean_loss(lm, *batch(4, step)).backward()
        optimizer.step()
    want = [m.detach() for _, m in optimizer._pairs]
    for stages in launch(lambda: [in_bf16(1), in_bf16(2)], world_size=2):
        for masters, parameters in stages:
            torch.testing.assert_close(masters, want, rtol=1e-6, atol=1e-9)
            assert all(p.dtype == torch.bfloat16 for p in parameters)
            # steps so small that bf16 alone forgets many of them
            kept = sum((p == s.bfloat16()).sum() for p, s in zip(parameters, start, strict=True))
            assert kept > 0.5 * sum(p.numel() for p in parameters)
            assert not any((m == m.bfloat16()).all() for m in masters if m.ndim == 2)


# -- odd modules and bad use ---------------------------------------------------------------------


class Two(nn.Module):
    """Uses one of its two layers; a tied weight, a frozen one and a scalar besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = nn.Parameter(torch.full((2,), 1.0), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, which):
        return (self.a if which == 0 else self.b)(x) * self.scale


def odd_module(stage):
    torch.manual_seed(0)
    two = Two()
    before = {k: p.detach().clone() for k, p in two.named_parameters()}
    optimizer = ShardedOptimizer(
        two.parameters(), torch.optim.SGD, world(), stage=stage, reduce="sum", bucket_bytes=1, lr=1
    )
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        two(torch.ones(1, 3), dist.get_rank()).sum().backward()
        return 5.0

    loss = optimizer.step(closure)
    optimizer.step()  # without zero_grad the gradient stays, as in one process
    change = {k: before[k] - p.detach() for k, p in two.named_parameters()}
    optimizer.zero_grad()
    optimizer.step()
    still = {k: before[k] - p.detach() for k, p in two.named_parameters()}
    one = (two.b.weight is two.a.weight) and two.scale.shape == ()
    return change, still, one, loss, calls


def test_unused_tied_frozen_and_scalar_parameters():
    for stages in launch(lambda: [odd_module(1), odd_module(2)], world_size=2):
        for change, still, one, loss, calls in stages:
            assert one and loss == 5.0 and calls == [True]
            torch.testing.assert_close(change["a.bias"], torch.full((3,), 2.0))
            torch.testing.assert_close(change["b.bias"], torch.full((3,), 2.0))
            torch.testing.assert_close(change["a.weight"], torch.full((3, 3), 4.0))
            assert not change["frozen"].any()
            for name in change:
                assert torch.equal(change[name], still[name])


def twice():
    lm = model()
    ShardedOptimizer(lm.parameters(), AdamW, world(), stage=2, lr=0.1)
    for _ in range(2):
        mean_loss(lm, *batch(1)).backward()


def build(**settings):
    return lambda: ShardedOptimizer(model().parameters(), AdamW, world(), **settings, lr=0.1)


def other_groups():
    lm = model()
    one = ShardedOptimizer(lm.parameters(), AdamW, world(), lr=0.1)
    ShardedOptimizer(decay_groups(lm, 0.1), AdamW, world(), lr=0.1).load_state_dict(
        one.consolidated_state_dict()
    )


def uneven_steps():
    lm = model()
    optimizer = ShardedOptimizer(lm.parameters(), AdamW, world(), lr=0.1)
    train(lm, optimizer, slice(0, 1), [0])
    state = optimizer.consolidated_state_dict()
    state["state"][0]["step"] = torch.tensor(9.0)
    optimizer.load_state_dict(state)


BAD = [
    (twice, "a second backward pass before finish_gradient_synchronization"),
    (build(stage=3), "stage=3 must be 1 or 2"),
    (build(reduce="median"), "'median' 'mean', 'sum' or None"),
    (build(bucket_bytes=0), "bucket_bytes=0 at least 1"),
    (build(stage=2, reduce=None), "stage=2 sums gradients itself"),
    (lambda: ShardedOptimizer([Two().frozen], AdamW, world(), lr=1), "nothing to train"),
    (lambda: build()().clip_grad_norm(0), "max_norm=0 must be positive"),
    (other_groups, r"groups of \[\d+\] parameters, not \[\d+, \d+\]"),
    (uneven_steps, "must have the same state and step"),
]


def test_bad_use_is_named():
    def all_of_it():
        for call, match in BAD:
            with pytest.raises((ValueError, RuntimeError), match=match):
                call()
        return len(BAD)

    assert launch(all_of_it, world_size=1) == [9]


def not_finite():
    lm = model()
    optimizer = ShardedOptimizer(lm.parameters(), AdamW, world(), lr=0.1)
    mean_loss(lm, *batch(1)).backward()
    if dist.get_rank() == 1:
        lm.tokens.weight.grad[0, 0] = float("nan")
    norm = optimizer.clip_grad_norm(1.0)
    return norm.isfinite().item(), [b.grad.isnan().sum().item() for b in optimizer.buckets]


def test_a_norm_that_is_not_finite_is_told_to_all_ranks_and_changes_nothing():
    found = launch(not_finite, world_size=2)
    assert not any(finite for finite, _ in found)
    assert sum(sum(nans) for _, nans in found) == 1
