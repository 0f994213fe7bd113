"""When does in-context learning appear? `python -m minillm.recipes.emergence`

Two series of small trainings, several seeds each, into `assets/benchmarks/icl.json`:

- `repeats`: attention alone (the MLPs are silenced from outside) reads random tokens said twice.
  On the way: how much of the second half it predicts, and how much each head looks at what followed
  the present token before (`minillm.prompting.induction`). With two layers, and with one.
- `bursts`: items of many classes, a label behind each, then an item to be labeled. Every class
  keeps its label throughout the training, so there are two ways to be right: to remember, or to
  look at the items shown. Which one is learned depends on how the data come.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm.config import ModelConfig
from minillm.data.incontext import draw_bursts, item_rows
from minillm.model import LM
from minillm.model.lm import attention_maps
from minillm.paths import ASSETS, write_atomically
from minillm.prompting.induction import induction_scores, previous_scores, repeated
from minillm.train import train
from minillm.train.optim import AdamW

IDS, LENGTH = 64, 20
"""different tokens of the repeats, and how many are said before they come again"""
CLASSES, LABELS, WIDTH = 1024, 32, 32
"""classes of the bursts, labels they have, and numbers an item consists of"""


@dataclass(frozen=True)
class Recipe:
    """What the record depends on, apart from the machine."""

    seeds: tuple[int, ...] = (0, 1, 2)
    repeat_steps: int = 480
    burst_steps: int = 500
    skews: tuple[float, ...] = (1.0,)
    """exponents of how frequent the classes of bursts are, beside 0 (all alike)"""
    threads: int = 1
    path: Path = ASSETS / "benchmarks" / "icl.json"


def attention_only(layers: int, seed: int) -> LM:
    """A small model whose MLPs say nothing: their last map is zero and stays so."""
    shape = {"d_ff": 1, "max_len": 2 * LENGTH, "init": "xavier", "norm": "rms"}
    # all pairs turn within a row; large token vectors, which stay as far apart as they are drawn
    shape |= {"position": "rope", "rope_theta": 100.0, "tie_embeddings": False}
    model = LM(ModelConfig(IDS, d_model=64, n_layers=layers, n_heads=2, **shape), seed=seed)
    torch.nn.init.normal_(model.tokens.weight, generator=torch.Generator().manual_seed(seed))
    for block in model.blocks:
        torch.nn.init.zeros_(block.mlp.down.weight)
        block.mlp.requires_grad_(False)
    return model


def copied(model: LM, tokens: Tensor) -> float:
    """The share of the second half, but for its first token, that the model predicts."""
    half = tokens.shape[1] // 2
    with torch.no_grad():
        best = model(tokens[:, :-1]).argmax(-1)
    return (best[:, half:] == tokens[:, half + 1 :]).float().mean().item()


def repeats(
    layers: int, seed: int, steps: int, every: int = 20, model: LM | None = None
) -> Iterator[dict[str, float]]:
    """Train on repeats; every so many steps what can be copied, and the best scores of a head."""
    model = attention_only(layers, seed) if model is None else model
    g, held_out = (torch.Generator().manual_seed(s) for s in (seed, 10**9))
    ids = torch.arange(IDS)
    told = repeated(ids, LENGTH, 64, held_out)
    # of many lengths, or a head could look so many places back without looking at the tokens
    lengths = iter(lambda: int(torch.randint(LENGTH // 2, LENGTH + 1, (), generator=g)), None)
    rows = (repeated(ids, length, 32, g) for length in lengths)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trainable, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    batches = ((tokens[:, :-1], tokens[:, 1:]) for tokens in rows)
    for step in train(model, batches, optimizer, clip=1.0, steps=steps):
        if step.step % every == 0 or step.step == 1:
            maps = attention_maps(model, told)
            yield {
                "step": step.step,
                "copied": copied(model, told),
                "induction": induction_scores(maps, told).max().item(),
                "previous": previous_scores(maps).max().item(),
            }


def burst_batch(
    vectors: Tensor, names: Tensor, ids: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of items [b, 17, v] of classes `ids` [b, 9], and the label of the last, [b]."""
    items = vectors[ids] + 0.1 * torch.randn(*ids.shape, WIDTH, generator=g)
    return item_rows(items, names[ids], WIDTH + LABELS), names[ids[:, -1]]


