"""Two-dimensional tensor parallelism: the model, cut over the batch and over the width, on a grid.

Cut as in `minillm.parallel.tensor`, every rank still holds all activations between the branches.
Here rank i, j of a q × q grid holds rows i of the batch and columns j of the width, [b/q, t, d/q],
and a block of every weight. Linears are SUMMA products, attention runs on whole heads of own rows,
norms and the loss sum their statistics along the row of the grid. All from outside:

    grid = Grid.of(Mesh({"row": 2, "column": 2}))
    model = parallelize_2d(LM(cfg, seed=0), grid)
    tokens, targets = own_rows(tokens, grid), own_rows(targets, grid)    # [b, t] -> [b/q, t]
    cross_entropy_2d(model(tokens), targets, cfg.vocab_size, grid).backward()

Source: Xu and You, An Efficient 2D Method for Training Super-Large Deep Learning Models, 2021
("Optimus").
"""

# b batch, t tokens, d model width, v vocabulary; q side of the grid, i row and j column of a rank

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minillm.parallel import collectives as C
from minillm.parallel.dropout import Places, place_dropout
from minillm.parallel.group import Group
from minillm.parallel.layers2d import (
    Embedding2d,
    Head2d,
    Norm2d,
    SummaLinear,
    hold_2d,
    share_input_2d,
)
from minillm.parallel.mesh import Mesh
from minillm.parallel.slices import f, g
from minillm.parallel.summa import (
    Cost,
    Grid,
    bytes_1d,
    bytes_2d,
    bytes_3d,
    bytes_25d,
    matmul,
    summa_bytes,
    tile,
    untile,
)
from minillm.parallel.tensor import Shared, check_heads, parallelize
from minillm.parallel.vocabulary import vocabulary_cross_entropy

__all__ = [
    "PLAN_2D",
    "Cost",
    "Embedding2d",
    "Grid",
    "Head2d",
    "Norm2d",
    "SummaLinear",
    "bytes_1d",
    "bytes_2d",
    "bytes_3d",
    "bytes_25d",
    "cross_entropy_2d",
    "gather_2d",
    "gather_logits_2d",
    "grad_norm_2d",
    "matmul",
    "own_rows",
    "parallelize_2d",
    "place_dropout_2d",
    "position_2d",
    "shard_2d",
    "summa_bytes",
    "tile",
    "untile",
]

# -- positions and dropout -----------------------------------------------------------------------


def _widen(x: Tensor, grid: Grid) -> Tensor:
    """x [..., d/q] among zeros, [..., d]: for what has to know which columns these are."""
    width = x.shape[-1]
    return F.pad(x, (grid.row.index * width, (grid.side - 1 - grid.row.index) * width))


def _narrow(x: Tensor, grid: Grid) -> Tensor:
    return tile(x, {x.ndim - 1: grid.row})


