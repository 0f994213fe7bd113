"""The three stages that teach a model to write cards: demonstrations, comparisons, reinforcement.

`minillm.recipes.align` runs them over seeds, `minillm.recipes.capstone` as a part of the whole way.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.align.objectives import KLControl
from minillm.align.ppo import PPOConfig, PPOStep, Reward, ppo
from minillm.align.reward import RewardModel, accuracy, normalize, train_reward
from minillm.align.sft import encode, sft_loss, sft_rows
from minillm.align.value import ValueModel
from minillm.data import cards
from minillm.data.batches import Packed
from minillm.data.instructions import conversation
from minillm.data.preferences import compare
from minillm.infer.batching import complete, prompt_ids
from minillm.model import LM
from minillm.tokenizers import BPE
from minillm.train import AdamW, Step, decay_groups, train, warmup_cosine

LONGEST = 48
"""tokens of a card, end marker included: a few more than the longest demonstration"""
TRAINING, JUDGING, IMPROVING, TESTING = (part * 10**6 for part in range(1, 5))
"""seeds of requests: for demonstrations, comparisons, PPO, and those that everybody is tested on"""
CONFIG = PPOConfig(max_new_tokens=LONGEST)
CONTROL = KLControl(0.1, target=4.0, horizon=256)


@dataclass(frozen=True)
class Arm:
    """How PPO is run."""

    config: PPOConfig = CONFIG
    control: KLControl = CONTROL
    shared: bool = False
    """actor and critic have one body"""
    critic: bool = True
    """False: values stay 0, as in REINFORCE with whitened returns"""


def demonstrations(
    tokenizer: BPE, max_len: int, batch: int = 32
) -> Iterator[tuple[Packed, Tensor, Tensor]]:
    """Endless (packed rows, targets, mask of what is learned: the cards)."""
    step = 0
    while True:
        rng = random.Random(f"cards {step}")
        asked = cards.requests(batch, TRAINING + step)
        chats = [encode(conversation(cards.demonstration(x, rng)), tokenizer) for x in asked]
        rows = sft_rows(chats, tokenizer, max_len)
        yield rows, rows.targets, rows.loss_mask
        step += 1


def train_policy(model: LM, tokenizer: BPE, steps: int, lr: float) -> Iterator[Step]:
    """SFT of `model`, in place, on demonstrations of cards."""
    optimizer = AdamW(decay_groups(model, 0.05), lr=lr, betas=(0.9, 0.98))
    yield from train(
        *(model, demonstrations(tokenizer, model.cfg.max_len), optimizer),
        warmup_cosine(lr, min(20, steps // 2), steps, floor=0.01),
        clip=1.0,
        steps=steps,
        loss_fn=sft_loss,
    )


def write(
    model: LM, tokenizer: BPE, asked: Sequence[str], seed: int, temperature: float = 1.0
) -> list[str]:
    """A card for each request, sampled."""
    rng = torch.Generator().manual_seed(seed)
    settings = {"temperature": temperature, "generator": rng}
    return complete(model, tokenizer, asked, LONGEST, chat=True, **settings)


def samples(
    policy: LM, tokenizer: BPE, n: int, k: int, seed: int
) -> tuple[list[str], list[list[str]], Tensor]:
    """n requests, k cards of the policy for each, and their true rewards [n, k]."""
    asked = [x.text for x in cards.requests(n, JUDGING + seed)]
    each = [text for text in asked for _ in range(k)]
    said = write(policy, tokenizer, each, seed)
    rows = [said[i : i + k] for i in range(0, len(said), k)]
    return asked, rows, cards.true_reward(each, said).view(n, k)


def train_judge(
    policy: LM, tokenizer: BPE, n: int, epochs: int, seed: int, lr: float = 3e-4
) -> tuple[RewardModel, float]:
    """A reward model, and the share of new pairs that it puts in the right order.

    It learns from n rankings of four cards of the policy. People are not sure, either: of two cards
    one point apart the better one wins in 73 %, as in Bradley and Terry's model. New pairs are
    judged by the true reward; cards that are worth the same are no pair.
    """
    asked, said, true = samples(policy, tokenizer, n, 4, seed)
    rng = torch.Generator().manual_seed(seed)
    rankings = compare(asked, said, true, generator=rng)
    model = RewardModel(policy, tokenizer)
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    for _ in train_reward(model, rankings, optimizer, batch=16, epochs=epochs, generator=rng):
        pass
    normalize(model, [text for text in asked for _ in range(4)], [x for row in said for x in row])
    test = samples(policy, tokenizer, 200, 2, seed + 1000)
    return model, accuracy(model, compare(*test, generator=rng, temperature=0))


def improve(
    policy: LM,
    judge: Reward,
    tokenizer: BPE,
    arm: Arm,
    *,
    iterations: int,
    prompts: int,
    lr: float,
    seed: int,
) -> Iterator[PPOStep]:
    """PPO of `policy`, in place; the reference is the policy as it comes in."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    critic = ValueModel(policy, share=arm.shared)
    learned = [*policy.parameters(), *(critic.value if arm.shared else critic).parameters()]
    if not arm.critic:
        critic.requires_grad_(False)
        learned = list(policy.parameters())
    batches = (
        [
            (x.text, prompt_ids(tokenizer, x.text, chat=True))
            for x in cards.requests(prompts, IMPROVING + 1000 * seed + i)
        ]
        for i in range(iterations)
    )
    yield from ppo(
        *(policy, reference, critic, tokenizer, batches, judge),
        [AdamW(learned, lr=lr, weight_decay=0.0)],
        control=arm.control,
        config=arm.config,
        true_reward=cards.true_reward,
        seed=seed,
    )


def held_out(policy: LM, tokenizer: BPE, judge: Reward | None, n: int) -> dict[str, Any]:
    """Cards for the same n requests, new to everybody, and what they are worth."""
    asked = [x.text for x in cards.requests(n, TESTING, "held_out")]
    said = write(policy, tokenizer, asked, TESTING)
    found = {"cards": said, "true": _short(cards.true_reward(asked, said))}
    return found | ({} if judge is None else {"proxy": _short(judge(asked, said))})


def _short(values: Tensor) -> list[float]:
    return [round(x, 3) for x in values.tolist()]
