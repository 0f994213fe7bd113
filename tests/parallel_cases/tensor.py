"""Every rank has slices of each matrix: tensor parallelism, alone and with divided tokens."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel import collectives as C
from minillm.parallel.group import Group, Tracer, world
from minillm.parallel.sequence import own_tokens, scatter_tokens, sequence_parallel
from minillm.parallel.tensor import gather_parameters, parallelize
from minillm.parallel.vocabulary import gather_logits, vocabulary_cross_entropy
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

RANKS = 4  # of 38 entries two have 9, two 10


def divided_loss(logits: Tensor, targets: Tensor, group: Group) -> Tensor:
    """The mean over tokens, of logits of which each rank has a slice."""
    return vocabulary_cross_entropy(logits, targets, VOCABULARY, group).mean()


def start(feature: Feature, dtype: torch.dtype, tokens_too: bool) -> Setup:
    """All ranks have all rows."""
    group = world(tracer=Tracer(), algorithm="native")
    quiet = group.with_(tracer=None)  # for what only the comparison needs
    model = (sequence_parallel if tokens_too else parallelize)(build(feature, dtype), group)
    positions = torch.arange(TOKENS)
    places = everywhere(positions=own_tokens(positions, group) if tokens_too else positions)
    optimizer = AdamW(placed(model, places).parameters(), **HYPER)

    def work(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = batch(step)
        logits, losses = [], []
        for rows in torch.arange(ROWS).chunk(feature.passes):
            places.rows = rows
            y = model(tokens[rows])
            loss = divided_loss(y, targets[rows], group) / feature.passes
            loss.backward()
            logits.append(gather_logits(y.detach(), VOCABULARY, quiet))
            losses.append(loss.detach())
        return torch.cat(logits), sum(losses)

    return Setup(
        model,
        optimizer,
        places,
        work,
        torch.arange(ROWS),
        positions,
        lambda: gather_parameters(model, gradients_of(model)),
        lambda: gather_parameters(model, named(model)),
        partial(hold, model, optimizer),
        group.tracer,
    )


# -- by hand -------------------------------------------------------------------------------------

AXES = {"tokens": 0, "head": 0, "q": 0, "k": 0, "v": 0, "up": 0, "gate": 0, "out": 1, "down": 1}


def cut(name: str, full: Tensor, rank: int, n: int = RANKS) -> Tensor:
    """What lies between two multiples of 1/n of the axis that the module divides."""
    axis = AXES.get(name.split(".")[-2])
    if axis is None or axis >= full.ndim:  # a norm, a position table; a bias behind a sum
        return full
    a, b = (full.shape[axis] * i // n for i in (rank, rank + 1))
    return full[a:b] if axis == 0 else full[:, a:b]


def share(names: tuple[str, ...], full: list[Tensor], rank: int) -> Tensor:
    """One parameter's slice."""
    return cut(names[0], full[0], rank)


# -- faults --------------------------------------------------------------------------------------


def whole(x, group):
    """A gradient, or a result, that is not summed over ranks."""
    return x


def bias_everywhere(self, x):
    """Adds the bias before the sum."""
    return C.all_reduce(F.linear(x, self.weight, self.bias), self.group)


def positions_from_zero(x, group, axis=-1):
    return torch.arange(x.shape[axis] // group.size)


def untied(model, first, others):
    """Two slices of one matrix, each with a gradient of its own."""
    for name in others:
        above, _, last = name.rpartition(".")
        copy = nn.Parameter(model.get_parameter(first).detach().clone())
        model.get_submodule(above).register_parameter(last, copy)


def bias_of_own_tokens(self, x):
    """Forgets that each rank sees a part of the bias's gradient."""
    return scatter_tokens(F.linear(x, self.weight), self.group) + self.bias


_TENSOR, _SEQUENCE = "minillm.parallel.tensor", "minillm.parallel.sequence"
_CUT = {"": "LM", "tokens": "VocabularyEmbedding", "head": "ColumnLinear"}
_CUT |= {f"blocks.{i}.attn.{x}": "ColumnLinear" for i in range(4) for x in "qkv"}
_CUT |= {f"blocks.{i}.{x}": "RowLinear" for i in range(4) for x in ("attn.out", "mlp.down")}
_DIVIDED = {"tokens": "PartialEmbedding", "norm": "Shared", "blocks.3.norm2": "Shared"}
_DIVIDED |= {
    path: {"ColumnLinear": "GatheredColumnLinear", "RowLinear": "ScatteredRowLinear"}[kind]
    for path, kind in _CUT.items()
    if kind.endswith("Linear")
}
STRATEGIES = (
    Strategy(
        "tp",
        RANKS,
        partial(start, tokens_too=False),
        share,
        _CUT,
        ("all_reduce", "all_to_all", "all_gather"),  # the last two in the loss
        (
            Fault("no sum forward", {f"{_TENSOR}.g": whole}, "untied", "logits"),
            Fault("no sum backward", {f"{_TENSOR}.f": whole}, "gqa", "gradients"),
            Fault("bias n times", {f"{_TENSOR}.RowLinear.forward": bias_everywhere}, "tied", "log"),
            Fault("not tied", {f"{_TENSOR}._tie": untied}, "tied", "gradients of tokens"),
            Fault(
                "softmax over own entries",
                {"minillm.parallel.vocabulary._combine": lambda lse, picked, group: (lse, picked)},
                "untied",
                "loss",
            ),
        ),
    ),
    Strategy(
        "tp+sp",
        RANKS,
        partial(start, tokens_too=True),
        share,
        _DIVIDED,
        ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"),
        (
            Fault("no sum for norms", {f"{_TENSOR}.f": whole}, "gqa", "gradients"),
            Fault(
                "no sum for biases",
                {f"{_SEQUENCE}.ScatteredRowLinear.forward": bias_of_own_tokens},
                "tied",
                "gradients",
            ),
            Fault(
                "positions of each rank from zero",
                {"tests.parallel_cases.tensor.own_tokens": positions_from_zero},
                "dropout",
                "logits",
            ),
            Fault(
                "position vectors of the first tokens",
                {f"{_SEQUENCE}.own_tokens": positions_from_zero},
                "tied",
                "logits",
            ),
        ),
    ),
)
