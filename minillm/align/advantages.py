"""From the score of a whole response to a signal for each of its tokens.

Time runs over the response's tokens: state t is the prompt and t tokens, the action is token t.
"""
# b responses, t tokens of a response (prompt tokens are masked out)

from __future__ import annotations

import torch
from torch import Tensor

from minillm.train.losses import masked_mean


def check_mask(mask: Tensor, *others: Tensor) -> Tensor:
    """`mask` as booleans; ValueError for other shapes, and where a response has no token."""
    if shapes := [tuple(x.shape) for x in others if x.shape != mask.shape]:
        raise ValueError(f"mask {tuple(mask.shape)} and values {shapes} must all be [b, t]")
    mask = mask.bool()
    if empty := (~mask.any(-1)).nonzero().flatten().tolist():
        raise ValueError(f"responses {empty} are empty: there is no token to give a reward to")
    return mask


def last_token(mask: Tensor) -> Tensor:
    """Where each response ends, [b]: the place of the last true of each row of mask [b, t]."""
    places = torch.arange(mask.shape[-1], device=mask.device)
    return (places * mask).amax(-1)


def shaped_rewards(
    score: Tensor, logp: Tensor, reference_logp: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """A reward for each token: r_t = -β (log π(a_t) - log π_ref(a_t)), and the last adds the score.

    score [b], log-probabilities of the sampled tokens [b, t], mask [b, t] true at the response;
    the result [b, t] is 0 elsewhere. The sum over a response is score - β Σ_t log π / π_ref, whose
    mean estimates E[score] - β KL(π | π_ref).

    Raises ValueError for scores that are not finite (which responses), for empty responses and for
    shapes that do not fit. Source: Ziegler et al., Fine-Tuning Language Models from Human
    Preferences, 2019.
    """
    mask = check_mask(mask, logp, reference_logp)
    if score.shape != mask.shape[:1]:
        raise ValueError(f"score {tuple(score.shape)} must be [{len(mask)}], one a response")
    if bad := (~score.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"the scores of responses {bad} are not finite: {score[bad].tolist()}")
    rewards = (-beta * (logp - reference_logp)).where(mask, 0.0)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last_token(mask)] += score.to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates, and the returns that a critic is to learn: both [b, t].

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}        return_t = A_t + V_t

    `values` [b, t] are V of the state in which each token was chosen; behind the last token the
    episode is over, V = 0. λ = 0 is the one-step temporal difference (little variance, all of the
    critic's bias), λ = 1 the sum of what came less V (no bias, all of the variance). Zero outside
    of the mask.

    Raises ValueError for γ, λ outside [0, 1] and where `check_mask` does. Source: Schulman et al.,
    High-Dimensional Continuous Control Using Generalized Advantage Estimation, 2016.
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma={gamma} and lam={lam} must be in [0, 1]")
    mask = check_mask(mask, rewards, values)
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    found = torch.zeros_like(values)
    later = following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        here = mask[:, t]
        # a token outside of the response passes on what comes behind it: nothing
        later = (delta + gamma * lam * later).where(here, later)
        following = values[:, t].where(here, following)
        found[:, t] = later.where(here, 0.0)
    return found, found + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x with mean 0 and variance 1 over the mask, 0 outside; `shift_mean=False` keeps the mean.

    The step of a policy then does not depend on the scale of the rewards. If all x are equal they
    carry no preference: the result is 0 (or their mean), not a division by zero.
    """
    mask = check_mask(mask, x)
    mean = masked_mean(x, mask)
    deviation = masked_mean((x - mean).square(), mask).sqrt()
    scaled = (x - mean) / deviation.clamp(min=torch.finfo(x.dtype).eps ** 0.5 * (1 + mean.abs()))
    return (scaled if shift_mean else scaled + mean).where(mask, 0.0)
