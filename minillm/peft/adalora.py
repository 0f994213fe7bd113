"""AdaLoRA: ranks go where they matter.

    ΔW = s · P Λ Q        Q [r, in], Λ diagonal, P [out, r], s = α / r

in the form of a singular value decomposition, which a penalty keeps P and Q near. Training starts
with more rank than is allowed in the end; singular values of little importance, compared over the
whole model, are set to zero. Source: Zhang et al., AdaLoRA: Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning, 2023.
"""

# r rank at the start; lora_A is Q, lora_E is Λ [r, 1], lora_B is P, as `peft` calls them

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minillm.peft import files
from minillm.peft.lora import KNOWN, LoRAConfig, LoRALinear, attach, fill, layers


@dataclass(frozen=True)
class AdaLoRAConfig(LoRAConfig):
    """`rank` at the start and the mean rank in the end, and when it falls.

    Raises ValueError unless 1 <= final_rank <= rank, 0 < beta < 1, warmup + settle < steps.
    """

    final_rank: int = 4
    """mean over the adapted matrices"""
    steps: int = 1000
    """of the whole training"""
    warmup: int = 0
    """steps at the start with the whole budget"""
    settle: int = 0
    """steps at the end in which the ranks stay"""
    every: int = 1
    """steps between two allocations"""
    beta: float = 0.85
    """of the running means of importance and of its uncertainty"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.final_rank <= self.rank or not 0 < self.beta < 1 or self.every < 1:
            raise ValueError(
                f"final_rank={self.final_rank} must be in 1 to rank={self.rank}, beta={self.beta} "
                f"between 0 and 1, every={self.every} at least 1"
            )
        if min(self.warmup, self.settle) < 0 or self.warmup + self.settle >= self.steps:
            raise ValueError(
                f"warmup={self.warmup} and settle={self.settle} must be at least 0 and leave some "
                f"of {self.steps} steps"
            )
        if self.rslora:
            raise ValueError("rslora has no meaning here: Λ learns the scale of each rank")


class AdaLoRALinear(LoRALinear):
    """A Linear with updates in the form P Λ Q."""

    peft_type: ClassVar[str | None] = "ADALORA"
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora_E = nn.ParameterDict()

    def add(self, name: str, config: LoRAConfig, generator: torch.Generator) -> None:
        """A new update `name`: P and Q Gaussian, Λ zero."""
        super().add(name, config, generator)
        a, b = self.lora_A[name], self.lora_B[name]
        for x in (a, b):
            x.data = torch.randn(x.shape, generator=generator).to(x) * 0.02
        self.lora_E[name] = nn.Parameter(a.new_zeros(config.rank, 1))

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Λ Q [r, in], P [out, r] and s; s stays when ranks are cut."""
        config = self.configs[name]
        return self.lora_A[name] * self.lora_E[name], self.lora_B[name], config.scale(config.rank)


def apply_adalora(
    model: nn.Module, config: AdaLoRAConfig | None = None, *, seed: int, name: str = "default"
) -> nn.Module:
    """As `apply_lora`; train with `with_orthogonality(...)` as the loss and an `Allocator`."""
    return attach(model, config or AdaLoRAConfig(), AdaLoRALinear, seed, name)


def orthogonality(model: nn.Module) -> Tensor:
    """Mean over all active P and Q of |PᵀP - I|, |Q Qᵀ - I| (Frobenius): 0 for an exact SVD."""
    found = []
    for part in layers(model).values():
        if isinstance(part, AdaLoRALinear) and part.active is not None:
            q, p = part.lora_A[part.active], part.lora_B[part.active]
            eye = torch.eye(len(q), dtype=q.dtype, device=q.device)
            found += [torch.linalg.norm(q @ q.T - eye), torch.linalg.norm(p.T @ p - eye)]
    if not found:
        raise ValueError("no AdaLoRA update is active: there is nothing to keep orthogonal")
    return torch.stack(found).mean()


def with_orthogonality(loss_fn: Callable, weight: float = 0.5) -> Callable:
    """A loss for `train`: that of `loss_fn`, plus for each token `weight` times `orthogonality`."""

    def loss(model: nn.Module, *batch: Any) -> tuple[Tensor, int | Tensor]:
        total, count = loss_fn(model, *batch)
        return total + weight * count * orthogonality(model), count

    return loss


def budget(step: int, start: int, end: int, config: AdaLoRAConfig) -> int:
    """How many singular values the model may have after `step`: a cubic from start to end, flat
    in `warmup` at the beginning and `settle` at the end.

    >>> config = AdaLoRAConfig(steps=10, warmup=2, settle=2)
    >>> [budget(step, 64, 32, config) for step in (1, 2, 5, 8, 10)]
    [64, 64, 36, 32, 32]
    """
    if step <= config.warmup:
        return start
    left = 1 - (step - config.warmup) / (config.steps - config.settle - config.warmup)
    return int(end + (start - end) * max(0.0, left) ** 3)


