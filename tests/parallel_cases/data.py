"""Every rank has rows of its own: DDP, ZeRO-1, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.parallel import dropout
from minillm.parallel.collectives import all_gather, all_reduce
from minillm.parallel.data import DDP
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Group, Tracer, world
from minillm.parallel.partition import Bucket
from minillm.parallel.units import Part
from minillm.parallel.zero import ShardedOptimizer
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
    Fault,
    Feature,
    Held,
    Setup,
    Strategy,
    batch,
    build,
    everywhere,
    gradients_of,
    hold,
    mean_loss,
    named,
    placed,
)

RANKS = 3  # divides neither the numbers of a bucket nor the rows of a matrix
BUCKET = 20_000  # bytes: several of them, most with many parameters


def start(feature: Feature, dtype: torch.dtype, how: str) -> Setup:
    """Each rank starts from other weights: those of place 0 count."""
    group = world(tracer=Tracer())
    quiet = group.with_(tracer=None)  # for what only the comparison needs
    own = torch.arange(ROWS).chunk(group.size)[group.index]
    places = everywhere(own)
    model = module = placed(build(feature, dtype, seed=group.index), places)
    if how == "ddp":
        module = DDP(model, group, bucket_bytes=BUCKET)
    elif how == "fsdp":
        module = FSDP(model, group)
    if how.startswith("zero"):
        optimizer = ShardedOptimizer(
            model.parameters(), AdamW, group, stage=int(how[-1]), bucket_bytes=BUCKET, **HYPER
        )
    else:
        optimizer = AdamW(module.parameters(), **HYPER)
    parts = own.chunk(feature.passes)

    def work(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = batch(step)
        logits, losses = [], []
        for i, rows in enumerate(parts):
            places.rows, last = rows, i + 1 == len(parts)
            with module.no_sync() if how == "ddp" and not last else nullcontext():
                y = module(tokens[rows])
                loss = mean_loss(y, targets[rows]) / len(parts)
                loss.backward()
            logits.append(y.detach())
            losses.append(loss.detach())
            if how == "zero-2":
                optimizer.finish_gradient_synchronization()
        if how != "zero-2":
            (optimizer if how == "zero-1" else module).finish_gradient_synchronization()
        return torch.cat(logits), all_reduce(sum(losses), quiet) / group.size

    gradients = {"ddp": lambda: gradients_of(model), "fsdp": lambda: rows_of_all(module, quiet)}
    weights = {"fsdp": lambda: whole_weights(module)}
    return Setup(
        module,
        optimizer,
        places,
        work,
        own,
        places.positions,
        gradients.get(how, lambda: parts_of_all(model, optimizer, quiet)),
        weights.get(how, lambda: {name: p.detach().clone() for name, p in named(model).items()}),
        partial(hold_buckets if how.startswith("zero") else hold, model, optimizer),
        group.tracer,
    )


# -- whole again ---------------------------------------------------------------------------------


def parts_of_all(model: torch.nn.Module, optimizer: ShardedOptimizer, group: Group) -> dict:
    """Gradients from the parts of all ranks, a tied one under both names."""
    pieces = ((b, b.cut(all_gather(b.grad, group))) for b in optimizer.buckets)
    found = {p: g for b, gs in pieces for p, g in zip(b.parameters, gs, strict=True)}
    return {name: found[p].clone() for name, p in named(model).items()}


def rows_of_all(fsdp: FSDP, group: Group) -> dict[str, Tensor]:
    """Gradients from the rows of all ranks, without the padding."""
    rows = {name: len(x) for name, x in whole_weights(fsdp).items()}
    shards = named(fsdp.module)
    return {name: all_gather(p.grad, group)[: rows[name]] for name, p in shards.items()}


def whole_weights(fsdp: FSDP) -> dict[str, Tensor]:
    """A copy of all weights."""
    with fsdp.gather_full_params() as model:
        return {name: p.detach().clone() for name, p in named(model).items()}


def hold_buckets(model: torch.nn.Module, optimizer: ShardedOptimizer) -> Held:
    """This rank's part of each bucket, with the names of what is in it, and its moments.

    Parameters have to be views of the buckets' rows, and there must be no other moments.
    """
    names, found = {p: name for name, p in model.named_parameters()}, {}
    assert len(optimizer.state) == len(optimizer.buckets) > 0
    for bucket in optimizer.buckets:
        memory = bucket.row.untyped_storage().data_ptr()
        assert all(p.untyped_storage().data_ptr() == memory for p in bucket.parameters)
        here = tuple(names[p] for p in bucket.parameters)
        found["weights", here] = bucket.part.detach().clone()
        moments = optimizer.state[bucket.part]
        found |= {(kind, here): moments[kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    return found


# -- by hand -------------------------------------------------------------------------------------


def all_of_it(names: tuple[str, ...], full: list[Tensor], rank: int) -> Tensor:
    """A replica."""
    return full[0]


def part_of_row(names: tuple[str, ...], full: list[Tensor], rank: int, n: int = RANKS) -> Tensor:
    """One of n equal parts of all numbers in a row, the last one filled up with zeros."""
    numbers = torch.cat([x.flatten() for x in full])
    size = -(-len(numbers) // n)
    return F.pad(numbers, (0, n * size - len(numbers)))[rank * size : (rank + 1) * size]


def rows(names: tuple[str, ...], full: list[Tensor], rank: int, n: int = RANKS) -> Tensor:
    """As many rows as each of n ranks has, the last ones filled up with zeros."""
    size = -(-len(full[0]) // n)
    found = torch.zeros(size, *full[0].shape[1:], dtype=full[0].dtype)
    own = full[0][rank * size : (rank + 1) * size]
    found[: len(own)] = own
    return found


# -- faults --------------------------------------------------------------------------------------

_keep, _flatten, _pad = dropout.keep, Bucket.flatten, Part.pad


def rows_from_zero(seed, site, rows, *args):
    return _keep(seed, site, rows - rows.min(), *args)


def alone(x, group, *args):
    """A collective that nobody takes part in."""
    return x


def only_the_last(self, grad):
    self.grad = grad


def only_the_last_of_a_unit(self, grad):
    for part in self.trained:
        part.shard.grad = grad[part.columns].view_as(part.shard)


def padding_in_front(self, tensors):
    row, size = _flatten(self, tensors), sum(x.numel() for x in tensors)
    return row.roll(len(row) - size)


def padded_in_front(self, x):
    table = _pad(self, x)
    return table.view(-1).roll(table.numel() - self.size).view(table.shape)


def next_ranks_part(x, group):
    return all_gather(x, group).roll(len(x), 0)


def no_exchange(self):
    for bucket in self.buckets:
        bucket.message.result()


def undivided(owner, method, **settings):
    """Patches for a sum where a mean was asked for."""
    right = getattr(owner, method)

    def wrong(self, *args):
        vars(self).update(settings)
        return right(self, *args)

    return {f"{owner.__module__}.{owner.__name__}.{method}": wrong}


def fault(what, function, wrong, feature, part):
    """In one function of the package."""
    return Fault(what, {f"minillm.parallel.{function}": wrong}, feature, part)


SAME_MASKS = fault(
    "rows of each rank counted from zero", "dropout.keep", rows_from_zero, "dropout", "logits"
)
_UNIT, _OPTIMIZER = "units.Unit.add", "zero.ShardedOptimizer"
_DDP = undivided(DDP, "finish_gradient_synchronization", factor=1.0)
_ZERO_2 = undivided(ShardedOptimizer, "_collect", reduce="sum")
_ZERO_3 = undivided(FSDP, "_collect", factor=1.0)
_BOTH = ("reduce_scatter", "all_gather")
STRATEGIES = (
    Strategy(
        "ddp",
        RANKS,
        partial(start, how="ddp"),
        all_of_it,
        {"": "DDP", "module": "LM", "module.blocks.0.attn.q": "Linear"},
        ("all_reduce",),
        (
            fault("gradients not sent", "data.all_reduce", alone, "tied", "gradients"),
            fault("each from its own weights", "data.broadcast", alone, "untied", "logits"),
            Fault("a sum, not a mean", _DDP, "accumulation", "gradients"),
            SAME_MASKS,
        ),
    ),
    Strategy(
        "zero-1",
        RANKS,
        partial(start, how="zero-1"),
        part_of_row,
        {"": "LM"},
        _BOTH,
        (
            fault("parts of other ranks", "zero.all_gather", next_ranks_part, "tied", "weights"),
            fault("no exchange", f"{_OPTIMIZER}._receive", no_exchange, "gqa", "weights"),
            SAME_MASKS,
        ),
    ),
    Strategy(
        "zero-2",
        RANKS,
        partial(start, how="zero-2"),
        part_of_row,
        {"": "LM"},
        _BOTH,
        (
            fault("last pass", "partition.Bucket.add", only_the_last, "accumulation", "gradients"),
            fault("padding", "partition.Bucket.flatten", padding_in_front, "tied", "logits"),
            Fault("a sum, not a mean", _ZERO_2, "untied", "gradients"),
            SAME_MASKS,
        ),
    ),
    Strategy(
        "zero-3",
        RANKS,
        partial(start, how="fsdp"),
        rows,
        {"": "FSDP", "module": "LM", "module.blocks.0.attn.q": "Linear"},
        _BOTH,
        (
            fault("last pass", _UNIT, only_the_last_of_a_unit, "accumulation", "gradients"),
            fault("padding in front", "units.Part.pad", padded_in_front, "tied", "logits"),
            Fault("a sum, not a mean", _ZERO_3, "gqa", "gradients"),
            SAME_MASKS,
        ),
    ),
)
