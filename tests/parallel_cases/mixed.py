"""Rows, layers and slices at once on 8 ranks: data × pipeline × tensor parallelism."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from minillm.parallel.actions import Action
from minillm.parallel.collectives import all_reduce
from minillm.parallel.data import DDP
from minillm.parallel.group import Group, Tracer
from minillm.parallel.mesh import Mesh
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.schedules import schedule
from minillm.parallel.sequence import own_tokens, sequence_parallel
from minillm.parallel.tensor import gather_parameters, parallelize
from minillm.parallel.vocabulary import gather_logits, vocabulary_cross_entropy
from minillm.parallel.zero import ShardedOptimizer
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
    TOKENS,
    VOCABULARY,
    Fault,
    Feature,
    Setup,
    Strategy,
    batch,
    build,
    everywhere,
    gradients_of,
    hold,
    named,
    placed,
)
from tests.parallel_cases.data import (
    SAME_MASKS,
    alone,
    hold_buckets,
    next_ranks_part,
    part_of_row,
    parts_of_all,
)
from tests.parallel_cases.pipeline import FAULTS, Slice, names_of, sum_tied
from tests.parallel_cases.tensor import cut

AXES = {"data": 2, "pipeline": 2, "tensor": 2}
MICRO_BATCHES = 3


def replicas(mesh: Mesh) -> Group:
    """Ranks with the same slices of the same layers."""
    return mesh.group("data")


def start(feature: Feature, dtype: torch.dtype, zero: bool) -> Setup:
    """A slice of two layers, by 1F1B. With `zero`: ZeRO-1 in DDP's place, and divided tokens."""
    tracer = Tracer()
    mesh = Mesh(AXES, {"tensor": {"algorithm": "native"}}, tracer=tracer)
    data, pipeline, tensor = replicas(mesh), mesh.group("pipeline"), mesh.group("tensor")
    quiet, slices = (x.with_(tracer=None) for x in (data, tensor))  # for the comparison
    stage = Slice(build(feature, dtype), pipeline.index, pipeline.size)
    (sequence_parallel if zero else parallelize)(stage.model, tensor)
    own, positions = torch.arange(ROWS).chunk(data.size)[data.index], torch.arange(TOKENS)
    positions = own_tokens(positions, tensor) if zero else positions
    places = everywhere(own, positions)
    placed(stage.model, places, stage.start)
    called = stage if zero else DDP(stage, data)
    if zero:
        optimizer = ShardedOptimizer(stage.parameters(), AdamW, data, stage=1, **HYPER)
    else:
        optimizer = AdamW(stage.parameters(), **HYPER)
    passes = [rows.chunk(MICRO_BATCHES) for rows in own.chunk(feature.passes)]
    like = torch.empty(len(passes[0][0]), len(positions), feature.cfg.d_model, dtype=dtype)
    lists = schedule("1f1b", pipeline.size, MICRO_BATCHES)
    engine = Pipeline(lists, [called], pipeline, like)

    def work(step: int) -> tuple[Tensor | None, Tensor | None]:
        (tokens, targets), logits, losses = batch(step), [], []
        for parts in passes:

            def busy(action: Action, parts: tuple = parts) -> None:
                places.rows = parts[action.micro_batch]

            def loss(y: Tensor, m: int, parts: tuple = parts) -> Tensor:
                logits.append(gather_logits(y.detach(), VOCABULARY, slices))
                each = vocabulary_cross_entropy(y, targets[parts[m]], VOCABULARY, tensor)
                return each.sum() / (len(own) * TOKENS)

            with nullcontext() if zero else called.no_sync():
                losses += engine.run([tokens[rows] for rows in parts], loss, busy=busy)
        sum_tied([stage], pipeline)
        (optimizer if zero else called).finish_gradient_synchronization()
        if not losses:
            return None, None
        return torch.cat(logits), all_reduce(sum(losses), quiet) / data.size

    def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return stage.whole_names(gather_parameters(stage.model, values))

    def gradients() -> dict[str, Tensor]:
        return whole(
            parts_of_all(stage.model, optimizer, quiet) if zero else gradients_of(stage.model)
        )

    def held() -> dict:
        found = (hold_buckets if zero else hold)(stage.model, optimizer)
        return {(k, tuple(map(stage.whole_name, names))): x for (k, names), x in found.items()}

    return Setup(
        called,
        optimizer,
        places,
        work,
        own,
        torch.arange(TOKENS),
        gradients,
        lambda: whole(named(stage.model)),
        held,
        tracer,
    )


# -- by hand -------------------------------------------------------------------------------------


def coordinates(rank: int) -> tuple[int, int, int]:
    """Data, pipeline, tensor: ranks 0 and 1 have slices of one layer, 0 and 4 the same slice."""
    return rank // 4, rank // 2 % 2, rank % 2


def share(names: tuple[str, ...], full: list[Tensor], rank: int) -> Tensor:
    """A slice, on both replicas."""
    return cut(names[0], full[0], coordinates(rank)[2], 2)


def part_of_slices(names: tuple[str, ...], full: list[Tensor], rank: int) -> Tensor:
    """Of all slices in a row, one half on each replica."""
    d, _, t = coordinates(rank)
    return part_of_row(names, [cut(n, x, t, 2) for n, x in zip(names, full, strict=True)], d, 2)


def names_at(rank: int, names: set[str]) -> set[str]:
    """Those of its stage."""
    return names_of(coordinates(rank)[1], names, 2, 1)


# -- faults --------------------------------------------------------------------------------------

_HERE = "tests.parallel_cases.mixed"
_ACTIONS = ("forward", "backward", "update", "send", "receive")
_FAULTS = (
    *(fault for fault in FAULTS if fault.what != "ends of a tied matrix apart"),
    Fault(
        "ends of a tied matrix apart",
        {f"{_HERE}.sum_tied": lambda stages, group: None},
        "tied",
        "gradients of tokens",
    ),
    Fault(
        "replicas along the wrong axis",
        {f"{_HERE}.replicas": lambda mesh: mesh.group("tensor")},
        "untied",
        "logits",
    ),
    SAME_MASKS,
)
STRATEGIES = (
    Strategy(
        "dp x tp x pp",
        8,
        partial(start, zero=False),
        share,
        {"": "DDP", "module": "Slice", "module.model.blocks.1.attn.q": "ColumnLinear"},
        (*_ACTIONS, "all_reduce", "all_to_all", "all_gather"),
        (
            Fault("replicas apart", {"minillm.parallel.data.all_reduce": alone}, "gqa", "grad"),
            *_FAULTS,
        ),
        names_at,
    ),
    Strategy(
        "zero-1 x tp+sp x pp",
        8,
        partial(start, zero=True),
        part_of_slices,
        {"": "Slice", "model.blocks.1.attn.q": "GatheredColumnLinear"},
        (*_ACTIONS, "all_reduce", "all_to_all", "all_gather", "reduce_scatter"),
        (
            Fault(
                "parts of the other replica",
                {"minillm.parallel.zero.all_gather": next_ranks_part},
                "gqa",
                "weights",
            ),
            SAME_MASKS,
        ),
        names_at,
    ),
)
