"""Train the storyteller on many devices: `python -m minillm.recipes.pretrain --dp 2 --tp 2`.

The model, rows, optimizer and schedule of `minillm.recipes.storyteller`, under any mesh of data,
tensor and pipeline parallelism and with any stage of ZeRO. That line starts the ranks on this
machine; so does `launch` from a notebook,

    launch(lambda: [step.loss for step in run(quick(dp=2, tp=2))], world_size=4)

and torchrun starts them on one machine or on many (`pretrain.slurm` beside this file):

    torchrun --nproc-per-node=4 -m minillm.recipes.pretrain --dp 2 --tp 2 --zero 1

With --max-restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (the Slurm script says why).

Whatever the mesh, the losses are those of one process, up to rounding. A run that is started again
goes on behind its newest whole checkpoint, under any other mesh as well. `--quick` changes
the defaults to a small model that takes seconds.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn.functional import pad

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import checkpoint
from minillm.parallel.collectives import all_reduce
from minillm.parallel.group import Link, Tracer
from minillm.parallel.launch import launch
from minillm.parallel.mesh import Mesh
from minillm.parallel.storage import read_manifest
from minillm.recipes import storyteller
from minillm.recipes.pretrain_own import Own, Rows, local
from minillm.recipes.pretrain_recipe import LAYOUT, Recipe, check, quick, settings
from minillm.tokenizers import BPE, load_course_tokenizer
from minillm.train.loop import NotFiniteError, Step
from minillm.train.schedules import warmup_cosine

AXES = ("data", "pipeline", "tensor")
"""of the mesh; tensor parallelism talks most, so its ranks are neighbors"""


class Share(storyteller.Rows):
    """The rows of one copy of the model: those at its place in every step's batch."""

    def __init__(self, recipe: Recipe, tokenizer: BPE, place: int) -> None:
        super().__init__(recipe, tokenizer)
        self.place = place

    def __next__(self) -> list[Rows]:
        r, n = self.recipe, self.recipe.batch // self.recipe.dp
        first = self.step * r.batch + self.place * n
        self.step += 1
        documents = [self.row(i) for i in range(first, first + n)]
        m = n // r.micro_batches
        pieces = (documents[i : i + m] for i in range(0, n, m))
        found = [storyteller.rows(self.tokenizer, piece, r.max_len) for piece in pieces]
        # messages between stages have one shape; what fills up is masked
        return [self._widen(*x) for x in found] if r.pp > 1 else found

    def _widen(self, *rows: Tensor) -> Rows:
        fill = self.tokenizer.special_ids[storyteller.PAD]
        more = (0, self.recipe.max_len - rows[0].shape[1])
        return tuple(pad(x, more, value=v) for x, v in zip(rows, (fill, fill, False), strict=True))


def run(
    recipe: Recipe, tracer: Tracer | None = None, links: Mapping[str, Link] | None = None
) -> Iterator[Step]:
    """Train; every rank calls it and gets the same `Step`s, of the whole batch, one by one.

        for step in run(quick(dp=2, tp=2, zero=1, checkpoints=folder)): ...

    With `checkpoints` it goes on behind the newest whole one, whatever mesh that was written
    under, and saves another every `recipe.every` steps: weights, moments, step, place in the data,
    random numbers. `tracer` gets what this rank sends (engine "own"), `links` are emulated wires
    by axis: "data", "pipeline", "tensor".

    Raises ValueError for a mesh that cannot be, and for checkpoints of another model or none that
    is whole; NotFiniteError before a loss that is not finite is learned from; CheckpointError when
    a rank cannot save: the checkpoints before are whole then.
    """
    recipe = check(recipe, dist.get_world_size() if dist.is_initialized() else 1)
    wires = {axis: {"link": link} for axis, link in (links or {}).items()}
    sizes = dict(zip(AXES, (recipe.dp, recipe.pp, recipe.tp), strict=True))
    mesh = Mesh(sizes, settings=wires, algorithm=recipe.algorithm, tracer=tracer)
    everyone, copies = mesh.group(*AXES), mesh.group("data")
    rank = dist.get_rank() if dist.is_initialized() else 0
    tokenizer = load_course_tokenizer()
    engine = engine_of(recipe)(recipe, lambda: build(recipe), mesh)
    rows = Share(recipe, tokenizer, mesh.place["data"])
    rates = warmup_cosine(recipe.lr, recipe.warmup, recipe.steps, floor=0.01)
    done = resume(recipe, engine, rows) if recipe.checkpoints else {"step": 0, "tokens": 0}
    start, tokens = time.perf_counter() - done.get("seconds", 0.0), done["tokens"]
    for number in range(done["step"] + 1, recipe.steps + 1):
        batches = [tuple(x.to(recipe.device) for x in b) for b in next(rows)]
        count = torch.stack([mask.sum() for *_, mask in batches]).sum().double()
        count = (all_reduce(count, copies) if recipe.dp > 1 else count).item()
        loss = engine.gradients(batches, count)
        loss, norm = _loss_and_norm(engine, loss, everyone)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            said = f"the loss of step {number} is {loss}, the gradient's norm {norm}"
            raise NotFiniteError(f"{said}; nothing was updated", number)
        factor = min(1.0, recipe.clip / (norm + 1e-6))
        for _, holder in engine.graded():
            holder.grad.mul_(factor)
        for options in engine.optimizer.param_groups:
            options["lr"] = rates(number)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        tokens += int(count)
        step = Step(number, loss, tokens, rates(number), time.perf_counter() - start, norm)
        if recipe.log and rank == 0:
            with recipe.log.open("a") as file:
                file.write(json.dumps(asdict(step)) + "\n")
        yield step
        if recipe.checkpoints and number % recipe.every == 0:
            save(recipe, engine, step)


