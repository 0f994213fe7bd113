"""PyTorch's engine behind `minillm.recipes.pretrain`: for runs beyond one node.

`fully_shard` (FSDP2) divides over the data axis, `parallelize_module` (DTensor) over the tensor
axis, `torch.distributed.pipelining` over the pipeline. Model, stages, loss and checkpoints are
those of the course's engine, so that either can go on where the other stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from minillm.model import LM
from minillm.parallel.checkpoint import Piece
from minillm.parallel.collectives import all_reduce
from minillm.parallel.mesh import Mesh
from minillm.recipes.pretrain_own import (
    Rows,
    Stage,
    both_ends,
    initialized_state,
    local,
    parameter_groups,
)

KINDS = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}
PLAN = {
    **dict.fromkeys((f"blocks.*.attn.{x}" for x in "qkv"), ColwiseParallel()),
    **dict.fromkeys((f"blocks.*.mlp.{x}" for x in ("up", "gate")), ColwiseParallel()),
    **dict.fromkeys(("blocks.*.attn.out", "blocks.*.mlp.down"), RowwiseParallel()),
    "tokens": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}
"""what becomes of the modules under tensor parallelism"""


class Torch:
    """Model, optimizer and gradients of this rank, as `pretrain_own.Own` has them."""

    def __init__(self, recipe: Any, build: Callable[[], LM], mesh: Mesh) -> None:
        if not dist.is_initialized():
            raise ValueError("engine 'torch' needs a process group, also for one rank: use launch")
        self.recipe = r = recipe
        sizes = dict(zip(("data", "pipeline", "tensor"), (r.dp, r.pp, r.tp), strict=True))
        devices = init_device_mesh(r.device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        self.stages, self.named = [], {}
        for place in range(mesh.place["pipeline"], r.pp * r.chunks, r.pp):
            model = build()
            self.tied = r.pp > 1 and model.cfg.tie_embeddings
            if r.tp > 1:
                parallelize_module(model, devices["tensor"], PLAN)
                if model.cfg.tie_embeddings:
                    model.head.weight = model.tokens.weight
            stage = Stage(model, place, r.pp * r.chunks)
            if r.dp > 1:
                options = {"mesh": devices["data"], "reshard_after_forward": r.zero == 3}
                for module in (*stage.blocks(), stage):
                    fully_shard(module, **options).set_gradient_divide_factor(1.0)
            self.stages.append(stage)
            self.named |= {stage.whole_name(n): p for n, p in stage.named_parameters()}
        groups = parameter_groups(self.named, r.weight_decay, self._copies, self.tied)
        self.optimizer = torch.optim.AdamW(groups, lr=r.lr, betas=(0.9, 0.98))
        self.total, self.schedule, self.ends = 1.0, None, None
        if r.pp > 1:
            self._pipeline(devices["pipeline"].get_group(), mesh)

    def _copies(self, name: str) -> int:
        p = self.named[name]
        cut = isinstance(p, DTensor) and "tensor" in p.device_mesh.mesh_dim_names
        return 1 if cut else self.recipe.tp

    def _pipeline(self, group: dist.ProcessGroup, mesh: Mesh) -> None:
        r = self.recipe
        p = local(next(iter(self.named.values())))
        rows, n = r.batch // r.dp // r.micro_batches, r.pp * r.chunks
        like = {"dtype": p.dtype, "device": p.device, "requires_grad": True}
        hidden = torch.empty(rows, r.max_len, r.d_model, **like)
        tokens = torch.empty(rows, r.max_len, dtype=torch.int64, device=p.device)
        made = [
            PipelineStage(
                *(stage, place, n, p.device),
                input_args=(tokens if stage.first else hidden,),
                output_args=(hidden,),
                group=group,
            )
            for place, stage in zip(
                range(mesh.place["pipeline"], n, r.pp), self.stages, strict=True
            )
        ]
        kind, stages = KINDS[r.schedule], made if r.schedule == "interleaved" else made[0]
        self.schedule = kind(stages, r.micro_batches, loss_fn=self._loss, scale_grads=False)
        self.ends = both_ends(mesh)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(logits, targets, reduction="sum") / self.total

    def gradients(self, batches: Sequence[Rows], total: float) -> Tensor:
        """As `Own.gradients`."""
        self.total, found = total, []
        labels = [targets.where(mask, -100) for _, targets, mask in batches]
        with loss_parallel() if self.recipe.tp > 1 else nullcontext():
            if self.schedule:
                inputs = (torch.cat([x for x, _, _ in batches]),) if self.stages[0].first else ()
                last = self.stages[-1].last
                target = {"target": torch.cat(labels), "losses": found} if last else {}
                self.schedule.step(*inputs, **target)
            else:
                (stage,) = self.stages
                for m, ((x, _, _), y) in enumerate(zip(batches, labels, strict=True)):
                    if self.recipe.dp > 1:
                        stage.set_requires_gradient_sync(m + 1 == len(batches))
                    found.append(self._loss(stage(x), y))
                    found[-1].backward()
        for options, p in self.graded():
            if isinstance(p, DTensor) and p.grad.placements != p.placements:
                # an embedding cut by its entries gets its gradient whole, on every rank
                p.grad = p.grad.redistribute(placements=p.placements)
            if options["at_ends"]:
                local(p.grad).copy_(all_reduce(local(p.grad), self.ends))
        zero = torch.zeros((), dtype=torch.float64, device=self.recipe.device)
        return sum((self._plain(x) for x in found), zero) / self.recipe.tp

    @staticmethod
    def _plain(x: Tensor) -> Tensor:
        x = x.detach()
        return (x.full_tensor() if isinstance(x, DTensor) else x).double()

    def graded(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """As `Own.graded`."""
        for options in self.optimizer.param_groups:
            for p in options["params"]:
                yield options, p

    def pieces(self) -> Iterator[Piece]:
        """As `Own.pieces`: the names, shapes and offsets that DTensors know."""
        state = initialized_state(self.optimizer)
        for name, p in self.named.items():
            kinds = {
                name: p.data,
                **{f"{k} of {name}": state[p][k] for k in ("exp_avg", "exp_avg_sq")},
            }
            for called, x in kinds.items():
                offsets = (0,) * x.ndim
                if isinstance(x, DTensor):
                    (chunk,) = x.__create_chunk_list__()
                    offsets = tuple(chunk.offsets)
                yield Piece(called, tuple(x.shape), offsets, local(x))
