"""Train the zoo's models that learn in context: `python -m minillm.recipes.icl words|regression`.

`icl` reads lines ` fox slow` (see `minillm.data.incontext`). It begins with bursts of rules; then a
row is <|endoftext|> and 13 lines, half of the rows from tables of facts, half from rules that only
their lines tell. What is learned is the label of every line, so that one row asks with 0 to 12
demonstrations at once; one row in eight is learned whole, so that the model can write lines itself.

`icl_regression` reads no text but numbers: positions are mixtures of its token vectors, and its
prediction is one column of the head. Half of the rows have no noise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from minillm.config import ModelConfig
from minillm.data import incontext
from minillm.data.incontext import Fact, Line, Mapping
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes.icl_regression import (
    Regression,
    judge_regression,
    predictions,
    regression_batches,
    squared_loss,
    vectors,
)
from minillm.recipes.training import Numbered, train_and_ship
from minillm.tokenizers import BPE, COURSE_TOKENIZER, load_course_tokenizer
from minillm.train import Step
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

__all__ = [
    "Regression",
    "Words",
    "answers",
    "judge_regression",
    "judge_words",
    "predictions",
    "regression_batches",
    "token_rows",
    "vectors",
    "word_batches",
    "word_loss",
]
END = "<|endoftext|>"
WHOLE = 8
"""one row in so many is learned whole"""
LINE, LABEL = 3, 2
"""tokens of a line, and at which of them, the marker of the row being 0, the first label stands"""


@dataclass(frozen=True)
class Words:
    """The model of word tasks, `icl`."""

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 2
    max_len: int = 128
    rope_theta: float = 100.0
    """less than usual: all pairs turn within the 53 tokens of a row"""
    likeness: float = 1.5
    """how much of a new word's vector is its category's, against 1 that is its own"""
    early_steps: int = 1200
    """with nothing but bursts of rules, nine lines a row"""
    early_batch: int = 64
    steps: int = 7000
    """in all; behind the early ones come rows of both kinds, in bursts or not"""
    batch: int = 32
    lines: int = 13
    lr: float = 3e-3
    beta2: float = 0.999
    warmup: int = 50
    weight_decay: float = 0.0
    seed: int = 0
    """of the weights, and of which lines are learned from"""
    held_out_seed: int = 10**9
    held_out: int = 400
    """prompts of each kind to judge by"""
    threads: int = 1
    folder: Path = ASSETS / "models"
    checkpoints: Path | None = None
    """where to keep checkpoints, to go on from if the run is stopped"""


def token_rows(tokenizer: BPE, prompts: Sequence[Sequence[Line]]) -> Tensor:
    """Tokens [b, 1 + 3n] of prompts of n lines: the marker, then word, label, line's end.

    Raises ValueError for a word that is not one token, and for prompts of unequal length.
    """
    known: dict[str, int] = {}

    def one(text: str) -> int:
        if text not in known:
            ids = tokenizer.encode_ordinary(text)
            if len(ids) != 1:
                raise ValueError(f"{text!r} is {len(ids)} tokens, a word of a line must be one")
            known[text] = ids[0]
        return known[text]

    if len({len(lines) for lines in prompts}) != 1:
        raise ValueError(f"prompts of {sorted({len(p) for p in prompts})} lines do not align")
    pieces = [[x for w, y in p for x in (f" {w}", f" {y}", "\n")] for p in prompts]
    return torch.tensor([[tokenizer.special_ids[END], *map(one, row)] for row in pieces])


def word_batches(recipe: Words, tokenizer: BPE) -> Numbered:
    """Inputs, targets and what is learned, [b, t] each, without end; the same for the same seed."""

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        early = step < recipe.early_steps
        rows, lines = (recipe.early_batch, 9) if early else (recipe.batch, recipe.lines)
        mixture = {"facts": 0.0, "bursts": 1.0} if early else {"facts": 0.5, "bursts": 0.3}
        rng = random.Random(recipe.seed * 10**8 + step)
        tokens = token_rows(
            tokenizer, [incontext.draw_lines(rng, lines, **mixture) for _ in range(rows)]
        )
        learned = torch.zeros(rows, tokens.shape[1] - 1, dtype=torch.bool)
        learned[:, LABEL - 1 :: LINE] = True
        if not early:
            learned[: rows // WHOLE] = True
        return tokens[:, :-1], tokens[:, 1:], learned

    return Numbered(make)


def start_words(model: LM, tokenizer: BPE, recipe: Words) -> None:
    """New token vectors of size one, in which words of a category have a part in common.

    So would those of a model that has read stories, where like words stand in like places. Vectors
    as large as this hardly turn during training and stay apart, which heads that look for a
    token's like need.
    """
    g = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        vectors = model.tokens.weight.normal_(generator=g)
        for group in incontext.CATEGORIES.values():
            ids = [tokenizer.encode_ordinary(f" {word}")[0] for word in group]
            common = recipe.likeness * torch.randn(recipe.d_model, generator=g)
            vectors[ids] = (vectors[ids] + common) / (1 + recipe.likeness**2) ** 0.5


def word_loss(model: LM, inputs: Tensor, targets: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) where `learned` is true, and how many; logits only for these."""
    logits = model.head(model.hidden(inputs)[learned])
    return F.cross_entropy(logits, targets[learned], reduction="sum"), learned.sum()


