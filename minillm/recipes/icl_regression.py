"""The zoo's model of linear regressions: what it reads, learns and is judged by.

`python -m minillm.recipes.icl regression` trains it. It reads no text but numbers: positions are
mixtures of its token vectors, and its prediction is one column of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.data import incontext
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes.training import Numbered


@dataclass(frozen=True)
class Regression:
    """The model of linear regressions, `icl_regression`."""

    inputs: int = 2
    examples: int = 10
    noise: float = 0.5
    """standard deviation, in the rows that have any"""
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    embedding_std: float = 0.3
    steps: int = 12000
    batch: int = 64
    lr: float = 2e-3
    beta2: float = 0.98
    warmup: int = 200
    weight_decay: float = 0.0
    seed: int = 0
    held_out_seed: int = 10**9
    held_out: int = 2000
    """regressions of each kind to judge by"""
    threads: int = 1
    folder: Path = ASSETS / "models"
    checkpoints: Path | None = None
    """where to keep checkpoints, to go on from if the run is stopped"""


def regression_batches(recipe: Regression) -> Numbered:
    """Rows of numbers [b, 1 + 2n, v] and the y that are to be predicted, [b, n]."""
    generator = torch.Generator().manual_seed(recipe.seed)
    v = vectors(recipe)
    noisy = torch.arange(recipe.batch) % 2 == 1

    def make(step: int) -> tuple[Tensor, Tensor]:
        shape = (recipe.batch, recipe.examples, recipe.inputs)
        x, y, _ = incontext.draw_regressions(*shape, 0.0, generator)
        y = y + recipe.noise * noisy[:, None] * torch.randn(y.shape, generator=generator)
        return incontext.number_rows(x, y, noisy, v), y

    return Numbered(make, generator)


def vectors(recipe: Regression) -> int:
    """How many token vectors there are: one for each input, for y, and the two markers."""
    return recipe.inputs + 3


def predictions(model: LM, rows: Tensor) -> Tensor:
    """The model's y for every x of rows [b, 1 + 2n, v]: [b, n]."""
    hidden = model.run(rows @ model.tokens.weight)[:, 1::2]
    return hidden @ model.head.weight[rows.shape[-1] - 3]


def squared_loss(model: LM, rows: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Sum of (prediction - y)², and how many."""
    return (predictions(model, rows) - y).square().sum(), y.numel()


@torch.no_grad()
def judge_regression(model: LM, recipe: Regression) -> dict[str, Any]:
    """Mean squares behind 0, 1, 2, ... examples: errors, and distances to the textbook's answers.

    `step` is one gradient step from zero, its rate the best for each number of examples.
    """
    found: dict[str, Any] = {}
    for name, noise in (("clean", 0.0), ("noisy", recipe.noise)):
        generator = torch.Generator().manual_seed(recipe.held_out_seed)
        shape = (recipe.held_out, recipe.examples, recipe.inputs)
        x, y, w = incontext.draw_regressions(*shape, noise, generator)
        noisy = torch.full((recipe.held_out,), noise > 0)
        said = predictions(model, incontext.number_rows(x, y, noisy, vectors(recipe))).double()
        truth = (x.double() @ w.double()[..., None]).squeeze(-1)
        step = incontext.gradient_step(x, y, 1.0)
        step *= (step * truth).mean(0) / step.square().mean(0).clamp(min=1e-9)
        others = {
            "least_squares": incontext.ridge(x, y),
            "ridge": incontext.ridge(x, y, noise**2),
            "gradient_step": step,
        }
        table = {"error": said - truth}
        for other, theirs in others.items():
            table |= {f"error_{other}": theirs - truth, f"to_{other}": said - theirs}
        for key, gap in table.items():
            found[f"{name}_{key}"] = [round(g, 5) for g in gap.square().mean(0).tolist()]
    return found