def label_logits(model: LM, rows: Tensor) -> Tensor:
    """Logits of the labels at the last position of rows [b, t, v]: [b, labels]."""
    return model.head(model.run(rows @ model.tokens.weight)[:, -1])[:, WIDTH:]


def bursts(burst: bool, skew: float, seed: int, steps: int) -> dict[str, float]:
    """Train on items in bursts or not, and ask about classes never seen, and about known ones.

    `new`: two new classes with two labels at random, four items of each shown. `known`: a class of
    the training that is not among those shown; `common` and `rare` are the most and the least
    frequent tenth of the classes.
    """
    shape = {"max_len": 17, "init": "xavier", "norm": "rms", "tie_embeddings": False}
    shape |= {"position": "rope", "rope_theta": 100.0}
    model = LM(ModelConfig(WIDTH + LABELS, d_model=64, n_layers=2, n_heads=2, **shape), seed=seed)
    torch.nn.init.normal_(model.tokens.weight, generator=torch.Generator().manual_seed(seed))
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(CLASSES, WIDTH, generator=g)
    names = torch.randint(LABELS, (CLASSES,), generator=g)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield burst_batch(vectors, names, draw_bursts(64, CLASSES, burst, g, skew), g)

    def loss(model: LM, rows: Tensor, labels: Tensor, mask: None) -> tuple[Tensor, int]:
        return F.cross_entropy(label_logits(model, rows), labels, reduction="sum"), len(labels)

    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    for _ in train(model, batches(), optimizer, clip=1.0, steps=steps, loss_fn=loss):
        pass

    @torch.no_grad()
    def right(rows: Tensor, labels: Tensor) -> float:
        return (label_logits(model, rows).argmax(-1) == labels).float().mean().item()

    found, n, tenth = {}, 500, CLASSES // 10
    pairs = torch.rand(n, LABELS, generator=g).argsort(1)[:, :2]  # two labels a prompt
    which = torch.stack(
        [torch.arange(8).remainder(2)[torch.randperm(8, generator=g)] for _ in range(n)]
    )
    which = torch.cat([which, torch.randint(2, (n, 1), generator=g)], dim=1)
    new = torch.randn(n, 2, WIDTH, generator=g).gather(1, which[..., None].expand(-1, -1, WIDTH))
    new = new + 0.1 * torch.randn(new.shape, generator=g)
    labels = pairs.gather(1, which)
    found["new"] = right(item_rows(new, labels, WIDTH + LABELS), labels[:, -1])
    for key, low, high in (
        ("known", 0, CLASSES),
        ("common", 0, tenth),
        ("rare", CLASSES - tenth, CLASSES),
    ):
        ids = torch.randint(CLASSES, (n, 9), generator=g)
        ids[:, -1] = torch.randint(low, high, (n,), generator=g)
        found[key] = right(*burst_batch(vectors, names, ids, g))
    return found


def main(recipe: Recipe) -> None:
    """Run all trainings and write the record."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    start, record = time.process_time(), {"repeats": [], "bursts": []}
    kinds = [(False, 0.0), (True, 0.0), *((True, skew) for skew in recipe.skews)]
    bar = tqdm(total=len(recipe.seeds) * (2 + len(kinds)), unit="training")
    for seed in recipe.seeds:
        for layers in (2, 1):
            history = list(repeats(layers, seed, recipe.repeat_steps))
            record["repeats"].append({"layers": layers, "seed": seed, "history": history})
            bar.update()
        for burst, skew in kinds:
            found = bursts(burst, skew, seed, recipe.burst_steps)
            record["bursts"].append({"burst": burst, "skew": skew, "seed": seed, **found})
            bar.update()
    bar.close()
    settings = {k: v for k, v in asdict(recipe).items() if k != "path"}
    result = {
        "command": " ".join(["python", "-m", "minillm.recipes.emergence", *sys.argv[1:]]),
        "recipe": settings,
        "torch": torch.__version__,
        "cpu_seconds": round(time.process_time() - start, 1),
        **record,
    }
    write_atomically(recipe.path, (json.dumps(result, indent=1) + "\n").encode())
    for burst, skew in kinds:
        rows = [x for x in record["bursts"] if (x["burst"], x["skew"]) == (burst, skew)]
        shares = {
            k: statistics.mean(x[k] for x in rows) for k in ("new", "known", "common", "rare")
        }
        print("bursts" if burst else "plain", skew, {k: round(v, 3) for k, v in shares.items()})


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
