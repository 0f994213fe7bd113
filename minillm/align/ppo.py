"""Proximal policy optimization of a language model: four models, one loop that yields each step.

The actor samples responses, a reward function scores them, the reference (the actor as it was)
says how far it has moved, and the critic guesses what a response will be worth before it is
finished. Source: Ouyang et al., Training Language Models to Follow Instructions with Human
Feedback, 2022.
"""

# b responses, t tokens of a response

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minillm.align.advantages import gae, shaped_rewards, whiten
from minillm.align.objectives import KLControl, policy_loss, value_loss
from minillm.align.rollout import (
    Rollout,
    actor_critic,
    check_owners,
    check_vocabulary,
    response_logp,
    response_values,
    roll_out,
)
from minillm.align.value import ValueModel
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE
from minillm.train.losses import masked_mean
from minillm.train.optim import clip_grad_norm

Reward = Callable[[Sequence[str], Sequence[str]], Tensor]
"""n requests, n responses -> a score for each, [n]"""
END = "<|endoftext|>"


@dataclass(frozen=True)
class PPOConfig:
    """The settings of a run; names as in the paper and in most libraries."""

    max_new_tokens: int = 32
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    epochs: int = 4
    minibatches: int = 4
    max_norm: float = 1.0
    """of the gradient, for actor and critic apart"""
    target_kl: float | None = 0.05
    """nats a token between old and new policy: an update stops at 1.5 times as much"""
    max_kl: float | None = None
    """nats a response from the reference: above it the run ends with an error"""
    unended: float | None = None
    """the score of a response without an end marker; None: what the reward says of its text"""
    whiten: bool = True

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("max_new_tokens", "epochs", "minibatches")}
        if wrong := {name: n for name, n in counts.items() if n < 1}:
            raise ValueError(f"{wrong} must be at least 1")
        limits = {name: getattr(self, name) for name in ("target_kl", "max_kl", "value_clip")}
        if wrong := {name: x for name, x in limits.items() if x is not None and not x > 0}:
            raise ValueError(f"{wrong} must be above 0, or None")
        sizes = {name: getattr(self, name) for name in ("temperature", "clip", "max_norm")}
        if wrong := {name: x for name, x in sizes.items() if not x > 0}:
            raise ValueError(f"{wrong} must be above 0")
        weights = {name: getattr(self, name) for name in ("value_weight", "entropy_weight")}
        if wrong := {name: x for name, x in weights.items() if not x >= 0}:
            raise ValueError(f"{wrong} must be at least 0")


@dataclass(frozen=True)
class PPOStep:
    """What one iteration did: a rollout, and the updates made with it."""

    step: int
    """counts from 1"""
    reward: float
    """mean score of the responses, KL penalty not included"""
    true_reward: float | None
    """mean of what is really wanted, where somebody knows it; nothing learns from it"""
    kl: float
    """from the reference, nats a response, estimated from the samples"""
    beta: float
    clip_share: float
    approximate_kl: float
    """of the last minibatch, from the policy that sampled, nats a token"""
    policy_loss: float
    value_loss: float
    explained_variance: float
    """1 - Var(return - V) / Var(return), before the update: 1 is a perfect critic, 0 a useless;
    NaN where all returns are equal, so that there is nothing to explain"""
    entropy: float
    """nats a token"""
    length: float
    """tokens a response"""
    ended: float
    """share of responses that came to their end"""
    updates: int
    """minibatches that were used: fewer than all if the update was stopped early"""
    samples: tuple[tuple[str, str, float], ...]
    """a few (request, response, score)"""


class KLTooLargeError(ValueError):
    """The policy has left the neighborhood of the reference."""


def ppo(
    policy: LM,
    reference: LM,
    critic: ValueModel,
    tokenizer: BPE,
    batches: Iterable[Sequence[tuple[str, Sequence[int]]]],
    reward: Reward,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    control: KLControl,
    config: PPOConfig | None = None,
    true_reward: Reward | None = None,
    seed: int = 0,
) -> Iterator[PPOStep]:
    """Improve `policy` (in place), one iteration for each of `batches`; yields after each.

    A batch holds (request, its tokens as the policy reads them). `optimizers` hold the parameters
    of actor and critic, together or apart. `reward` sees texts; `true_reward` is only reported.
    All models are put into evaluation mode: with dropout two passes of one policy would differ.

    Raises ValueError for scores that are not finite or not one a response, for a reference or
    critic of another vocabulary, for optimizers that hold nothing of the actor or a part of the
    reference, for a KL that is not a number, and (`KLTooLargeError`) above `config.max_kl`.
    """
    config = config or PPOConfig()
    check_vocabulary(tokenizer, policy, reference, critic.lm)
    check_owners(policy, reference, optimizers)
    for model in (policy, reference, critic):
        model.eval()
    generator = torch.Generator().manual_seed(seed)
    models, rewarded = (policy, reference, tokenizer), (reward, true_reward)
    for number, batch in enumerate(batches, start=1):
        rollout, score, reference_logp, seen = experience(
            *models, batch, *rewarded, config, generator, number
        )
        with torch.no_grad():
            values = response_values(critic, rollout)
        rewards = shaped_rewards(score, rollout.logp, reference_logp, rollout.mask, control.beta)
        told = update(policy, critic, rollout, rewards, values, optimizers, config, generator)
        yield PPOStep(step=number, beta=control.beta, **seen, **told)
        control = control.after(seen["kl"], len(batch))


