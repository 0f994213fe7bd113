"""Prompt tuning: trained vectors stand before those of the text, at the first layer only."""

# n virtual tokens, w model width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from minillm.model.lm import LM
from minillm.peft import virtual
from minillm.peft.virtual import Table, VirtualTokens


class Prompt(VirtualTokens):
    """The encoder gives vectors [n, w], the model makes of them what it makes of any token.

    They cannot look ahead, so one computation serves the whole batch and all of a generation.
    """

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    known: ClassVar[tuple[str, ...]] = (
        *("prompt_tuning_init", "prompt_tuning_init_text"),
        *("tokenizer_name_or_path", "tokenizer_kwargs"),
    )

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer, [1, g, n, d]."""
        self.layers = []  # nothing stands before these
        return virtual.keys_values(self.model[0], self.encoder())

    @staticmethod
    def sizes(model: LM) -> tuple[int, int, int]:
        """See `VirtualTokens`."""
        return model.cfg.d_model, model.cfg.d_model, model.cfg.n_heads


@dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning: w numbers for each virtual token.

    They start as the vectors of `tokens` (repeated or cut to `length`), such as a description of
    the task; without, as those of tokens drawn from the vocabulary, or with `std` as noise.

    Source: Lester, Al-Rfou and Constant, The Power of Scale for Parameter-Efficient Prompt Tuning,
    2021.
    """

    length: int = 20
    tokens: Sequence[int] | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.std is not None:
            raise ValueError(f"a prompt starts from tokens={self.tokens} or std={self.std}")


def apply_prompt(
    model: LM, config: PromptConfig | None = None, *, seed: int = 0, start: Tensor | None = None
) -> LM:
    """Put a prompt before every text, in place; the base is frozen.

    `start` [n, w] is a trained prompt to begin with (see `minillm.peft.spot`), in place of what the
    config says. Raises ValueError when it does not fit the context or the model, or virtual tokens
    are attached already.
    """
    config = config or PromptConfig()
    cfg, n = model.cfg, config.length
    virtual.check(model, n)
    if start is not None and start.shape != (n, cfg.d_model):
        raise ValueError(f"start {tuple(start.shape)} must be {(n, cfg.d_model)}")
    with virtual.seeded(seed):
        drawn = torch.randint(cfg.vocab_size, (n,)).tolist()
        if start is not None:
            vectors = start
        elif config.std is not None:
            vectors = torch.randn(n, cfg.d_model) * config.std
        else:
            tokens = drawn if config.tokens is None else config.tokens
            vectors = virtual.vectors_of(model, tokens, n)
    return virtual.attach(model, Prompt(model, Table(vectors), n))


def prompt_vectors(model: LM) -> Tensor:
    """The prompt that stands before every text, [n, w]; ValueError if there is none."""
    prompt = virtual.attached(model)
    if not isinstance(prompt, Prompt):
        raise ValueError("a prefix is attached, which has no vectors before the first layer")
    return prompt.encoder().detach()


to_peft, from_peft = virtual.to_peft, partial(virtual.from_peft, Prompt)
