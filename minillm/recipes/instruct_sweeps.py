"""What makes instruction tuning work, in small: `python -m minillm.recipes.instruct_sweeps`.

Three seeds each. The *small world* has 30 tasks and 50 words, each of them a token,
and is learned by a new model of two layers. A message lists words of different kinds and asks for
two of the kinds:

    lake red Mia fox   Give the animal and the color .   ->   fox red

A task is a pair of kinds in order. Every run makes as many steps, with as many examples in each;
only what its name says is changed. It is judged on new inputs of the tasks it was trained on
(`inputs`), on these in wordings that were never used (`wordings`), and on six pairs that are held
out (`tasks`), though each kind occurs in others. *Forgetting* tunes the storyteller on all families
of `minillm.data.families`, with and without its stories mixed in.

Results go to `assets/benchmarks/instruct.json`; what is there already is not run again.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm import zoo
from minillm.align.sft import sft_loss
from minillm.config import ModelConfig
from minillm.data.batches import pad
from minillm.data.families_makers import WORDS
from minillm.data.mixture import MixtureSampler, proportional_rates
from minillm.model import LM
from minillm.paths import ASSETS, write_atomically
from minillm.recipes import instruct
from minillm.tokenizers.chat import Chat
from minillm.train import train
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

KINDS = {
    "name": WORDS["names"][:4],
    "animal": WORDS["animals"][:4],
    "thing": WORDS["things"][:4],
    "color": WORDS["colors"][:4],
    "place": WORDS["places"][:4],
    "number": WORDS["digits"][:4],
}
"""what is asked for -> the words of this kind"""
WORDINGS = (
    "Give the {a} and the {b} .",
    "Which {a} and which {b} is it ?",
    "First the {a} then the {b} .",
    "Find the {a} and the {b} .",
    "I want the {a} and the {b} .",
    "What is the {a} what the {b} ?",
)
NEW_WORDINGS = ("Find which {a} and which {b} it is .", "I want the {a} then the {b} .")
HELD_OUT = tuple(zip(KINDS, [*list(KINDS)[1:], "name"], strict=True))
TASKS = tuple(pair for pair in itertools.permutations(KINDS, 2) if pair not in HELD_OUT)
SIZES = {" ".join(pair): 8192 // 2 ** (i // 3) for i, pair in enumerate(TASKS)}
"""examples there are of each task, where the mixture is the question: 8192 down to 64"""
PAD, USER, ASSISTANT, END = range(4)
VOCABULARY = ("<|pad|>", "<|user|>", "<|assistant|>", "<|endoftext|>", *KINDS,
              *itertools.chain(*KINDS.values()),
              *sorted({w for text in WORDINGS for w in text.split() if "{" not in w}))  # fmt: skip


@dataclass(frozen=True)
class Small:
    """One run in the small world."""

    tasks: int = 24
    wordings: int = 6
    examples: int | None = None
    """different ones of each task; None: never the same twice"""
    cap: float | None = None
    """None: tasks equally often; else min(size, cap) of `SIZES` in proportion"""
    learn: str = "response"
    steps: int = 300
    batch: int = 48
    lr: float = 1e-2


RUNS = {
    "baseline": Small(),
    "tasks 3": Small(tasks=3),
    "tasks 6": Small(tasks=6),
    "tasks 12": Small(tasks=12),
    "wordings 1": Small(wordings=1),
    "wordings 2": Small(wordings=2),
    "examples 4": Small(examples=4),
    "examples 16": Small(examples=16),
    "examples 64": Small(examples=64),
    "everything": Small(learn="everything"),
    "cap none": Small(cap=1e9),
    "cap 512": Small(cap=512),
    "cap 64": Small(cap=64),
}


@dataclass(frozen=True)
class Sweep:
    """What to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    """names of runs; all, if empty"""
    path: Path = ASSETS / "benchmarks" / "instruct.json"


def example(rng: random.Random, pair: tuple[str, str], wordings: Sequence[str]) -> Chat:
    """Four words of different kinds in any order, and a request for two of the kinds."""
    others = rng.sample([kind for kind in KINDS if kind not in pair], 2)
    words = {kind: rng.choice(KINDS[kind]) for kind in (*pair, *others)}
    ask = rng.choice(wordings).format(a=pair[0], b=pair[1])
    given = [*rng.sample(list(words.values()), 4), *ask.split()]
    answer = [words[pair[0]], words[pair[1]]]
    ids = [USER, *map(VOCABULARY.index, given), ASSISTANT, *map(VOCABULARY.index, answer), END]
    return Chat(ids, [False] * (len(ids) - 3) + [True] * 3)


def small_model(seed: int) -> LM:
    """A new model of 2 layers and width 64."""
    shape = (len(VOCABULARY), 64, 2, 4)
    model = LM(ModelConfig(*shape, max_len=32, norm="rms", position="rope", mlp="swiglu"), seed)
    with torch.no_grad():  # as in the storyteller: words that are used alike stay apart
        model.tokens.weight.mul_(0.3 / model.tokens.weight.std())
    return model


def chosen_tasks(run: Small, seed: int) -> list[tuple[str, str]]:
    """The tasks of a run: the first of an order that the seed gives, so more include fewer."""
    return random.Random(f"tasks {seed}").sample(TASKS, len(TASKS))[: run.tasks]