def experience(
    policy: LM,
    reference: LM,
    tokenizer: BPE,
    batch: Sequence[tuple[str, Sequence[int]]],
    reward: Reward,
    true_reward: Reward | None,
    config: PPOConfig,
    generator: torch.Generator,
    number: int,
) -> tuple[Rollout, Tensor, Tensor, dict[str, Any]]:
    """Sample and judge: responses, scores [b], the reference's log-probabilities [b, t], and what
    `PPOStep` tells of them. Raises ValueError as `ppo` does."""
    requests, prompts = zip(*batch, strict=True)
    limits = {"temperature": config.temperature, "generator": generator}
    end = tokenizer.special_ids[END]
    rollout = roll_out(policy, prompts, config.max_new_tokens, end, **limits)
    responses = [tokenizer.decode(ids) for ids in rollout.responses()]
    with torch.no_grad():
        score = reward(requests, responses).float()
        reference_logp = response_logp(reference, rollout, config.temperature)
    if score.shape != (len(batch),):  # before `where`, which would broadcast
        raise ValueError(f"score {tuple(score.shape)} must be [{len(batch)}], one a response")
    if config.unended is not None:
        score = score.where(rollout.ended, config.unended)
    kl = (rollout.logp - reference_logp).sum(-1).mean().item()
    if not math.isfinite(kl):
        raise ValueError(
            f"step {number}: the KL from the reference is {kl}: a model gives no probabilities"
        )
    if config.max_kl is not None and kl > config.max_kl:
        raise KLTooLargeError(
            f"step {number}: the policy is {kl:.1f} nats a response from the reference, more "
            f"than max_kl={config.max_kl}; a larger β or a smaller learning rate keeps it near"
        )
    true = None if true_reward is None else true_reward(requests, responses).mean().item()
    return (
        rollout,
        score,
        reference_logp,
        {
            "reward": score.mean().item(),
            "true_reward": true,
            "kl": kl,
            "length": rollout.mask.sum(-1).float().mean().item(),
            "ended": rollout.ended.float().mean().item(),
            "samples": tuple(zip(requests[:4], responses, score.tolist(), strict=False)),
        },
    )


def update(
    policy: LM,
    critic: ValueModel,
    rollout: Rollout,
    rewards: Tensor,
    values: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, float | int]:
    """Epochs of minibatches over one rollout; what `PPOStep` tells of them.

    rewards and values [b, t]. Advantages are those of the critic before the update.
    """
    mask, count = rollout.mask, len(rollout.tokens)
    if config.minibatches > count:
        raise ValueError(f"minibatches={config.minibatches} of a batch of {count} responses")
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    error, spread = (x[mask].var(correction=0) for x in (returns - values, returns))
    if config.whiten:
        advantages = whiten(advantages, mask)
    sums: dict[str, list[float]] = {"policy_loss": [], "value_loss": [], "clip_share": []}
    entropies, updates, moved, stopped = [], 0, 0.0, False
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator)
        for places in order.tensor_split(config.minibatches):
            part = rollout.rows(places)
            logp, undecided, now = actor_critic(
                *(policy, critic, part, config.temperature), bonus=config.entropy_weight > 0
            )
            actor = policy_loss(logp, part.logp, advantages[places], part.mask, config.clip)
            moved = actor.approximate_kl
            if config.target_kl is not None and moved > 1.5 * config.target_kl:
                stopped = True
                break
            guess = value_loss(now, values[places], returns[places], part.mask, config.value_clip)
            bonus = masked_mean(undecided, part.mask)
            total = actor.loss + config.value_weight * guess - config.entropy_weight * bonus
            _step(total, optimizers, (policy, critic), config.max_norm)
            updates += 1
            entropies.append(bonus.item())
            for name, x in (("policy_loss", actor.loss), ("value_loss", guess)):
                sums[name].append(x.item())
            sums["clip_share"].append(actor.clip_share)
        if stopped:
            break
    return {
        **{name: _mean(each) for name, each in sums.items()},
        "entropy": _mean(entropies),
        "approximate_kl": moved,
        "explained_variance": (1 - error / spread).item() if spread > 0 else math.nan,
        "updates": updates,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _step(
    loss: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    models: Sequence[nn.Module],
    max_norm: float,
) -> None:
    """One update of actor and critic, each with a gradient of at most `max_norm`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    actor = list(models[0].parameters())
    mine = {id(x) for x in actor}
    critic = [x for x in models[1].parameters() if id(x) not in mine]
    for group in (actor, critic):
        norm = clip_grad_norm([x for x in group if x.grad is not None], max_norm)
        if not norm.isfinite():
            raise ValueError(f"the gradient's norm is {norm}, the loss {loss}: nothing was updated")
    for optimizer in optimizers:
        optimizer.step()
