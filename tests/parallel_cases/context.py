"""Every rank has tokens of its own: attention by a ring of keys and values."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel import context as X
from minillm.parallel.collectives import all_reduce
from minillm.parallel.group import Group, Tracer, world
from minillm.train.optim import AdamW
from tests.parallel_cases import (
    HYPER,
    ROWS,
    TOKENS,
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
from tests.parallel_cases.data import all_of_it

RANKS = 3  # shares of 2, 3 and 3 tokens


def start(feature: Feature, dtype: torch.dtype) -> Setup:
    """All ranks have all rows and all weights; gradients are summed at the end of a step."""
    group = world(tracer=Tracer())
    quiet = group.with_(tracer=None)  # for what only the comparison needs
    model = build(feature, dtype)
    own = X.context_parallel(model, group, X.zigzag(TOKENS, group.size))
    places = everywhere(positions=own)
    optimizer = AdamW(placed(model, places).parameters(), **HYPER)

    def work(step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = (x[:, own] for x in batch(step))
        logits, losses = [], []
        for rows in torch.arange(ROWS).chunk(feature.passes):
            places.rows = rows
            y = model(tokens[rows], positions=own)
            loss = F.cross_entropy(y.flatten(0, 1), targets[rows].flatten(), reduction="sum")
            loss = loss / (ROWS * TOKENS)
            loss.backward()
            logits.append(y.detach())
            losses.append(loss.detach())
        sum_gradients(model, group)
        return torch.cat(logits), all_reduce(sum(losses), quiet)

    return Setup(
        model,
        optimizer,
        places,
        work,
        torch.arange(ROWS),
        own,
        lambda: gradients_of(model),
        lambda: {name: p.detach().clone() for name, p in named(model).items()},
        partial(hold, model, optimizer),
        group.tracer,
    )


def sum_gradients(model: nn.Module, group: Group) -> None:
    """In one message: weights are whole on every rank, and each sees what its tokens do."""
    grads = [p.grad for p in model.parameters()]
    total = all_reduce(torch.cat([g.flatten() for g in grads]), group)
    for g, part in zip(grads, total.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


# -- faults --------------------------------------------------------------------------------------

_slopes = X._slopes


def one_rank_adds_nothing(*args):
    dq, dkv = _slopes(*args)
    return dq, dkv * (world().index != 1)


def last_block_only(out, lse, part, part_lse):
    return part, part_lse


def own_tokens_only(model, group, places):
    """Right positions, attention left as it was."""
    return places[group.index]


def nothing(*args):
    pass


_HERE = "tests.parallel_cases.context"
STRATEGIES = (
    Strategy(
        "context",
        RANKS,
        start,
        all_of_it,
        {f"blocks.{i}.attn.attend": "minillm.parallel.context" for i in range(4)},
        ("ring", "all_reduce"),
        (
            Fault(
                "own tokens only", {f"{_HERE}.X.context_parallel": own_tokens_only}, "gqa", "log"
            ),
            Fault("not merged", {"minillm.parallel.context._merge": last_block_only}, "gqa", "log"),
            Fault(
                "one rank adds nothing to the gradient of keys and values",
                {"minillm.parallel.context._slopes": one_rank_adds_nothing},
                "all at once",
                "gradients",
            ),
            Fault("gradients not summed", {f"{_HERE}.sum_gradients": nothing}, "tied", "gradients"),
        ),
    ),
)
