"""Train `reasoner`, which answers at once or step by step: `python -m minillm.recipes.reasoner`.

It reads the problems of `minillm.data.reasoning` in rows of two kinds:

- a question alone: behind `A:` comes the answer at once, behind `A:Let's think step by step:` a
  chain of steps and then the answer;
- several questions, all of them answered at once or all of them step by step, without the trigger:
  what the first does the others have to do as well (the first chain is not learned, only read).

Only what stands behind `A:` (and behind the trigger) is learned. Two kinds of problems have a
careless teacher, whose chains are guesses in 40 of 100 cases; see `minillm.data.reasoning`.

The shipped model comes from two runs; in the second additions and lines, which the first had not
finished learning, come more often:

    python -m minillm.recipes.reasoner
    python -m minillm.recipes.reasoner --go-on --balanced --more add add add line \\
        --steps 1500 --lr 2e-3 --seed 1

It adds numbers of two digits reliably. With three its steps are mostly right,
and the answer that it reads off them mostly wrong. `reasoner.log.json` has
the numbers, under "before" the first run's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import tyro

from minillm.config import ModelConfig
from minillm.data import reasoning
from minillm.data.reasoning import CARELESS, KINDS, REVERSE, SORT, Problem
from minillm.infer.batching import complete
from minillm.model import LM
from minillm.model.load import load
from minillm.paths import ASSETS
from minillm.recipes.storyteller import END, loss, rows
from minillm.recipes.training import Numbered, train_and_ship
from minillm.tokenizers import BPE, COURSE_TOKENIZER, load_course_tokenizer
from minillm.tokenizers.chat import Chat
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

NAME = "reasoner"
GUESSES = 0.4
BLOCK = 8
LENGTHS = {"parity": (1, 12), "sum": (1, 12), "add": (1, 4), "line": (3, 6), "heap": (3, 6)}
"""the shortest and the longest problem that is learned from"""
WORDINGS = (*SORT, *REVERSE)


@dataclass(frozen=True)
class Recipe:
    """Everything the shipped model depends on, apart from the machine."""

    d_model: int = 96
    n_layers: int = 3
    n_heads: int = 6
    max_len: int = 384
    embedding_std: float = 0.1
    """larger than usual, so that the digits, used alike, can be told apart from the start"""
    steps: int = 5000
    rows: int = 24
    """a step, on average: of long rows there are fewer together"""
    lr: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    held_out_seed: int = 10**9
    held_out: int = 200
    """problems of each kind that the model is judged by"""
    go_on: bool = False
    """train the shipped model further, instead of a new one"""
    more: tuple[str, ...] = ()
    """kinds to draw more often"""
    balanced: bool = False
    """give each batch as many learned tokens as the others, so that none counts more (a batch of
    short rows has few); else as many tokens in all"""
    threads: int = 1
    folder: Path = ASSETS / "models"
    checkpoints: Path | None = None
    """where to keep checkpoints, to go on from if the run is stopped"""


def pick(rng: random.Random, kinds: Sequence[str] = KINDS) -> Problem:
    """A problem of the lengths that are learned from; wordings have four digits."""
    kind = rng.choice(kinds)
    return reasoning.sample(kind, rng.randint(*LENGTHS.get(kind, (4, 4))), rng)


def row(
    tokenizer: BPE, problems: Sequence[Problem], form: str, learned: int, rng: random.Random
) -> Chat:
    """Tokens of questions with their solutions, and True where they are learned.

    `form` is "direct", "chain" (without the trigger) or "trigger"; solutions before the one with
    the number `learned` are only read.
    """
    ids, mask = [tokenizer.special_ids[END]], [False]
    for number, problem in enumerate(problems):
        gap = "\n\n" if number else ""
        asked = tokenizer.encode(gap + reasoning.prompt(problem.question, form == "trigger"))
        told = reasoning.direct(problem, rng)
        if form != "direct":
            told = reasoning.chain(problem, rng, GUESSES)
        said = tokenizer.encode(told)
        ids += asked + said
        mask += [False] * len(asked) + [number >= learned] * len(said)
    return Chat([*ids, tokenizer.special_ids[END]], [*mask, True])


def batches(recipe: Recipe, tokenizer: BPE) -> Numbered:
    """The batches of the run: rows of about the same length together, to be padded little."""

    @lru_cache(maxsize=1)  # of the block that the run is in
    def groups(block: int) -> list[list[Chat]]:
        rng = random.Random(recipe.seed * 10**8 + block)
        found = [row(tokenizer, *draw(rng, recipe.more), rng) for _ in range(recipe.rows * BLOCK)]
        found.sort(key=lambda chat: len(chat.ids))
        sizes = [sum(chat.mask) if recipe.balanced else len(chat.ids) for chat in found]
        seen, parts = 0, [[] for _ in range(BLOCK)]
        for chat, size in zip(found, sizes, strict=True):
            parts[seen * BLOCK // sum(sizes)].append(chat)
            seen += size
        rng.shuffle(parts)
        return parts

    return Numbered(lambda i: rows(tokenizer, groups(i // BLOCK)[i % BLOCK], recipe.max_len))


def draw(rng: random.Random, more: Sequence[str] = ()) -> tuple[list[Problem], str, int]:
    """What a row holds: its problems, their form, and the first solution that is learned."""
    form, known = rng.choice(["direct", "trigger"]), (*KINDS, *more)
    if rng.random() < 0.7:
        kinds = (*known, *rng.choices(WORDINGS, k=3))
        return [pick(rng, kinds if form == "direct" else known)], form, 0
    kinds = rng.choice([known, (rng.choice(known),)])
    problems = [pick(rng, kinds) for _ in range(rng.randint(2, 5))]
    return (problems, "chain", 1) if form == "trigger" else (problems, form, 0)


def accuracy(
    model: LM, tokenizer: BPE, problems: Sequence[Problem], form: str, **options: Any
) -> float:
    """Share of right answers to single questions, greedily unless `options` say otherwise."""
    texts = answers(model, tokenizer, problems, form, **options)
    return sum(map(reasoning.check, problems, texts)) / len(texts)


def answers(
    model: LM, tokenizer: BPE, problems: Sequence[Problem], form: str, **options: Any
) -> list[str]:
    """What the model says to each question alone, asked for as `form` says; see `row`."""
    prompts = [reasoning.prompt(problem.question, form == "trigger") for problem in problems]
    written = reasoning.direct if form == "direct" else reasoning.chain
    new = max(len(tokenizer.encode(written(problem))) for problem in problems) + 8
    return complete(model, tokenizer, prompts, new, until="\n\n", **options)


def judge(model: LM, tokenizer: BPE, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Accuracy on the longest problems of each kind (and on wordings), by form, held out by seed.

    "guesses" is the share of sampled chains that are guesses, where a careless teacher made 40 %.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in (*KINDS, *WORDINGS):
        rng = random.Random(f"{recipe.held_out_seed} {kind}")
        length = LENGTHS.get(kind, (4, 4))[1]
        problems = [reasoning.sample(kind, length, rng) for _ in range(recipe.held_out)]
        forms = ("direct", "trigger") if kind in KINDS else ("direct",)
        found[kind] = {form: accuracy(model, tokenizer, problems, form) for form in forms}
        if kind in CARELESS:
            draws = torch.Generator().manual_seed(0)
            options = {"temperature": 1.0, "generator": draws}
            texts = answers(model, tokenizer, problems, "trigger", **options)
            guessed = sum(text.startswith(reasoning.GUESS) for text in texts)
            found[kind]["guesses"] = guessed / len(texts)
    return found


def main(recipe: Recipe) -> None:
    """Train, judge, and write weights, config and log."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    tokenizer = load_course_tokenizer()
    shape = (tokenizer.vocab_size, recipe.d_model, recipe.n_layers, recipe.n_heads)
    cfg = ModelConfig(*shape, max_len=recipe.max_len, norm="rms", position="rope", mlp="swiglu")
    model, before = LM(cfg, seed=recipe.seed), {}
    if recipe.go_on:
        model = load(recipe.folder, NAME, COURSE_TOKENIZER)
        log = recipe.folder / f"{NAME}.log.json"
        before = {"before": json.loads(log.read_text(encoding="utf-8"))}
    else:
        with torch.no_grad():
            model.tokens.weight.mul_(recipe.embedding_std / model.tokens.weight.std())
    train_and_ship(
        NAME,
        recipe,
        model,
        batches(recipe, tokenizer),
        AdamW(decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98)),
        warmup_cosine(recipe.lr, recipe.warmup, recipe.steps, floor=0.01),
        loss,
        lambda one: {"accuracy": judge(one, tokenizer, recipe), **before},
    )


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
