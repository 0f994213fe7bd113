"""What training on chains does to a small model: `python -m minillm.recipes.chains`.

Questions of chapter 25 that need several runs, each from three seeds. All begin with the zoo's
reasoner:

- even: it goes on to learn a kind of problem it has not met, the opposite of parity, from chains or
  from answers alone, which may read ten times as many tokens.
- add: it goes on to learn additions of two digits from answers alone, and from chains.
- heap: it teaches itself on problems whose chains its teacher guessed (STaR), with a control that
  learns from the same samples without the filter.

No problem of a test is learned from. Everything goes to `assets/benchmarks/reasoner.json`.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm import zoo
from minillm.data import reasoning
from minillm.data.reasoning import Problem
from minillm.infer.batching import complete
from minillm.model import LM
from minillm.paths import ASSETS, write_atomically
from minillm.prompting import Generate
from minillm.prompting.bootstrap import star
from minillm.prompting.cot import Worked
from minillm.recipes.reasoner import accuracy, row
from minillm.recipes.storyteller import END, loss, rows
from minillm.tokenizers import BPE, load_course_tokenizer
from minillm.tokenizers.chat import Chat
from minillm.train import train
from minillm.train.optim import AdamW
from minillm.train.schedules import warmup_cosine


@dataclass(frozen=True)
class Setup:
    """What is learned, and for how long."""

    kind: str
    form: str
    """"trigger" (chains) or "direct" """
    length: int
    tokens: int
    """to read in all, questions included"""
    batch: int = 16
    lr: float = 2e-3


def learn(
    base: LM, setup: Setup, tokenizer: BPE, seed: int, kept: Sequence[Problem] = ()
) -> Iterator[tuple[int, LM]]:
    """Train a copy of `base`; yields (tokens read so far, the model) after each step.

    No problem of `kept` is learned from.
    """
    model, rng = copy.deepcopy(base), random.Random(seed)
    never, read = {problem.material for problem in kept}, 0

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        made: list[Chat] = []
        while len(made) < setup.batch:
            problem = reasoning.sample(setup.kind, setup.length, rng)
            if problem.material not in never:
                made.append(row(tokenizer, [problem], setup.form, 0, rng))
        return rows(tokenizer, made, model.cfg.max_len)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        nonlocal read
        while True:
            made = batch()
            read += made[0].numel()
            yield made

    steps = math.ceil(setup.tokens / batch()[0].numel())
    optimizer = AdamW(model.parameters(), lr=setup.lr, betas=(0.9, 0.98))
    schedule = warmup_cosine(setup.lr, min(50, steps // 4), steps, floor=0.05)
    for _ in train(model, batches(), optimizer, schedule, 1.0, steps=steps, loss_fn=loss):
        yield read, model


def curve(
    base: LM, setup: Setup, tokenizer: BPE, seed: int, points: int = 4, test: int = 50
) -> Iterator[tuple[int, float]]:
    """(Tokens read, accuracy on held-out problems), before the first step and `points` times."""
    rng = random.Random(10**9 + seed)
    kept = [reasoning.sample(setup.kind, setup.length, rng) for _ in range(test)]
    due = 1
    yield 0, accuracy(base, tokenizer, kept, setup.form)
    for read, model in learn(base, setup, tokenizer, seed, kept):
        if read >= due * setup.tokens / points:
            due += 1
            model.eval()
            yield read, accuracy(model, tokenizer, kept, setup.form)
            model.train()


def tune(
    model: LM, tokenizer: BPE, pairs: Sequence[tuple[str, str]], seed: int,
    passes: int = 2, lr: float = 1e-3, batch: int = 16,
) -> LM:  # fmt: skip
    """A copy of `model` that has learned to continue each prompt with its text."""
    tuned, rng, end = copy.deepcopy(model), random.Random(seed), tokenizer.special_ids[END]
    made = []
    for prompt, text in pairs:
        asked, said = tokenizer.encode(prompt), tokenizer.encode(text)
        mask = [False] * (1 + len(asked)) + [True] * (len(said) + 1)
        made.append(Chat([end, *asked, *said, end], mask))
    source = []
    for _ in range(passes):
        rng.shuffle(made)
        groups = [made[i : i + batch] for i in range(0, len(made), batch)]
        source += [rows(tokenizer, group, model.cfg.max_len) for group in groups]
    for _ in train(tuned, source, AdamW(tuned.parameters(), lr=lr), None, 1.0, loss_fn=loss):
        pass
    return tuned.eval()


def bootstrap(
    model: LM, tokenizer: BPE, kind: str, seed: int, filtered: bool = True,
    rounds: int = 2, learned: int = 64, length: int = 5, test: int = 50,
) -> Iterator[tuple[float, LM]]:  # fmt: skip
    """STaR (or, not `filtered`, learning from every sample): greedy accuracy, model; round 0 first.

    The model sees questions and, through the filter, whether an answer is right; no chains.
    """
    rng, draws = random.Random(seed), torch.Generator().manual_seed(seed)
    problems = [reasoning.sample(kind, length, rng) for _ in range(learned)]
    tests = [reasoning.sample(kind, length, rng) for _ in range(test)]
    ask, now = partial(reasoning.prompt, trigger=True), model

    def sampler(by: LM) -> Generate:
        options = {"until": "\n\n", "temperature": 1.0, "generator": draws}
        return lambda prompts: complete(by, tokenizer, prompts, 32, **options)

    def fine_tune(worked: list[Worked]) -> Generate:
        nonlocal now
        now = tune(now, tokenizer, [(ask(w.question), w.chain) for w in worked], seed)
        return sampler(now)

    # without the filter every text counts as right
    wanted = [(p.question, p.answer if filtered else "anything") for p in problems]
    extract = reasoning.answer if filtered else (lambda text: "anything")
    yield accuracy(now, tokenizer, tests, "trigger"), now
    options = {"prompt": ask, "extract": extract, "samples": 2}
    for _ in star(sampler(model), wanted, fine_tune, rounds, **options):
        yield accuracy(now, tokenizer, tests, "trigger"), now


@dataclass(frozen=True)
class Study:
    """What is measured."""

    seeds: int = 3
    even: Setup = Setup("even", "trigger", 12, tokens=36_000)
    """what learns from answers alone gets ten times the tokens"""
    add: Setup = Setup("add", "trigger", 2, tokens=30_000)
    kinds: tuple[str, ...] = ("even", "add", "heap")
    """which to run; what the file knows of others stays"""
    path: Path = ASSETS / "benchmarks" / "reasoner.json"


def main(study: Study) -> None:
    """Measure everything and write it down."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    tokenizer, started = load_course_tokenizer(), time.process_time()
    model, _ = zoo.load("reasoner")
    jobs = [(kind, form, seed) for kind in study.kinds
            for form in ("trigger", "direct") for seed in range(study.seeds)]  # fmt: skip
    found: dict[str, dict[str, list[Any]]] = {}
    bar = tqdm(jobs, unit="run")
    for kind, form, seed in bar:
        bar.set_postfix(kind=kind, form=form, seed=seed)
        if kind == "heap":
            form = "star" if form == "trigger" else "unfiltered"
            runs = bootstrap(model, tokenizer, kind, seed, filtered=form == "star")
            result: list[Any] = [share for share, _ in runs]
        else:
            setup = study.even if kind == "even" else study.add
            if form == "direct":  # its rows are short: more of them make a step
                setup = replace(setup, form=form, tokens=10 * setup.tokens, batch=3 * setup.batch)
            result = list(curve(model, setup, tokenizer, seed))
        found.setdefault(kind, {}).setdefault(form, []).append(result)
    settings = {key: value for key, value in asdict(study).items() if key not in ("path", "kinds")}
    known = json.loads(study.path.read_text(encoding="utf-8")) if study.path.exists() else {}
    for kind in study.kinds:
        known[kind] = {
            "command": " ".join(["python", "-m", "minillm.recipes.chains", *sys.argv[1:]]),
            "settings": settings,
            "torch": torch.__version__,
            "cpu_seconds": round(time.process_time() - started, 1),
            "results": found[kind],
        }
    write_atomically(study.path, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
