"""The MLP of a block: what each token does with what attention brought it."""

# d model width, f hidden width

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.ops import op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
}
GATES = {
    "glu": "sigmoid",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu": "silu",
}
"""what the gate of each gated unit goes through; of a bilinear one through nothing"""


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) · up(x)), the same for every token.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.act, self.activation = ACTIVATIONS.get(cfg.mlp), GATES.get(cfg.mlp)
        self.glu = op("glu", cfg.impl)
        self.up = nn.Linear(cfg.d_model, cfg.mlp_width, bias=cfg.bias)
        self.gate = nn.Linear(cfg.d_model, cfg.mlp_width, bias=cfg.bias) if cfg.gated else None
        self.down = nn.Linear(cfg.mlp_width, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        gate, up = self.gate(x), self.up(x)
        return self.down(self.glu(gate, up, self.activation) if self.activation else gate * up)
