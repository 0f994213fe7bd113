"""Tensor parallelism: every rank holds a slice of each large matrix and computes with it.

The model is not rewritten. `parallelize` walks a table, path -> what becomes of the module there,
and puts narrower modules in the old ones' places:

    y = act(x A) B    A cut by columns, B by rows:    y = Σ over ranks of act(x A_i) B_i

so that a pair of products needs one sum. Attention is cut by heads, the vocabulary by entries.

Source: Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism, 2019.
"""

# b batch, t tokens, d model width, v vocabulary, N ranks; a Linear's weight is [out, in]

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.slices import Cut, Sharded, f, g, hold, join, shard
from minillm.parallel.vocabulary import VocabularyEmbedding

__all__ = [
    *("PLAN", "ColumnLinear", "Cut", "RowLinear", "Shared", "Sharded", "VocabularyEmbedding"),
    *("cuts", "f", "g", "gather_parameters", "grad_norm", "parallelize", "shard_parameters"),
]


class ColumnLinear(Sharded):
    """x Wᵀ + b for this rank's outputs: [..., in] -> [..., out / N]. The input passed `f` before.

    (The columns are those of Megatron's A = Wᵀ; stored as [out, in], they are rows.)
    """

    axes: ClassVar = {"weight": 0, "bias": 0}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out / N]."""
        return F.linear(x, self.weight, self.bias)


class RowLinear(Sharded):
    """Σ over ranks of x W_iᵀ, plus b, for this rank's inputs: [..., in / N] -> [..., out].

    The bias is added once, behind the sum; added before, it would count N times.
    """

    axes: ClassVar = {"weight": 1, "bias": None}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in / N] -> [..., out], the same on every rank."""
        y = g(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class Shared(nn.Module):
    """A module that every rank holds whole but applies to its own part of the work.

    Each sees a part of its weights' gradient, so these pass through `f`: the sum arrives.
    """

    def __init__(self, full: nn.Module, group: Group) -> None:
        super().__init__()
        self.group, self._like = group, [full]  # in a list: the parameters keep their names
        self._names = [name for name, _ in full.named_parameters()]
        for name in self._names:
            self.register_parameter(name, getattr(full, name))

    def forward(self, x: Tensor) -> Tensor:
        """As the module it stands for."""
        weights = {name: f(getattr(self, name), self.group) for name in self._names}
        return functional_call(self._like[0], weights, (x,))


def copy_input(module: nn.Module, group: Group) -> nn.Module:
    """`f` before a module, once for all the Linears in it that read the same x."""
    module.register_forward_pre_hook(lambda _, args: (f(args[0], group), *args[1:]))
    return module


def check_heads(attention: nn.Module, group: Group) -> None:
    """ValueError unless every rank gets whole heads, and the key/value heads they look at."""
    heads, kv_heads = (len(x.weight) // attention.d_head for x in (attention.q, attention.k))
    if heads % group.size or kv_heads % group.size:
        raise ValueError(
            f"{heads} query and {kv_heads} key/value heads cannot be divided among {group.size} "
            f"ranks: each takes whole heads with the key/value heads that they share, so both "
            "numbers must be multiples of the ranks"
        )


def heads(attention: nn.Module, group: Group) -> nn.Module:
    """`copy_input` for attention, whose projections are then cut by heads."""
    check_heads(attention, group)
    return copy_input(attention, group)


def position_of_heads(position: nn.Module, group: Group) -> nn.Module:
    """What positions add to the scores of this rank's heads (ALiBi's slopes, T5's buckets)."""
    if hasattr(position, "slopes"):
        position.slopes = shard(position.slopes, 0, group).clone()
    if hasattr(position, "buckets"):
        position.group, position.cuts = group, {}
        hold(position, "buckets", position.buckets, 1)
    return position


def vocabulary_head(full: nn.Module, group: Group) -> nn.Module:
    """A `ColumnLinear` of its own: [b, t, d] -> this rank's logits [b, t, v / N]."""
    return copy_input(ColumnLinear(full, group), group)


# -- the table -----------------------------------------------------------------------------------

Plan = Mapping[str, Callable[[nn.Module, Group], nn.Module]]
PLAN: Plan = {
    "blocks.*.attn": heads,
    "blocks.*.attn.q": ColumnLinear,
    "blocks.*.attn.k": ColumnLinear,
    "blocks.*.attn.v": ColumnLinear,
    "blocks.*.attn.q_norm": Shared,
    "blocks.*.attn.k_norm": Shared,
    "blocks.*.attn.out": RowLinear,
    "blocks.*.mlp": copy_input,
    "blocks.*.mlp.up": ColumnLinear,
    "blocks.*.mlp.gate": ColumnLinear,
    "blocks.*.mlp.down": RowLinear,
    "position": position_of_heads,
    "tokens": VocabularyEmbedding,
    "head": vocabulary_head,
}
"""paths, * for any part -> what stands there afterwards, in this order"""


def parallelize(model: nn.Module, group: Group, plan: Plan = PLAN) -> nn.Module:
    """Replace modules of `model` in place as `plan` says, each by its slice for this rank.

    Build the model whole on every rank with one seed (or load it), then cut it: the slices are of
    the same weights. Tied parameters stay tied. Afterwards the model returns this rank's logits
    [b, t, v / N]: see `minillm.parallel.vocabulary` for their loss. An entry of the plan may lead
    to None (a part that the config left out).

    Raises ValueError for an entry that leads nowhere, a plan that changes nothing, heads that do
    not divide, and tied parameters that would be cut differently; the model is unusable then.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    replaced = 0
    for pattern, becomes in plan.items():
        above, _, name = pattern.rpartition(".")
        parents = [m for path, m in model.named_modules() if fnmatchcase(path, above)]
        parents = [m for m in parents if hasattr(m, name)]
        if not parents:
            raise ValueError(f"{pattern!r} of the plan leads nowhere in {type(model).__name__}")
        for parent in parents:
            if getattr(parent, name) is not None:
                setattr(parent, name, becomes(getattr(parent, name), group))
                replaced += 1
    if not replaced:
        raise ValueError(f"no entry of the plan matches a module: {sorted(plan)}")
    for first, *others in names.values():
        _tie(model, first, others)
    return model


def _tie(model: nn.Module, first: str, others: list[str]) -> None:
    """Make parameters one again that were one before they were cut."""
    shared = model.get_parameter(first)
    for name in others:
        if not torch.equal(model.get_parameter(name), shared):
            raise ValueError(f"{first} and {name} are tied: the plan must cut them alike")
        above, _, last = name.rpartition(".")
        model.get_submodule(above).register_parameter(last, shared)


# -- whole again ---------------------------------------------------------------------------------


def cuts(model: nn.Module) -> dict[str, tuple[Cut, Group]]:
    """The names of all parameters that are cut: how, and over which ranks.

    Raises ValueError if there are none.
    """
    found = {
        f"{path}.{name}" if path else name: (cut, module.group)
        for path, module in model.named_modules()
        for name, cut in getattr(module, "cuts", {}).items()
    }
    if not found:
        raise ValueError(f"no parameter of this {type(model).__name__} is cut")
    return found


def gather_parameters(
    model: nn.Module, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state dict of the whole model, on every rank: what one process would save.

    With `values`, tensors that are named and cut as the parameters are: gradients, or an
    optimizer's moments. All ranks have to call it, with the same names.
    """
    cut = cuts(model)
    values = model.state_dict() if values is None else values
    return {
        name: join(x.detach(), cut[name][0].axis, cut[name][0].size, cut[name][1])
        if name in cut
        else x.detach()
        for name, x in values.items()
    }


def shard_parameters(model: nn.Module, full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a whole state dict, for `model.load_state_dict`.

    Raises ValueError where a length is not that of the model.
    """
    found = dict(full)
    for name, (cut, group) in cuts(model).items():
        if name in full:
            if full[name].shape[cut.axis] != cut.size:
                raise ValueError(
                    f"{name} {tuple(full[name].shape)} must have {cut.size} along axis {cut.axis}"
                )
            found[name] = shard(full[name], cut.axis, group)
    return found


def grad_norm(model: nn.Module, group: Group) -> Tensor:
    """The length of the whole model's gradient, as for clipping: slices add up, copies do not."""
    cut = cuts(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    squares = {name: x.double().square().sum() for name, x in grads.items()}
    zero = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    mine = sum((x for name, x in squares.items() if name in cut), zero)
    common = sum((x for name, x in squares.items() if name not in cut), zero)
    return (C.all_reduce(mine, group) + common).sqrt()
