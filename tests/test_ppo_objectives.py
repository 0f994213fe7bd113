"""Shaped rewards, advantages, losses and KL control, beside versions in NumPy written from the
formulas, token by token, in float64."""

import math

import numpy as np
import pytest
import torch

from minillm.align.advantages import gae, last_token, shaped_rewards, whiten
from minillm.align.objectives import (
    KLControl,
    entropy,
    kl_estimate,
    policy_loss,
    reduce,
    value_loss,
)

F64 = torch.float64


@pytest.fixture
def batch():
    """Five responses of at most seven tokens, of lengths 7, 1, 3, 6, 2; noise behind their ends."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 3, 6, 2])
    mask = torch.arange(7) < lengths[:, None]

    def draw(scale=1.0):
        return scale * torch.randn(5, 7, generator=rng, dtype=F64)

    return {
        "mask": mask,
        "logp": -draw().abs() - 0.1,
        "old": -draw().abs() - 0.1,
        "ref": -draw().abs() - 0.1,
        "values": draw(),
        "old_values": draw(),
        "rewards": draw(),
        "advantages": draw(),
        "score": torch.randn(5, generator=rng, dtype=F64),
    }


def numpy(batch):
    return {name: x.numpy() for name, x in batch.items()}


# -- rewards and advantages ------------------------------------------------------------------------


def test_the_score_lands_on_the_last_token_and_the_rest_is_kl(batch):
    got = shaped_rewards(*(batch[x] for x in ("score", "logp", "ref", "mask")), beta=0.3)
    b = numpy(batch)
    for row in range(5):
        n = int(b["mask"][row].sum())
        for t in range(7):
            want = -0.3 * (b["logp"][row, t] - b["ref"][row, t]) if t < n else 0.0
            want += b["score"][row] if t == n - 1 else 0.0
            assert got[row, t].item() == pytest.approx(want, abs=1e-12)
        assert last_token(batch["mask"])[row] == n - 1


def by_definition(rewards, values, length, gamma, lam):
    """A_t = Σ_k (γ λ)^k δ_{t+k}, the sum written out for every t."""
    values = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_the_sum_of_discounted_errors(batch, gamma, lam):
    got, returns = gae(batch["rewards"], batch["values"], batch["mask"], gamma, lam)
    b = numpy(batch)
    want = np.zeros((5, 7))
    for row in range(5):
        n = int(b["mask"][row].sum())
        want[row, :n] = by_definition(b["rewards"][row], b["values"][row], n, gamma, lam)
    np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(returns, want + b["values"] * b["mask"], atol=1e-12)


def test_the_two_ends_of_lambda(batch):
    """0: the one-step temporal difference; 1: the sum of what came, less the value."""
    b = numpy(batch)
    n, rewards, values = 7, b["rewards"][0], b["values"][0]
    one_step = [rewards[t] + (values[t + 1] if t < 6 else 0) - values[t] for t in range(n)]
    monte_carlo = [rewards[t:].sum() - values[t] for t in range(n)]
    for lam, want in ((0.0, one_step), (1.0, monte_carlo)):
        got, _ = gae(batch["rewards"], batch["values"], batch["mask"], 1.0, lam)
        np.testing.assert_allclose(got[0], want, atol=1e-12)


def test_what_stands_behind_the_end_changes_nothing(batch):
    noisy = {
        name: x.where(batch["mask"], 99.0) if x.ndim == 2 and x.is_floating_point() else x
        for name, x in batch.items()
    }
    for one, other in zip(
        gae(batch["rewards"], batch["values"], batch["mask"]),
        gae(noisy["rewards"], noisy["values"], noisy["mask"]),
        strict=True,
    ):
        assert torch.equal(one, other)
    names = ("logp", "old", "advantages", "mask")
    losses = [policy_loss(*(each[x] for x in names)).loss for each in (batch, noisy)]
    assert losses[0] == losses[1]
    assert whiten(batch["rewards"], batch["mask"]).equal(whiten(noisy["rewards"], batch["mask"]))


def test_whitening(batch):
    mask = batch["mask"]
    kept = batch["rewards"][mask].numpy()
    got = whiten(batch["rewards"], mask)
    np.testing.assert_allclose(got[mask], (kept - kept.mean()) / kept.std(), atol=1e-12)
    assert (got[~mask] == 0).all()
    shifted = whiten(batch["rewards"], mask, shift_mean=False)
    assert shifted[mask].mean().item() == pytest.approx(kept.mean())
    same = torch.full((5, 7), 0.1, dtype=F64)
    assert whiten(same, mask).abs().max() < 1e-6  # nothing to prefer, and no 0 / 0


# -- losses ----------------------------------------------------------------------------------------


def policy_by_hand(b, clip):
    terms, clipped = np.zeros((5, 7)), 0
    for row, t in zip(*b["mask"].nonzero(), strict=True):
        ratio = math.exp(b["logp"][row, t] - b["old"][row, t])
        a = b["advantages"][row, t]
        held = min(max(ratio, 1 - clip), 1 + clip)
        terms[row, t] = -min(ratio * a, held * a)
        clipped += held * a < ratio * a
    return terms, clipped / b["mask"].sum()


@pytest.mark.parametrize("normalize", ["token", "sequence", 40.0])
def test_the_clipped_policy_loss(batch, normalize):
    b = numpy(batch)
    got = policy_loss(
        *(batch[x] for x in ("logp", "old", "advantages", "mask")), 0.2, normalize=normalize
    )
    terms, share = policy_by_hand(b, 0.2)
    counts = b["mask"].sum(-1)
    want = {
        "token": terms.sum() / counts.sum(),
        "sequence": (terms.sum(-1) / counts).mean(),
    }.get(normalize, terms.sum() / 40)
    assert got.loss.item() == pytest.approx(want, abs=1e-12)
    assert got.clip_share == pytest.approx(share)
    x = (b["logp"] - b["old"])[b["mask"]]
    assert got.approximate_kl == pytest.approx((np.exp(x) - 1 - x).mean(), abs=1e-12)


def test_no_gradient_where_the_clip_holds(batch):
    logp = batch["logp"].clone().requires_grad_(True)
    policy_loss(logp, batch["old"], batch["advantages"], batch["mask"]).loss.backward()
    ratio = (logp - batch["old"]).exp()
    up, a = ratio > 1.2, batch["advantages"]
    stopped = batch["mask"] & ((up & (a > 0)) | ((ratio < 0.8) & (a < 0)))
    assert stopped.any() and (logp.grad[stopped] == 0).all()
    moving = batch["mask"] & ~stopped
    torch.testing.assert_close(logp.grad[moving], (-(ratio * a) / batch["mask"].sum())[moving])
    assert (logp.grad[~batch["mask"]] == 0).all()


def test_at_the_old_policy_the_gradient_is_that_of_the_plain_policy_gradient(batch):
    logp = batch["old"].clone().requires_grad_(True)
    told = policy_loss(logp, batch["old"], batch["advantages"], batch["mask"])
    told.loss.backward()
    want = -batch["advantages"].where(batch["mask"], 0) / batch["mask"].sum()
    torch.testing.assert_close(logp.grad, want)
    assert told.clip_share == 0 and told.approximate_kl == 0


def test_one_advantage_a_response(batch):
    each = batch["score"]
    names = [batch[x] for x in ("logp", "old")]
    one = policy_loss(*names, each, batch["mask"]).loss
    all_tokens = policy_loss(*names, each[:, None].expand(5, 7), batch["mask"]).loss
    assert one == all_tokens


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_clipped_value_loss(batch, clip):
    b = numpy(batch)
    returns = batch["rewards"]
    got = value_loss(batch["values"], batch["old_values"], returns, batch["mask"], clip)
    terms = []
    for row, t in zip(*b["mask"].nonzero(), strict=True):
        v, old, goal = b["values"][row, t], b["old_values"][row, t], b["rewards"][row, t]
        error = (v - goal) ** 2
        if clip is not None:
            near = old + min(max(v - old, -clip), clip)
            error = max(error, (near - goal) ** 2)
        terms.append(error / 2)
    assert got.item() == pytest.approx(np.mean(terms), abs=1e-12)


def test_entropy_and_kl_of_whole_distributions():
    rng = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 6, generator=rng, dtype=F64)
    p, q = logits.softmax(-1).numpy(), other.softmax(-1).numpy()
    assert entropy(logits.log_softmax(-1)).item() == pytest.approx(
        -(p * np.log(p)).sum(), abs=1e-12
    )
    exact = (p * np.log(p / q)).sum()
    logp, logq = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    for kind, unbiased in (("k1", True), ("k3", True), ("k2", False)):
        mean = (torch.tensor(p) * kl_estimate(logp, logq, kind)).sum().item()
        assert (abs(mean - exact) < 1e-12) == unbiased
    assert (kl_estimate(logp, logq, "k3") >= 0).all() and (kl_estimate(logp, logq, "k1") < 0).any()


def test_adaptive_control_finds_the_weight_and_a_fixed_one_stays():
    """A world in which KL = 10 / β: the control has to find β = 10 / target."""
    control, fixed = KLControl(0.1, target=4.0, horizon=100), KLControl(0.1)
    for _ in range(300):
        control, fixed = control.after(10 / control.beta, 64), fixed.after(10 / fixed.beta, 64)
    assert control.beta == pytest.approx(2.5, rel=0.05)
    assert fixed.beta == 0.1


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input_is_refused(batch):
    four = [batch[x] for x in ("score", "logp", "ref", "mask")]
    empty = batch["mask"].clone()
    empty[3] = False
    with pytest.raises(ValueError, match=r"responses \[3\] are empty"):
        shaped_rewards(*four[:3], empty, 0.1)
    spoiled = batch["score"].clone()
    spoiled[1], spoiled[4] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"responses \[1, 4\] are not finite: \[nan, inf\]"):
        shaped_rewards(spoiled, *four[1:], 0.1)
    with pytest.raises(ValueError, match="one a response"):
        shaped_rewards(batch["logp"], *four[1:], 0.1)
    with pytest.raises(ValueError, match="must all be"):
        gae(batch["rewards"][:, :6], batch["values"], batch["mask"])
    with pytest.raises(ValueError, match=r"gamma=1.5 and lam=0.95"):
        gae(batch["rewards"], batch["values"], batch["mask"], gamma=1.5)
    with pytest.raises(ValueError, match="'token', 'sequence' or a number"):
        reduce(batch["logp"], batch["mask"], "mean")
    with pytest.raises(ValueError, match="clip=0"):
        policy_loss(*(batch[x] for x in ("logp", "old", "advantages", "mask")), clip=0)
    with pytest.raises(ValueError, match="beta=-1"):
        KLControl(-1.0)
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_estimate(batch["logp"], batch["ref"], "k4")
