"""Generation: predict the next token, append it, repeat; each token passes the model once."""

# b batch, t prompt tokens, s source tokens, v vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minillm.infer.sampling import check, choose
from minillm.model.cache import KVCache
from minillm.model.lm import LM
from minillm.model.mask import sliding_window_mask
from minillm.model.seq2seq import Seq2Seq

Observer = Callable[[Tensor, Tensor], None]


def generate(
    model: LM | Seq2Seq,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    mask: Tensor | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
    observe: Observer | None = None,
) -> Iterator[Tensor]:
    """Continue the prompts `tokens` [b, t]; yields the next token of each, [b], one at a time.

    `temperature`, `top_k` and `top_p` are those of `minillm.infer.sampling.probabilities`. Ends
    early once every row has produced `stop`. Old keys and values stay in a cache, so a new token
    costs one token's work.

    Prompts of different lengths are padded on the left, and `mask` [b, t] is True at their tokens:
    each row then gets what it would get alone. An encoder-decoder continues `tokens` (often one
    start token) as an answer to `source` [b, s], whose padding `source_mask` [b, 1, 1, s] hides.
    `observe(logits [b, v], new [b])` is called with what each new token was drawn from.

    Raises ValueError at once when prompt and answer together do not fit a model whose positions
    come from a table, and for settings that mean nothing.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"a prompt is [batch, at least one token], got {tuple(tokens.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    check(temperature, top_k, top_p)
    _check_length(model, tokens, max_new_tokens)
    if (source is not None) != isinstance(model, Seq2Seq):
        raise ValueError("an encoder-decoder needs a source, and nothing else takes one")
    if mask is not None and (source is not None or not _padded_left(mask, tokens)):
        raise ValueError(
            f"mask {tuple(mask.shape)} must be boolean, of the shape of a decoder's prompts "
            f"{tuple(tokens.shape)}, and in each row False, then True up to the end"
        )
    step = _stepper(model, tokens, max_new_tokens, mask, source, source_mask)
    sampling = (temperature, top_k, top_p, generator)
    return _steps(step, tokens, max_new_tokens, sampling, stop, observe)


def _check_length(model: LM | Seq2Seq, tokens: Tensor, max_new_tokens: int) -> None:
    total, most = tokens.shape[1] + max_new_tokens, model.cfg.max_len
    if model.cfg.position in ("learned", "hierarchical") and total > most:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} and {max_new_tokens} new tokens exceed the context "
            f"of {most} by {total - most}"
        )


def _padded_left(mask: Tensor, tokens: Tensor) -> bool:
    if mask.shape != tokens.shape or mask.dtype != torch.bool or not mask[:, -1].all():
        return False
    return bool((mask[:, 1:] >= mask[:, :-1]).all())


def _stepper(
    model: LM | Seq2Seq,
    tokens: Tensor,
    max_new_tokens: int,
    mask: Tensor | None,
    source: Tensor | None,
    source_mask: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """A function from new tokens [b, t] to the logits [b, v] for the one after."""
    weight, (b, t) = model.head.weight, tokens.shape
    # the last new token is never read
    cache = KVCache.for_config(model.cfg, b, t + max_new_tokens - 1, weight.dtype, weight.device)
    if isinstance(model, Seq2Seq):
        with torch.inference_mode():
            memory = model.encode(source, source_mask)
        return lambda new: model.decode(new, memory, source_mask, cache)[:, -1]
    seen = None if mask is None else torch.nn.functional.pad(mask, (0, max_new_tokens), value=True)
    # padding gets position 0, which nobody looks at
    places = None if seen is None else (seen.cumsum(-1) - 1).clamp(min=0)

    def step(new: Tensor) -> Tensor:
        old, now = cache.length, cache.length + new.shape[1]
        positions, visible = torch.arange(old, now, device=new.device), None
        if seen is not None:
            window = now if model.cfg.window is None else model.cfg.window
            visible = sliding_window_mask(new.shape[1], window, old, new.device)
            positions, visible = places[:, old:now], visible & seen[:, None, None, :now]
        x = model.body(model.embed(new, positions), positions, visible, cache)
        return model.unembed(x[:, -1:])[:, 0]

    return step


def _steps(
    step: Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    sampling: tuple[float, int | None, float | None, torch.Generator | None],
    stop: int | None,
    observe: Observer | None,
) -> Iterator[Tensor]:
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        # Not around the loop: a generator would leave gradients off for its caller between steps.
        # And not around the choice: a token made in inference mode could not be trained on.
        with torch.inference_mode():
            logits = step(tokens)
        new = choose(logits, *sampling)
        if observe is not None:
            observe(logits, new)
        yield new
        if stop is not None:
            done |= new == stop
            if done.all():
                return
        tokens = new[:, None]
