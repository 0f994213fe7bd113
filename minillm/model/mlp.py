"""The MLP of a block: what each token does with what attention brought it."""

# d model width, f hidden width

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "swish": F.silu,
    "glu": torch.sigmoid,
    "bilinear": _identity,
    "reglu": F.relu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "swiglu": F.silu,
}


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) · up(x)), the same for every token.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[cfg.mlp]
        self.up = nn.Linear(cfg.d_model, cfg.mlp_width, bias=cfg.bias)
        self.gate = nn.Linear(cfg.d_model, cfg.mlp_width, bias=cfg.bias) if cfg.gated else None
        self.down = nn.Linear(cfg.mlp_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))
