"""A backward pass in two halves against a whole one: gradients, and the products it takes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel.halves import input_gradient
from minillm.recompute import checkpoint

CFG = ModelConfig(
    vocab_size=13, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, max_len=8, impl="reference"
)


def test_halves_have_the_whole_gradient_for_the_same_products():
    whole = LM(CFG, seed=0).double()
    x = torch.randn(2, 5, CFG.d_model, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, CFG.d_model, dtype=torch.float64)
    positions = torch.arange(5)

    def gradients():
        return {n: p.grad.clone() for n, p in whole.named_parameters() if p.grad is not None}

    def halves(body):
        whole.zero_grad()
        y = body(x, positions)
        found, later = input_gradient(y, x, weight)
        assert not gradients()
        later()
        torch.testing.assert_close(found, want_x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(), want, rtol=1e-12, atol=1e-12)

    y = whole.body(x, positions)
    with FlopCounterMode(display=False) as together:
        y.backward(weight)
    want, want_x = gradients(), x.grad.clone()
    halves(whole.body)
    halves(lambda *args: checkpoint(whole.body, *args))
    y = whole.body(x, positions)
    with FlopCounterMode(display=False) as first:
        _, later = input_gradient(y, x, weight)
    with FlopCounterMode(display=False) as second:
        later()
    shares = [part.get_total_flops() / together.get_total_flops() for part in (first, second)]
    assert sum(shares) == 1 and 0.5 < shares[0] < 0.6  # attention itself has no weights


def test_halves_with_a_weight_used_twice_and_several_results():
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, dtype=torch.float64, requires_grad=True)
    frozen = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def f(x):
        y = torch.tanh(x @ w) @ (w * 2) + v.exp()
        parts = (y * v).split(2, dim=1)  # one node, several results, of which one is not used
        return ((parts[0] @ w[:2]) @ frozen + x).sin().sum()

    want = torch.autograd.grad(f(x), (x, w, v))
    found, later = input_gradient(f(x), x)
    assert w.grad is None and v.grad is None
    later()
    for a, b in zip((found, w.grad, v.grad), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="y does not depend on x"):
        input_gradient(f(x.detach()), x)
    with pytest.raises(ValueError, match="x must be a leaf"):
        input_gradient(f(x * 2), x * 2)
