"""From raw text to an aligned model that chats: `python -m minillm.recipes.capstone [--quick]`.

    text -> tokenizer -> pretrain -> sft -> reward -> ppo -> int8 -> exam

Each stage reads the files of those before it and can be killed at any time (`stages.py`); the two
that train longest keep checkpoints as well. Nothing comes from the zoo: tokenizer, weights, reward
model and comparisons are made here. The text is stories of `minillm.data.stories`, whose entropy is
known, or a folder of one's own (`--text.folder`). The model then learns to answer questions about
stories and to write the cards of `minillm.data.cards`; the reward model learns from comparisons of
such cards, and PPO improves them by its judgement.

The report card judges every model in the same way, on what nothing was trained on. Then talk to
the last one: `python -m minillm.chat build/capstone/int8`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from minillm.paths import ROOT, write_atomically
from minillm.recipes import capstone_stages as work
from minillm.recipes import report
from minillm.recipes.capstone_settings import FULL, QUICK, Recipe
from minillm.recipes.stages import Stage, run


@dataclass(frozen=True)
class Settings:
    """A run: what, where and how."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    folder: Path = ROOT / "build" / "capstone"
    card: Path | None = None
    """where to write the report card as well; in the folder it always is"""
    threads: int = 2


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a run, in order."""
    text = recipe.text
    if text.folder is not None:  # its files may change while its name stays
        text = replace(text, contents=work.contents(text.folder))
    return [
        Stage("text", work.make_text, text),
        Stage("tokenizer", work.make_tokenizer, recipe.tokenizer),
        Stage("pretrain", work.pretrain, recipe.pretrain),
        Stage("sft", work.finetune, recipe.sft),
        Stage("reward", work.learn_to_judge, recipe.reward),
        Stage("ppo", work.improve, recipe.ppo),
        Stage("int8", work.shrink, recipe.int8),
        Stage("exam", work.examine, recipe.exam),
    ]


def _said(arguments: Sequence[str]) -> list[str]:
    """The arguments without the two that only say where this machine keeps its files."""
    where = ("--folder", "--card")
    before = ["", *arguments]
    pairs = zip(before, arguments, strict=False)
    return [x for last, x in pairs if not {x, last} & {*where} and not x.startswith(where)]


def main(settings: Settings) -> dict[str, Any]:
    """Bring every stage up to date, print the report card and write it as JSON; returns that."""
    done = []
    for one, why in run(plan(settings.recipe), settings.folder, settings.threads):
        print(f"{one.name}: {why or 'was finished'}", flush=True)
        done.append(one)
    print(f"\n{report.table(done)}\n\n{report.samples(done)}")
    card = {
        "command": " ".join(["python", "-m", "minillm.recipes.capstone", *_said(sys.argv[1:])]),
        "torch": torch.__version__,
        "threads": settings.threads,
        "stages": [asdict(one) for one in done],
    }
    for path in (settings.folder / "card.json", settings.card):
        if path is not None:
            write_atomically(path, (json.dumps(card, indent=1) + "\n").encode())
    return card


if __name__ == "__main__":
    preset = Settings(FULL)
    if "--quick" in sys.argv[1:]:
        preset = Settings(QUICK, folder=preset.folder.with_name("capstone-quick"))
    arguments = [x for x in sys.argv[1:] if x != "--quick"]
    main(tyro.cli(Settings, description=__doc__, default=preset, args=arguments))