def small_batches(run: Small, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches (inputs, targets, mask)."""
    rng, words = random.Random(f"examples {seed}"), WORDINGS[: run.wordings]
    pools: dict[str, list[Any]] = {}
    for pair in chosen_tasks(run, seed):
        name = " ".join(pair)
        n = run.examples if run.cap is None else SIZES[name]
        pools[name] = [pair] if n is None else [example(rng, pair, words) for _ in range(n)]
    sizes = {name: len(pool) for name, pool in pools.items()}
    source = MixtureSampler(pools, proportional_rates(sizes, run.cap or 1), seed)
    while True:
        drawn = [next(source)[1] for _ in range(run.batch)]
        chats = [x if isinstance(x, Chat) else example(rng, x, words) for x in drawn]
        yield small_rows(chats, run.learn)


def small_rows(chats: Sequence[Chat], learn: str = "response") -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and mask, one example a row."""
    tokens, there = pad([chat.ids for chat in chats], PAD)
    mask = pad([chat.mask for chat in chats], 0)[0].bool() if learn == "response" else there
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


@torch.no_grad()
def small_score(model: LM, chats: Sequence[Chat]) -> float:
    """Share of the examples that greedy decoding answers exactly."""
    inputs, targets, mask = small_rows(chats)
    return ((model(inputs).argmax(-1) == targets) | ~mask).all(-1).float().mean().item()


def judge_small(model: LM, run: Small, seed: int, n: int = 240) -> dict[str, Any]:
    """Share that is answered right: of each kind of held-out examples, and of tasks by size."""
    rng, known = random.Random(f"judge {seed}"), WORDINGS[: run.wordings]
    trained = chosen_tasks(run, seed)

    def score(pairs: Sequence[tuple[str, str]], words: Sequence[str]) -> float:
        return small_score(model, [example(rng, pairs[i % len(pairs)], words) for i in range(n)])

    by_size: dict[str, list[tuple[str, str]]] = {}
    for pair in trained:
        by_size.setdefault(str(SIZES[" ".join(pair)]), []).append(pair)
    model.eval()
    return {
        "inputs": score(trained, known),
        "wordings": score(trained, NEW_WORDINGS),
        "tasks": score(HELD_OUT, known),
        "no request": score(trained, [" ".join(["it"] * 7)]),
        "by_size": {size: score(pairs, known) for size, pairs in by_size.items()},
    }


def run_small(run: Small, seed: int) -> dict[str, Any]:
    """Train one small model and judge it."""
    model = small_model(seed)
    optimizer = AdamW(decay_groups(model, 0.01), lr=run.lr, betas=(0.9, 0.98))
    start = time.process_time()
    loop = train(
        *(model, small_batches(run, seed), optimizer),
        warmup_cosine(run.lr, 10, run.steps, floor=0.05),
        clip=1.0,
        steps=run.steps,
        loss_fn=sft_loss,
    )
    losses = [step.loss for step in loop]
    spent = round(time.process_time() - start, 1)
    return {**judge_small(model, run, seed), "losses": losses[9::10], "cpu_seconds": spent}


def forget(
    stories: int, batch: int, steps: int, seed: int, every: int = 4, told: int = 12
) -> dict[str, list[float]]:
    """Tune the storyteller for a few steps, with so many `stories` a step beside the examples.

    The examples are of all families but those that have whole stories in them. Returns after how
    many steps it was judged, and the nats a story that it then needs beyond the exact -log P, over
    `told` held-out stories.
    """
    recipe = instruct.Recipe(stories=stories, batch=batch, steps=steps, warmup=3, seed=seed + 10)
    model, tokenizer = zoo.load(recipe.base)
    optimizer = AdamW(decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    found = {"steps": [0.0], "excess": [instruct.excess(model, tokenizer, told)]}
    for step in train(
        *(model, instruct.batches(recipe, tokenizer, model.cfg.max_len, instruct.RATES), optimizer),
        warmup_cosine(recipe.lr, recipe.warmup, steps, floor=0.01),
        clip=1.0,
        steps=steps,
        loss_fn=sft_loss,
    ):
        if step.step % every == 0:
            found["steps"].append(float(step.step))
            found["excess"].append(instruct.excess(model, tokenizer, told))
    return found


def main(sweep: Sweep) -> None:
    """Run what is missing, one result after the other into the file."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    result = {
        "command": " ".join(["python", "-m", "minillm.recipes.instruct_sweeps", *sys.argv[1:]]),
        "torch": torch.__version__,
        "settings": {name: asdict(run) for name, run in RUNS.items()},
        "sizes": SIZES,
        "small": {name: {} for name in RUNS},
    }
    if sweep.path.exists():
        result["small"] |= json.loads(sweep.path.read_text(encoding="utf-8"))["small"]
    jobs = [(seed, name) for seed in sweep.seeds for name in sweep.only or RUNS]
    for seed, name in tqdm(jobs, unit="run"):
        if str(seed) not in result["small"][name]:
            result["small"][name][str(seed)] = run_small(RUNS[name], seed)
            write_atomically(sweep.path, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Sweep, description=__doc__))
