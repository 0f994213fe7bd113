"""Generation: predict the next token, append it, repeat; each token passes the model once."""

# b batch, t prompt tokens, v vocabulary

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.model.cache import KVCache
from minillm.model.lm import LM


def generate(
    model: LM,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Iterator[Tensor]:
    """Continue the prompts `tokens` [b, t]; yields the next token of each, [b], one at a time.

    `temperature` divides the logits, 0 means the likeliest token; `top_k` keeps the k likeliest.
    Ends early once every row has produced `stop`. Old keys and values stay in a cache, so a new
    token costs one token's work.

    Raises ValueError at once when prompt and answer together do not fit the model's context.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"a prompt is [batch, at least one token], got {tuple(tokens.shape)}")
    total = tokens.shape[1] + max_new_tokens
    if total > model.cfg.max_len:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} and {max_new_tokens} new tokens exceed the context "
            f"of {model.cfg.max_len} by {total - model.cfg.max_len}"
        )
    if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and top_k={top_k} must be at least 1, "
            f"temperature={temperature} at least 0"
        )
    return _steps(model, tokens, max_new_tokens, temperature, top_k, generator, stop)


def _steps(
    model: LM,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    stop: int | None,
) -> Iterator[Tensor]:
    weight = model.head.weight
    capacity = tokens.shape[1] + max_new_tokens
    cache = KVCache.for_config(model.cfg, len(tokens), capacity, weight.dtype, weight.device)
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        # Not around the loop: a generator would leave gradients off for its caller between steps.
        with torch.no_grad():
            logits = model(tokens, cache=cache)[:, -1]
        new = choose(logits, temperature, top_k, generator)
        yield new
        if stop is not None:
            done |= new == stop
            if done.all():
                return
        tokens = new[:, None]


def choose(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits [b, v]; see `generate` for the arguments.

    >>> choose(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
    [1]
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best, ids = logits.topk(top_k)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, ids, best)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
