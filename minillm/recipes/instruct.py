"""Train `instruct`, which follows short instructions: `python -m minillm.recipes.instruct`.

The storyteller is fine-tuned on the families of `minillm.data.families`, asked for in chat form,
and on stories with their questions as it was pre-trained on, so that it goes on telling them.
Of a conversation only the answer is learned. A step has `batch` examples and `stories` documents,
packed into rows that do not see each other (`minillm.align.sft`).

It is judged, after saving and loading, on inputs, wordings, materials and families that it was
never trained on, by what it says when it always takes the likeliest token.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from minillm import zoo
from minillm.align.sft import encode, sft_loss, sft_rows
from minillm.data import families, stories
from minillm.data.batches import Packed, document_mask
from minillm.data.families import Family
from minillm.data.instructions import Instruction, conversation
from minillm.infer.batching import complete
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes import storyteller
from minillm.recipes.training import Numbered, train_and_ship
from minillm.tokenizers import BPE
from minillm.tokenizers.chat import Chat
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

NAME = "instruct"
RATES = {"story": 0.4, "story_question": 0.2}
"""how often a family is drawn, where not as often as the others: these are ten times as long"""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    base: str = "storyteller"
    steps: int = 3400
    batch: int = 32
    """examples a step"""
    stories: int = 1
    """stories with questions a step, as in pre-training"""
    questions: int = 4
    """how many questions come with such a story"""
    learn: str = "response"
    """"response", or "everything": also what the user says"""
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 1
    """of the examples and the stories; another than the base's, so that the stories are new"""
    held_out: int = 60
    """examples of each family and split to judge by"""
    told: int = 100
    """stories to judge by"""
    threads: int = 1
    folder: Path = ASSETS / "models"
    checkpoints: Path | None = None
    """where to keep checkpoints, to go on from if the run is stopped"""


def document(tokenizer: BPE, rng: random.Random, questions: int) -> Chat:
    """A story with some of its questions, as in the base's pre-training."""
    story = stories.sample(rng.randrange(10**8, 10**9))
    return storyteller.document(tokenizer, story.text, rng.sample(story.questions, questions))


def batches(
    recipe: Recipe, tokenizer: BPE, max_len: int, leave_out: Collection[str] = ()
) -> Numbered:
    """Endless (packed rows, targets, mask); a batch depends on the recipe and its number alone.

    Families named in `leave_out` are not drawn.
    """
    among = [one for one in families.in_split("train") if one.name not in leave_out]
    rates = [RATES.get(one.name, 1.0) for one in among]

    def make(step: int) -> tuple[Packed, Tensor, Tensor]:
        rng = random.Random(f"{recipe.seed} {step}")
        asked = [one.sample(rng) for one in rng.choices(among, rates, k=recipe.batch)]
        chats = [encode(conversation(x), tokenizer, recipe.learn) for x in asked]
        chats += [document(tokenizer, rng, recipe.questions) for _ in range(recipe.stories)]
        rows = sft_rows(chats, tokenizer, max_len)
        return rows, rows.targets, rows.loss_mask

    return Numbered(make)


@torch.no_grad()
def exactly(
    model: LM, tokenizer: BPE, examples: Sequence[Instruction], batch: int = 64
) -> list[bool]:
    """Whether greedy decoding gives exactly the known answer, for each example.

    It does if every token of it, and the marker behind, is the likeliest after those before: one
    pass instead of one a token. For families with many right answers see `answers`.
    """
    found: list[bool] = []
    for start in range(0, len(examples), batch):
        chats = [encode(conversation(x), tokenizer) for x in examples[start : start + batch]]
        rows = sft_rows(chats, tokenizer, model.cfg.max_len)
        sight = document_mask(rows.documents)[:, None]
        best = model(rows.tokens, positions=rows.positions, mask=sight).argmax(-1)
        wrong = set(rows.documents[(best != rows.targets) & rows.loss_mask].tolist())
        found += [i not in wrong for i in range(len(chats))]
    return found


def answers(
    model: LM, tokenizer: BPE, examples: Sequence[Instruction], **options: Any
) -> list[str]:
    """What the model says to each example; `options` are those of `complete`."""
    asked = [conversation(x)[0][1] for x in examples]
    return complete(model, tokenizer, asked, chat=True, **options)


def right(model: LM, tokenizer: BPE, one: Family, examples: Sequence[Instruction]) -> float:
    """The share of examples of a family that the model answers right, greedily."""
    if one.check is families.exact:
        found = exactly(model, tokenizer, examples)
    else:
        said = answers(model, tokenizer, examples, max_new_tokens=one.longest)
        found = [one.verify(x, text) for x, text in zip(examples, said, strict=True)]
    return sum(found) / len(found)


def accuracy(model: LM, tokenizer: BPE, n: int, split: str, seed: int = 0) -> dict[str, float]:
    """Family -> share of `n` examples of a split that are answered right."""
    return {
        one.name: right(model, tokenizer, one, families.examples(one, split, n, seed))
        for one in families.in_split(split)
    }


def excess(model: LM, tokenizer: BPE, n: int, first: int = 10**9) -> float:
    """Nats a story above its exact -log P, on held-out stories: what has been forgotten."""
    told = [stories.sample(first + i) for i in range(n)]
    nll = storyteller.story_nll(model, tokenizer, [story.text for story in told])
    return (nll + torch.tensor([story.log_prob for story in told])).mean().item()


def judge(model: LM, tokenizer: BPE, recipe: Recipe) -> dict[str, Any]:
    """What the model is judged by: accuracy of each split and family, and what it still tells."""
    found = {s: accuracy(model, tokenizer, recipe.held_out, s) for s in families.SPLITS[1:]}
    told = [stories.sample(10**9 + i) for i in range(recipe.told)]
    asked = storyteller.answered(model, tokenizer, told)
    return {
        **{split: sum(each.values()) / len(each) for split, each in found.items()},
        "excess_per_story": excess(model, tokenizer, recipe.told),
        "answered": sum(asked) / len(asked),
        "by_family": found,
    }


def main(recipe: Recipe) -> None:
    """Train, judge, and write weights, config and log."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    model, tokenizer = zoo.load(recipe.base)
    train_and_ship(
        NAME,
        recipe,
        model,
        batches(recipe, tokenizer, model.cfg.max_len),
        AdamW(decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98)),
        warmup_cosine(recipe.lr, recipe.warmup, recipe.steps, floor=0.01),
        sft_loss,
        lambda tuned: {
            **judge(tuned, tokenizer, recipe),
            "base": judge(zoo.load(recipe.base)[0], tokenizer, recipe),
        },
        log_every=100,
        log_also=(1, recipe.steps),
    )


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
