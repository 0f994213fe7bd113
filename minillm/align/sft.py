"""Supervised fine-tuning: conversations as rows, what of them is learned, and the loss.

    <|user|>Sort. 2 1<|assistant|>1 2<|endoftext|><|user|>Copy. a<|assistant|>a<|endoftext|>
                                  ^^^^^^^^^^^^^^^^                             ^^^^^^^^^^^^^^

It is next-token prediction, as before; only the answers (^) count. Conversations are short and
differ in length, so several share a row: the mask of documents keeps each from seeing the others,
and its positions begin at 0, so every one of them is computed as if it stood alone.
(Ouyang et al., Training Language Models to Follow Instructions with Human Feedback, 2022; packing
with masks: Krell et al., Efficient Sequence Packing without Cross-contamination, 2021.)
"""
# b rows, t tokens of a row

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.data.batches import Packed, document_mask, pad
from minillm.data.mixture import MixtureSampler
from minillm.model import LM
from minillm.model.mask import sliding_window_mask
from minillm.ops import op
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.chat import END, Chat, render

Conversation = Sequence[tuple[str, str]]
"""(role, content) pairs, the user first (or one system message before), the assistant last"""

LEARN = ("response", "everything")


def encode(conversation: Conversation, tokenizer: BPE, learn: str = "response") -> Chat:
    """A conversation as tokens and a mask, True for each token that is learned.

    With `learn="response"` that is what the assistant says and the marker by which it stops, in
    every turn; with "everything" all tokens but the first, for which there is no prediction.

    Raises ValueError for roles out of order, for a conversation in which the assistant does not
    have the last word, and for a response without text.
    """
    if learn not in LEARN:
        raise ValueError(f"learn={learn!r} must be one of {list(LEARN)}")
    chat = render(tokenizer, conversation)
    role, content = conversation[-1]
    if role != "assistant":
        raise ValueError(
            f"the conversation ends with the {role} ({content!r}): no response to learn"
        )
    for place, (role, content) in enumerate(conversation):
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {place}, a response, is empty: {content!r}")
    if learn == "everything":
        return Chat(chat.ids, [False] + [True] * (len(chat.ids) - 1))
    return chat


