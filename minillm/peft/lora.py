"""LoRA: a matrix is left alone and gets a product of two thin ones beside it.

    y = x W₀ᵀ + s · x Aᵀ Bᵀ        A [r, in], B [out, r], s = α / r

A starts Gaussian and B at zero, so at first nothing changes; the product can be added to W₀ for
good, and then costs nothing. Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language
Models, 2021.
"""

# n tokens in any leading axes; r rank; W₀ [out, in]

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.peft import files
from minillm.peft.inject import (
    Wrapper,
    chain,
    detach,
    find,
    freeze,
    innermost,
    matches,
    replace,
    walk,
)


@dataclass(frozen=True)
class LoRAConfig:
    """Rank r and α of the update, and the modules that get one (see `inject.matches`).

    Raises ValueError unless rank >= 1, alpha > 0 and 0 <= dropout < 1.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attn.q", "attn.v")
    dropout: float = 0.0
    """of the update's input, in training"""
    rslora: bool = False
    """s = α / √r instead: Kalajdzievski, A Rank Stabilization Scaling Factor, 2023"""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"rank={self.rank} must be at least 1, alpha={self.alpha} positive, "
                f"dropout={self.dropout} in [0, 1)"
            )

    def scale(self, rank: int) -> float:
        """s at a rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


class LoRALinear(Wrapper):
    """A Linear with any number of low-rank updates, of which at most one is active."""

    peft_type: ClassVar[str | None] = "LORA"
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    """where the numbers of an update lie, under its name"""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self._bare: list[nn.Module] = []  # the base while it is merged; no part of this module

    def add(self, name: str, config: LoRAConfig, generator: torch.Generator) -> None:
        """A new update `name`, zero at first."""
        weight = self.weight
        out, width = weight.shape
        # rows of length about 1, so that A x is about as large as x; the paper leaves it open
        a = torch.randn(config.rank, width, generator=generator) * width**-0.5
        self.lora_A[name] = nn.Parameter(a.to(weight))
        self.lora_B[name] = nn.Parameter(weight.new_zeros(out, config.rank))
        self.configs[name] = config

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A [r, in], B [out, r] and s of an update."""
        config = self.configs[name]
        return self.lora_A[name], self.lora_B[name], config.scale(config.rank)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = self.base(x)
        if self.active is None or self.merged is not None:
            return y
        a, b, scale = self.factors(self.active)
        x = F.dropout(x, self.configs[self.active].dropout, self.training)
        return y + F.linear(F.linear(x, a) * scale, b)

    def delta(self) -> Tensor:
        """ΔW = s B A of the active update, [out, in]."""
        a, b, scale = self.factors(self.active)
        return scale * (b @ a)

    @property
    def weight(self) -> Tensor:
        """The matrix that acts, [out, in]: W₀, or W₀ + ΔW; not a parameter."""
        if self.active is None or self.merged is not None:
            return self.base.weight
        return self.base.weight + self.delta()

    @property
    def bias(self) -> Tensor | None:
        """That of the base."""
        return self.base.bias

    @torch.no_grad()
    def merge(self) -> None:
        """Put a Linear with W₀ + ΔW in the base's place; the base is kept, untouched."""
        if self.active is None or self.merged is not None:
            return
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(self.weight, requires_grad=False)
        merged.bias = self.bias
        self._bare, self.base, self.merged = [self.base], merged, self.active

    def unmerge(self) -> None:
        """The base again, bit by bit as it was."""
        if self.merged is not None:
            self.base, self._bare, self.merged = self._bare[0], [], None


def apply_lora(
    model: nn.Module, config: LoRAConfig | None = None, *, seed: int, name: str = "default"
) -> nn.Module:
    """Give the target Linears of `model` an update `name` (in place), active and the only one to
    be trained; the base is frozen. Updates under other names stay, see `set_adapter`.

    Raises ValueError when a target matches nothing or no Linear, when the rank exceeds a matrix's,
    and when the name is taken.
    """
    return attach(model, config or LoRAConfig(), LoRALinear, seed, name)


def attach(
    model: nn.Module, config: LoRAConfig, kind: type[LoRALinear], seed: int, name: str
) -> nn.Module:
    """As `apply_lora`, for each class of update."""
    if name in adapters(model):
        raise ValueError(f"there is an adapter {name!r} already, of {adapters(model)}")
    targets = check_targets(model, config)
    there = layers(model)
    if other := [t for t in targets if t in there and type(there[t]) is not kind]:
        raise ValueError(f"{other[0]} has a {type(there[other[0]]).__name__}: take that off first")
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        if target not in there:
            there[target] = kind(find(model, target))
            replace(model, target, there[target])
        there[target].add(name, config, generator)
    set_adapter(model, name)
    freeze(model)
    return model


