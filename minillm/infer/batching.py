"""Many prompts at once: padded on the left, answered together, each as if it were alone."""

# b batch, t prompt tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minillm.infer.generate import generate
from minillm.infer.prepare import prepare
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.chat import END, Message, render

Prompt = str | Sequence[Message | tuple[str, str]]
"""a text, or a conversation as (role, content) pairs"""


def prompt_ids(tokenizer: BPE, prompt: Prompt, chat: bool = False) -> list[int]:
    """The tokens a model goes on from: <|endoftext|> and the text, or with `chat` a conversation.

    A text is then what the user says. Raises ValueError for a conversation without `chat`, and
    for one that does not end with the user.
    """
    if chat:
        said = [("user", prompt)] if isinstance(prompt, str) else prompt
        return render(tokenizer, said, reply=True).ids
    if not isinstance(prompt, str):
        raise ValueError(f"a conversation needs chat=True; without, a prompt is a text: {prompt!r}")
    return [tokenizer.special_ids[END], *tokenizer.encode_ordinary(prompt)]


def by_length(rows: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """The places of `rows` in groups of `batch`, longest first: a group needs little padding."""
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def pad_left(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Tokens [b, t] with `fill` in front of short rows, and a mask [b, t], True at tokens.

    >>> tokens, mask = pad_left([[5, 6], [7]], fill=0)
    >>> tokens.tolist(), mask.tolist()
    ([[5, 6], [0, 7]], [[True, True], [False, True]])
    """
    width = max(map(len, rows))
    tokens = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
    empty = torch.tensor([width - len(row) for row in rows])
    return tokens, torch.arange(width) >= empty[:, None]


def check_fits(rows: Sequence[Sequence[int]], new: int, max_len: int) -> None:
    """Raise ValueError, saying by how much, where a row and `new` more tokens exceed the context.

    Rotary positions would go on, but a model was never trained there and answers nonsense.
    """
    place = max(range(len(rows)), key=lambda i: len(rows[i]))
    if (total := len(rows[place]) + new) > max_len:
        raise ValueError(
            f"prompt {place} has {len(rows[place])} tokens: with {new} more it exceeds the context "
            f"of {max_len} by {total - max_len}"
        )


def complete(
    model: LM,
    tokenizer: BPE,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
    *,
    chat: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    batch: int = 64,
    until: str | None = None,
    progress: bool = False,
) -> list[str]:
    """What the model answers to each prompt, up to its end marker or to the text `until`.

    The prompts' texts are continued behind <|endoftext|>, or with `chat` answered as messages of a
    user (see `prompt_ids`). Greedy unless `temperature` is above 0. The greedy answer to a prompt
    does not depend on the others. One that is still going on after `max_new_tokens` is cut there.

    Raises ValueError for prompts that with their answers exceed the context, saying by how much.
    """
    rows = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    if not rows:
        return []
    check_fits(rows, max_new_tokens, model.cfg.max_len)
    end, ready = tokenizer.special_ids[END], prepare(model)
    answers = [""] * len(rows)
    sampling = (temperature, top_k, top_p, generator)
    groups = by_length(rows, batch)
    bar = tqdm(total=len(rows), unit="prompt", disable=not progress)
    for group in groups:
        tokens, mask = pad_left([rows[i] for i in group], end)
        said: list[list[int]] = [[] for _ in group]
        going = set(range(len(group)))
        for new in generate(ready, tokens, max_new_tokens, *sampling, mask=mask):
            ids = new.tolist()
            for row in sorted(going):
                if ids[row] == end:
                    going.discard(row)
                    continue
                said[row].append(ids[row])
                if until is not None and until in tokenizer.decode(said[row]):
                    going.discard(row)
            if not going:
                break
        for i, ids in zip(group, said, strict=True):
            text = tokenizer.decode(ids)
            answers[i] = text if until is None else text.partition(until)[0]
        bar.update(len(group))
    bar.close()
    return answers
