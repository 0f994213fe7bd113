"""From scores to one token: greedy, temperature, top-k, top-p, all of them pure functions."""

# b batch, v vocabulary

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """What is drawn from, given logits [..., v]: probabilities [..., v] in float32.

    In this order: divide the logits by `temperature` (0 puts all on the likeliest token, the
    first of equals), keep the `top_k` likeliest tokens, keep the smallest set of likeliest tokens
    that holds `top_p` of what is left (of equals the first). Source for the last, nucleus sampling:
    Holtzman et al., The Curious Case of Neural Text Degeneration, 2020.

    Raises ValueError for a negative temperature, top_k below 1, top_p outside (0, 1].

    >>> logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    >>> probabilities(logits, top_p=0.7).mul(3).round(decimals=6).tolist()
    [2.0, 1.0, 0.0, 0.0]
    """
    check(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best, ids = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, ids, best)
    p = logits.softmax(-1)
    if top_p is None or top_p == 1:
        return p
    ordered, ids = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what the likelier ones hold already
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(p).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits [b, v] -> [b]; see `probabilities`.

    >>> choose(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
    [1]
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for settings that mean nothing."""
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