def check_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the Linears that `config` means; ValueError where it does not fit them."""
    targets = matches(model, config.targets)
    for target in targets:
        part = innermost(find(model, target))
        if not hasattr(part, "in_features"):
            raise ValueError(
                f"{target} is no Linear but {type(part).__name__}: LoRA adds to a matrix [out, in]"
            )
        most = min(part.in_features, part.out_features)
        if config.rank > most:
            raise ValueError(
                f"rank={config.rank} exceeds {most}, the most that the matrix of {target} "
                f"[{part.out_features}, {part.in_features}] can have"
            )
    return targets


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The modules with low-rank updates, by the names of the bare model."""
    parts = ((name, part) for name, module in walk(model) for part in chain(module))
    return {name: part for name, part in parts if isinstance(part, LoRALinear)}


def adapters(model: nn.Module) -> list[str]:
    """Names of the updates that a model carries."""
    return list(dict.fromkeys(name for part in layers(model).values() for name in part.configs))


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one update the active one, the only one that is used and trained; None: the bare base.

    Nothing is copied or loaded. Raises ValueError for an unknown name and while one is merged.
    """
    known = adapters(model)
    if name is not None and name not in known:
        raise ValueError(f"there is no adapter {name!r}, known are {known}")
    if merged := [part.merged for part in layers(model).values() if part.merged is not None]:
        raise ValueError(f"adapter {merged[0]!r} is merged: unmerge first")
    for part in layers(model).values():
        part.active = name if name in part.configs else None
        for key, x in part.named_parameters():
            if not key.startswith("base."):
                x.requires_grad_(key.endswith(f".{name}"))


def merge(model: nn.Module) -> None:
    """Add the active update to the weights: the model computes the same, as fast as the base."""
    for part in _attached(model):
        part.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, exactly: the base's weights were kept."""
    for part in _attached(model):
        part.unmerge()


def remove_lora(model: nn.Module, keep: bool = False) -> nn.Module:
    """Take all updates off: the base as it was, or with `keep` the active update merged for good.

    The base's parameters stay frozen.
    """
    for part in _attached(model):
        part.merge() if keep else part.unmerge()
    detach(model, LoRALinear)
    return model


def _attached(model: nn.Module) -> list[LoRALinear]:
    if not layers(model):
        raise ValueError("the model carries no low-rank update")
    return list(layers(model).values())


KNOWN = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
"""settings of `peft` and the values known here, see `files.check_config`"""


def to_peft(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `files.save_adapter` writes: the settings, A and B of each module."""
    hub, tensors = files.hub_names(model), {}
    parts = {ours: part for ours, part in layers(model).items() if name in part.configs}
    targets = files.target_modules(model, list(parts))
    for ours, part in parts.items():
        a, b, _ = part.factors(name)
        tensors[f"{files.PREFIX}{hub[ours]}.lora_A.weight"] = a
        tensors[f"{files.PREFIX}{hub[ours]}.lora_B.weight"] = files.hub_rows(model, ours, b)
        config = part.configs[name]
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    settings = {"r": len(a), "lora_alpha": alpha, "lora_dropout": config.dropout}
    settings |= {"use_rslora": config.rslora, "target_modules": targets, "bias": "none"}
    return settings, tensors


def from_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Attach what `peft` wrote; ValueError for settings, tensors or shapes that do not fit."""
    files.check_config(config, KNOWN)
    found = files.by_module(model, tensors, ("lora_A.weight", "lora_B.weight"))
    settings = (config["lora_dropout"], config.get("use_rslora", False))
    mine = LoRAConfig(config["r"], config["lora_alpha"], tuple(found), *settings)
    fill(model, found, mine, LoRALinear, name)


def fill(
    model: nn.Module,
    found: Mapping[str, Sequence[Tensor]],
    config: LoRAConfig,
    kind: type[LoRALinear],
    name: str,
) -> None:
    """Attach updates with the given values: A, B and whatever else `kind.parts` names."""
    for ours, (a, b, *_) in found.items():
        part = innermost(find(model, ours))
        wanted = (config.rank, part.in_features), (part.out_features, config.rank)
        if (a.shape, b.shape) != wanted:
            raise ValueError(
                f"{ours} needs A {wanted[0]} and B {wanted[1]}, the adapter has "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
    attach(model, config, kind, 0, name)
    for ours, (a, b, *more) in found.items():
        values = (a, files.hub_rows(model, ours, b, back=True), *more)
        for part, x in zip(kind.parts, values, strict=True):
            getattr(layers(model)[ours], part)[name].data.copy_(x)
