"""DyLoRA: one training, an update for every rank.

At each training step a rank b is drawn and only the first b rows of A and columns of B are used,
so that these alone have to do. Afterwards the update may be cut to any rank without training
again. Source: Valipour et al., DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using
Dynamic Search-Free Low-Rank Adaptation, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minillm.peft.inject import Addition
from minillm.peft.lora import LoRAConfig, LoRALinear, attach, layers, remove_lora


@dataclass(frozen=True)
class DyLoRAConfig(LoRAConfig):
    """Ranks from `min_rank` to `rank` are drawn, each as often. Raises ValueError otherwise."""

    min_rank: int = 1
    newest_only: bool = False
    """a step trains only row and column b, not those before: saves work, learns slower"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_rank <= self.rank:
            raise ValueError(f"min_rank={self.min_rank} must be in 1 to rank={self.rank}")


class DyLoRALinear(LoRALinear):
    """A Linear whose updates use their first ranks only: those drawn, or those asked for."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.rank: dict[str, int] = {}
        self.drawn: int | None = None

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A [b, in], B [out, b] and α / b."""
        config = self.configs[name]
        training = self.training and self.drawn is not None
        rank = self.drawn if training else self.rank.get(name, config.rank)
        a, b = self.lora_A[name][:rank], self.lora_B[name][:, :rank]
        if training and config.newest_only:
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b = torch.cat([b[:, :-1].detach(), b[:, -1:]], 1)
        return a, b, config.scale(rank)


class Ranks(Addition):
    """Draws the rank of a training step, the same for all modules, when a model reads tokens.

    The drawing hangs on the token vectors and not on `forward`, since a loss may call a part of
    the model only (`hidden`), and not on a block, which recomputation runs twice in a step.
    """

    peft_type: ClassVar[str | None] = "LORA"  # at each rank it is one

    def __init__(self, model: nn.Module, config: DyLoRAConfig, seed: int) -> None:
        super().__init__()
        self.config, self.generator = config, torch.Generator().manual_seed(seed)
        self.model = (model,)  # in a tuple, or the model would become a part of its own part
        self.hook = getattr(model, "tokens", model).register_forward_pre_hook(self.draw)

    def draw(self, *_: object) -> None:
        """A rank for the next training step; none outside of training."""
        if not self.model[0].training:
            return
        span = (self.config.min_rank, self.config.rank + 1)
        rank = int(torch.randint(*span, (), generator=self.generator))
        for part in layers(self.model[0]).values():
            if isinstance(part, DyLoRALinear):
                part.drawn = rank


def apply_dylora(
    model: nn.Module, config: DyLoRAConfig | None = None, *, seed: int, name: str = "default"
) -> nn.Module:
    """As `apply_lora`; while the model is in training mode each run draws a rank.

    Otherwise the whole rank is used, or that of `set_rank`. Raises ValueError as `apply_lora`, and
    for a second DyLoRA on the same model.
    """
    config = config or DyLoRAConfig()
    if hasattr(model, "ranks"):
        raise ValueError("the model draws ranks for a DyLoRA already: remove that one first")
    attach(model, config, DyLoRALinear, seed, name)
    model.add_module("ranks", Ranks(model, config, seed))
    return model


def set_rank(model: nn.Module, rank: int) -> None:
    """The rank at which the active update is used and saved; nothing is trained or lost.

    Raises ValueError for ranks that were not trained.
    """
    parts = [part for part in layers(model).values() if isinstance(part, DyLoRALinear)]
    for part in parts:
        config = part.configs[part.active]
        if not config.min_rank <= rank <= config.rank:
            raise ValueError(f"rank={rank} was not trained: {config.min_rank} to {config.rank}")
        part.rank[part.active] = rank
    if not parts:
        raise ValueError("the model carries no DyLoRA update")


def remove_dylora(model: nn.Module, keep: bool = False) -> nn.Module:
    """As `remove_lora`; ranks are no longer drawn."""
    if hasattr(model, "ranks"):
        model.ranks.hook.remove()
        del model.ranks
    return remove_lora(model, keep)
