"""Align a model that writes cards: `python -m minillm.recipes.align`, three quarters of an hour.

Three stages, as in Ouyang et al., Training Language Models to Follow Instructions with Human
Feedback, 2022: *instruct* learns from demonstrations to write cards (SFT), a copy of that learns
from comparisons what people like (reward), and PPO improves the first by the judgement of the
second. People are played by `minillm.data.cards`, whose true reward nothing here learns from.

Each seed has its own comparisons, reward model and PPO run; every run is in the file, whatever came
of it. Arms differ from "kl" in one thing. A run that was stopped goes on behind the last arm.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm.auto import tqdm

from minillm import zoo
from minillm.align.objectives import KLControl
from minillm.align.reward import load_reward, save_reward
from minillm.model import LM
from minillm.model.load import load, save
from minillm.paths import ASSETS, ROOT, write_atomically
from minillm.recipes.align_stages import Arm, held_out, improve, train_judge, train_policy
from minillm.tokenizers import COURSE_TOKENIZER, load_course_tokenizer

_KL = Arm()
ARMS = {
    "kl": _KL,
    "free": replace(_KL, control=KLControl(0.0)),
    "fixed": replace(_KL, control=KLControl(0.1)),
    "no critic": replace(_KL, critic=False, config=replace(_KL.config, lam=1.0)),
    "no whitening": replace(_KL, config=replace(_KL.config, whiten=False)),
    "no clipping": replace(_KL, config=replace(_KL.config, clip=1e9, target_kl=None)),
    "shared body": replace(_KL, shared=True),
    "small": _KL,
}
"""what is compared; "small" starts from a smaller policy"""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    base: str = "instruct"
    steps: int = 300
    """of SFT, each of 32 demonstrations"""
    lr: float = 1e-3
    small: tuple[int, int, int] = (64, 2, 1500)
    """width, layers and steps of the smaller policy, which starts from nothing"""
    requests: int = 200
    """for comparisons, each with four cards"""
    epochs: int = 3
    """over the comparisons"""
    iterations: int = 40
    """of the arms kl, free and small"""
    fewer: int = 24
    """of the other arms"""
    prompts: int = 64
    """an iteration"""
    ppo_lr: float = 2e-4
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of "kl" and "free"; the other arms take the first three"""
    tested: int = 128
    """held-out requests"""
    workers: int = 2
    """processes of one thread each"""
    models: Path = ASSETS / "models"
    path: Path = ASSETS / "benchmarks" / "align.json"
    work: Path = ROOT / "build" / "align"


