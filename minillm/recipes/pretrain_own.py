"""The course's own engine behind `minillm.recipes.pretrain`: one rank's share of model and work."""

# b rows of a micro-batch, t tokens, d model width, v vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model import LM
from minillm.parallel.actions import Action
from minillm.parallel.checkpoint import Piece, flat_pieces
from minillm.parallel.collectives import all_reduce
from minillm.parallel.data import DDP
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Group, split
from minillm.parallel.mesh import Mesh, partition
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.schedules import schedule
from minillm.parallel.slices import bounds
from minillm.parallel.tensor import parallelize
from minillm.parallel.vocabulary import vocabulary_cross_entropy
from minillm.parallel.zero import ShardedOptimizer
from minillm.train.optim import AdamW

Rows = tuple[Tensor, Tensor, Tensor]
"""inputs, targets and the mask of what is learned, [b, t] each"""


class Elsewhere(nn.Module):
    """Stands where a block is that another rank has: the numbers of the others stay."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """x as it is."""
        return x


class Stage(nn.Module):
    """The blocks of stage `place` of `stages`; the first has the embedding, the last the head.

    Made of a whole model, whose names it keeps: [b, t] tokens, or [b, t, d], to [b, t, d] or
    logits. Tied ends are two copies, which stay one as long as both get the sum of gradients.
    """

    def __init__(self, model: LM, place: int, stages: int) -> None:
        super().__init__()
        self.first, self.last, n = place == 0, place == stages - 1, len(model.blocks)
        for i in range(n):
            if not n * place // stages <= i < n * (place + 1) // stages:
                model.blocks[i] = Elsewhere()
        self.tied = model.cfg.tie_embeddings
        if not self.first:
            model.tokens = None
            if hasattr(model.position, "table"):  # what is added where the stream begins
                model.position.table = None
        if not self.last:
            model.head = model.norm = None
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """What comes in from the stage before, one stage on."""
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.model.embed(x, positions) if self.first else x
        x = self.model.body(x, positions)
        return self.model.unembed(x) if self.last else x

    def blocks(self) -> list[nn.Module]:
        """Those that are here."""
        return [b for b in self.model.blocks if not isinstance(b, Elsewhere)]

    def whole_name(self, name: str) -> str:
        """A parameter's name in the whole model, however the stage is wrapped."""
        name = name[name.index("model.") + len("model.") :]
        return "tokens.weight" if self.tied and name == "head.weight" else name


