"""A language model that gives numbers instead of words: critic and reward model."""

# b texts, t tokens, d model width

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from minillm.model.lm import LM


class ValueModel(nn.Module):
    """A decoder with a head of one number: V [b, t], at each token for the text up to there.

    The body starts as a copy of `lm`, which knows language already; with `share` it is `lm` itself,
    so that actor and critic learn in the same weights. The head starts at zero: at first every text
    is worth `bias`. Source: Stiennon et al., Learning to Summarize with Human Feedback, 2020.
    """

    def __init__(self, lm: LM, bias: float = 0.0, share: bool = False) -> None:
        super().__init__()
        self.lm = lm if share else copy.deepcopy(lm).requires_grad_(True)
        self.value = nn.Linear(lm.cfg.d_model, 1).to(lm.tokens.weight)
        with torch.no_grad():
            self.value.weight.zero_()
            self.value.bias.fill_(bias)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """tokens [b, t] -> [b, t]; positions and mask as for `LM`."""
        return self.read(self.lm.hidden(tokens, positions, mask))

    def read(self, hidden: Tensor) -> Tensor:
        """Values of the body's last vectors, [b, t, d] -> [b, t]."""
        return self.value(hidden).squeeze(-1)