def document(text: str, tokenizer: BPE) -> Chat:
    """Plain text to mix in, between two end markers; all of it is learned but the first marker."""
    end = tokenizer.special_ids[END]
    ids = [end, *tokenizer.encode_ordinary(text), end]
    return Chat(ids, [False] + [True] * (len(ids) - 1))


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity`: the longest first, each into the first row with room.

    At most 11/9 of the fewest rows possible, plus 6/9. (Dósa, The Tight Bound of First Fit
    Decreasing Bin-Packing Algorithm, 2007.) Items of a row stand in their old order; rows are
    ordered by their first item.

    >>> first_fit([3, 6, 4, 2], capacity=8)
    [[0, 2], [1, 3]]
    """
    if wrong := [n for n in lengths if not 0 < n <= capacity]:
        raise ValueError(f"lengths {wrong} do not lie between 1 and capacity={capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if lengths[i] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return sorted(sorted(row) for row in rows)


def sft_rows(
    conversations: Sequence[Conversation | Chat],
    tokenizer: BPE,
    max_len: int,
    *,
    learn: str = "response",
    pack: bool = True,
) -> Packed:
    """Conversations as rows of at most `max_len` tokens, every field [b, t].

    A conversation of n tokens takes n - 1 places: the last token is only a target. It stays whole,
    sees itself alone (`documents` says which it is, -1 is filling) and counts its positions from
    0. With `pack` several share a row, otherwise each has its own. `loss_mask` is True where the
    target is learned. A `Chat` brings its own mask, whatever `learn` says.

    Raises ValueError for what `encode` refuses, for a conversation that does not fit (saying by how
    much), and for a `Chat` in which nothing is learned.
    """
    if not conversations:
        raise ValueError("there are no conversations to make rows of")
    chats = [c if isinstance(c, Chat) else encode(c, tokenizer, learn) for c in conversations]
    for i, chat in enumerate(chats):
        if (needed := len(chat.ids) - 1) > max_len:
            raise ValueError(
                f"conversation {i} needs {needed} places, {needed - max_len} more than the "
                f"max_len={max_len} there are; it begins {tokenizer.decode(chat.ids[:20])!r}"
            )
        if not any(chat.mask[1:]):
            raise ValueError(f"nothing is learned from conversation {i}: its mask is empty")
    lengths = [len(chat.ids) - 1 for chat in chats]
    groups = first_fit(lengths, max_len) if pack else [[i] for i in range(len(chats))]
    end = tokenizer.special_ids[END]

    def laid_out(parts: Sequence[Sequence[int]], fill: int) -> Tensor:
        return pad([[x for i in group for x in parts[i]] for group in groups], fill)[0]

    return Packed(
        tokens=laid_out([chat.ids[:-1] for chat in chats], end),
        targets=laid_out([chat.ids[1:] for chat in chats], end),
        documents=laid_out([[i] * n for i, n in enumerate(lengths)], -1),
        positions=laid_out([range(n) for n in lengths], 0),
        loss_mask=laid_out([chat.mask[1:] for chat in chats], False).bool(),
    )


def sft_loss(
    model: LM, inputs: Packed | Tensor, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) where `mask` is true, and how many; for `minillm.train.train`.

    `inputs` are packed rows, whose conversations do not see each other, or tokens [b, t] with one
    conversation a row, filled up behind it. Targets and mask [b, t]; no matrix of logits is kept.
    """
    if isinstance(inputs, Packed):
        sight = document_mask(inputs.documents)
        if model.cfg.window is not None:  # a mask replaces the one that the model would use
            window = sliding_window_mask(sight.shape[-1], model.cfg.window, device=sight.device)
            sight = sight & window
        hidden = model.hidden(inputs.tokens, inputs.positions, sight[:, None])
    else:
        hidden = model.hidden(inputs)
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    total = op("linear_cross_entropy", model.cfg.impl)(
        *(hidden.flatten(0, 1), model.head.weight, targets.flatten(), mask.flatten()),
        model.cfg.logit_scale,
    )
    return total, mask.sum()


class ConversationBatches:
    """Endless batches (inputs, targets, mask) for `train`, each of `batch` examples of a mixture.

    The sampler says which example comes (`minillm.data.mixture`); `render(example, rng)` makes it a
    conversation, or a `Chat`, and may draw its wording from `rng`. Batch i depends on the sampler's
    seed and i alone, so a run that was stopped goes on exactly from `state_dict()`. With `pack` the
    inputs are packed rows, as few as are needed; otherwise each example has a row.

    Raises ValueError where `sft_rows` does.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        tokenizer: BPE,
        max_len: int,
        batch: int,
        render: Callable[[Any, random.Random], Conversation | Chat],
        *,
        learn: str = "response",
        pack: bool = True,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        self.sampler, self.tokenizer, self.render = sampler, tokenizer, render
        self.settings = {"batch": batch, "max_len": max_len, "learn": learn, "pack": pack}
        self.step = 0

    def __iter__(self) -> ConversationBatches:
        return self

    def __next__(self) -> tuple[Packed | Tensor, Tensor, Tensor]:
        batch, max_len, learn, pack = self.settings.values()
        drawn = []
        for number in range(self.step * batch, (self.step + 1) * batch):
            rng = random.Random(f"{self.sampler.seed}, example {number}")
            drawn.append(self.render(next(self.sampler)[1], rng))
        self.step += 1
        rows = sft_rows(drawn, self.tokenizer, max_len, learn=learn, pack=pack)
        return rows if pack else rows.tokens, rows.targets, rows.loss_mask

    def state_dict(self) -> dict[str, Any]:
        """The place in the run, and what the sequence of batches depends on."""
        return {"step": self.step, "sampler": self.sampler.state_dict(), **self.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError if it belongs to other batches."""
        for name, value in self.settings.items():
            if state.get(name) != value:
                raise ValueError(f"{name}={value} here, {state.get(name)} in the saved state")
        self.sampler.load_state_dict(state["sampler"])
        self.step = int(state["step"])
