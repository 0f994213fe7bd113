"""Train `tiny`, the zoo's first model: `python -m minillm.recipes.tiny`.

It reads made-up stories (`minillm.data.stories`), one to a row, on one core; `tiny.log.json` says
how long the shipped run took.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm.config import ModelConfig
from minillm.data import stories
from minillm.data.batches import pad
from minillm.model import LM
from minillm.model.load import load, save
from minillm.paths import ASSETS, write_atomically
from minillm.tokenizers import BPE, COURSE_TOKENIZER, load_course_tokenizer
from minillm.train import evaluate, train


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    d_model: int = 64
    n_layers: int = 4
    n_heads: int = 4
    max_len: int = 256
    steps: int = 1400
    batch: int = 16
    """stories a step"""
    lr: float = 4e-3
    warmup: int = 50
    """steps over which the learning rate rises; then it falls as a cosine to a tenth"""
    weight_decay: float = 0.01
    seed: int = 0
    """of the weights and of the stories to learn from"""
    held_out_seed: int = 1_000_000
    """of the stories that are kept for the final loss"""
    held_out: int = 256
    """how many of these"""
    threads: int = 1
    folder: Path = ASSETS / "models"


def rows(texts: Sequence[str], tokenizer: BPE, max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """One story a row: inputs start and targets end with the end marker, padded to the longest.

    Returns inputs, targets and the mask of real targets, [b, t] each. Raises ValueError when a
    story is longer than the context.
    """
    end = tokenizer.special_ids["<|endoftext|>"]
    ids = [[end, *tokenizer.encode(text), end] for text in texts]
    longest = max(map(len, ids))
    if longest - 1 > max_len:
        raise ValueError(f"a story of {longest - 1} tokens does not fit a context of {max_len}")
    tokens, real = pad(ids, tokenizer.special_ids["<|pad|>"])
    return tokens[:, :-1], tokens[:, 1:], real[:, 1:]


def batches(recipe: Recipe, tokenizer: BPE) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Fresh stories for every step: none is seen twice."""
    for step in range(recipe.steps):
        texts = stories.generate(recipe.batch, seed=recipe.seed + step)
        yield rows(texts, tokenizer, recipe.max_len)


def held_out(recipe: Recipe, tokenizer: BPE) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The stories the model is judged by, in batches."""
    texts = stories.generate(recipe.held_out, seed=recipe.held_out_seed)
    step = recipe.batch
    parts = (texts[i : i + step] for i in range(0, len(texts), step))
    return [rows(part, tokenizer, recipe.max_len) for part in parts]


def main(recipe: Recipe) -> None:
    """Train, judge, and write weights, config and log."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    tokenizer = load_course_tokenizer()
    cfg = ModelConfig(
        tokenizer.vocab_size,
        recipe.d_model,
        recipe.n_layers,
        recipe.n_heads,
        max_len=recipe.max_len,
    )
    model = LM(cfg, seed=recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )

    def schedule(step: int) -> float:
        if step < recipe.warmup:
            return recipe.lr * step / recipe.warmup
        share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return recipe.lr * (0.55 + 0.45 * math.cos(math.pi * share))

    log = []
    loop = train(model, batches(recipe, tokenizer), optimizer, schedule, clip=1.0)
    bar = tqdm(loop, total=recipe.steps, unit="step")
    for step in bar:
        if step.step % 20 == 0 or step.step in (1, recipe.steps):
            bar.set_postfix(loss=f"{step.loss:.3f}")
            log.append(asdict(step))
    save(model, recipe.folder, "tiny", COURSE_TOKENIZER)
    saved = load(recipe.folder, "tiny", COURSE_TOKENIZER)  # what is judged is what is shipped
    judged = held_out(recipe, tokenizer)
    loss = evaluate(saved, judged)
    tokens = sum(int(mask.sum()) for _, _, mask in judged)
    result = {
        "command": " ".join(["python", "-m", "minillm.recipes.tiny", *sys.argv[1:]]),
        "recipe": {key: value for key, value in asdict(recipe).items() if key != "folder"},
        "torch": torch.__version__,
        "seconds": round(log[-1]["seconds"], 1),
        "held_out_loss": loss,
        "held_out_tokens": tokens,
        "entropy_of_stories": stories.entropy() * recipe.held_out / tokens,
        "steps": log,
    }
    path = recipe.folder / "tiny.log.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print(f"held-out loss {loss:.4f} nats a token; the stories' own entropy is at most", end=" ")
    print(f"{result['entropy_of_stories']:.4f}. Written to {recipe.folder}")


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
