"""Schedules that never wait: PipeDream and 2BW, and one process with weights just as old."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minillm.parallel.actions import Action
from minillm.parallel.group import world
from minillm.parallel.pipeline import Pipeline
from minillm.parallel.schedules import schedule
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
    TOKENS,
    Feature,
    batch,
    build,
    everywhere,
    mean_loss,
    placed,
    planted,
)
from tests.parallel_cases.pipeline import Slice, names_of

DEVICES = MICRO_BATCHES = 3
BATCHES = 4

_TWO_ENDS = "the ends of a tied matrix are updated at different times, so it would be two"
IMPOSSIBLE = {
    "pipedream": {
        "tied": _TWO_ENDS,
        "all at once": _TWO_ENDS,
        "accumulation": "PipeDream updates after every micro-batch",
    },
    "2bw": {"tied": _TWO_ENDS, "all at once": _TWO_ENDS},  # it accumulates by itself
}

Weights = dict[str, Tensor]


def rows_of(m: int) -> Tensor:
    """Of a micro-batch, in its batch."""
    return torch.arange(ROWS).chunk(MICRO_BATCHES)[m % MICRO_BATCHES]


def data(m: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a micro-batch."""
    tokens, targets = batch(m // MICRO_BATCHES)
    return tokens[rows_of(m)], targets[rows_of(m)]


def updates_every(name: str) -> int:
    """Micro-batches whose mean gradient makes an update."""
    return 1 if name == "pipedream" else MICRO_BATCHES


def on_rank(name: str, feature: Feature, stash: bool) -> tuple[list[Tensor], Weights]:
    """Losses of all micro-batches where the last stage is; this stage's weights at the end."""
    group, places = world(), everywhere()
    stage = Slice(build(feature, torch.float64), group.index, group.size)
    placed(stage.model, places, stage.start)
    optimizer = AdamW(stage.parameters(), **HYPER)
    like = torch.empty(len(rows_of(0)), TOKENS, feature.cfg.d_model, dtype=torch.float64)
    lists = schedule(name, DEVICES, MICRO_BATCHES, batches=BATCHES)

    def busy(action: Action) -> None:
        if action.what == "forward":
            places.rows, places.seed = rows_of(action.micro_batch), action.micro_batch

    def loss(y: Tensor, m: int) -> Tensor:
        return mean_loss(y, data(m)[1]) / updates_every(name)

    def update(_: int) -> None:
        optimizer.step()
        optimizer.zero_grad()

    tokens = [data(m)[0] for m in range(MICRO_BATCHES * BATCHES)]
    losses = Pipeline(lists, [stage], group, like).run(tokens, loss, update, busy, stash)
    weights = {name: p.detach() for name, p in stage.model.named_parameters()}
    return losses, stage.whole_names(weights)


def run(
    name: str, jobs: Sequence[tuple[Feature, Mapping[str, Any]]], stash: bool = True
) -> list[tuple[list[Tensor], Weights]]:
    """On a rank: one job after the other."""
    found = []
    for feature, patches in jobs:
        with planted(patches):
            found.append(on_rank(name, feature, stash))
    return found


# -- one process ---------------------------------------------------------------------------------

VERSIONS: dict[str, Callable[[int, int], int]] = {
    "pipedream": lambda m, s: max(0, m - (DEVICES - s) + 1),
    "2bw": lambda m, s: max(m // MICRO_BATCHES - 1, 0),
    "up to date": lambda m, s: m,  # updated after every micro-batch, or
    "up to date, by batches": lambda m, s: m // MICRO_BATCHES,
}
"""how many updates the weights have seen that stage s uses for micro-batch m"""
UP_TO_DATE = {"pipedream": "up to date", "2bw": "up to date, by batches"}


def one_process(name: str, feature: Feature, versions: str = "") -> tuple[Tensor, Weights]:
    """Losses and weights; every version of all weights is kept, and used as `VERSIONS` says."""
    places, version = everywhere(), VERSIONS[versions or name]
    model = placed(build(feature, torch.float64), places)
    latest = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    optimizer = AdamW(latest.values(), **HYPER)
    history, losses = [{n: p.detach().clone() for n, p in latest.items()}], []
    stage = {n: s for s in range(DEVICES) for n in names_of(s, set(latest), DEVICES, 1)}
    for m in range(MICRO_BATCHES * BATCHES):
        places.rows, places.seed = rows_of(m), m
        used = {n: history[version(m, stage[n])][n].requires_grad_() for n in latest}
        tokens, targets = data(m)
        loss = mean_loss(functional_call(model, used, (tokens,)), targets) / updates_every(name)
        for n, gradient in zip(used, torch.autograd.grad(loss, list(used.values())), strict=True):
            p = latest[n]
            p.grad = gradient if p.grad is None else p.grad + gradient
        losses.append(loss.detach())
        if (m + 1) % updates_every(name) == 0:
            optimizer.step()
            optimizer.zero_grad()
            history.append({n: p.detach().clone() for n, p in latest.items()})
    return torch.stack(losses), history[-1]


def compare(ranks: Sequence[tuple[list[Tensor], Weights]], want: tuple[Tensor, Weights]) -> None:
    """Raise AssertionError unless losses and all weights are those of one process."""
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.stack(ranks[-1][0]), want[0], **close)
    names = [names_of(rank, set(want[1]), DEVICES, 1) for rank in range(DEVICES)]
    assert [set(weights) for _, weights in ranks] == names
    for _, weights in ranks:
        for name, found in weights.items():
            torch.testing.assert_close(found, want[1][name], **close)


# -- faults --------------------------------------------------------------------------------------


def nothing(*args):
    pass


_schedule = schedule


def one_that_waits(name, *args, **kwargs):
    return _schedule("1f1b", *args, **kwargs)


FAULTS = {
    "gradients of older weights lost": {
        "minillm.parallel.pipeline.Pipeline._collect": nothing,
    },
    "weights up to date": {"tests.parallel_cases.late.schedule": one_that_waits},
}
