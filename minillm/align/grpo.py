"""GRPO (group relative policy optimization): PPO without a critic.

What a response is worth is compared with the mean of other responses to the same request, instead
of with what a second model expects. That saves the critic's memory and work, and costs several
responses to each request; all tokens of a response share its advantage.
"""

# b responses, t tokens of a response

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from minillm.align.advantages import check_mask
from minillm.align.objectives import Normalize, PolicyLoss, kl_estimate, policy_loss, reduce
from minillm.align.ppo import PPOConfig, PPOStep, Reward, experience
from minillm.align.preference import Batch, improve
from minillm.align.rollout import check_owners, check_vocabulary, hidden, read_logp
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE
from minillm.train.losses import masked_mean


def group_advantages(scores: Tensor, group: int, scale: bool = True) -> Tensor:
    """(r - mean) / (standard deviation + 1e-4) within each group of responses to one request, [b].

    scores [b], groups of `group` in a row; the deviation is the sample's (divided by group - 1).
    A group whose scores are all equal carries no preference: 0. `scale=False` only subtracts the
    mean, so that requests with little spread do not count more. Raises ValueError for scores that
    are not finite, and unless groups of 2 or more fill b. Sources: Shao et al., DeepSeekMath, 2024;
    without scale: Liu et al., Understanding R1-Zero-Like Training, 2025.
    """
    if group < 2 or scores.ndim != 1 or len(scores) % group:
        raise ValueError(f"scores {list(scores.shape)} must be [b], in groups of {group} >= 2")
    if bad := (~scores.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"the scores of responses {bad} are not finite: {scores[bad].tolist()}")
    rows = scores.view(-1, group)
    flat = rows.amax(-1, keepdim=True) == rows.amin(-1, keepdim=True)
    centered = (rows - rows.mean(-1, keepdim=True)).masked_fill(flat, 0.0)
    return (centered / (rows.std(-1, keepdim=True) + 1e-4) if scale else centered).flatten()


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    reference_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.04,
    normalize: Normalize = "sequence",
) -> PolicyLoss:
    """PPO's clipped loss with one advantage a response, and β times the k3 estimate of the KL.

    The KL from the reference is part of the loss here, not of the reward. log-probabilities and
    mask [b, t], advantages [b]; `normalize` is that of both terms: "sequence" in the paper,
    "token" in DAPO, rows · max_new_tokens in Dr. GRPO. Source: Shao et al., DeepSeekMath, 2024.
    """
    actor = policy_loss(logp, old_logp, advantages, mask, clip, normalize)
    mask = check_mask(mask, reference_logp)
    kl = kl_estimate(logp.where(mask, 0.0), reference_logp.where(mask, 0.0), "k3")
    return replace(actor, loss=actor.loss + beta * reduce(kl, mask, normalize))


def grpo(
    policy: LM,
    reference: LM,
    tokenizer: BPE,
    batches: Iterable[Batch],
    reward: Reward,
    optimizer: Optimizer,
    *,
    group: int = 8,
    beta: float = 0.04,
    scale: bool = True,
    normalize: Normalize = "sequence",
    config: PPOConfig | None = None,
    true_reward: Reward | None = None,
    seed: int = 0,
) -> Iterator[PPOStep]:
    """Improve `policy` (in place), one iteration for each of `batches`; yields after each.

    Every request is answered `group` times. `config` is PPO's; what it says of values, discounts
    and whitening has nothing to act on, as there is no critic: `value_loss` and
    `explained_variance` are NaN. The other fields of a step mean what they mean in PPO.

    Raises ValueError as `minillm.align.ppo.ppo` does, and `group_advantages`.
    """
    config = config or PPOConfig()
    check_vocabulary(tokenizer, policy, reference)
    check_owners(policy, reference, [optimizer])
    for model in (policy, reference):  # with dropout two passes of one policy would differ
        model.eval()
    generator = Generator().manual_seed(seed)
    for number, batch in enumerate(batches, start=1):
        rows = [each for each in batch for _ in range(group)]
        if config.minibatches > len(rows):
            raise ValueError(
                f"minibatches={config.minibatches} of a batch of {len(rows)} responses"
            )
        rollout, score, reference_logp, seen = experience(
            *(policy, reference, tokenizer, rows, reward, true_reward, config, generator, number)
        )
        advantages = group_advantages(score, group, scale)
        orders = (torch.randperm(len(rows), generator=generator) for _ in range(config.epochs))
        told, moved = [], 0.0
        for places in (part for order in orders for part in order.tensor_split(config.minibatches)):
            part = rollout.rows(places)
            told_by, weight = hidden(policy, part), config.entropy_weight
            logp, undecided = read_logp(policy, told_by, part, config.temperature, weight > 0)
            sides = (logp, part.logp, reference_logp[places], advantages[places], part.mask)
            found = grpo_loss(*sides, config.clip, beta, normalize)
            moved = found.approximate_kl
            if config.target_kl is not None and moved > 1.5 * config.target_kl:
                break
            loss, bonus = found.loss, masked_mean(undecided, part.mask)
            improve(policy, loss - weight * bonus, optimizer, config.max_norm)
            told.append((found.loss.item(), found.clip_share, bonus.item()))
        loss, clip_share, undecided = torch.tensor(told).view(-1, 3).mean(0).tolist()
        yield PPOStep(
            step=number,
            beta=beta,
            clip_share=clip_share,
            approximate_kl=moved,
            policy_loss=loss,
            value_loss=math.nan,
            explained_variance=math.nan,
            entropy=undecided,
            updates=len(told),
            **seen,
        )
