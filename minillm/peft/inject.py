"""How a method gets into a model from outside, and out again; what is the base's and what is new.

The model knows nothing of any method. A `Wrapper` stands where a module stood and holds it as
`base`; an `Addition` is a module that a method adds. All other parameters are the base's, and
whatever is attached, they keep the names, the values and so the hash that they had before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn


class Wrapper(nn.Module):
    """Stands in the place of the module `base`; every other parameter in it is the method's own."""

    peft_type: ClassVar[str | None] = None
    """what the `peft` library calls the method, if it has it; see `minillm.peft.files`"""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


class Addition(nn.Module):
    """A module that a method adds to a model, and that takes nothing's place."""

    peft_type: ClassVar[str | None] = None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) for every module of the base, whatever is attached to it.

    `name` is its path in the bare model; where wrappers stand, the outermost of them comes.
    """

    def below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield name, module
        for child, part in innermost(module).named_children():
            if not isinstance(part, Addition):
                yield from below(f"{name}.{child}".lstrip("."), part)

    yield from below("", model)


def chain(module: nn.Module) -> list[nn.Module]:
    """The wrappers around a module of the base, from outside, and then the module itself."""
    found = [module]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].base)
    return found


def innermost(module: nn.Module) -> nn.Module:
    """The module of the base behind any number of wrappers."""
    return chain(module)[-1]


def matches(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the modules of the base that `targets` mean, in the order of the model.

    A target is compared with the end of a module's name in the bare model, on whole parts: "q" and
    "attn.q" mean "blocks.0.attn.q", "tn.q" means nothing. After "re:" stands a regular expression
    for the whole name. What is attached already changes no name.

    Raises ValueError when one of the targets matches nothing, with the names that there are.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    there = [name for name, _ in walk(model) if name]
    if not targets:
        raise ValueError(f"no targets given; there are {_summary(there)}")
    found: set[str] = set()
    for target in targets:
        if target.startswith("re:"):
            hits = {name for name in there if re.fullmatch(target[3:], name)}
        else:
            hits = {name for name in there if f".{name}".endswith(f".{target}")}
        if not hits:
            raise ValueError(f"target {target!r} matches no module; there are {_summary(there)}")
        found |= hits
    return [name for name in there if name in found]


def _summary(there: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in there))


def find(model: nn.Module, name: str) -> nn.Module:
    """What stands where the bare model has `name`: its module, or the outermost wrapper of it."""
    for part in name.split("."):
        model = innermost(model).get_submodule(part)
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where the bare model has `name`, in the same mode; returns what stood there."""
    parent, _, child = name.rpartition(".")
    old = find(model, name)
    holder = innermost(find(model, parent) if parent else model)
    setattr(holder, child, module.train(old.training))
    return old


def freeze(model: nn.Module) -> None:
    """The base's parameters are trained no more; those of what is attached stay as they are."""
    for _, module in walk(model):
        for parameter in innermost(module).parameters(recurse=False):
            parameter.requires_grad_(False)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is to be given: the parameters that take a gradient.

    Raises ValueError when there are none, as after a method was taken off.
    """
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("every parameter is frozen and nothing is attached: nothing to train")
    return found


def detach(model: nn.Module, kind: type[Wrapper]) -> int:
    """Take all wrappers of a kind off and leave what they wrapped; how many there were.

    The base stays frozen. Raises ValueError when there is none of them.
    """
    count = 0
    for name, module in list(walk(model)):
        parts = chain(module)
        kept = [part for part in parts if not isinstance(part, kind)]
        if len(kept) < len(parts):
            count += len(parts) - len(kept)
            for outer, inner in pairwise(kept):
                outer.base = inner
            replace(model, name, kept[0])
    if not count:
        raise ValueError(f"no {kind.__name__} is attached to this {type(model).__name__}")
    return count


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's values, as float32 numbers."""
    data = x.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def base_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the base's parameters, whatever is attached.

    A module that stores weights in another form (4 bits) has `digests`, name -> (shape, digest) of
    what it was made from: so an adapter trained on a quantized base belongs to that base.

    Raises ValueError while an adapter is merged, since then the weights are not the base's.
    """
    lines = []
    for name, module in walk(model):
        parts = chain(module)
        if merged := [part.merged for part in parts if getattr(part, "merged", None)]:
            raise ValueError(f"{name} has {merged[0]!r} merged in: unmerge first")
        part = parts[-1]
        for key, (shape, value) in getattr(part, "digests", {}).items():
            lines.append(f"{name}.{key} {tuple(shape)} {value}")
        for key, x in part.named_parameters(recurse=False):
            if (name, key) != ("head", "weight") or x is not _tied(model):
                lines.append(f"{name}.{key} {tuple(x.shape)} {digest(x)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _tied(model: nn.Module) -> Tensor | None:
    """The table of token vectors, which a tied head shares and which counts once."""
    return getattr(innermost(getattr(model, "tokens", None)), "weight", None)
