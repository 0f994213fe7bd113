"""Data parallelism: the gradients of one process, in buckets, while backward still computes."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import RankError, launch
from minillm.parallel.data import DDP, fill_buckets
from minillm.parallel.group import Link, Tracer, world
from minillm.train.optim import AdamW

pytestmark = pytest.mark.slow  # many ranks, many times

CFG = ModelConfig(29, 16, 2, 2, max_len=12, position="rope", norm="rms", mlp="swiglu")


def model(seed=0):
    return LM(CFG, seed).double()


def batch(rows, seed=0):
    """Tokens and targets [rows, 7]."""
    return torch.randint(29, (2, rows, 7), generator=torch.Generator().manual_seed(seed))


def mean_loss(lm, tokens, targets):
    return F.cross_entropy(lm(tokens).flatten(0, 1), targets.flatten())


def gradients(lm):
    return {name: p.grad.clone() for name, p in lm.named_parameters()}


def same(found, want):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-9, atol=1e-12)


def train_on_ranks(settings, steps):
    rank, n = dist.get_rank(), dist.get_world_size()
    group = world(tracer=Tracer(), algorithm=settings.pop("algorithm", "ring"))
    ddp = DDP(model(seed=rank), group, **settings)  # other weights on each rank: place 0's count
    optimizer = AdamW(ddp.parameters(), lr=0.01)
    for step in range(steps):
        tokens, targets = batch(2 * n, step)[:, 2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        mean_loss(ddp, tokens, targets).backward()
        ddp.finish_gradient_synchronization()
        grads = gradients(ddp.module)
        optimizer.step()
    return grads, ddp.module.state_dict(), group.tracer.events


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (2, {"bucket_bytes": 1}),
        (3, {"bucket_bytes": 4096, "algorithm": "native"}),
        (4, {"bucket_bytes": 4096}),
        (2, {"overlap": False}),
    ],
)
def test_gradients_and_weights_are_those_of_one_process(n, settings):
    found = launch(train_on_ranks, settings, 3, world_size=n)
    lm = model()
    optimizer = AdamW(lm.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        mean_loss(lm, *batch(2 * n, step)).backward()
        want = gradients(lm)
        optimizer.step()
    for grads, weights, _ in found:
        same(grads, want)
        same(weights, lm.state_dict())


def test_bytes_do_not_depend_on_the_buckets():
    k = sum(p.nbytes for p in model().parameters())
    for bucket_bytes, many in ((1, True), (2**30, False)):
        found = launch(train_on_ranks, {"bucket_bytes": bucket_bytes}, 1, world_size=4)
        sent = [sum(e.sent for e in events if e.op == "all_reduce") for *_, events in found]
        messages = sum(e.op == "all_reduce" for e in found[0][2])
        assert messages == (len(list(model().parameters())) if many else 1)
        # 2(N-1)/N K; chunks of uneven length move a few numbers from one rank to another
        assert sum(sent) == 4 * 2 * 3 * k // 4
        assert all(abs(s - 2 * 3 * k / 4) <= 16 * 6 * messages for s in sent)


def accumulated():
    rank, n = dist.get_rank(), dist.get_world_size()
    group = world(tracer=Tracer())
    ddp = DDP(model(), group)
    group.tracer.clear()
    tokens, targets = batch(4 * n)[:, 4 * rank : 4 * rank + 4]
    with ddp.no_sync():
        for i in range(3):
            (mean_loss(ddp, tokens[i : i + 1], targets[i : i + 1]) / 4).backward()
    silent = group.tracer.count("all_reduce")
    (mean_loss(ddp, tokens[3:], targets[3:]) / 4).backward()
    ddp.finish_gradient_synchronization()
    return silent, group.tracer.count("all_reduce"), gradients(ddp.module)


def test_accumulation_communicates_once():
    lm = model()
    mean_loss(lm, *batch(8)).backward()
    for silent, messages, grads in launch(accumulated, world_size=2):
        assert (silent, messages) == (0, 1)
        same(grads, gradients(lm))


def unequal(reduce):
    """Rank r has r + 1 rows."""
    rank = dist.get_rank()
    ddp = DDP(model(), world(), reduce=reduce)
    tokens, targets = batch(3)[:, slice(0, 1) if rank == 0 else slice(1, 3)]
    loss = mean_loss(ddp, tokens, targets)
    if reduce == "sum":
        loss = loss * targets.numel() / 21  # 3 rows of 7 tokens on all ranks
    loss.backward()
    ddp.finish_gradient_synchronization()
    return gradients(ddp.module)


def test_a_mean_of_means_is_wrong_where_token_counts_differ():
    lm = model()
    mean_loss(lm, *batch(3)).backward()
    want = gradients(lm)
    same(launch(unequal, "sum", world_size=2)[0], want)
    with pytest.raises(AssertionError):
        same(launch(unequal, "mean", world_size=2)[0], want)


class Two(torch.nn.Module):
    """Uses one of its two layers; a tied weight, a frozen one and a buffer besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.frozen = torch.nn.Parameter(torch.full((2,), 1.0), requires_grad=False)
        self.register_buffer("table", torch.zeros(2))

    def forward(self, x, which):
        return (self.a if which == 0 else self.b)(x)


