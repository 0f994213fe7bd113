"""Every rank has layers of its own: synchronous schedules, and the slice of the model they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel.actions import Action, placement
from minillm.parallel.collectives import all_reduce
from minillm.parallel.dropout import place_dropout
from minillm.parallel.group import Group, Tracer, world
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.schedules import schedule
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
    TOKENS,
    VOCABULARY,
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
    placed,
)
from tests.parallel_cases.data import all_of_it

LAYERS, MICRO_BATCHES = 4, 6


class Slice(nn.Module):
    """Some of a model's own layers; the first of them embeds, the last has the vocabulary.

    The two ends of a tied matrix are two parameters, see `sum_tied`.
    """

    def __init__(self, model: nn.Module, stage: int, stages: int) -> None:
        super().__init__()
        self.first, self.last, n = stage == 0, stage == stages - 1, len(model.blocks)
        self.start, blocks = n * stage // stages, model.blocks
        model.blocks = blocks[self.start : n * (stage + 1) // stages]
        self.model = copy.deepcopy(model)
        model.blocks = blocks
        if not self.first:
            self.model.tokens = None
            if hasattr(self.model.position, "table"):
                del self.model.position.table
        if not self.last:
            self.model.head = self.model.norm = None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, or the stream of the stage before -> the stream, or logits."""
        positions = torch.arange(TOKENS)
        x = self.model.embed(x, positions) if self.first else x
        x = self.model.body(x, positions)
        return self.model.unembed(x) if self.last else x

    def whole_name(self, name: str) -> str:
        """What a parameter of `self.model` is called in the whole one."""
        if not name.startswith("blocks."):
            return name
        _, i, rest = name.split(".", 2)
        return f"blocks.{self.start + int(i)}.{rest}"

    def whole_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, renamed."""
        return {self.whole_name(name): x for name, x in values.items()}

    def tied(self) -> list[nn.Parameter]:
        """The end of a tied matrix that lies here."""
        if not self.model.cfg.tie_embeddings:
            return []
        ends = (self.model.tokens if self.first else None, self.model.head if self.last else None)
        return list({end.weight for end in ends if end is not None})


def sum_tied(stages: list[Slice], group: Group) -> None:
    """Give both ends of a tied matrix the gradient of both; called by all ranks of a pipeline."""
    own = [p for stage in stages for p in stage.tied()]
    cfg, rows = stages[0].model.cfg, len(own[0]) if own else VOCABULARY
    if cfg.tie_embeddings:
        nothing = torch.zeros(rows, cfg.d_model, dtype=next(stages[0].parameters()).dtype)
        total = all_reduce(sum((p.grad for p in own), nothing), group)
        for p in own:
            p.grad.copy_(total)


def start(feature: Feature, dtype: torch.dtype, name: str, devices: int, chunks: int) -> Setup:
    """A rank has `chunks` stages; a pass is cut into micro-batches."""
    group = world(tracer=Tracer())
    lists = schedule(name, devices, MICRO_BATCHES, chunks)
    where, places = placement(lists), everywhere()
    whole = build(feature, dtype)
    stages = [Slice(whole, s, len(where)) for s in sorted(where) if where[s] == group.index]
    for stage in stages:
        placed(stage.model, places, stage.start)
    passes = [rows.chunk(MICRO_BATCHES) for rows in torch.arange(ROWS).chunk(feature.passes)]
    like = torch.empty(len(passes[0][0]), TOKENS, feature.cfg.d_model, dtype=dtype)
    pipeline = Pipeline(lists, stages, group, like)
    optimizer = AdamW([p for stage in stages for p in stage.parameters()], **HYPER)

    def work(step: int) -> tuple[Tensor | None, Tensor | None]:
        (tokens, targets), logits, losses = batch(step), [], []
        for parts in passes:

            def busy(action: Action, parts: tuple = parts) -> None:
                places.rows = parts[action.micro_batch]

            def loss(y: Tensor, m: int, parts: tuple = parts) -> Tensor:
                logits.append(y.detach())
                total = F.cross_entropy(
                    y.flatten(0, 1), targets[parts[m]].flatten(), reduction="sum"
                )
                return total / (ROWS * TOKENS)

            losses += pipeline.run([tokens[rows] for rows in parts], loss, busy=busy)
        sum_tied(stages, group.with_(tracer=None))
        return (torch.cat(logits), sum(losses)) if losses else (None, None)

    return Setup(
        nn.ModuleList(stages),
        optimizer,
        places,
        work,
        torch.arange(ROWS),
        places.positions,
        lambda: of_all(stages, lambda s: gradients_of(s.model)),
        lambda: of_all(stages, lambda s: {n: p.detach() for n, p in s.model.named_parameters()}),
        partial(held_by, stages, optimizer),
        group.tracer,
    )


def of_all(stages: list[Slice], values: Callable[[Slice], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all stages of a rank have, under the names of the whole model."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        found |= stage.whole_names(values(stage))
    return found


def held_by(stages: list[Slice], optimizer: torch.optim.Optimizer) -> Held:
    """As `hold`, under the names of the whole model."""
    return {
        (kind, (stage.whole_name(name),)): x
        for stage in stages
        for (kind, (name,)), x in hold(stage.model, optimizer).items()
    }


# -- by hand -------------------------------------------------------------------------------------

STARTS = {2: (0, 2, 4), 3: (0, 1, 2, 4), 4: (0, 1, 2, 3, 4)}
"""of each number of stages: the first layer of each, and the end"""


def names_of(rank: int, names: set[str], devices: int, chunks: int) -> set[str]:
    """Those of the layers of stages rank, rank + K, ..., and of what belongs to the two ends."""
    starts, found = STARTS[devices * chunks], set()
    for stage in range(rank, devices * chunks, devices):
        for i in range(starts[stage], starts[stage + 1]):
            found |= {name for name in names if name.startswith(f"blocks.{i}.")}
    if rank == 0:
        found |= names & {"tokens.weight", "position.table"}
    if rank == devices - 1:
        found |= {name for name in names if name.startswith("norm.")} | {"head.weight"}
    return found


# -- faults --------------------------------------------------------------------------------------

_receive, _weights = Pipeline._receive, Pipeline._backward_weight


def nothing(*args):
    pass


def gradient_lost(self, result, tag):
    """What comes back from the stage behind is replaced by zeros."""
    x = _receive(self, result, tag)
    return torch.zeros_like(x) if result[0] == "backward" else x


def first_again(self, result, tag):
    """A stage gets the first micro-batch's activations for all of them."""
    x = _receive(self, result, tag)
    if result[0] == "forward":
        if result[2] == 0:
            self.first = x.detach().clone()
        return self.first.clone()
    return x