class _Method(nn.Module):
    """A method of a module, called so that `functional_call` can replace the parameters."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.method = module, getattr(module, name)

    def forward(self, *args: Any) -> Any:
        return self.method(*args)


def position_2d(position: nn.Module, grid: Grid) -> nn.Module:
    """Own columns of what is added to tokens, own heads of what is added to scores."""
    position.tiles = {}
    for name, method in (("table", "add"), ("buckets", "bias")):
        if hasattr(position, name):
            hold_2d(position, name, getattr(position, name), {1: grid.row})
            call, key = _Method(position, method), f"module.{name}"
            setattr(position, method, _summed(call, key, grid.column))
    if hasattr(position, "slopes"):
        position.slopes = tile(position.slopes, {0: grid.row}).clone()
    if position.cfg.position == "sinusoidal":
        add = position.add
        position.add = lambda x, positions: _narrow(add(_widen(x, grid), positions), grid)
    return position


def _summed(call: nn.Module, key: str, group: Group) -> Callable[..., Tensor]:
    """`call` with one parameter whose gradient is summed over a group."""

    def wrapped(*args: Any) -> Tensor:
        return functional_call(call, {key: f(call.get_parameter(key), group)}, args)

    return wrapped


def place_dropout_2d(model: nn.Module, places: Places, grid: Grid, first_layer: int = 0) -> None:
    """`place_dropout` for a model in blocks: the masks of one process, for own columns.

    `places.rows` are this rank's rows of the batch. Raises ValueError as `place_dropout` does.
    """
    branches = [branch for block in model.blocks for branch in (block.attn, block.mlp)]
    branches += [model.embedding_norm] if model.embedding_norm is not None else []
    add = model.position.add
    model.position.add = lambda *args: _widen(add(*args), grid)
    for branch in branches:
        branch.register_forward_hook(lambda module, args, x: _widen(x, grid))
    place_dropout(model, places, first_layer)
    dropped = model.position.add
    model.position.add = lambda *args: _narrow(dropped(*args), grid)
    for branch in branches:
        branch.register_forward_hook(lambda module, args, x: _narrow(x, grid))


# -- the model -----------------------------------------------------------------------------------


def heads_2d(attention: nn.Module, grid: Grid) -> nn.Module:
    """Attention, if its heads can be divided among the columns of the grid."""
    check_heads(attention, grid.row)
    return attention


def norm_of_heads(full: nn.Module, grid: Grid) -> nn.Module:
    """A norm over the width of one head: whole on each rank, which has its own heads and rows."""
    return Shared(full, grid.all)


LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.gate", "mlp.down")
PLAN_2D: Mapping[str, Callable[[nn.Module, Grid], nn.Module]] = {
    "blocks.*.attn": heads_2d,
    **dict.fromkeys((f"blocks.*.{name}" for name in LINEARS), SummaLinear),
    "blocks.*.attn.q_norm": norm_of_heads,
    "blocks.*.attn.k_norm": norm_of_heads,
    "position": position_2d,
    "tokens": Embedding2d,
    "head": Head2d,
}
"""as `minillm.parallel.tensor.PLAN`, with a grid instead of a group"""


def parallelize_2d(
    model: nn.Module,
    grid: Grid | Mesh,
    plan: Mapping[str, Callable[[nn.Module, Grid], nn.Module]] = PLAN_2D,
) -> nn.Module:
    """Replace modules of `model` in place by their blocks for this rank of the grid.

    Build the model whole on every rank with one seed. Afterwards it takes own rows of the tokens,
    [b/q, t], and returns own logits [b/q, t, v/q]. Norms over the width, wherever they are, become
    `Norm2d`, unless the plan says otherwise. Tied parameters stay tied. Queries, keys and values
    are one product, and so are gate and up.

    Raises ValueError for a mesh without a grid, for widths, heads or a vocabulary that q does not
    divide, and for parameters that would stay whole; the model is unusable then.
    """
    grid = Grid.of(grid) if isinstance(grid, Mesh) else grid
    norms = {
        path: Norm2d
        for path, module in model.named_modules()
        if hasattr(module, "eps") and not path.endswith(("q_norm", "k_norm"))
    }
    parallelize(model, grid, norms | dict(plan))
    whole = []
    for path, module in model.named_modules():
        for names in (("q", "k", "v"), ("gate", "up")):
            share_input_2d([getattr(module, name, None) for name in names])
        if not isinstance(module, Shared) and not hasattr(module, "tiles"):
            whole += [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    if whole:
        raise ValueError(f"the plan leaves {whole} whole on every rank of the grid")
    return model


def own_rows(x: Tensor, grid: Grid) -> Tensor:
    """This rank's share of a batch, as tokens [b, t] -> [b/q, t]; alike along a row of the grid.

    Raises ValueError where q does not divide b.
    """
    return tile(x, {0: grid.column})


def cross_entropy_2d(
    logits: Tensor, targets: Tensor, vocab_size: int, grid: Grid, z_loss: float = 0.0
) -> Tensor:
    """The mean of `vocabulary_cross_entropy` over all b · t tokens, in nats, on every rank.

    logits [b/q, t, v/q] and targets [b/q, t] are this rank's. Less than 4 numbers a token are sent
    along the row of the grid, then one along its column. Raises ValueError as that does.
    """
    losses = vocabulary_cross_entropy(logits, targets, vocab_size, grid.row, z_loss)
    return g(losses.sum(), grid.column) / (losses.numel() * grid.side)


# -- whole again ---------------------------------------------------------------------------------


def gather_logits_2d(logits: Tensor, grid: Grid) -> Tensor:
    """Own logits [b/q, t, v/q] -> all, [b, t, v], on every rank; without gradients."""
    return untile(logits, {0: grid.column, -1: grid.row})


def _cuts(model: nn.Module) -> dict[str, dict[int, Group]]:
    """The name of each parameter that is cut: axis -> the ranks that share it."""
    found = {
        f"{path}.{name}" if path else name: cuts
        for path, module in model.named_modules()
        for name, cuts in getattr(module, "tiles", {}).items()
    }
    if not found:
        raise ValueError(f"no parameter of this {type(model).__name__} is cut in two directions")
    return found


def gather_2d(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the whole model on every rank, or `values` named and cut as parameters.

    All ranks have to call it, with the same names. Raises ValueError for a model that is not cut.
    """
    cuts = _cuts(model)
    values = model.state_dict() if values is None else values
    return {name: untile(x, cuts.get(name, {})) for name, x in values.items()}


def shard_2d(model: nn.Module, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's blocks of a whole state dict, for `model.load_state_dict`."""
    cuts = _cuts(model)
    return {name: tile(x, cuts.get(name, {})).clone() for name, x in full.items()}


def grad_norm_2d(model: nn.Module, grid: Grid) -> Tensor:
    """The length of the whole model's gradient, as for clipping: copies count once."""
    cuts, device = _cuts(model), next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for name, p in model.named_parameters():
        if p.grad is not None:
            copies = grid.side ** (2 - len(cuts.get(name, {})))
            total += p.grad.double().square().sum() / copies
    return C.all_reduce(total, grid.all).sqrt()
