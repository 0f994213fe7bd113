"""What reward models learn from comparisons: `python -m minillm.recipes.preferences`, 7 minutes.

*cards* writes two cards for each request, and which is better is said by the true reward, by the
true reward with noise, or by the answers to four yes/no questions. Every reward model gets equally
many updates, so a smaller set of comparisons is seen more often; all are judged on the same new
pairs. At last *cards* writes many cards for each of a few requests, for choosing the best of n.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm import zoo
from minillm.align.reward import RewardModel, accuracy, normalize, train_reward
from minillm.align.rules import Question, label
from minillm.data import cards
from minillm.data.preferences import Comparison, compare
from minillm.model.files import read_card
from minillm.paths import ASSETS, write_atomically
from minillm.recipes.align_stages import samples
from minillm.train import AdamW, decay_groups, warmup_cosine

QUESTIONS = (
    Question("Does it greet the right person?", 1.0, lambda q, a: cards.judge(q, a).greeting > 0),
    Question("Is it about the right thing?", 1.0, lambda q, a: cards.judge(q, a).topic > 0),
    Question("Does it say a line again?", -1.0, lambda q, a: cards.judge(q, a).repeats > 0),
    Question("Is it longer than four lines?", -0.5, lambda q, a: cards.judge(q, a).extra > 0),
)
"""none of them asks how kind the lines are"""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    model: str = "cards"
    comparisons: tuple[int, ...] = (50, 200, 800)
    noises: tuple[float, ...] = (0.15, 0.3, 0.45)
    """at the largest number of comparisons"""
    shown: int = 800
    """comparisons that a model is updated with, seen before or not"""
    batch: int = 8
    lr: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    pairs: int = 1000
    """to draw comparisons from"""
    tested: int = 300
    pool: tuple[int, int] = (32, 64)
    """requests, and cards for each, to choose the best of n from"""
    threads: int = 1
    path: Path = ASSETS / "benchmarks" / "preferences.json"
    """written after each run; a run that was stopped goes on from there"""


def parts(test: tuple[list[str], list[list[str]], Tensor]) -> dict[str, list[Comparison]]:
    """New pairs, ranked by the true reward, by what the questions see of it, and by kindness among
    those in which the questions see no difference."""
    asked, said, true = test
    judged = [[cards.judge(q, a) for a in pair] for q, pair in zip(asked, said, strict=True)]
    kind = torch.tensor([[one.kindness for one in pair] for pair in judged])
    seen = (true - kind).round(decimals=4)
    same = (seen[:, 0] == seen[:, 1]).tolist()
    hidden = [i for i, equal in enumerate(same) if equal]
    rest = {"generator": torch.Generator().manual_seed(0), "temperature": 0}
    return {
        "clean": compare(asked, said, true, **rest),
        "seen": compare(asked, said, seen, **rest),
        "unseen": compare(
            [asked[i] for i in hidden], [said[i] for i in hidden], kind[hidden], **rest
        ),
    }


def fit(
    policy: Any, tokenizer: Any, comparisons: list[Comparison], recipe: Recipe, seed: int
) -> RewardModel:
    """A reward model after `recipe.shown` comparisons, each seen equally often or once more."""
    rng = torch.Generator().manual_seed(seed)
    model = RewardModel(policy, tokenizer)
    optimizer = AdamW(decay_groups(model, 0.01), lr=recipe.lr, betas=(0.9, 0.98))
    total = recipe.shown // recipe.batch
    schedule = warmup_cosine(recipe.lr, min(5, total // 2), total, floor=0.05)
    epochs = -(-recipe.shown // len(comparisons)) + 1
    rest = {"batch": recipe.batch, "epochs": epochs, "generator": rng}
    for step in train_reward(model, comparisons, optimizer, **rest):
        if step.step == total:
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(step.step + 1)
    return model.eval()


def main(recipe: Recipe) -> None:
    """Run everything and write the file."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    policy, tokenizer = zoo.load(recipe.model)
    plan = {key: x for key, x in asdict(recipe).items() if key not in ("path", "threads")}
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "minillm.recipes.preferences", *sys.argv[1:]]),
        "recipe": json.loads(json.dumps(plan)),
        "torch": torch.__version__,
        "model_sha256": read_card(zoo.MODELS, recipe.model)["sha256"],
        "cpu_seconds": 0.0,
        "runs": [],
    }
    same = ("recipe", "model_sha256")
    if recipe.path.exists():  # go on, if it is the same run
        last = json.loads(recipe.path.read_text(encoding="utf-8"))
        result = last if all(last[key] == result[key] for key in same) else result
    begun = time.process_time() - result["cpu_seconds"]
    drawn = samples(policy, tokenizer, recipe.pairs, 2, seed=10**5)
    test = samples(policy, tokenizer, recipe.tested, 2, seed=10**5 + 1)
    asked, said, true = samples(policy, tokenizer, *recipe.pool, seed=10**5 + 2)
    flat = [text for text in asked for _ in said[0]], [text for some in said for text in some]
    result["pool"] = {"true": true.tolist(), "example": [asked[0], said[0][:4]]}
    judged = parts(test)
    result["tested"] = {name: len(some) for name, some in judged.items()}
    most = max(recipe.comparisons)
    arms = [("clean", n, 0.0) for n in recipe.comparisons]
    arms += [("clean", most, e) for e in recipe.noises] + [("questions", most, 0.0)]
    jobs = [(seed, *arm) for seed in recipe.seeds for arm in arms]
    for seed, by, n, noise in tqdm(jobs, unit="reward model", smoothing=0):
        key = {"seed": seed, "by": by, "comparisons": n, "noise": noise}
        if any(key.items() <= run.items() for run in result["runs"]):
            continue
        rng = torch.Generator().manual_seed(seed)
        if by == "questions":
            found = label(QUESTIONS, *drawn[:2], generator=rng)
        else:
            found = compare(*drawn, generator=rng, noise=noise, temperature=0)
        found = random.Random(seed).sample(found, min(n, len(found)))
        model = fit(policy, tokenizer, found, recipe, seed)
        normalize(model, *flat)
        turned = compare(*test, generator=rng, noise=noise, temperature=0)
        run = key | {"labels": len(found), "noisy": accuracy(model, turned)}
        run |= {name: accuracy(model, some) for name, some in judged.items()}
        if noise == 0:
            scores = model(*flat).view(true.shape)
            run["scores"] = [[round(x, 3) for x in row] for row in scores.tolist()]
        result["runs"].append(run)
        result["cpu_seconds"] = round(time.process_time() - begun, 1)
        write_atomically(recipe.path, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
