"""Our Adafactor takes the steps of transformers' Adafactor."""

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as TheirAdafactor

from minillm.train.optim import Adafactor


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "options",
    [{}, {"warmup_init": True}, {"lr": 0.05}, {"lr": 0.05, "scale_parameter": False}],
    ids=str,
)
def test_step_for_step(options, beta1, decay):
    rng = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3,), (), (2, 3, 4), (1, 1), (60, 50)]
    ours = [nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    both = {"beta1": beta1, "weight_decay": decay, "clip_threshold": 0.7}
    mine = Adafactor(ours, **options, **both)
    reference = TheirAdafactor(theirs, **options, **both, relative_step="lr" not in options)
    for step in range(12):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = 10.0 ** (i - 3) * torch.randn(p.shape, generator=rng, dtype=torch.float64)
            if step == 1 and i in (0, 5):
                p.grad = None  # a parameter's own steps count
            q.grad = None if p.grad is None else p.grad.clone()
        mine.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
