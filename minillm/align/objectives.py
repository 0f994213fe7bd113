"""What PPO minimizes: clipped losses of policy and critic, and measures of how far it has moved.

All are pure functions of log-probabilities and values [b, t] with a mask, true at the response.
`normalize` says what a loss is a mean over: "token" (all tokens count alike, so long responses
count more), "sequence" (first within each response, then over responses), or a number that the sum
is divided by (so that a token's weight depends neither on the batch nor on the response).
"""
# b responses, t tokens, v vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillm.align.advantages import check_mask
from minillm.train.losses import masked_mean

Normalize = str | float


def reduce(x: Tensor, mask: Tensor, normalize: Normalize = "token") -> Tensor:
    """One number from x [b, t] over a mask; see the module.

    >>> x, mask = torch.tensor([[2.0, 4.0], [6.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> [reduce(x, mask, how).item() for how in ("token", "sequence", 6.0)]
    [4.0, 4.5, 2.0]
    """
    mask = check_mask(mask, x)
    if normalize == "token":
        return masked_mean(x, mask)
    sums = x.where(mask, 0.0).sum(-1)
    if normalize == "sequence":
        return (sums / mask.sum(-1)).mean()
    if isinstance(normalize, str) or not normalize > 0:
        raise ValueError(f"normalize={normalize!r} must be 'token', 'sequence' or a number above 0")
    return sums.sum() / normalize


@dataclass(frozen=True)
class PolicyLoss:
    """The loss with its gradient, and what tells how the update went."""

    loss: Tensor
    clip_share: float
    """of tokens at which the clipped branch is the one that counts: they get no gradient"""
    approximate_kl: float
    """KL(old | new) in nats a token, see `kl_estimate`"""


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    normalize: Normalize = "token",
) -> PolicyLoss:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) with ρ = π(a) / π_old(a), from log-probabilities [b, t].

    Advantages are [b, t], or [b] where all tokens of a response share one. Moving ρ further than ε
    in the direction that A asks for gains nothing, so nothing pushes it there; back it may always
    go. Source: Schulman et al., Proximal Policy Optimization Algorithms, 2017.
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be above 0")
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand_as(logp)
    mask = check_mask(mask, logp, old_logp, advantages)
    difference = (logp - old_logp).where(mask, 0.0)
    ratio = difference.exp()
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = reduce(-torch.minimum(free, held), mask, normalize)
    with torch.no_grad():
        share = masked_mean((held < free).to(ratio.dtype), mask).item()
        kl = masked_mean(kl_estimate(old_logp, logp), mask).item()
    return PolicyLoss(loss, share, kl)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    normalize: Normalize = "token",
) -> Tensor:
    """½ max((V - R)², (V_clipped - R)²), V_clipped within `clip` of the values before the update.

    All [b, t]. `clip=None` leaves the plain squared error. Source: as `policy_loss`, in the
    authors' code; described by Huang et al., The 37 Implementation Details of Proximal Policy
    Optimization, 2022.
    """
    mask = check_mask(mask, values, old_values, returns)
    error = (values - returns).square()
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip={clip} must be above 0, or None")
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * reduce(error, mask, normalize)


def entropy(logp: Tensor) -> Tensor:
    """H = -Σ p log p in nats, from all log-probabilities [..., v] -> [...]: how undecided it is."""
    return -(logp.exp() * logp).sum(-1)


def kl_estimate(logp: Tensor, reference_logp: Tensor, kind: str = "k3") -> Tensor:
    """For actions sampled from π, numbers whose mean is KL(π | ref): of the shape of `logp`.

    With x = log ref - log π: k1 = -x has no bias, but much variance, and signs; k2 = x² / 2 is
    biased, with little variance near 0; k3 = exp(x) - 1 - x has no bias and is never below 0. At
    k3 the expectation must exist: where ref is much likelier than π, exp(x) is large.
    Source: Schulman, Approximating KL Divergence, 2020.
    """
    x = reference_logp - logp
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind={kind!r} must be 'k1', 'k2' or 'k3'")
    return {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[kind]


@dataclass(frozen=True)
class KLControl:
    """The weight β of the KL penalty: fixed, or (with a `target`) steered toward it.

        β ← β (1 + clip(KL / target - 1, ±0.2) · n / horizon)        after n responses

    An adaptive control that started wrong finds its weight; a fixed one keeps what it was given.
    State is explicit: `after` returns the next control. Source: Ziegler et al., Fine-Tuning
    Language Models from Human Preferences, 2019.

    >>> KLControl(0.1, target=2.0, horizon=100).after(kl=8.0, responses=50).beta
    0.11000000000000001
    >>> KLControl(0.1).after(kl=8.0, responses=50).beta
    0.1
    """

    beta: float
    target: float | None = None
    """nats a response"""
    horizon: int = 10_000
    """responses after which β has changed by a fifth at most, in one direction"""

    def __post_init__(self) -> None:
        steered = self.target is not None
        if not self.beta >= 0 or self.horizon < 1 or (steered and not self.target > 0):
            raise ValueError(
                f"beta={self.beta} must be at least 0, target={self.target} above 0 or None, "
                f"horizon={self.horizon} at least 1"
            )
        if steered and self.beta == 0:
            raise ValueError(f"beta=0 stays 0, whatever it is multiplied by: target={self.target}")

    def after(self, kl: float, responses: int) -> KLControl:
        """The control for the next step, given the mean KL of a response in nats.

        Raises ValueError for a KL that is not a number, and where a fifth of `responses` is not
        below the horizon: β could come to 0 and never back.
        """
        if self.target is None:
            return self
        if math.isnan(kl) or not 0.2 * responses < self.horizon:
            raise ValueError(
                f"kl={kl} must be a number, and horizon={self.horizon} above a fifth of the "
                f"{responses} responses"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * responses / self.horizon))
