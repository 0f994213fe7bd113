"""Prefix tuning and P-tuning v2: keys and values of its own for every layer."""

# n virtual tokens, l layers, g key/value heads, d head width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm.model.lm import LM
from minillm.peft import files, virtual
from minillm.peft.virtual import Table, VirtualTokens


class Prefix(VirtualTokens):
    """Keys and values are what the encoder gives: [n, (l 2 g d)], keys as if rotated already."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    known: ClassVar[tuple[str, ...]] = ("prefix_projection", "encoder_hidden_size", "init_weights")

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, [1, g, n, d]."""
        cfg, split = self.base.cfg, "n (l two g d) -> l two 1 g n d"
        parts = rearrange(self.encoder(), split, l=cfg.n_layers, two=2, d=cfg.d_head)
        return [(k, v) for k, v in parts]

    @staticmethod
    def sizes(model: LM) -> tuple[int, int, int]:
        """See `VirtualTokens`."""
        heads, width = model.cfg.kv_heads, model.cfg.kv_heads * model.cfg.d_head
        return 2 * model.cfg.n_layers * width, width, heads

    @staticmethod
    def turn(model: LM, table: Tensor, back: bool = False) -> Tensor:
        """See `VirtualTokens`."""
        parts = rearrange(table, "n (l two w) -> l two w n", l=model.cfg.n_layers, two=2)
        keys = torch.stack([files.hub_rows(model, "attn.k", k, back) for k in parts[:, 0]])
        return rearrange([keys, parts[:, 1]], "two l w n -> n (l two w)")


class PrefixEncoder(nn.Module):
    """up(tanh(down(embedding))): a small table and an MLP in place of a large table.

    Only for training, which it makes steadier; `virtual.fold` leaves the table that comes out.
    """

    def __init__(self, length: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self) -> Tensor:
        """[n, (l 2 g d)]."""
        return self.up(self.down(self.embedding).tanh())


@dataclass(frozen=True)
class PrefixConfig:
    """Prefix tuning: 2 l g d numbers for each virtual token, none of them shared by two layers.

    With `hidden`, they come out of an MLP of that width while they are trained (Li and Liang,
    Prefix-Tuning, 2021); without, they are trained themselves (Liu et al., P-Tuning v2, 2022).
    They start as numbers of standard deviation `std`, or as what the model makes of `tokens`
    (repeated or cut to `length`), as if these stood before every text.
    """

    length: int = 10
    hidden: int | None = None
    tokens: Sequence[int] | None = None
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be at least 1, or None")
        if self.hidden is not None and self.tokens is not None:
            raise ValueError("tokens give keys and values, which no MLP can be made to start from")


def apply_prefix(model: LM, config: PrefixConfig | None = None, *, seed: int = 0) -> LM:
    """Attach a prefix to every layer, in place; the base is frozen.

    Raises ValueError when it does not fit the context, or virtual tokens are attached already.
    """
    config = config or PrefixConfig()
    n, (out, width, _) = config.length, Prefix.sizes(model)
    virtual.check(model, n)
    with virtual.seeded(seed):
        if config.hidden is not None:
            encoder = PrefixEncoder(n, width, config.hidden, out)
        elif config.tokens is not None:
            layers = virtual.keys_values(model, virtual.vectors_of(model, config.tokens, n))
            stacked = [torch.stack(pair) for pair in layers]
            encoder = Table(rearrange(stacked, "l two 1 g n d -> n (l two g d)"))
        else:
            encoder = Table(torch.randn(n, out) * config.std)
    return virtual.attach(model, Prefix(model, encoder, n))


to_peft, from_peft = virtual.to_peft, partial(virtual.from_peft, Prefix)