class Allocator:
    """Gives the budget to the most important singular values; call `step` behind each step.

    The importance of a number w is Ī · Ū: the running means of I = |w · gradient|, what its loss
    would cost to first order, and of how much I varies, |I - Ī|. That of a triplet is λ's plus the
    means over its row of Q and its column of P.

        for step in train(model, batches, optimizer, loss_fn=with_orthogonality(next_token_loss)):
            allocator.step(step.step)
    """

    def __init__(self, model: nn.Module, config: AdaLoRAConfig) -> None:
        self.parts = {
            name: part
            for name, part in layers(model).items()
            if isinstance(part, AdaLoRALinear) and part.active is not None
        }
        if not self.parts:
            raise ValueError("no AdaLoRA update is active: there are no ranks to allocate")
        self.config = config
        self.kept = {
            name: torch.ones(config.rank, dtype=torch.bool, device=part.lora_E[part.active].device)
            for name, part in self.parts.items()
        }
        self._mean: dict[nn.Parameter, Tensor] = {}
        self._spread: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Note the gradients of `step` (counted from 1) and, where it is due, cut.

        Raises ValueError when there are no gradients.
        """
        end = self.config.steps - self.config.settle
        if step < end:
            self._note()
        due = self.config.warmup < step < end and step % self.config.every == 0
        if due or step == end:
            self._cut(step)
        elif step > end:
            for name, part in self.parts.items():
                part.lora_E[part.active].data[~self.kept[name]] = 0.0

    def _note(self) -> None:
        beta = self.config.beta
        for part in self.parts.values():
            for numbers in (part.lora_A, part.lora_B, part.lora_E):
                w = numbers[part.active]
                if w.grad is None:
                    raise ValueError("no gradients: call step behind an optimizer step")
                now = (w * w.grad).abs()
                mean = self._mean.get(w, torch.zeros_like(w)).lerp(now, 1 - beta)
                spread = self._spread.get(w, torch.zeros_like(w))
                self._mean[w], self._spread[w] = mean, spread.lerp((now - mean).abs(), 1 - beta)

    def _cut(self, step: int) -> None:
        scores = {}
        for name, part in self.parts.items():
            q, p, e = (
                self._mean[x[part.active]] * self._spread[x[part.active]]
                for x in (part.lora_A, part.lora_B, part.lora_E)
            )
            scores[name] = e[:, 0] + q.mean(1) + p.mean(0)
        start, end = self.config.rank * len(scores), self.config.final_rank * len(scores)
        cut = start - budget(step, start, end, self.config)
        if cut < 1:
            return
        bound = torch.cat(list(scores.values())).kthvalue(cut).values
        for name, part in self.parts.items():
            self.kept[name] = scores[name] > bound
            part.lora_E[part.active].data[~self.kept[name]] = 0.0


def ranks(model: nn.Module) -> dict[str, int]:
    """Singular values in use of the active updates, by the names of the bare model."""
    return {
        name: int((part.lora_E[part.active] != 0).sum())
        for name, part in layers(model).items()
        if isinstance(part, AdaLoRALinear) and part.active is not None
    }


_KNOWN = {
    **KNOWN,
    **dict.fromkeys(("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step")),
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight", "rank_pattern")),
}
_FIELDS = {
    "init_r": "rank",
    "target_r": "final_rank",
    "total_step": "steps",
    "tinit": "warmup",
    "tfinal": "settle",
    "deltaT": "every",
    "beta1": "beta",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}


def to_peft(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `files.save_adapter` writes: the triplets in use, and which of them these are."""
    hub, tensors, pattern = files.hub_names(model), {}, {}
    parts = {ours: part for ours, part in layers(model).items() if name in part.configs}
    targets = files.target_modules(model, list(parts))
    trained = any(part.lora_E[name].any() for part in parts.values())
    for ours, part in parts.items():
        used = (part.lora_E[name][:, 0] != 0) if trained else slice(None)
        b = files.hub_rows(model, ours, part.lora_B[name])[:, used]
        values = part.lora_A[name][used], b, part.lora_E[name][used]
        for key, x in zip(part.parts, values, strict=True):
            tensors[f"{files.PREFIX}{hub[ours]}.{key}"] = x
        if trained:
            pattern[f"{hub[ours]}.lora_E"] = used.tolist()
        config = part.configs[name]
    settings = {theirs: getattr(config, ours) for theirs, ours in _FIELDS.items()}
    settings |= {"beta2": config.beta, "rank_pattern": pattern or None}
    return {**settings, "target_modules": targets, "bias": "none"}, tensors


def from_peft(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Attach what `peft` wrote; ValueError for settings, tensors or shapes that do not fit."""
    files.check_config(config, _KNOWN)
    found = files.by_module(model, tensors, AdaLoRALinear.parts)
    mine = {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    mine = AdaLoRAConfig(targets=tuple(found), **mine)
    pattern = config.get("rank_pattern") or {}
    for ours, (a, b, e) in found.items():
        used = torch.tensor(pattern.get(f"{files.hub_names(model)[ours]}.lora_E", [True] * len(a)))
        if len(used) != mine.rank or len(a) != used.sum():
            raise ValueError(
                f"{ours} has {len(a)} triplets, rank_pattern keeps {int(used.sum())} of "
                f"{len(used)}, init_r is {mine.rank}"
            )
        whole = a.new_zeros(mine.rank, a.shape[1]), b.new_zeros(len(b), mine.rank)
        whole = *whole, e.new_zeros(mine.rank, 1)
        whole[0][used], whole[1][:, used], whole[2][used] = a, b, e
        found[ours] = whole
    fill(model, found, mine, AdaLoRALinear, name)
