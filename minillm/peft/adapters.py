"""Adapters: small bottlenecks behind or beside a frozen module."""

# w model width, m bottleneck width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.attention import Attention
from minillm.model.lm import LM
from minillm.model.mlp import ACTIVATIONS, MLP
from minillm.peft.inject import Wrapper, find, freeze, innermost, matches, replace
from minillm.peft.virtual import seeded


@dataclass(frozen=True)
class AdapterConfig:
    """A bottleneck of m = `width`: w m + m numbers down and m w + w up, at each target.

    Serial ones stand behind the last Linear of both branches of a block (Houlsby et al.,
    Parameter-Efficient Transfer Learning for NLP, 2019, who train the norms as well), parallel
    ones beside the MLP, with a `scale`, for which the paper takes 4 (He et al., Towards a Unified
    View of Parameter-Efficient Transfer Learning, 2022).
    """

    width: int = 16
    parallel: bool = False
    targets: str | Sequence[str] | None = None
    """None: attn.out and mlp.down, for parallel ones mlp"""
    activation: str = "relu"
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} of the bottleneck must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {sorted(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


class Adapter(Wrapper):
    """y + s · up(act(down(z))): serial with z = y, the base's output; parallel with z its input.

    Down is drawn, up is zero: at the start an adapter adds nothing, and learns all the same.
    """

    def __init__(self, base: nn.Module, config: AdapterConfig, sizes: tuple[int, int]) -> None:
        super().__init__(base)
        self.config, self.act = config, ACTIVATIONS[config.activation]
        size, out = sizes if config.parallel else (sizes[1], sizes[1])
        self.down, self.up = nn.Linear(size, config.width), nn.Linear(config.width, out)
        nn.init.normal_(self.down.weight, std=size**-0.5)
        for x in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base gives for x, and the adapter's part on top."""
        y = self.base(x, *args, **kwargs)
        z = F.dropout(x if self.config.parallel else y, self.config.dropout, self.training)
        return y + self.config.scale * self.up(self.act(self.down(z)))


def apply_adapter(model: LM, config: AdapterConfig, *, seed: int = 0) -> LM:
    """Put adapters behind or beside every target, in place; the base is frozen.

    Raises ValueError for targets that match nothing, that have an adapter already, or that are no
    Linear, MLP or attention. `inject.detach(model, Adapter)` takes them off again.
    """
    serial = ("attn.out", "mlp.down")
    targets = (
        (("mlp",) if config.parallel else serial) if config.targets is None else config.targets
    )
    sizes, w = {}, model.cfg.d_model
    for name in matches(model, targets):
        base, there = innermost(find(model, name)), find(model, name)
        if not isinstance(base, (nn.Linear, MLP, Attention)):
            kind = type(base).__name__
            raise ValueError(f"{name} is a {kind}: adapters go with a Linear, an MLP or attention")
        while isinstance(there, Wrapper):
            if isinstance(there, Adapter):
                raise ValueError(f"{name} has an adapter already: take it off first")
            there = there.base
        linear = isinstance(base, nn.Linear)
        sizes[name] = (base.in_features, base.out_features) if linear else (w, w)
    freeze(model)
    with seeded(seed):
        for name, size in sizes.items():
            adapter = Adapter(find(model, name), config, size)
            replace(model, name, adapter.to(model.head.weight))
    return model
