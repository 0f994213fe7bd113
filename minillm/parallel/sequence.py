"""Sequence parallelism: what tensor parallelism leaves whole, each rank holds for t / N tokens.

Norms, dropout and the stream between the branches work on each token alone. So a rank needs t / N
of the tokens there, and all of them only within attention and the MLP:

    f = identity / all-reduce   becomes   all-gather / reduce-scatter    (forward / backward)
    g = all-reduce / identity   becomes   reduce-scatter / all-gather

An all-reduce is the two of them, so as many bytes travel. Nothing is repeated between ranks any
more: each one's gradients are a part, and the differentiable collectives fit as they are.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.
"""

# b batch, t tokens, d model width, N ranks

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.slices import Sharded, f
from minillm.parallel.tensor import (
    PLAN,
    ColumnLinear,
    RowLinear,
    Shared,
    VocabularyEmbedding,
    check_heads,
    parallelize,
)


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """[b, t / N, d] of each rank -> [b, t, d]; backward sums, and each gets its tokens' part."""
    return C.all_gather(x.transpose(0, 1), group).transpose(0, 1).contiguous()


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x [b, t, d], of which each gets its tokens, [b, t / N, d].

    Raises ValueError where t is not a multiple of N.
    """
    if x.shape[1] % group.size:
        raise ValueError(f"{x.shape[1]} tokens cannot be divided evenly among {group.size} ranks")
    return C.reduce_scatter(x.transpose(0, 1), group).transpose(0, 1).contiguous()


def own_tokens(x: Tensor, group: Group, axis: int = -1) -> Tensor:
    """This rank's share of what all ranks hold for t tokens, as positions [..., t]."""
    if x.shape[axis] % group.size:
        raise ValueError(f"{x.shape[axis]} tokens cannot be divided evenly by {group.size}")
    return x.chunk(group.size, axis)[group.index]


class _Input:
    """All tokens' x for the Linears that read the same x: gathered once, and kept as own tokens.

    What a Linear keeps for backward is only noted; the first one that needs it gathers it again,
    and after the last one it is dropped.
    """

    def __init__(self, x: Tensor, readers: int, group: Group) -> None:
        self.x, self.own, self.group = x, x.detach(), group
        self.full, self.left = gather_tokens(x, group), readers
        self.known = self.full.data_ptr(), self.full.numel()
        self.kept, self.again = 0, None

    def read(self) -> Tensor:
        full = self.full
        self.left -= 1
        if not self.left:  # backward knows this object, and needs neither
            self.x = self.full = None
        return full

    def pack(self, x: Tensor) -> Tensor | tuple:
        if (x.data_ptr(), x.numel()) != self.known:
            return x
        self.kept += 1
        return x.shape, x.stride()

    def unpack(self, kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        full = gather_tokens(self.own, self.group) if self.again is None else self.again
        self.kept -= 1
        self.again = full if self.kept > 0 else None
        return full.as_strided(*kept)


class GatheredColumnLinear(ColumnLinear):
    """A `ColumnLinear` that gathers its input: [b, t / N, in] -> [b, t, out / N]."""

    def __init__(self, full: nn.Module, group: Group) -> None:
        super().__init__(full, group)
        self.readers = 1  # how many Linears are given the same x in one call of their module
        self.current: list[_Input] = []  # what the first of them has gathered, for the others

    def forward(self, x: Tensor) -> Tensor:
        """[b, t / N, in] -> [b, t, out / N]."""
        if not self.current or self.current[0].x is not x:
            self.current[:] = [_Input(x, self.readers, self.group)]
        source = self.current[0]
        full = source.read()
        if source.x is None:
            self.current.clear()
        with torch.autograd.graph.saved_tensors_hooks(source.pack, source.unpack):
            return F.linear(full, self.weight, self.bias)


def share_input(module: nn.Module) -> None:
    """Let the `GatheredColumnLinear` of a module, which read the same x, gather it once."""
    linears = [m for m in module.children() if isinstance(m, GatheredColumnLinear)]
    for linear in linears:
        linear.readers, linear.current = len(linears), linears[0].current


def checked_heads(attention: nn.Module, group: Group) -> nn.Module:
    """Attention, if its heads can be divided."""
    check_heads(attention, group)
    return attention


class ScatteredRowLinear(RowLinear):
    """A `RowLinear` whose sum arrives in shares of t / N tokens: [b, t, in / N] -> [b, t / N, out].

    Each rank adds the bias to its tokens and sees a part of its gradient, hence `f`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, in / N] -> [b, t / N, out]."""
        y = scatter_tokens(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + f(self.bias, self.group)


class PartialEmbedding(VocabularyEmbedding):
    """Only this rank's part of the token vectors; the sum follows where positions are added.

    So the model still sees how many tokens there are, which numbers the positions.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, t] -> [b, t, d], zeros where another rank has the entry."""
        return self.partial(tokens)


class _Add(nn.Module):
    """`position.add`, as a module whose parameters `functional_call` can replace."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position, self.add = position, position.add

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.add(x, positions)


def position_of_tokens(position: nn.Module, group: Group) -> nn.Module:
    """Where the stream begins: sum of the token vectors' parts, and positions of own tokens."""
    add = _Add(PLAN["position"](position, group))

    def scattered(x: Tensor, positions: Tensor) -> Tensor:
        tables = {"position.table": position.table} if hasattr(position, "table") else {}
        tables = {name: f(p, group) for name, p in tables.items()}
        return functional_call(
            add, tables, (scatter_tokens(x, group), own_tokens(positions, group))
        )

    position.add = scattered
    return position


COLUMNS = ("attn.q", "attn.k", "attn.v", "mlp.up", "mlp.gate")
SEQUENCE_PLAN = {
    "blocks.*.attn": checked_heads,
    **dict.fromkeys((f"blocks.*.{name}" for name in COLUMNS), GatheredColumnLinear),
    **{name: becomes for name, becomes in PLAN.items() if becomes is Shared},
    "blocks.*.attn.out": ScatteredRowLinear,
    "blocks.*.mlp.down": ScatteredRowLinear,
    "position": position_of_tokens,
    "tokens": PartialEmbedding,
    "head": GatheredColumnLinear,
}
"""`minillm.parallel.tensor.PLAN` with the two conjugate pairs exchanged"""


def sequence_parallel(
    model: nn.Module, group: Group, plan: dict[str, Callable] = SEQUENCE_PLAN
) -> nn.Module:
    """`parallelize` with all that lies between the branches on t / N tokens of each rank.

    Every rank gives the model all tokens [b, t], t a multiple of N, and gets its logits
    [b, t, v / N] as before. Norms are whole on every rank; the gradients of their weights, of
    position tables and of biases behind a sum are summed over ranks.

    Raises ValueError as `parallelize` does.
    """
    parallelize(model, group, plan)
    for path, module in list(model.named_modules()):
        share_input(module)
        own = list(module.parameters(recurse=False))
        if own and not isinstance(module, Sharded | Shared) and path != "position":
            above, _, name = path.rpartition(".")
            setattr(model.get_submodule(above), name, Shared(module, group))
    return model