def parameter_groups(
    named: Mapping[str, Tensor], weight_decay: float, copies: Callable[[str], int], tied: bool
) -> list[dict[str, Any]]:
    """Groups for an optimizer: as `decay_groups`, and apart by how many ranks hold the same.

    `copies(name)` is that number: gradients of copies count once in the norm. `tied`: the matrix
    of the token vectors lies at both ends of a pipeline; it has a group of its own.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in named.items():
        decays, at_ends = p.ndim >= 2, tied and name == "tokens.weight"
        key = (decays, copies(name), at_ends)
        new = {"params": [], "weight_decay": weight_decay if decays else 0.0}
        new |= {"copies": copies(name) * (1 + at_ends), "at_ends": at_ends}
        groups.setdefault(key, new)["params"].append(p)
    return list(groups.values())


def both_ends(mesh: Mesh) -> Group:
    """The first and the last rank of this pipeline, which share tied weights; others are alone."""
    across = partition(mesh.axes, "pipeline")
    inner = [[rank] for ranks in across for rank in ranks[1:-1]]
    return split([[ranks[0], ranks[-1]] for ranks in across] + inner, **mesh.common)


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor, the same memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def losses(
    logits: Tensor, targets: Tensor, mask: Tensor, vocab_size: int, group: Group | None
) -> Tensor:
    """Σ -log p(target) where the mask is true, of logits [b, t, v], or v / N of each of `group`."""
    if group is not None and group.size > 1:
        nats = vocabulary_cross_entropy(logits, targets, vocab_size, group)
        return nats.where(mask, 0.0).sum()
    targets = targets.where(mask, -100)  # the index that PyTorch leaves out
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


class Own:
    """Model, optimizer and data parallelism of this rank, by `minillm.parallel`.

    `gradients` is forward and backward of a step, `graded` what it has left; `pieces` is what a
    checkpoint needs. `mesh` has the axes "data", "pipeline", "tensor".
    """

    def __init__(self, recipe: Any, build: Callable[[], LM], mesh: Mesh) -> None:
        self.recipe = r = recipe
        self.data, self.tensor, pipe = (mesh.group(x) for x in ("data", "tensor", "pipeline"))
        self.stages, self.cuts, self.shapes = [], {}, {}
        for place in range(pipe.index, r.pp * r.chunks, r.pp):
            model = build()
            self.vocab_size, self.tied = model.cfg.vocab_size, r.pp > 1 and model.cfg.tie_embeddings
            if r.tp > 1:
                parallelize(model, self.tensor)
            self.stages.append(stage := Stage(model, place, r.pp * r.chunks))
            for path, module in stage.named_modules():
                for name, cut in getattr(module, "cuts", {}).items():
                    self.cuts[stage.whole_name(f"{path}.{name}")] = cut
            for name, p in stage.named_parameters():
                self.shapes[stage.whole_name(name)] = tuple(p.shape)
        self._share_data()
        self.pipeline, self.ends = None, None
        if r.pp > 1:
            across = partition(mesh.axes, "pipeline")
            self.ends = both_ends(mesh)
            back = split(across, **mesh.common, **mesh.settings.get("pipeline", {}))
            p, rows = next(iter(self.named.values())), r.batch // r.dp // r.micro_batches
            like = p.new_empty(rows, r.max_len, r.d_model)
            lists = schedule(r.schedule, r.pp, r.micro_batches, r.chunks)
            self.pipeline = Pipeline(lists, self.called, pipe, like, back)

    def _share_data(self) -> None:
        """Data parallelism of the right stage, and the optimizer."""
        r, self.ddp, self.called = self.recipe, None, list(self.stages)
        if r.zero == 0 and r.dp > 1:
            # behind a pipeline there is nothing left to overlap with
            self.ddp = DDP(nn.ModuleList(self.stages), self.data, reduce="sum", overlap=r.pp == 1)
        if r.zero == 3:
            self.called = [FSDP(s, self.data, units=s.blocks(), reduce="sum") for s in self.stages]
        self.named = {
            stage.whole_name(name): p
            for stage, module in zip(self.stages, self.called, strict=True)
            for name, p in module.named_parameters()
        }
        whole = r.dp if r.zero == 0 else 1
        copies = lambda name: whole * (1 if name in self.cuts else r.tp)  # noqa: E731
        groups = parameter_groups(self.named, r.weight_decay, copies, self.tied)
        options = {"lr": r.lr, "betas": (0.9, 0.98)}
        if r.zero in (1, 2):
            options |= {"stage": r.zero, "reduce": "sum"}
            self.optimizer = ShardedOptimizer(groups, AdamW, self.data, **options)
        else:
            self.optimizer = AdamW(groups, **options)

    # -- a step --------------------------------------------------------------------------------

    def gradients(self, batches: Sequence[Rows], total: float) -> Tensor:
        """Gradients of the mean loss over the `total` tokens of all ranks, from one batch of rows a
        micro-batch; this rank's part of the loss, of which the sum over ranks is that of the step.
        """

        def loss(logits: Tensor, m: int) -> Tensor:
            return losses(logits, *batches[m][1:], self.vocab_size, self.tensor) / total

        quiet = self.ddp.no_sync if self.ddp else nullcontext
        if self.pipeline:
            with quiet():
                found = self.pipeline.run([x for x, _, _ in batches], loss, busy=self._between)
        else:
            found = []
            for m, (x, _, _) in enumerate(batches):
                self._between()
                with quiet() if m + 1 < len(batches) else nullcontext():
                    one = loss(self.called[0](x), m)
                    one.backward()
                found.append(one.detach())
        self._finish()
        zero = next(iter(self.named.values())).new_zeros(())
        return sum(found, zero).double() / self.recipe.tp

    def _between(self, action: Action | None = None) -> None:
        """Stage 2 of ZeRO keeps no gradients: what one backward left goes before the next begins.

        So with M micro-batches gradients travel M times.
        """
        if self.recipe.zero != 2 or (action is not None and action.what == "update"):
            return
        if any(b.missing < len(b.parameters) for b in self.optimizer.buckets):
            self.optimizer.finish_gradient_synchronization()

    def _finish(self) -> None:
        """Gradients over the ranks of the data axis, and over both ends of the pipeline."""
        last = [self.ddp] if self.ddp else []
        last += self.called if self.recipe.zero == 3 else []
        last += [self.optimizer] if self.recipe.zero in (1, 2) else []
        for one in last:
            one.finish_gradient_synchronization()
        for options, holder in self.graded():
            if options["at_ends"]:
                holder.grad = all_reduce(holder.grad, self.ends)

    def graded(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """All that has a `grad` on this rank, parameters or parts of them, with its options."""
        groups = self.optimizer.param_groups
        if self.recipe.zero in (1, 2):
            groups = self.optimizer.inner.param_groups
        buckets = {id(b.part): b for b in getattr(self.optimizer, "buckets", [])}
        for options in groups:
            for p in options["params"]:
                yield options, buckets.get(id(p), p)

    # -- checkpoints ---------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of weights and moments, as memory to read from or write to."""
        names = {id(p): name for name, p in self.named.items()}
        state = initialized_state(self.optimizer)
        for name, p in self.named.items():
            yield from self._rows(name, name, p.data)
            for kind in ("exp_avg", "exp_avg_sq"):
                if p in state:
                    yield from self._rows(f"{kind} of {name}", name, state[p][kind])
        for bucket in getattr(self.optimizer, "buckets", []):
            at = -bucket.mine.start  # where in this rank's part the parameter begins
            for p in bucket.parameters:
                start, stop = max(0, -at), min(p.numel(), bucket.k - at)
                for kind in ("exp_avg", "exp_avg_sq") if start < stop else ():
                    part = state[bucket.part][kind][at + start : at + stop]
                    name = names[id(p)]
                    whole = self._whole(f"{kind} of {name}", name, p.data)
                    yield from flat_pieces(whole, part, start)
                at += p.numel()

    def _whole(self, called: str, name: str, x: Tensor) -> Piece:
        """x as the whole of what tensor parallelism has left to this rank."""
        shape, offsets = list(self.shapes[name]), [0] * len(self.shapes[name])
        if name in self.cuts:
            axis, shape[axis] = self.cuts[name]
            offsets[axis] = bounds(shape[axis], self.tensor)[0]
        return Piece(called, tuple(shape), tuple(offsets), x)

    def _rows(self, called: str, name: str, x: Tensor) -> Iterator[Piece]:
        """x, of which ZeRO-3 leaves each rank some rows, with zeros behind the last ones."""
        whole = self._whole(called, name, x)
        if self.recipe.zero == 3:
            first = len(x) * self.data.index
            own = x[: max(0, self.shapes[name][0] - first)]
            at = (whole.offsets[0] + first, *whole.offsets[1:])
            whole = whole._replace(offsets=at, tensor=own)
        yield whole


def initialized_state(optimizer: torch.optim.Optimizer) -> Mapping[Tensor, dict[str, Tensor]]:
    """The state of AdamW, zeros before the first step."""
    groups = getattr(optimizer, "inner", optimizer).param_groups
    for p in (p for options in groups for p in options["params"]):
        if not optimizer.state[p]:
            zeros = {kind: torch.zeros_like(p.data) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] |= {"step": torch.tensor(0.0), **zeros}
    return optimizer.state
