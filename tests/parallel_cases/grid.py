"""Every rank has a block of each matrix and of the activations: tensor parallelism on a grid."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.parallel import tensor2d as T
from minillm.parallel.group import Tracer
from minillm.parallel.mesh import Mesh
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
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
)

SIDE = 2


def start(feature: Feature, dtype: torch.dtype) -> Setup:
    """Rows of the batch are divided along columns of the grid."""
    tracer = Tracer()
    mesh = Mesh({"row": SIDE, "column": SIDE}, tracer=tracer, algorithm="native")
    grid = T.Grid.of(mesh)
    # for what only the comparison needs
    quiet = T.Grid(*(x.with_(tracer=None) for x in (grid.row, grid.column, grid.all)))
    model = T.parallelize_2d(build(feature, dtype), grid)
    places = everywhere()
    if feature.cfg.dropout:
        T.place_dropout_2d(model, places, grid)
    optimizer = AdamW(model.parameters(), **HYPER)

    def work(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = batch(step)
        logits, losses = [], []
        for rows in torch.arange(ROWS).chunk(feature.passes):
            places.rows = own = T.own_rows(rows, grid)
            y = model(tokens[own])
            loss = T.cross_entropy_2d(y, targets[own], VOCABULARY, grid) / feature.passes
            loss.backward()
            logits.append(T.gather_logits_2d(y.detach(), quiet))
            losses.append(loss.detach())
        return torch.cat(logits), sum(losses)

    return Setup(
        model,
        optimizer,
        places,
        work,
        torch.arange(ROWS),
        places.positions,
        lambda: T.gather_2d(model, gradients_of(model)),
        lambda: T.gather_2d(model, named(model)),
        partial(hold, model, optimizer),
        tracer,
    )


def share(names: tuple[str, ...], full: list[Tensor], rank: int) -> Tensor:
    """A quarter of a matrix, half of a vector; a norm of heads is whole.

    Rank i, j has block i, j of the token vectors and of the head, [v, d], and of a Linear's Wᵀ.
    """
    i, j = divmod(rank, SIDE)
    (name,), (x,) = names, full
    if ".q_norm." in name or ".k_norm." in name:
        return x
    if x.ndim == 1:
        return x.chunk(SIDE)[j]
    if name == "position.table":  # columns of the width; every row of the grid has all positions
        return x.chunk(SIDE, 1)[j]
    i, j = (i, j) if name in ("tokens.weight", "head.weight") else (j, i)
    return x.chunk(SIDE)[i].chunk(SIDE, 1)[j]


# -- faults --------------------------------------------------------------------------------------


def own_mean(self, x):
    return x.mean(-1, keepdim=True)


def first_columns(x, grid):
    """As if these were the columns from zero on."""
    return F.pad(x, (0, (grid.side - 1) * x.shape[-1]))


def first_of_them(x, grid):
    return x[..., : x.shape[-1] // grid.side]


_LAYERS, _TENSOR = "minillm.parallel.layers2d", "minillm.parallel.tensor2d"
_MODULES = {"tokens": "Embedding2d", "head": "Head2d", "blocks.0.norm1": "Norm2d"}
_MODULES |= {
    f"blocks.{i}.attn.{x}": "SummaLinear" for i in range(4) for x in ("q", "k", "v", "out")
}
_MODULES |= {f"blocks.{i}.mlp.{x}": "SummaLinear" for i in range(4) for x in ("up", "down")}
STRATEGIES = (
    Strategy(
        "2d",
        SIDE**2,
        start,
        share,
        _MODULES | {"norm": "Norm2d"},
        ("broadcast", "reduce", "all_reduce", "all_to_all", "all_gather"),
        (
            Fault("mean of own columns", {f"{_LAYERS}.Norm2d._mean": own_mean}, "tied", "logits"),
            Fault("norms not summed", {f"{_LAYERS}.f": lambda x, group: x}, "gqa", "gradients"),
            Fault(
                "a product's gradient not summed",
                {"minillm.parallel.summa._atb": lambda a, b, grid: a.T @ b},
                "accumulation",
                "gradients",
            ),
            Fault(
                "all columns have the masks of the first",
                {f"{_TENSOR}._widen": first_columns, f"{_TENSOR}._narrow": first_of_them},
                "dropout",
                "logits",
            ),
        ),
    ),
)
