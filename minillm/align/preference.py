"""Preferences without reinforcement learning: DPO and best-of-n.

DPO (direct preference optimization) needs no reward model: the policy itself is one, and learns by
the same ranking loss. Best-of-n trains nothing: it samples n responses and keeps the best.
"""

# b responses, t tokens of a response

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid
from torch.optim import Optimizer

from minillm.align.advantages import check_mask
from minillm.align.ppo import END, Reward
from minillm.align.rollout import Rollout, check_vocabulary, response_logp, roll_out
from minillm.data.batches import pad
from minillm.data.preferences import Comparison
from minillm.infer.batching import check_fits, pad_left, prompt_ids
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE
from minillm.train.optim import clip_grad_norm

Batch = Sequence[tuple[str, Sequence[int]]]
"""(request, its tokens as the policy reads them), as in `minillm.align.ppo`"""


def implicit_rewards(logp: Tensor, reference_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """β Σ_t (log π(a_t) - log π_ref(a_t)): what the policy acts as if responses were worth, [b].

    log-probabilities and mask [b, t]. The policy that is best for E[r] - β KL(π | π_ref) has
    r = β log π / π_ref + a constant of the request; so π tells its r, up to that constant.
    Source: Rafailov et al., Direct Preference Optimization, 2023.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    mask = check_mask(mask, logp, reference_logp)
    return beta * (logp - reference_logp).where(mask, 0.0).sum(-1)


def dpo_loss(
    logp: Tensor, reference_logp: Tensor, mask: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """-log σ(r_chosen - r_rejected), a mean over pairs, and the implicit rewards r [b].

    The first half of the rows [b, t] are the preferred responses, the second half the others, in
    the same order. Two equal responses have the loss log 2, and no gradient. Raises ValueError for
    an odd number of rows. Source: as `implicit_rewards`.
    """
    if len(mask) % 2:
        raise ValueError(f"{len(mask)} rows are no pairs: first the preferred, then the others")
    rewards = implicit_rewards(logp, reference_logp, mask, beta)
    chosen, rejected = rewards.chunk(2)
    return -logsigmoid(chosen - rejected).mean(), rewards.detach()


def written(
    model: LM, tokenizer: BPE, requests: Sequence[str], responses: Sequence[str]
) -> Rollout:
    """Responses that came from anywhere, with the log-probabilities that `model` gives them.

    Each ends with the end marker, so an empty one has that single token. Raises ValueError where
    request and response exceed the context.
    """
    end = tokenizer.special_ids[END]
    prompts = [prompt_ids(tokenizer, request, chat=True) for request in requests]
    said = [[*tokenizer.encode_ordinary(response), end] for response in responses]
    check_fits([p + s for p, s in zip(prompts, said, strict=True)], 0, model.cfg.max_len)
    (before, seen), (tokens, mask) = pad_left(prompts, end), pad(said, end)
    tokens, seen = torch.cat([before, tokens], 1), torch.cat([seen, mask], 1)
    found = Rollout(tokens, seen, torch.zeros(mask.shape), torch.ones(len(said), dtype=torch.bool))
    with torch.no_grad():
        return replace(found, logp=response_logp(model, found))


@dataclass(frozen=True)
class DPOStep:
    """One update; measured before it."""

    step: int
    """counts from 1"""
    loss: float
    accuracy: float
    """share of pairs whose preferred response has the larger implicit reward"""
    chosen: float
    """mean implicit reward of the preferred responses; it may sink, if the others sink faster"""
    rejected: float


def dpo(
    policy: LM,
    reference: LM,
    tokenizer: BPE,
    comparisons: Sequence[Comparison],
    optimizer: Optimizer,
    *,
    beta: float = 0.1,
    batch: int = 16,
    epochs: int = 1,
    max_norm: float = 1.0,
    generator: Generator,
) -> Iterator[DPOStep]:
    """Teach `policy` (in place) the best of each comparison over its worst; yields each update.

    Raises ValueError without comparisons, for models of other vocabularies than the tokenizer's,
    and for a gradient that is not finite.
    """
    check_vocabulary(tokenizer, policy, reference)
    if not comparisons or batch < 1:
        raise ValueError(f"{len(comparisons)} comparisons in batches of {batch}: both at least 1")
    orders = (torch.randperm(len(comparisons), generator=generator) for _ in range(epochs))
    parts = (part.tolist() for order in orders for part in order.split(batch))
    for number, part in enumerate(parts, start=1):
        some = [comparisons[i] for i in part]
        said = [c.responses[place] for place in (0, -1) for c in some]
        pairs = written(reference, tokenizer, [c.request for c in some] * 2, said)
        loss, rewards = dpo_loss(response_logp(policy, pairs), pairs.logp, pairs.mask, beta)
        improve(policy, loss, optimizer, max_norm)
        chosen, rejected = rewards.chunk(2)
        right = (chosen > rejected).float().mean().item()
        yield DPOStep(number, loss.item(), right, chosen.mean().item(), rejected.mean().item())


def best_of_n(
    policy: LM,
    tokenizer: BPE,
    batch: Batch,
    reward: Reward,
    n: int,
    max_new_tokens: int = 32,
    *,
    temperature: float = 1.0,
    generator: Generator | None = None,
) -> tuple[list[str], Tensor]:
    """Of n responses to each of b requests the one with the highest score, and all scores [b, n].

    All are sampled together; of equal scores the first counts. Raises ValueError for scores that
    are not finite, and for n < 1.
    """
    best_of_n_kl(n)
    rows = [each for each in batch for _ in range(n)]
    _, said = sample(policy, tokenizer, rows, max_new_tokens, temperature, generator)
    scores = reward([request for request, _ in rows], said)
    if bad := (~scores.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"the scores of responses {bad} are not finite: {scores[bad].tolist()}")
    scores = scores.view(-1, n)
    return [said[n * i + j] for i, j in enumerate(scores.argmax(-1).tolist())], scores


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: the most nats that best-of-n can be from what it samples from.

    It is reached where no response is likely to be drawn twice, and scores differ. Source: Beirami
    et al., Theoretical Guarantees on the Best-of-n Alignment Policy, 2024.

    >>> round(best_of_n_kl(1), 3), round(best_of_n_kl(16), 3)
    (0.0, 1.835)
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Tensor, wanted: Tensor, n: int) -> Tensor:
    """What best-of-n by `proxy` brings of `wanted`, from N >= n samples: [..., N] -> [...].

    The mean over all choices of n of the N: the sample of rank i from below is the best of
    C(i - 1, n - 1) of them. So one set of samples serves every n, without bias. Source: Nakano et
    al., WebGPT, 2021.

    >>> expected_best(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0.0, 6.0, 3.0]), n=2)
    tensor(5., dtype=torch.float64)
    """
    count = proxy.shape[-1]
    if proxy.shape != wanted.shape or not 1 <= n <= count:
        raise ValueError(
            f"{proxy.shape=} and {wanted.shape=} must agree, with {n=} or more samples"
        )
    share = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    ranked = wanted.gather(-1, proxy.argsort(stable=True)).double()
    return (ranked * torch.tensor(share, dtype=torch.float64)).sum(-1)


def sample(
    policy: LM, tokenizer: BPE, rows: Batch, new: int, temperature: float, rng: Generator | None
) -> tuple[Rollout, list[str]]:
    """A response of at most `new` tokens to each request, as tokens and as texts."""
    prompts, end = [ids for _, ids in rows], tokenizer.special_ids[END]
    rollout = roll_out(policy, prompts, new, end, temperature=temperature, generator=rng)
    return rollout, [tokenizer.decode(ids) for ids in rollout.responses()]


def improve(policy: LM, loss: Tensor, optimizer: Optimizer, max_norm: float) -> None:
    """One update with a gradient of at most `max_norm`; ValueError where it is not finite."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_grad_norm([x for x in policy.parameters() if x.grad is not None], max_norm)
    if not norm.isfinite():
        raise ValueError(f"the gradient's norm is {norm}, the loss {loss}: nothing was updated")
    optimizer.step()
