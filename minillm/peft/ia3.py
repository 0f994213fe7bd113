"""(IA)³: three learned vectors a block rescale keys, values and the MLP's hidden numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minillm.model.lm import LM
from minillm.peft import files
from minillm.peft.inject import Wrapper, find, freeze, innermost, matches, replace, walk


@dataclass(frozen=True)
class IA3Config:
    """Linears whose output is rescaled, and Linears whose input is, as the paper does in MLPs.

    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning, 2022.
    """

    outputs: Sequence[str] = ("attn.k", "attn.v")
    inputs: Sequence[str] = ("mlp.down",)


class IA3Linear(Wrapper):
    """A Linear whose output or input is multiplied by numbers: (W x + b) ⊙ s or W (x ⊙ s) + b.

    s starts at one, where it changes nothing.
    """

    peft_type: ClassVar[str | None] = "IA3"

    def __init__(self, base: nn.Module, on_input: bool) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.on_input, size = on_input, base.in_features if on_input else base.out_features
        self.scale = nn.Parameter(torch.ones(size).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(x * self.scale) if self.on_input else self.base(x) * self.scale

    @property
    def weight(self) -> Tensor:
        """The matrix that acts, [out, in]."""
        return self.base.weight * (self.scale if self.on_input else self.scale[:, None])

    @property
    def bias(self) -> Tensor | None:
        """The bias that acts."""
        bias = self.base.bias
        return bias if self.on_input or bias is None else bias * self.scale


def apply_ia3(model: LM, config: IA3Config | None = None, *, seed: int = 0) -> LM:
    """Rescale what the config names, in place; the base is frozen. Nothing is drawn from `seed`.

    Raises ValueError for names that match nothing, or no Linear, or what is rescaled already.
    `inject.detach(model, IA3Linear)` takes it off again.
    """
    config = config or IA3Config()
    places = dict.fromkeys(matches(model, config.outputs), False) if config.outputs else {}
    places |= dict.fromkeys(matches(model, config.inputs), True) if config.inputs else {}
    if not places:
        raise ValueError("outputs and inputs name nothing to rescale")
    for name in places:
        there = find(model, name)
        if not isinstance(innermost(there), nn.Linear) or isinstance(there, IA3Linear):
            kind = type(there).__name__
            raise ValueError(f"{name} is a {kind}: a Linear that is not rescaled yet is needed")
    freeze(model)
    for name, on_input in places.items():
        replace(model, name, IA3Linear(find(model, name), on_input))
    return model


@torch.no_grad()
def merge_ia3(model: LM) -> LM:
    """Multiply the vectors into the weights for good: the same function, as fast as the base.

    Raises ValueError when there are none.
    """
    for name, part in _places(model).items():
        merged = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(part.weight, requires_grad=False)
        if part.bias is not None:
            merged.bias = nn.Parameter(part.bias, requires_grad=False)
        replace(model, name, merged)
    return model


def _places(model: LM) -> dict[str, IA3Linear]:
    found = {name: part for name, part in walk(model) if isinstance(part, IA3Linear)}
    if not found:
        raise ValueError("no (IA)³ is attached to this model")
    return found


def to_peft(model: LM, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `files.save_adapter` writes; there is one set of vectors, whatever `name` says."""
    hub, places, tensors, inner = files.hub_names(model), _places(model), {}, []
    targets = files.target_modules(model, list(places))
    for ours, part in places.items():
        rows = files.hub_rows(model, ours, part.scale)[:, None]
        tensors[f"{files.PREFIX}{hub[ours]}.ia3_l"] = part.scale[None] if part.on_input else rows
        inner += [f".{hub[ours]}"] if part.on_input else []
    inputs = [target for target in targets if any(full.endswith(f".{target}") for full in inner)]
    return {"target_modules": targets, "feedforward_modules": inputs}, tensors


def from_peft(
    model: LM, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Attach what `peft` wrote; ValueError for settings, tensors or shapes that do not fit."""
    known = ("target_modules", "feedforward_modules", "init_ia3_weights")
    files.check_config(config, dict.fromkeys(known))
    found = files.by_module(model, tensors, ("ia3_l",))
    for ours, (x,) in found.items():
        shape = find(model, ours).out_features, find(model, ours).in_features
        if tuple(x.shape) not in ((1, shape[1]), (shape[0], 1)):
            raise ValueError(f"{ours} is {shape}, the adapter has a vector {tuple(x.shape)} for it")
    inputs = [ours for ours, (x,) in found.items() if len(x) == 1]
    apply_ia3(model, IA3Config([ours for ours in found if ours not in inputs], inputs))
    for ours, (x,) in found.items():
        x = x if ours in inputs else files.hub_rows(model, ours, x, back=True)
        find(model, ours).scale.data.copy_(x.flatten())
