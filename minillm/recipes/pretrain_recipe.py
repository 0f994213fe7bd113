"""What `minillm.recipes.pretrain` trains and how it is divided, and which divisions are legal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minillm.parallel.schedules import schedule
from minillm.recipes.storyteller import Recipe as Story


@dataclass(frozen=True)
class Recipe:
    """What is trained, as in the storyteller's recipe, and how it is divided."""

    dp: int = 1
    """copies of the model, each with its own rows of the batch"""
    tp: int = 1
    """ranks that share each matrix"""
    pp: int = 1
    """ranks that share the layers"""
    zero: Literal[0, 1, 2, 3] = 0
    """what the copies share: optimizer state (1), gradients too (2), parameters too (3)"""
    schedule: str = "1f1b"
    """of the pipeline: naive, gpipe, 1f1b, interleaved or zb-h1"""
    chunks: int = 1
    """stages of each rank; above 1 for interleaved"""
    micro_batches: int = 0
    """pieces of each copy's rows, one after the other; 0: twice as many as stages, 1 without"""
    engine: Literal["own", "torch"] = "own"
    """`minillm.parallel`, or PyTorch's fully_shard, DTensor and pipelining"""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    algorithm: Literal["native", "ring"] = "native"
    """whose collectives: the library's, or rings whose bytes are counted"""
    d_model: int = Story.d_model
    n_layers: int = Story.n_layers
    n_heads: int = Story.n_heads
    n_kv_heads: int | None = None
    max_len: int = Story.max_len
    embedding_std: float = Story.embedding_std
    steps: int = Story.steps
    batch: int = Story.batch
    """rows a step, of all copies together"""
    questions: int = Story.questions
    prose_every: int = Story.prose_every
    lr: float = Story.lr
    warmup: int = Story.warmup
    weight_decay: float = Story.weight_decay
    clip: float = 1.0
    seed: int = Story.seed
    checkpoints: Path | None = None
    """a folder that all ranks see"""
    every: int = 100
    """steps between two"""
    keep: int = 2
    """how many of the newest stay"""
    # torchrun would take --log, though it is behind the program's name, for one of its own
    log: Annotated[Path | None, tyro.conf.arg(name="step-log")] = None
    """a line of JSON for each step; after a restart, the repeated ones appear again"""

    @property
    def world_size(self) -> int:
        """How many ranks."""
        return self.dp * self.tp * self.pp


LAYOUT = ("dp", "tp", "pp", "zero", "schedule", "chunks", "micro_batches", "engine", "device")
PLACES = ("algorithm", "dtype", "checkpoints", "every", "keep", "log")
"""with LAYOUT, what may differ between a checkpoint and the run that goes on from it"""


def quick(**changes: Any) -> Recipe:
    """A small recipe, for tests and lectures: 4 layers of width 32, 8 rows, 12 steps."""
    small = {"d_model": 32, "n_layers": 4, "max_len": 208, "steps": 12, "batch": 8, "warmup": 4}
    return Recipe(**(small | {"questions": 0, "every": 4} | changes))


def check(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with its number of micro-batches; ValueError for a mesh that cannot be."""
    r = recipe
    if min(r.dp, r.tp, r.pp, r.chunks) < 1 or r.micro_batches < 0:
        sizes = f"dp={r.dp}, tp={r.tp}, pp={r.pp}, chunks={r.chunks} must be at least 1"
        raise ValueError(f"{sizes}, micro_batches={r.micro_batches} at least 0")
    if r.world_size != world_size:
        product = f"dp={r.dp} x tp={r.tp} x pp={r.pp} = {r.world_size}"
        raise ValueError(f"{product} must be the number of ranks, which is {world_size}")
    r = replace(r, micro_batches=r.micro_batches or (2 * r.pp * r.chunks if r.pp > 1 else 1))
    kv_heads = r.n_heads if r.n_kv_heads is None else r.n_kv_heads
    if r.n_heads % r.tp or kv_heads % r.tp:
        raise ValueError(f"n_heads={r.n_heads}, kv heads={kv_heads} must be multiples of tp={r.tp}")
    if r.n_layers < r.pp * r.chunks:
        stages = f"pp={r.pp} x chunks={r.chunks} stages"
        raise ValueError(f"n_layers={r.n_layers} must be at least {stages}: each needs a layer")
    if r.batch % (r.dp * r.micro_batches):
        parts = f"dp={r.dp} x micro_batches={r.micro_batches}"
        raise ValueError(f"batch={r.batch} rows must be a multiple of {parts}")
    if r.zero and r.dp == 1:
        raise ValueError(f"zero={r.zero} divides among the copies of the model, but dp=1")
    if r.schedule in ("pipedream", "2bw"):
        raise ValueError(
            f"schedule={r.schedule!r} uses late weights, which are not those of one process: take "
            "naive, gpipe, 1f1b, interleaved or zb-h1"
        )
    if r.pp == 1 and (r.chunks > 1 or r.schedule != Recipe.schedule):
        raise ValueError(f"schedule={r.schedule!r}, chunks={r.chunks} belong to pp > 1, but pp=1")
    schedule(r.schedule, r.pp, r.micro_batches, r.chunks)
    if r.zero == 3 and r.schedule == "zb-h1":
        raise ValueError(
            "zero=3 frees parameters behind a backward pass, but zb-h1 has halves that need them "
            "later: take 1f1b"
        )
    if not (r.steps > 0 and r.every > 0 and r.keep > 0):
        raise ValueError(f"steps={r.steps}, every={r.every}, keep={r.keep} must be at least 1")
    if r.engine == "torch":
        _check_torch(r)
    return r


def _check_torch(r: Recipe) -> None:
    """What PyTorch's own parts do not do."""
    if r.dp > 1 and r.zero not in (2, 3):
        raise ValueError(
            f"zero={r.zero} with dp={r.dp}: fully_shard is stage 3, or 2 where parameters stay "
            "gathered after forward; stages 0 and 1 are in engine='own'"
        )
    known = ("gpipe", "1f1b", "interleaved")
    if r.pp > 1 and r.schedule not in known:
        raise ValueError(f"schedule={r.schedule!r} of engine 'torch' must be one of {known}")


def settings(recipe: Recipe) -> dict[str, Any]:
    """What a run that goes on must have in common with the one before: all but the layout."""
    known = asdict(recipe).items()
    return {name: value for name, value in known if name not in LAYOUT + PLACES}