def odd_module():
    rank = dist.get_rank()
    two = Two()
    two.table += rank + 5
    two.frozen.data += rank
    ddp = DDP(two, world(), bucket_bytes=1)
    start = copy.deepcopy(two.state_dict())
    ddp(torch.ones(1, 3), rank).sum().backward()
    ddp.finish_gradient_synchronization()
    return start, {name: p.grad for name, p in two.named_parameters()}


def test_unused_tied_and_frozen_parameters():
    found = launch(odd_module, world_size=2)
    for start, grads in found:
        assert start["table"].tolist() == [5.0, 5.0] and start["frozen"].tolist() == [1.0, 1.0]
        assert grads["frozen"] is None
        # each rank used one layer: half of the gradient, on both
        assert torch.equal(grads["a.bias"], torch.full((3,), 0.5))
        assert torch.equal(grads["b.bias"], torch.full((3,), 0.5))
        assert torch.equal(grads["a.weight"], torch.ones(3, 3))
    assert all(torch.equal(found[0][0][k], found[1][0][k]) for k in found[0][0])


def on_a_slow_link(overlap):
    group = world(tracer=Tracer(), link=Link(0.02, 1e9))
    ddp = DDP(model(), group, bucket_bytes=2000, overlap=overlap)
    group.tracer.clear()
    tokens, targets = batch(2)
    loss = mean_loss(ddp, tokens, targets)
    loss.backward()
    done = time.monotonic()
    ddp.finish_gradient_synchronization()
    return done, [e.start for e in group.tracer.events]


def test_messages_leave_while_backward_still_computes():
    for done, starts in launch(on_a_slow_link, True, world_size=2):
        assert len(starts) > 3 and starts[0] < done
    for done, starts in launch(on_a_slow_link, False, world_size=2):
        assert min(starts) >= done


def test_buckets_hold_every_parameter_once_last_first():
    parameters = list(model().parameters())
    for size in (1, 1000, 5000, 10**9):
        buckets = fill_buckets(parameters, size)
        assert [p for b in buckets for p in b] == parameters[::-1]
        assert all(len(b) == 1 or sum(p.nbytes for p in b) <= size for b in buckets)
    mixed = [torch.nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    assert len(fill_buckets(mixed, 10**9)) == 2


def twice():
    ddp = DDP(model(), world())
    for _ in range(2):
        mean_loss(ddp, *batch(1)).backward()


def test_bad_use_is_named():
    with pytest.raises(RankError, match="a second backward pass before finish_gradient"):
        launch(twice, world_size=1)
    with pytest.raises(RankError, match="'median' must be 'mean' or 'sum'"):
        launch(lambda: DDP(model(), world(), reduce="median"), world_size=1)
    with pytest.raises(RankError, match="no parameter of the module requires a gradient"):
        launch(lambda: DDP(torch.nn.ReLU(), world()), world_size=1)
