"""Rewards, advantages, losses and KL control of PPO against `trl` 0.11.4, the last that had PPO.

That version does not import beside today's `transformers`. Its functions are taken out of the wheel
and run as they stand. The wheel is not installed; to run these tests:

    pip download --no-deps --dest build trl==0.11.4

Where the two differ, the test says so: it whitens with the sample's variance, we with that of the
tokens there are; it reports k2 as `approxkl` and stops early by k1, we use k3 for both; it leaves
out minibatches whose mean ratio is above 10, we do not.
"""

import ast
import hashlib
import math
import typing
import warnings
import zipfile
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillm.align.advantages import gae, shaped_rewards, whiten
from minillm.align.objectives import KLControl, entropy, kl_estimate, policy_loss, value_loss
from minillm.paths import ROOT
from minillm.train.losses import masked_mean

WHEEL = ROOT / "build" / "trl-0.11.4-py3-none-any.whl"
SHA256 = "071d64164c152ef65b44d15f878793b28d3340310c9e157dc3608bbe5fa549a9"
FUNCTIONS = {
    "trl/core.py": (
        ["flatten_dict", "masked_mean", "masked_var", "masked_whiten"],
        ["clip_by_value", "entropy_from_logits"],
    ),
    "trl/trainer/ppo_trainer.py": (
        ["compute_rewards", "_kl_penalty", "compute_advantages", "loss"],
        [],
    ),
    "trl/trainer/utils.py": (["AdaptiveKLController"], []),
}
pytestmark = pytest.mark.skipif(not WHEEL.exists(), reason=f"needs build/{WHEEL.name}")


@pytest.fixture(scope="module")
def theirs():
    """The functions by name, as plain functions: methods take the trainer first."""
    assert hashlib.sha256(WHEEL.read_bytes()).hexdigest() == SHA256
    space = {"torch": torch, "F": torch.nn.functional, "np": np, "warnings": warnings}
    space["Mapping"] = Mapping
    space |= {name: getattr(typing, name) for name in ("Dict", "List", "Optional", "Tuple")}
    with zipfile.ZipFile(WHEEL) as wheel:
        for path, names in FUNCTIONS.items():
            wanted = {*names[0], *names[1]}
            tree = ast.parse(wheel.read(path))
            found = [x for x in ast.walk(tree) if getattr(x, "name", None) in wanted]
            assert {x.name for x in found} == wanted
            exec(compile(ast.Module(found, []), path, "exec"), space)
    return SimpleNamespace(**space)


@pytest.fixture
def trainer(theirs):
    config = SimpleNamespace(
        kl_penalty="kl",
        whiten_rewards=False,
        gamma=0.9,
        lam=0.8,
        cliprange=0.2,
        cliprange_value=0.3,
        vf_coef=1.0,
        ratio_threshold=10.0,
    )
    trainer = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=0.3))
    trainer._kl_penalty = lambda *sides: theirs._kl_penalty(trainer, *sides)
    return trainer


@pytest.fixture
def batch():
    """Five responses of at most seven tokens; float64."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]

    def draw(scale=1.0):
        return scale * torch.randn(5, 7, generator=rng, dtype=torch.float64)

    logp = draw() - 2
    found = {"mask": mask, "logp": logp, "old": logp + draw(0.2), "ref": draw() - 2}
    found |= {"values": draw(), "old_values": draw(), "rewards": draw(), "advantages": draw()}
    return {**found, "score": draw()[:, 0]}


def same(ours, wanted):
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_shaped_rewards(theirs, trainer, batch):
    sides = [batch[name] for name in ("score", "logp", "ref", "mask")]
    wanted, _, _ = theirs.compute_rewards(trainer, *sides)
    same(shaped_rewards(*sides, beta=0.3), wanted.where(batch["mask"], 0.0))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_and_returns(theirs, trainer, batch, gamma, lam):
    trainer.config.gamma, trainer.config.lam = gamma, lam
    mask, n = batch["mask"], batch["mask"].sum().item()
    _, white, returns = theirs.compute_advantages(trainer, batch["values"], batch["rewards"], mask)
    ours, our_returns = gae(batch["rewards"], batch["values"], mask, gamma, lam)
    same(our_returns, returns.where(mask, 0.0))
    # theirs divides by the sample's deviation, and adds 1e-8 to the variance
    scaled = math.sqrt((n - 1) / n) * whiten(ours, mask)
    torch.testing.assert_close(scaled, white.where(mask, 0.0), rtol=1e-7, atol=1e-9)
    assert (whiten(ours, mask) - white).where(mask, 0.0).abs().max() > 0.01  # it is no rounding


def test_losses_and_their_gradients(theirs, trainer, batch):
    mask = batch["mask"]
    found, wanted = [], []
    for into in (found, wanted):
        into += [batch[name].clone().requires_grad_() for name in ("logp", "values")]
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, 11, generator=rng, dtype=torch.float64)
    # (old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
    sides = (batch["old"], batch["old_values"], logits, wanted[1], wanted[0], mask)
    theirs_policy, theirs_value, stats = theirs.loss(
        trainer, *sides, batch["advantages"], batch["rewards"]
    )
    ours = policy_loss(found[0], batch["old"], batch["advantages"], mask, clip=0.2)
    value = value_loss(found[1], batch["old_values"], batch["rewards"], mask, clip=0.3)
    same(ours.loss, theirs_policy)
    same(value, theirs_value)
    (ours.loss + value).backward()
    (theirs_policy + theirs_value).backward()
    for a, b in zip(found, wanted, strict=True):
        same(a.grad, b.grad)
    assert 0 < ours.clip_share == pytest.approx(stats["policy/clipfrac"].item(), rel=1e-6)
    same(masked_mean(entropy(logits.log_softmax(-1)), mask), stats["policy/entropy"])
    # three estimates of the same KL; ours reports the third
    k1, k2, k3 = (
        masked_mean(kl_estimate(batch["old"], batch["logp"], kind), mask)
        for kind in ("k1", "k2", "k3")
    )
    same(k1, stats["policy/policykl"])
    same(k2, stats["policy/approxkl"])
    assert ours.approximate_kl == pytest.approx(k3.item())
    assert k3.item() == pytest.approx(k2.item(), rel=0.2) and k3 != k2


@pytest.mark.parametrize("kl", [0.1, 5.5, 6.0, 6.7, 40.0])
def test_adaptive_control(theirs, kl):
    wanted = theirs.AdaptiveKLController(0.2, target=6.0, horizon=1000)
    ours = KLControl(0.2, target=6.0, horizon=1000)
    for _ in range(3):
        wanted.update(kl, 64)
        ours = ours.after(kl, 64)
        assert ours.beta == pytest.approx(float(wanted.value), rel=1e-12)