@torch.no_grad()
def answers(model: LM, tokenizer: BPE, prompts: Sequence[Sequence[Line]]) -> list[list[str]]:
    """The model's own word for the label of every line, given the lines before it.

    The word is free: the likeliest of the whole vocabulary, not of a list of labels.
    """
    tokens = token_rows(tokenizer, prompts)
    best = torch.cat(
        [model(part)[:, LABEL - 1 :: LINE].argmax(-1) for part in tokens[:, :-1].split(100)]
    )
    return [[tokenizer.decode([i]).strip() for i in row] for row in best.tolist()]


def judge_words(model: LM, tokenizer: BPE, recipe: Words, prompts: int) -> dict[str, list[float]]:
    """Share of right answers behind 0, 1, 2, ... lines, for facts and for rules of four letters.

    `random`: every label shown is drawn from those of the prompt's task.
    """
    found: dict[str, list[float]] = {}
    for kind in ("facts", "rules"):
        for shown in ("true", "random"):
            rng = random.Random(recipe.held_out_seed)
            drawn, right = [], []
            for i in range(prompts):
                task = Fact(i % len(incontext.FACTS)) if kind == "facts" else Mapping.draw(rng, 4)
                lines = task.say(rng.sample(incontext.words(), recipe.lines), rng)
                right.append([task.answer(word) for word, _ in lines])
                if shown == "random":
                    lines = [(word, rng.choice(task.labels)) for word, _ in lines]
                drawn.append(lines)
            said = answers(model, tokenizer, drawn)
            hits = torch.tensor(np.array(said) == np.array(right)).double().mean(0)
            found[f"{kind}_{shown}"] = [round(share, 4) for share in hits.tolist()]
    return found


def main(recipe: Words | Regression) -> None:
    """Train, judge after loading, and write weights, config and log."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    shape: dict[str, Any] = {"init": "xavier"}  # 0.02 is small for narrow models: they start late
    shape |= {key: getattr(recipe, key) for key in ("d_model", "n_layers", "n_heads")}
    tokenizer = None
    if isinstance(recipe, Words):
        name, path, tokenizer = "icl", COURSE_TOKENIZER, load_course_tokenizer()
        shape |= {"max_len": recipe.max_len, "norm": "rms", "position": "rope"}
        shape |= {"rope_theta": recipe.rope_theta, "tie_embeddings": False}
        cfg = ModelConfig(tokenizer.vocab_size, **shape)
        batches, loss = word_batches(recipe, tokenizer), word_loss
    else:
        name, path = "icl_regression", None
        shape |= {"max_len": 1 + 2 * recipe.examples, "tie_embeddings": False}
        cfg = ModelConfig(vectors(recipe), **shape)
        batches, loss = regression_batches(recipe), squared_loss
    model = LM(cfg, seed=recipe.seed)
    if tokenizer is not None:
        start_words(model, tokenizer, recipe)
    else:
        with torch.no_grad():
            model.tokens.weight.mul_(recipe.embedding_std / model.tokens.weight.std())

    def judge(one: LM) -> dict[str, Any]:
        if tokenizer is None:
            return judge_regression(one, recipe)
        return judge_words(one, tokenizer, recipe, recipe.held_out)

    def watch(step: Step) -> dict[str, float]:
        if tokenizer is None or step.step % 250:
            return {}
        some = judge_words(model, tokenizer, recipe, 64)
        return {key: shares[-1] for key, shares in some.items()}

    train_and_ship(
        name,
        recipe,
        model,
        batches,
        AdamW(
            decay_groups(model, recipe.weight_decay),
            lr=recipe.lr,
            betas=(0.9, recipe.beta2),
            fused=True,
        ),
        warmup_cosine(recipe.lr, recipe.warmup, recipe.steps, floor=0.01),
        loss,
        judge,
        module="icl",
        tokenizer=path,
        log_also=(1, 10),
        watch=watch,
    )


if __name__ == "__main__":
    words = Annotated[Words, tyro.conf.subcommand("words")]
    regression = Annotated[Regression, tyro.conf.subcommand("regression")]
    main(tyro.cli(words | regression, description=__doc__))
