"""Schedules on real ranks: gradients of one process, messages, memory, late weights."""

import copy
import dataclasses
import itertools
import math
import random
import time
import weakref
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel.actions import needs
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Group, Link, Tracer, world
from minillm.parallel.pipeline import Pipeline, recorded
from minillm.parallel.schedules import (
    Action,
    check,
    in_flight,
    placement,
    schedule,
    timeline,
    versions,
)

pytestmark = pytest.mark.slow  # many ranks, many times

CFG = ModelConfig(vocab_size=13, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, max_len=8)
B, T = 2, 5


def model(layers, tied=True):
    cfg = dataclasses.replace(CFG, n_layers=layers, tie_embeddings=tied)
    return LM(cfg, seed=0).double()


class Slice(nn.Module):
    """Some of the model's own layers; its first and last have the vocabulary too."""

    def __init__(self, model, stage, stages):
        super().__init__()
        self.first, self.last, n = stage == 0, stage == stages - 1, len(model.blocks)
        self.start, blocks = n * stage // stages, model.blocks
        model.blocks = blocks[self.start : n * (stage + 1) // stages]
        self.model = copy.deepcopy(model)
        model.blocks = blocks
        if not self.first and not (self.last and model.cfg.tie_embeddings):
            del self.model.tokens
        if not self.last:
            del self.model.head, self.model.norm

    def forward(self, x):
        positions = torch.arange(T)
        x = self.model.embed(x, positions) if self.first else x
        x = self.model.body(x, positions)
        return self.model.unembed(x) if self.last else x

    def gradients(self):
        """By the names of the whole model. Of a tied matrix, each end's share has its own."""
        found = {}
        for name, p in self.model.named_parameters():
            if name.startswith("blocks."):
                _, i, rest = name.split(".", 2)
                name = f"blocks.{self.start + int(i)}.{rest}"
            elif name == "tokens.weight" and not self.first:
                name = "head.weight"
            if p.grad is not None:
                found[name] = p.grad.clone()
        return found


def data(m):
    rng = torch.Generator().manual_seed(m)
    return torch.randint(0, CFG.vocab_size, (m, 2, B, T), generator=rng)


def losses_of(targets, m):
    return lambda y, i: F.cross_entropy(y.flatten(0, 1), targets[i].flatten()) / m


@cache
def one_process(layers, m, tied):
    """Losses and gradients by name."""
    whole, (tokens, targets) = model(layers, tied), data(m).unbind(1)
    loss = losses_of(targets, m)
    losses = [loss(whole(tokens[i]), i) for i in range(m)]
    sum(losses).backward()
    return torch.stack(losses).detach(), {n: p.grad for n, p in whole.named_parameters()}


def agree(found, lists, m, tied):
    """What all ranks return against one process."""
    where = placement(lists)
    want_losses, want = one_process(len(where) + 1, m, tied)
    torch.testing.assert_close(
        torch.stack(found[where[max(where)]][0]), want_losses, rtol=1e-9, atol=1e-12
    )
    assert sum(losses == [] for losses, _ in found) == len(found) - 1
    total = {}
    for _, gradients in found:
        for name, gradient in gradients.items():
            name = "tokens.weight" if tied and name == "head.weight" else name
            total[name] = total.get(name, 0) + gradient
    assert total.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(total[name], gradient, rtol=1e-9, atol=1e-12)


def on_a_rank(lists, m, tied, group, times=1, back=None):
    """Losses and gradients of this rank's stages, which hold one layer each, the last one two."""
    where = placement(lists)
    whole = model(len(where) + 1, tied)
    mine = [s for s in sorted(where) if where[s] == group.index]
    stages = [Slice(whole, s, len(where)) for s in mine]
    like = torch.empty(B, T, CFG.d_model, dtype=torch.float64)
    pipeline = Pipeline(lists, stages, group, like, back)
    tokens, targets = data(m).unbind(1)
    for _ in range(times):  # a second time as the first
        for stage in stages:
            stage.zero_grad()
        losses = pipeline.run(tokens, losses_of(targets, m))
    found = {}
    for stage in stages:
        found |= stage.gradients()
    return losses, found


SYNCHRONOUS = ("naive", "gpipe", "1f1b", "zb-h1")


def many_schedules(cases):
    group = world()
    back = group.with_(process_group=dist.new_group(list(group.ranks)))
    return [
        on_a_rank(*case, group, times=1 + (i % 5 == 0), back=back if i % 2 else None)
        for i, case in enumerate(cases)
    ]


def compare(cases, k):
    """All cases in one launch, each with one process."""
    results = launch(many_schedules, cases, world_size=k)
    for case, found in zip(cases, zip(*results, strict=True), strict=True):
        agree(found, *case)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_synchronous_schedule_has_the_gradients_of_one_process(k):
    cases = [
        (schedule(name, k, m), m, m != 5) for name, m in itertools.product(SYNCHRONOUS, (1, 3, 5))
    ]
    rounds = [(1, 2), (1, 3), (2, 2)]
    cases += [(schedule("interleaved", k, g * k, v), g * k, True) for g, v in rounds]
    compare(cases, k)


def any_schedule(rng, k, v, m):
    """A valid one in which nothing has an order but what needs an order; any placement."""
    n = k * v
    where = [s % k for s in range(n)]
    rng.shuffle(where)
    halves = {s for s in range(n) if rng.random() < 0.5}
    left = [
        Action(what, i, s)
        for i in range(m)
        for s in range(n)
        for what in [
            "forward",
            *(["backward_input", "backward_weight"] if s in halves else ["backward"]),
        ]
    ]
    lists, done = [[] for _ in range(k)], set()
    while left:
        ready = [a for a in left if done.issuperset(needs(a, n))]
        action = rng.choice(ready)
        left.remove(action)
        lists[where[action.stage]].append(action)
        done.add((action.what.removesuffix("_input"), action.stage, action.micro_batch))
    check(lists)
    return lists


@pytest.mark.parametrize("k", [2, 3, 4])
def test_no_valid_schedule_deadlocks(k):
    """Messages in any order, also both ways at once, and around corners."""
    rng = random.Random(k)
    compare([(any_schedule(rng, k, v, m), m, True) for v in (1, 2, 3) for m in (1, 3, 4)], k)


def large_messages(k):
    """2 MB each, more than any buffer holds, both ways at the same time."""
    like = torch.empty(250_000, dtype=torch.float64)
    stage = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(stage.weight, 0.5)
    scale = lambda x: x * stage.weight.view(())  # noqa: E731
    group, m = world(tracer=Tracer()), 4
    for name in ("gpipe", "1f1b", "zb-h1"):
        stage.zero_grad()
        pipeline = Pipeline(schedule(name, k, m), [scale], group, like)
        batches = [torch.full_like(like, float(i)) for i in range(m)]
        pipeline.run(batches, lambda y, i: y.mean())
        # d/dw of w^k times the mean, where all w are 1/2
        assert stage.weight.grad.item() == pytest.approx(0.5 ** (k - 1) * sum(range(m)))


def test_large_messages():
    launch(large_messages, 3, world_size=3)


# -- what travels, and when ----------------------------------------------------------------------


def traced(lists, m, seconds, link=None):
    """Events of a run whose actions sleep."""
    group = world(tracer=Tracer(), link=link)
    dist.barrier()
    where = placement(lists)
    mine = [s for s in where if where[s] == group.index]
    pipeline = Pipeline(lists, [lambda x: x * 1.0 for _ in mine], group, torch.empty(3))
    busy = lambda a: time.sleep(seconds.get(a.what, 0.0))  # noqa: E731
    batches = [torch.ones(3, requires_grad=True) for _ in range(m)]
    pipeline.run(batches, lambda y, i: y.sum(), busy=busy)
    return group.tracer.events


@pytest.mark.parametrize(("name", "k", "m", "v"), [("1f1b", 3, 4, 1), ("interleaved", 2, 4, 3)])
def test_messages_are_counted_and_the_recorded_order_is_the_schedules(name, k, m, v):
    lists = schedule(name, k, m, v)
    found = launch(traced, lists, m, {}, world_size=k)
    for device, events in enumerate(found):
        done = [e for e in recorded(events) if e.device == device]
        assert [e.action for e in done] == lists[device]
        sends = [e for e in events if e.op == "send"]
        # forth from all stages but the last, back from all but the first; 3 numbers of 4 bytes
        borders = 2 * v - (device == 0) - (device == k - 1)
        assert len(sends) == m * borders and all(e.sent == 12 for e in sends)
        assert sum(e.op == "receive" for e in events) == m * borders


@pytest.mark.parametrize("name", ["naive", "1f1b", "zb-h1"])
def test_recorded_work_begins_no_sooner_than_the_schedule_allows(name):
    """Real ranks that sleep 30 ms forward and 60 ms backward; other work here only adds to it."""
    k, m = 4, 4
    seconds = {"forward": 0.03, "backward": 0.06, "backward_input": 0.03, "backward_weight": 0.03}
    lists = schedule(name, k, m)
    want = timeline(lists, 0.03, 0.06)
    ranks = launch(traced, lists, m, seconds, world_size=k)
    events = recorded(e for rank in ranks for e in rank)
    assert sorted(e.action for e in events) == sorted(e.action for e in want)
    earliest = {e.action: e for e in want}
    for e in events:
        assert e.start >= earliest[e.action].start - 1e-3
        assert e.end - e.start >= seconds.get(e.action.what, 0.0) - 1e-4
    # so it takes at least as long as the formula says, and some rank has to be idle
    assert max(e.end for e in events) >= max(e.end for e in want) - 1e-3


def test_an_emulated_link_delays_messages_but_not_the_sender():
    latency, lists = 0.3, schedule("gpipe", 2, 3)
    want = timeline(lists, 0.0, 0.0, communication=latency)
    found = launch(traced, lists, 3, {}, Link(latency, math.inf), world_size=2)
    events = recorded(e for rank in found for e in rank)
    first = {e.action[:3]: e for e in events}
    # forwards of the first stage do not wait; messages follow each other on its wire
    assert first["forward", 2, 0].end < 2 * latency  # three messages take three times as long
    for m in range(3):
        assert first["forward", m, 1].start >= (m + 1) * latency
    assert max(e.end for e in events) >= max(e.end for e in want)


# -- what is kept, and for how long --------------------------------------------------------------


class Counted(torch.autograd.Function):
    """Counts the graphs that hold one."""

    @staticmethod
    def forward(ctx, x, alive):
        ctx.something = nn.Identity()
        alive.add(ctx.something)
        return x + 0

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def peaks(lists, m):
    """The most forwards kept at one time, and the most messages not known to have arrived."""
    group, alive, most = world(), weakref.WeakSet(), [0, 0]
    mine = [s for s, device in placement(lists).items() if device == group.index]
    stage = lambda x: Counted.apply(x, alive) * 1.0  # noqa: E731

    def busy(_):
        most[:] = max(most[0], len(alive)), max(most[1], sum(map(len, pipeline.sent.values())))

    pipeline = Pipeline(lists, [stage for _ in mine], group, torch.empty(3))
    batches = [torch.ones(3, requires_grad=True) for _ in range(m)]
    pipeline.run(batches, lambda y, i: y.sum(), busy=busy)
    return most


def test_activations_live_as_long_as_the_schedule_says():
    cases = [("naive", 9), ("gpipe", 9), ("1f1b", 30), ("zb-h1", 9), ("interleaved", 9, 2)]
    lists = [schedule(name, 3, *sizes) for name, *sizes in cases]
    ranks = launch(
        lambda: [peaks(each, sizes[0]) for each, (_, *sizes) in zip(lists, cases, strict=True)],
        world_size=3,
    )
    for each, found in zip(lists, zip(*ranks, strict=True), strict=True):
        assert [alive for alive, _ in found] == in_flight(each)
    # of 60 messages and more that a rank sends in 1F1B, few are held at any time
    assert all(pending <= 8 for _, pending in (rank[2] for rank in ranks))


# -- late weights --------------------------------------------------------------------------------


def late_weights(lists, m, lr, stash):
    """Weights after the last update, and how many copies of them there were at most."""
    group = world()
    torch.manual_seed(group.index)
    stage = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    optimizer = torch.optim.SGD(stage.parameters(), lr)
    copies = [0]

    def update(_):
        optimizer.step()
        optimizer.zero_grad()

    def busy(_):
        kept = [stage[0].weight, *(w["0.weight"] for w in pipeline.weights.values())]
        copies[0] = max(copies[0], len({w.data_ptr() for w in kept}))

    pipeline = Pipeline(lists, [stage], group, torch.empty(3, 4, dtype=torch.float64))
    batches = torch.randn(m, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = {n: p.detach().clone() for n, p in stage.named_parameters()}
    losses = pipeline.run(batches, lambda y, i: (y - 1).square().mean(), update, busy, stash=stash)
    return losses, start, {n: p.detach() for n, p in stage.named_parameters()}, copies[0]


def delayed(starts, batches, version, every, lr):
    """One process, all versions of all weights kept: stage s sees `version(m, s)` for batch m."""
    shape = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    history = [[{n: p.clone().requires_grad_() for n, p in start.items()}] for start in starts]
    losses, total = [], [dict.fromkeys(start, 0) for start in starts]
    for m, x in enumerate(batches):
        used = [history[s][version(m, s)] for s in range(len(starts))]
        for weights in used:
            x = torch.func.functional_call(shape, weights, (x,))
        losses.append((x - 1).square().mean())
        for s, weights in enumerate(used):
            gradients = torch.autograd.grad(losses[-1], list(weights.values()), retain_graph=True)
            total[s] = {n: total[s][n] + g for n, g in zip(weights, gradients, strict=True)}
        if (m + 1) % every == 0:
            for s, latest in enumerate([h[-1] for h in history]):
                new = {n: (p - lr * total[s][n]).detach() for n, p in latest.items()}
                history[s].append({n: p.requires_grad_() for n, p in new.items()})
                total[s] = dict.fromkeys(new, 0)
    return torch.stack(losses).detach(), [h[-1] for h in history]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_late_weights_are_late_as_published(k):
    each, batches, lr = k + 1, 4, 0.05
    n = each * batches
    cases = {
        "pipedream": (lambda m, s: max(0, m - (k - s) + 1), 1),
        "2bw": (lambda m, s: max(m // each - 1, 0), each),
    }
    lists = [schedule(name, k, each, batches=batches) for name in cases]
    ranks = launch(lambda: [late_weights(x, n, lr, True) for x in lists], world_size=k)
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 3, 4, dtype=torch.float64, generator=rng)
    for i, case in enumerate(cases.values()):
        found = [rank[i] for rank in ranks]
        losses, weights = delayed([start for _, start, *_ in found], inputs, *case, lr)
        torch.testing.assert_close(torch.stack(found[-1][0]), losses, rtol=1e-9, atol=1e-12)
        for (_, _, got, copies), want, most in zip(found, weights, versions(lists[i]), strict=True):
            want = {name: p.detach() for name, p in want.items()}
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
            assert copies == most


# -- what is wrong is named ----------------------------------------------------------------------


def double(x):
    return x * 2.0


def pipeline_of(lists, stages=(double,)):
    """Of place 0 among two; it never comes to sending anything."""
    return Pipeline(lists, stages, Group((0, 1)), torch.empty(3))


def run(lists, n, stage=double):
    pipeline_of(lists, (stage,)).run([torch.ones(3)] * n, lambda y, i: y.sum())


def alone():
    return FSDP(nn.Linear(3, 3), Group((0,)), units=[])


TWO = schedule("1f1b", 2, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pipeline_of(schedule("1f1b", 3, 2)), "for 3 devices, a group of 2"),
        (lambda: pipeline_of(TWO, (double, double)), r"place 0 holds stages \[0\], got 2"),
        (lambda: pipeline_of([TWO[0][::-1], TWO[1]]), "deadlock: device 0 waits for"),
        (lambda: pipeline_of(schedule("2bw", 2, 2, batches=3)), r"only, stages \[0\] are none"),
        (lambda: pipeline_of(schedule("zb-h1", 2, 2), (alone(),)), "no halves of it"),
        (lambda: run(TWO, 1), "2 micro-batches, got 1"),
        (lambda: run(schedule("1f1b", 2, 1, batches=2), 2), "update= has to change them"),
        (lambda: run(TWO, 2, lambda x: x.repeat(2)), r"\(6,\) of torch.float32, but .* \(3,\)"),
        (lambda: run(TWO, 2, lambda x: x.double()), "of torch.float64, but messages are"),
    ],
)
def test_what_does_not_fit_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
