"""Optimizer state on the host, and layers in tiles: same numbers, fewer device bytes, more time."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel.group import Link
from minillm.parallel.offload import Bus, OffloadedOptimizer, TiledLinear
from minillm.parallel.partition import held
from minillm.train.optim import AdamW, decay_groups
from minillm.train.precision import MasterWeights

pytestmark = pytest.mark.slow  # many ranks, many times

CFG = ModelConfig(29, 16, 2, 2, max_len=12, position="rope", norm="rms", mlp="swiglu")


def batch(rows, seed=0):
    """Tokens and targets [rows, 7]."""
    return torch.randint(29, (2, rows, 7), generator=torch.Generator().manual_seed(seed))


def mean_loss(lm, tokens, targets):
    return F.cross_entropy(lm(tokens).flatten(0, 1), targets.flatten())


def train(lm, optimizer, steps, passes=2):
    """Several backward passes a step; the learning rate falls."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.zero_grad()
        for i in range(passes):
            (mean_loss(lm, *batch(3, 2 * step + i)) / passes).backward()
        optimizer.step()


def test_the_same_weights_as_on_the_device():
    ours, theirs = LM(CFG, 0).double(), LM(CFG, 0).double()
    ours.blocks[1].mlp.requires_grad_(False)
    theirs.blocks[1].mlp.requires_grad_(False)
    one = OffloadedOptimizer(decay_groups(ours, 0.1), AdamW, Bus(), lr=1.0)
    two = AdamW(decay_groups(theirs, 0.1), lr=1.0)
    train(ours, one, range(3))
    train(theirs, two, range(3))
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-12, atol=1e-14)
    again = LM(CFG, 5).double()
    again.blocks[1].mlp.requires_grad_(False)
    again.load_state_dict(ours.state_dict())
    three = OffloadedOptimizer(decay_groups(again, 0.1), AdamW, Bus(), lr=1.0)
    three.load_state_dict(copy.deepcopy(one.state_dict()))
    train(again, three, [3])
    train(theirs, two, [3])
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), p, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_somebody_set_and_a_closure():
    p = nn.Parameter(torch.ones(2))
    optimizer = OffloadedOptimizer([p], torch.optim.SGD, Bus(), lr=0.5)
    p.grad = torch.tensor([1.0, 2.0])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert p.tolist() == [0.5, 0.0]
    optimizer.zero_grad()
    assert optimizer.step(lambda: p.sum().backward()) is None
    assert p.tolist() == [0.0, -0.5]


def test_bytes_on_the_device_fall_and_those_on_the_host_rise():
    kept, moved = LM(CFG, 0), LM(CFG, 0).bfloat16()
    x = sum(p.numel() for p in kept.parameters())
    one = MasterWeights(decay_groups(kept, 0.1), AdamW, torch.bfloat16, lr=1e-3)
    bus = Bus()
    two = OffloadedOptimizer(decay_groups(moved, 0.1), AdamW, bus, lr=1e-3)
    for lm, optimizer in ((kept, one), (moved, two)):
        for step in range(2):
            optimizer.zero_grad()
            bus.moved = 0
            mean_loss(lm, *batch(3, step)).backward()
            if optimizer is two:
                two.finish_gradient_synchronization()
                now = held(moved, two)
            optimizer.step()
    on_device = held(kept, one)
    masters = sum(m.nbytes for _, m in one._pairs)
    steps = 4 * len(list(kept.parameters()))
    assert on_device.total + masters == (2 + 4 + 12) * x + steps  # it keeps float32 gradients
    assert now == (2 * x, 0, 0)
    assert two.host_bytes == (12 + 4) * x + steps  # masters, Adam's state and gradients
    assert bus.moved == 4 * x  # gradients down and parameters up, two bytes each