def engine_of(recipe: Recipe) -> Any:
    """The class that holds a rank's share; PyTorch's takes seconds to import."""
    if recipe.engine == "own":
        return Own
    from minillm.recipes.pretrain_torch import Torch

    return Torch


def build(recipe: Recipe) -> LM:
    """The whole model, as every rank has it before it is cut."""
    shape = (load_course_tokenizer().vocab_size, recipe.d_model, recipe.n_layers, recipe.n_heads)
    kinds = {"norm": "rms", "position": "rope", "mlp": "swiglu"}
    heads = {"n_kv_heads": recipe.n_kv_heads, "max_len": recipe.max_len}
    model = LM(ModelConfig(*shape, **heads, **kinds), seed=recipe.seed)
    with torch.no_grad():
        model.tokens.weight.mul_(recipe.embedding_std / model.tokens.weight.std())
    return model.to(recipe.device, getattr(torch, recipe.dtype))


def _loss_and_norm(engine: Any, loss: Tensor, everyone: Any) -> tuple[float, float]:
    """The loss of the step and the norm of all gradients: what copies have counts once."""
    square = loss.new_zeros(())
    for options, holder in engine.graded():
        square += local(holder.grad).double().square().sum() / options["copies"]
    loss, square = all_reduce(torch.stack([loss, square]), everyone).tolist()
    return loss, math.sqrt(square)


# -- checkpoints ---------------------------------------------------------------------------------


def save(recipe: Recipe, engine: Any, step: Step) -> Path:
    """Write `step_00000120`, and remove the checkpoints that are too old, or newer."""
    path = recipe.checkpoints / f"step_{step.step:08d}"
    rng = torch.get_rng_state()
    pieces = [*engine.pieces(), checkpoint.Piece("rng", tuple(rng.shape), (0,), rng)]
    layout = {name: value for name, value in asdict(recipe).items() if name in LAYOUT}
    extra = {"step": asdict(step), "recipe": settings(recipe), "layout": layout}
    checkpoint.save(path, pieces, extra)
    checkpoint.keep_newest(recipe.checkpoints, recipe.keep, path)
    return path


def resume(recipe: Recipe, engine: Any, rows: Share) -> dict[str, Any]:
    """Load the newest whole checkpoint; what it says of its last step."""
    path = checkpoint.newest(recipe.checkpoints)
    if path is None:
        return {"step": 0, "tokens": 0}
    here, there = settings(recipe), read_manifest(path)["extra"]["recipe"]
    differ = [f"{name}={here[name]} here, {there.get(name)} there" for name in here]
    differ = [d for d, name in zip(differ, here, strict=True) if here[name] != there.get(name)]
    if differ:
        raise ValueError(f"{path} belongs to another run: " + "; ".join(differ))
    rng = torch.get_rng_state()
    pieces = [*engine.pieces(), checkpoint.Piece("rng", tuple(rng.shape), (0,), rng)]
    done = checkpoint.load(path, pieces)["step"]
    for state in engine.optimizer.state.values():
        state["step"].fill_(done["step"])
    rows.load_state_dict({"step": done["step"]})
    torch.set_rng_state(rng)
    return done


def whole_model(path: Path | str) -> LM:
    """The model of a checkpoint of any mesh, whole, on this process."""
    model = build(Recipe(**read_manifest(Path(path))["extra"]["recipe"]))
    named = model.named_parameters()
    pieces = [checkpoint.Piece(n, tuple(p.shape), (0,) * p.ndim, p.data) for n, p in named]
    checkpoint.load(path, pieces)
    return model


# -- the command ---------------------------------------------------------------------------------


def work(recipe: Recipe) -> None:
    """What each rank does: train, and rank 0 tells."""
    torch.set_flush_denormal(True)
    for step in run(recipe):
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"step {step.step:5d}  loss {step.loss:.4f}  {step.seconds:.1f} s", flush=True)


def main(recipe: Recipe) -> None:
    """Start the ranks, or be one of those that torchrun has started."""
    check(recipe, recipe.world_size)
    if recipe.world_size == 1 and recipe.engine == "own" and not dist.is_torchelastic_launched():
        return work(recipe)
    # under torchrun a limit on each message, otherwise one on the whole run
    limit = 600.0 if dist.is_torchelastic_launched() else 2e6
    launch(work, recipe, world_size=recipe.world_size, timeout=limit, device=recipe.device)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--quick"]
    default = quick() if "--quick" in sys.argv else Recipe()
    main(tyro.cli(Recipe, default=default, description=__doc__, args=words))
