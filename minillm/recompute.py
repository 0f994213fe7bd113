"""Activation checkpointing: keep the inputs of a piece of the model, compute the rest again.

Backward needs what forward computed on the way. Keeping all of it costs memory; a checkpointed
piece keeps only what went in, and runs a second time when its gradient is asked for.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; Korthikanti et al.,
Reducing Activation Recomputation in Large Transformer Models, 2022 (selective).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

PATTERNS = {"full": r"(.*\.)?blocks\.\d+", "selective": r"(.*\.)?blocks\.\d+\.(attn|cross)"}


def checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """fn(*args, **kwargs), of which only the arguments are kept for the backward pass.

    Backward runs `fn` again from the same arguments, in the same state of the random number
    generators (so dropout drops the same places) and of autocast: the gradients are those of
    `fn` to the last bit (where several pieces share a tensor, up to the order in which its
    gradients are added). Arguments and results may be tensors, anything else, and tuples, lists
    and dicts of them. Tensors that `fn` uses beside its arguments get their gradients too where
    they can be seen: parameters of a module, what a function closes over or a partial holds.
    Checkpoints may be nested. Where nothing needs a gradient, `fn` is simply called.

    Raises ValueError when `fn` changes an argument in place (it could not be run again), and, in
    backward, when it returns something else than before or reaches a tensor that cannot be seen.

    >>> x = torch.ones(3, requires_grad=True)
    >>> checkpoint(lambda x, power: (x * 2) ** power, x, power=3).sum().backward()
    >>> x.grad
    tensor([24., 24., 24.])
    """
    seen: dict[int, Tensor] = {}
    _find(fn, seen, set())
    leaves, spec = tree_flatten((args, kwargs))
    if not torch.is_grad_enabled() or not (seen or any(map(_needs_gradient, leaves))):
        return fn(*args, **kwargs)
    found: list[TreeSpec] = []
    out = _Checkpoint.apply(fn, spec, len(leaves), found, *leaves, *seen.values())
    return tree_unflatten(list(out), found[0])


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _find(x: Any, found: dict[int, Tensor], visited: set[int]) -> None:
    """Tensors with gradients that a callable holds, each once."""
    if id(x) in visited:
        return
    visited.add(id(x))
    if isinstance(x, Tensor):
        if x.requires_grad:
            found[id(x)] = x
    elif isinstance(x, nn.Module):
        found.update((id(p), p) for p in x.parameters() if p.requires_grad)
    else:
        parts = x if isinstance(x, (tuple, list)) else [getattr(x, "__self__", None)]
        if isinstance(x, partial):
            parts = (x.func, *x.args, *x.keywords.values())
        for y in (*parts, *(cell.cell_contents for cell in getattr(x, "__closure__", None) or ())):
            _find(y, found, visited)


class _Moment:
    """The state in which a function ran, to run it again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.cuda = {x.device: torch.cuda.get_rng_state(x.device) for x in tensors if x.is_cuda}
        self.cpu = torch.get_rng_state()
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in ("cpu", *(["cuda"] if self.cuda else []))
        ]

    def again(self) -> ExitStack:
        """Go back to it; at the end of the `with`, everything is as it was before."""
        stack = ExitStack()
        stack.enter_context(torch.random.fork_rng(list(self.cuda)))
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for kind, dtype, enabled in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled))
        stack.enter_context(torch.enable_grad())
        return stack


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: Callable, spec: TreeSpec, n: int, found: list[TreeSpec], *sources: Any
    ) -> tuple:
        tensors = [x for x in sources if isinstance(x, Tensor)]
        ctx.moment, versions = _Moment(tensors), [x._version for x in tensors]
        args, kwargs = tree_unflatten(list(sources[:n]), spec)
        out, shape = tree_flatten(fn(*args, **kwargs))
        found.append(shape)
        if changed := [i for i, x in enumerate(tensors) if x._version != versions[i]]:
            raise ValueError(
                f"a checkpointed function changed its tensors {changed} in place, counted from 0: "
                "it cannot be run again from them"
            )
        ctx.fn, ctx.spec, ctx.n, ctx.sizes = fn, spec, n, [_size(x) for x in out]
        ctx.rest = [None if isinstance(x, Tensor) else x for x in sources]
        ctx.places = [i for i, x in enumerate(sources) if isinstance(x, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if torch.is_grad_enabled():
            raise ValueError("a checkpoint has no second derivative: create_graph must be False")
        sources = list(ctx.rest)
        for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
            sources[i] = x.detach().requires_grad_(x.requires_grad) if i < ctx.n else x
        args, kwargs = tree_unflatten(sources[: ctx.n], ctx.spec)
        with ctx.moment.again():
            out, _ = tree_flatten(ctx.fn(*args, **kwargs))
        if (sizes := [_size(x) for x in out]) != ctx.sizes:
            raise ValueError(
                f"a checkpointed function returned {ctx.sizes}, the second time {sizes}"
            )
        used = [i for i, x in enumerate(out) if _needs_gradient(x) and grads[i] is not None]
        ends, wanted = [out[i] for i in used], [x for x in sources if _needs_gradient(x)]
        _check_leaves(ends, wanted)
        found = torch.autograd.grad(ends, wanted, [grads[i] for i in used], allow_unused=True)
        each = iter(found)
        return (None,) * 4 + tuple(next(each) if _needs_gradient(x) else None for x in sources)


def _size(x: Any) -> tuple[int, ...] | None:
    return tuple(x.shape) if isinstance(x, Tensor) else None


def _check_leaves(ends: list[Tensor], wanted: list[Tensor]) -> None:
    """Raise ValueError when the graph behind `ends` reaches a leaf that is not in `wanted`."""
    known = {id(x) for x in wanted}
    visited = {x.grad_fn for x in wanted if x.grad_fn is not None}
    nodes = [x.grad_fn for x in ends]
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"a checkpointed function uses a tensor of shape {tuple(leaf.shape)} that needs a "
                "gradient but cannot be seen from outside: pass it as an argument"
            )
        nodes += [parent for parent, _ in node.next_functions]


def recompute(model: nn.Module, which: str | int) -> list[str]:
    """Checkpoint parts of `model` from outside; returns their names.

    "full": every block by itself. "selective": every attention by itself, whose scores are much
    memory for little arithmetic (its projections are repeated too). A number k: blocks in groups
    of k, of which only the input of the first is kept. "none": take all of it back. Any other
    string: a regular expression for the full names of modules, such as r"blocks\\.[01]\\.mlp".

    The forward method of these modules is replaced; names, weights and results stay the same.
    In groups, the first block does the work of all; their arguments must be the same, and hooks
    on the others see their input go through unchanged.

    Raises ValueError when nothing matches, k is below 1 or a module is already wrapped.
    """
    modules = dict(model.named_modules())
    if which == "none":
        found = [name for name, module in modules.items() if module.__dict__.pop("forward", None)]
        return found
    pattern = PATTERNS["full"] if isinstance(which, int) else PATTERNS.get(which, which)
    names = [name for name in modules if re.fullmatch(pattern, name)]
    if not names or (isinstance(which, int) and which < 1):
        raise ValueError(f"recompute({which!r}) matches none of the modules {list(modules)[1:]}")
    if wrapped := [name for name in names if "forward" in modules[name].__dict__]:
        raise ValueError(f"{wrapped} are recomputed already; undo it with recompute(model, 'none')")
    if not isinstance(which, int):
        for name in names:
            modules[name].forward = partial(checkpoint, modules[name].forward)
        return names
    for _, stack in groupby(names, key=lambda name: name.rpartition(".")[0]):
        stack = list(stack)
        for group in (stack[i : i + which] for i in range(0, len(stack), which)):
            forwards = [modules[name].forward for name in group]
            modules[group[0]].forward = partial(_first, forwards)
            for name in group[1:]:
                modules[name].forward = partial(_other, modules[name].forward)
    return names


def _first(forwards: list[Callable[..., Tensor]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled():  # every block does its own work, with its own cache
        return forwards[0](x, *args, **kwargs)
    return checkpoint(partial(_chain, forwards), x, *args, **kwargs)


def _other(forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x if torch.is_grad_enabled() else forward(x, *args, **kwargs)


def _chain(forwards: list[Callable[..., Tensor]], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for forward in forwards:
        x = forward(x, *args, **kwargs)
    return x