def one_weight_gradient_lost(self, action, message):
    if action.micro_batch == 3:
        self.kept.pop((action.stage, action.micro_batch))
    else:
        _weights(self, action, message)


def layers_from_zero(model, places, first_layer=0):
    return place_dropout(model, places)


_HERE, _PIPELINE = "tests.parallel_cases.pipeline", "minillm.parallel.pipeline.Pipeline"
FAULTS = (
    Fault("ends of a tied matrix apart", {f"{_HERE}.sum_tied": nothing}, "tied", "grad.* tokens"),
    Fault("a gradient lost", {f"{_PIPELINE}._receive": gradient_lost}, "accumulation", "grad"),
    Fault("first micro-batch again", {f"{_PIPELINE}._receive": first_again}, "gqa", "logits"),
    Fault(
        "layers of each stage counted from zero",
        {"tests.parallel_cases.place_dropout": layers_from_zero},
        "dropout",
        "logits",
    ),
)
HALVES = (
    Fault(
        "one weights' gradient lost",
        {f"{_PIPELINE}._backward_weight": one_weight_gradient_lost},
        "untied",
        "gradients",
    ),
)


def _strategy(name: str, devices: int = 3, chunks: int = 1) -> Strategy:
    halves = name == "zb-h1"
    actions = ("backward_input", "backward_weight") if halves else ("backward",)
    modules = {f"{chunk}": "Slice" for chunk in range(chunks)}
    return Strategy(
        name,
        devices,
        partial(start, name=name, devices=devices, chunks=chunks),
        all_of_it,
        modules,
        ("forward", *actions, "send", "receive", "update"),
        FAULTS + (HALVES if halves else ()),
        partial(names_of, devices=devices, chunks=chunks),
    )


STRATEGIES = (
    *(_strategy(name) for name in ("naive", "gpipe", "1f1b")),
    _strategy("interleaved", devices=2, chunks=2),
    _strategy("zb-h1"),
)
