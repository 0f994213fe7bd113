"""A conversation as one sequence of tokens: the chat template of the course.

    <|system|>Be brief.<|user|>Who are you?<|assistant|>A small model.<|endoftext|>

Only this module writes the special tokens. What people write is encoded as plain text, so a user
who types `<|assistant|>` gets a few ordinary tokens and does not change who is speaking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minillm.tokenizers.bpe import BPE

ROLES = ("system", "user", "assistant")
END = "<|endoftext|>"


class Message(NamedTuple):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation as tokens: `ids`, and `mask`, True where the assistant is to be learned from.

    The mask covers what the assistant says and the end token by which it stops, not the marker that
    gives it the word: at generation that marker is part of the prompt.
    """

    ids: list[int]
    mask: list[bool]


def render(bpe: BPE, messages: Sequence[Message | tuple[str, str]], reply: bool = False) -> Chat:
    """Tokens of a conversation, as (role, content) pairs.

    At most one system message, first; then user and assistant in turns, the user first. With
    `reply=True` the conversation must end with the user, and `<|assistant|>` is added for a model
    to go on from. Raises ValueError for roles out of order, and for a tokenizer without the
    special tokens.

    >>> from minillm.tokenizers.bpe_train import train_bpe
    >>> marks = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    >>> bpe = train_bpe("hi ho", 262, special_tokens=marks)
    >>> chat = render(bpe, [("user", "hi<|user|>"), ("assistant", "ho")])
    >>> bpe.decode(chat.ids)
    '<|user|>hi<|user|><|assistant|>ho<|endoftext|>'
    >>> chat.ids.count(bpe.special_ids["<|user|>"])
    1
    >>> bpe.decode(token for token, learn in zip(chat.ids, chat.mask) if learn)
    'ho<|endoftext|>'
    """
    messages = [Message(*message) for message in messages]
    _check_order([message.role for message in messages], reply)
    marks = {role: f"<|{role}|>" for role in ROLES}
    if missing := [mark for mark in (*marks.values(), END) if mark not in bpe.special_ids]:
        raise ValueError(f"the tokenizer lacks the special tokens {missing}")
    ids: list[int] = []
    mask: list[bool] = []
    for role, content in messages:
        said = bpe.encode_ordinary(content)
        if role == "assistant":
            said.append(bpe.special_ids[END])
        ids += [bpe.special_ids[marks[role]], *said]
        mask += [False] + [role == "assistant"] * len(said)
    if reply:
        ids.append(bpe.special_ids[marks["assistant"]])
        mask.append(False)
    return Chat(ids, mask)


def _check_order(roles: list[str], reply: bool) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise ValueError(f"a conversation needs at least one user message; the roles are {roles}")
    for place, role in enumerate(turns, start=len(roles) - len(turns)):
        expected = ("user", "assistant")[(place - len(roles) + len(turns)) % 2]
        if role != expected:
            raise ValueError(
                f"message {place} has role {role!r} where {expected!r} is due: a system message "
                f"may come first, then user and assistant take turns; the roles are {roles}"
            )
    if reply and turns[-1] != "user":
        raise ValueError(f"reply=True needs the user's message last; the roles are {roles}")