def run(recipe: Recipe, name: str, seed: int) -> dict[str, Any]:
    """One PPO run from files, in a process of its own."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    tokenizer = load_course_tokenizer()
    start = load(*place(recipe, "cards_small" if name == "small" else "cards"), COURSE_TOKENIZER)
    judge = load_reward(*place(recipe, judge_name(seed)), tokenizer)
    begun = time.process_time()
    policy = copy.deepcopy(start)
    long = name in ("kl", "free", "small")
    settings = {"prompts": recipe.prompts, "lr": recipe.ppo_lr, "seed": seed}
    settings["iterations"] = recipe.iterations if long else recipe.fewer
    steps = [asdict(step) for step in improve(policy, judge, tokenizer, ARMS[name], **settings)]
    curves = {key: [step[key] for step in steps] for key in steps[0]}
    last = [
        {"request": q, "card": a, "proxy": round(r, 3)} for q, a, r in curves.pop("samples")[-1]
    ]
    return {
        "arm": name,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - begun, 1),
        "curves": {k: [round(x, 4) for x in v] for k, v in curves.items() if k != "step"},
        "samples": last,
        "before": held_out(start, tokenizer, judge, recipe.tested),
        "after": held_out(policy, tokenizer, judge, recipe.tested),
    }


def judge_name(seed: int) -> str:
    """The reward model of a seed; the first one is in the zoo."""
    return f"cards_reward_{seed}" if seed else "cards_reward"


def place(recipe: Recipe, name: str) -> tuple[Path, str]:
    """Where a model lies: what the zoo ships in `models`, the rest in `work`."""
    return (recipe.models if name in ("cards", "cards_reward") else recipe.work), name


def make(recipe: Recipe, name: str) -> dict[str, Any]:
    """Train a model that PPO starts from, or a judge, and save it; what came of it."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    begun = time.process_time()
    tokenizer = load_course_tokenizer()
    found: dict[str, Any] = {}
    if name.startswith("cards_reward"):
        seed = int(name.removeprefix("cards_reward").strip("_") or 0)
        policy = load(*place(recipe, "cards"), COURSE_TOKENIZER)
        judge, right = train_judge(policy, tokenizer, recipe.requests, recipe.epochs, seed)
        save_reward(judge, *place(recipe, name))
        found = {"accuracy": round(right, 4)}
    else:
        model, steps, lr = zoo.load(recipe.base)[0], recipe.steps, recipe.lr
        if name == "cards_small":
            width, layers, steps = recipe.small
            shape = replace(model.cfg, d_model=width, n_layers=layers, n_heads=4, n_kv_heads=None)
            model, lr = LM(replace(shape, d_ff=None), seed=0), 3 * lr
        losses = [step.loss for step in train_policy(model, tokenizer, steps, lr)]
        save(model, *place(recipe, name), COURSE_TOKENIZER)
        found = held_out(
            load(*place(recipe, name), COURSE_TOKENIZER), tokenizer, None, recipe.tested
        )
        found |= {"loss": round(sum(losses[-20:]) / 20, 4)}
        found |= {"parameters": sum(p.numel() for p in model.parameters())}
    return found | {"cpu_seconds": round(time.process_time() - begun, 1)}


def main(recipe: Recipe) -> None:
    """Train what is missing, run the arms that are missing, write the file after each."""
    recipe.work.mkdir(parents=True, exist_ok=True)
    plan = {
        k: v for k, v in asdict(recipe).items() if k not in ("models", "path", "work", "workers")
    }
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "minillm.recipes.align", *sys.argv[1:]]),
        "recipe": json.loads(json.dumps(plan)),
        "torch": torch.__version__,
        "models": {},
        "runs": [],
    }
    if recipe.path.exists():  # go on, if it is the same run
        last = json.loads(recipe.path.read_text(encoding="utf-8"))
        result = last if last["recipe"] == result["recipe"] else result
    models = ["cards", "cards_small", *map(judge_name, recipe.seeds)]
    arms = [(name, seed) for seed in recipe.seeds for name in ("kl", "free")]
    arms += [
        (name, seed) for seed in recipe.seeds[:3] for name in ARMS if name not in ("kl", "free")
    ]
    done = {(one["arm"], one["seed"]) for one in result["runs"]}
    with (
        tqdm(total=len(models) + len(arms), unit="run", smoothing=0) as bar,
        ProcessPoolExecutor(recipe.workers, get_context("spawn")) as pool,
    ):

        def keep(told: str) -> None:
            result["cpu_seconds"] = round(
                sum(x["cpu_seconds"] for x in [*result["models"].values(), *result["runs"]]), 1
            )
            write_atomically(recipe.path, (json.dumps(result) + "\n").encode())
            bar.update()
            bar.set_postfix_str(told)

        for stage in (models[:2], models[2:]):  # a judge starts from the policy
            waiting = {}
            for name in stage:
                if name in result["models"] and (recipe_file(recipe, name)).exists():
                    keep(name)
                else:
                    waiting[pool.submit(make, recipe, name)] = name
            for one in as_completed(waiting):
                result["models"][waiting[one]] = one.result()
                keep(waiting[one])
        waiting = {pool.submit(run, recipe, *arm): arm for arm in arms if arm not in done}
        bar.update(len(arms) - len(waiting))
        for one in as_completed(waiting):
            result["runs"].append(one.result())
            result["runs"].sort(key=lambda x: (list(ARMS).index(x["arm"]), x["seed"]))
            keep(f"{waiting[one][0]} {waiting[one][1]}")


def recipe_file(recipe: Recipe, name: str) -> Path:
    """The weights of a model."""
    folder, name = place(recipe, name)
    return folder / f"{name}.safetensors"


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