def test_a_step_takes_longer_on_a_slower_link():
    seconds = []
    lm = LM(CFG, 0)
    for bandwidth in (1e9, 1e6, 2e5):
        bus = Bus(Link(0.0, bandwidth))
        optimizer, times = OffloadedOptimizer(copy.deepcopy(lm).parameters(), AdamW, bus, lr=1), []
        for _ in range(2):
            start = time.monotonic()
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
            times.append(time.monotonic() - start)
        seconds.append(min(times))
    n = 2 * sum(p.nbytes for p in lm.parameters())
    assert seconds[1] > n / 1e6 and seconds[2] > n / 2e5
    assert seconds[0] < seconds[2]


def test_gradients_travel_while_backward_computes():
    lm = nn.Sequential(*(nn.Linear(10, 10) for _ in range(6)))
    optimizer = OffloadedOptimizer(lm.parameters(), torch.optim.SGD, Bus(Link(0.05, 1e9)), lr=0.1)
    start = time.monotonic()
    lm(torch.ones(1, 10)).sum().backward()
    backward = time.monotonic() - start
    assert all(p.grad is None for p in lm.parameters())
    optimizer.finish_gradient_synchronization()
    assert backward < 12 * 0.05 <= time.monotonic() - start


@pytest.mark.parametrize("tiles", [1, 3, 7])
def test_a_tiled_layer_computes_what_the_layer_does(tiles):
    rng = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(5, 7).double(), torch.randn(2, 3, 5, dtype=torch.float64, generator=rng)
    tiled = TiledLinear(layer, tiles, Bus())
    assert [w.shape[1] for w in tiled.tiles] == [5] * tiles
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
    tiled(here).square().sum().backward()
    grad, layer.bias.grad = layer.bias.grad, None  # the bias is the layer's own
    layer(there).square().sum().backward()
    torch.testing.assert_close(tiled(x), layer(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, layer.bias.grad, rtol=1e-12, atol=1e-14)
    weights = torch.cat([w.grad for w in tiled.tiles])
    torch.testing.assert_close(weights, layer.weight.grad, rtol=1e-12, atol=1e-14)
    free = TiledLinear(nn.Linear(5, 7, bias=False).double(), tiles, Bus())
    assert torch.autograd.gradcheck(free, x.clone().requires_grad_())


def test_a_layer_larger_than_the_device():
    layer, x = nn.Linear(64, 96), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    capacity = layer.weight.nbytes // 4
    with pytest.raises(MemoryError, match=f"24576 bytes more than the 0 held .* into {capacity}"):
        TiledLinear(layer, 1, Bus(capacity=capacity))(x)
    bus = Bus(capacity=capacity)
    tiled = TiledLinear(layer, 4, bus)
    y = tiled(x)
    torch.testing.assert_close(y, layer(x))
    y.sum().backward()
    assert bus.held == 0 and bus.peak == capacity
    # to forward, once more as x needs no gradient: not; and a gradient back
    assert bus.moved == 2 * layer.weight.nbytes
    tiled.requires_grad_(False)
    tiled(x.requires_grad_()).sum().backward()
    assert bus.moved == 4 * layer.weight.nbytes and tiled.tiles[0].requires_grad is False


def test_bad_use_is_named():
    layer = nn.Linear(2, 3)
    for tiles in (0, 4):
        with pytest.raises(ValueError, match=f"tiles={tiles} must be from 1 to the 3 outputs"):
            TiledLinear(layer, tiles, Bus())
    with pytest.raises(ValueError, match="nothing to train"):
        OffloadedOptimizer(layer.requires_grad_(False).parameters(), AdamW, Bus(), lr=1e-3)
    layer.requires_grad_()
    one = OffloadedOptimizer(layer.parameters(), AdamW, Bus(), lr=1e-3)
    two = OffloadedOptimizer([layer.weight], AdamW, Bus(), lr=1e-3)
    with pytest.raises(ValueError, match=r"masters of shapes \[\(3, 2\), \(3,\)\], these are"):
        two.load_state_dict(one.state_dict())
