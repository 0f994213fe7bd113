"""P-tuning v1: a prompt that comes out of a small network while it is trained."""

# n virtual tokens, w model width

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from minillm.model.lm import LM
from minillm.peft import virtual
from minillm.peft.prompt import Prompt


class PTuned(Prompt):
    """A prompt that an encoder writes."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    known: ClassVar[tuple[str, ...]] = (
        *("encoder_reparameterization_type", "encoder_hidden_size"),
        *("encoder_num_layers", "encoder_dropout"),
    )


class PromptEncoder(nn.Module):
    """MLP(LSTM(embedding)), the LSTM in both directions: neighbors in the prompt hang together."""

    def __init__(self, length: int, width: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True)
        both = 2 * hidden
        self.mlp = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))

    def forward(self) -> Tensor:
        """[n, w]."""
        return self.mlp(self.lstm(self.embedding)[0])


@dataclass(frozen=True)
class PTuningConfig:
    """P-tuning v1: w numbers for each virtual token, written by an LSTM and an MLP.

    `hidden` is the LSTM's width in each direction (None: that of the model); `virtual.fold` drops
    both after training. Version 2 is `minillm.peft.prefix.PrefixConfig` without `hidden`.

    Source: Liu et al., GPT Understands, Too, 2021.
    """

    length: int = 20
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if (self.hidden is not None and self.hidden < 1) or self.layers < 1:
            raise ValueError(f"hidden={self.hidden} and layers={self.layers} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


def apply_ptuning(model: LM, config: PTuningConfig | None = None, *, seed: int = 0) -> LM:
    """Put a prompt with its encoder before every text, in place; the base is frozen.

    Raises ValueError when it does not fit the context, or virtual tokens are attached already.
    """
    config = config or PTuningConfig()
    width, n = model.cfg.d_model, config.length
    virtual.check(model, n)
    with virtual.seeded(seed):
        encoder = PromptEncoder(n, width, config.hidden or width, config.layers, config.dropout)
    return virtual.attach(model, PTuned(model, encoder, n))


to_peft, from_peft = virtual.to_peft, partial(virtual.from_peft, PTuned)
