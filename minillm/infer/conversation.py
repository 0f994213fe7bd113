"""A conversation with a model: what was said, and an answer that comes piece by piece.

It knows nothing of screens; the terminal (`minillm.chat`) and the notebook
(`minillm.teach.chat_view`) are two views of the same object.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.infer.generate import generate
from minillm.infer.prepare import prepare
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.chat import Message, render

Reward = Callable[[Sequence[str], Sequence[str]], Tensor]
"""n requests, n responses -> a score for each, as `minillm.align.ppo` takes it"""


@dataclass(frozen=True)
class Answer:
    """How an answer came to be."""

    text: str
    ended: str
    """"end": the model came to its end; "length": it was cut; "stopped": somebody stopped it"""
    tokens: int
    first: float
    """seconds until the first token"""
    seconds: float
    reward: float | None = None
    """what the reward model thinks of it as an answer to what was said last"""
    problem: str = ""
    """why there is no reward, if it could not be had"""

    def __str__(self) -> str:
        ended = {"length": "cut at the longest answer", "stopped": "stopped"}.get(self.ended)
        score = None if self.reward is None else f"reward {self.reward:.2f}"
        score = f"no reward: {self.problem}" if self.problem else score
        speed = f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens a second"
        first = f"first after {self.first:.2f} s" if self.tokens else None
        notes = (score, f"{self.tokens} tokens", ended, first, speed if self.tokens else None)
        return " · ".join(note for note in notes if note)


class Conversation:
    """Messages so far, and the settings with which the next answer is drawn.

    `messages` are all that were said, a `system` message not among them. The model reads the last
    `turns` pairs of them (None: as many as fit; 0: each message alone, as models expect that were
    trained on single requests); the first `forgotten` messages no longer fit. `answers` tells of
    each answer. `temperature` may be set at any time.

    Raises ValueError for a tokenizer of another size than the model's vocabulary, or without the
    marks of a chat, and for settings that mean nothing.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: BPE,
        *,
        reward: Reward | None = None,
        system: str | None = None,
        temperature: float = 0.7,
        max_new_tokens: int = 64,
        turns: int | None = None,
        seed: int = 0,
    ) -> None:
        if model.cfg.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model knows {model.cfg.vocab_size} tokens, the tokenizer has "
                f"{tokenizer.vocab_size}: they were not made for each other"
            )
        render(tokenizer, [("user", "")])  # complains where the marks of a chat are missing
        if not 0 < max_new_tokens < model.cfg.max_len or (turns or 0) < 0:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} must be at least 1 and leave room for a question "
                f"in the context of {model.cfg.max_len}; turns={turns} must not be negative"
            )
        self.tokenizer, self.reward, self.system = tokenizer, reward, system
        self.temperature, self.max_new_tokens, self.turns = temperature, max_new_tokens, turns
        self.model, self.generator = prepare(model), torch.Generator().manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages: list[Message] = []
        self.answers: list[Answer] = []
        self.forgotten = 0

    @property
    def temperature(self) -> float:
        """0 takes the likeliest token each time, 1 what the model thinks; above, it wanders."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature={value} must be a number of at least 0")
        self._temperature = float(value)

    def say(self, text: str) -> Iterator[str]:
        """Say something; yields the answer in pieces, each of whole characters, as they come.

        A token may end within a character: its bytes wait for the rest. What no longer fits the
        context together with an answer is forgotten, oldest turns first (see `forgotten`); the
        system message stays. An iterator that is closed early, or interrupted, leaves the part of
        the answer that came; if nothing had come, it is as if nothing had been said.

        Raises ValueError at once for a blank text and one that alone exceeds the context.
        """
        if not text.strip():
            raise ValueError("a blank message says nothing")
        ids, self.forgotten = self._read(text)
        return self._answer(text, ids)

    def _read(self, text: str) -> tuple[list[int], int]:
        """The tokens that the model goes on from, and how many messages are forgotten in them."""
        head = [] if self.system is None else [Message("system", self.system)]
        room = self.model.cfg.max_len - self.max_new_tokens
        unread = 0 if self.turns is None else max(0, len(self.messages) - 2 * self.turns)
        for start in range(max(self.forgotten, unread), len(self.messages) + 1, 2):
            said = [*head, *self.messages[start:], Message("user", text)]
            ids = render(self.tokenizer, said, reply=True).ids
            if len(ids) <= room:
                return ids, start if start > unread else self.forgotten
        raise ValueError(
            f"the message has {len(ids)} tokens with its marks, {len(ids) - room} too many: the "
            f"context holds {self.model.cfg.max_len}, and {self.max_new_tokens} are for the answer"
        )

    def _answer(self, text: str, ids: list[int]) -> Iterator[str]:
        begin, first, count, said, ended = time.perf_counter(), 0.0, 0, "", "stopped"
        whole = codecs.getincrementaldecoder("utf-8")("replace")
        marks = set(self.tokenizer.special_ids.values())
        settings = {"temperature": self.temperature, "generator": self.generator}
        try:
            for new in generate(self.model, torch.tensor([ids]), self.max_new_tokens, **settings):
                first, token = first or time.perf_counter() - begin, int(new)
                if token in marks:  # mostly the end; but who hands over the word has ended, too
                    ended = "end"
                    break
                count += 1
                if piece := whole.decode(self.tokenizer.vocab[token]):
                    said += piece
                    yield piece
            else:
                ended = "length"
            if piece := whole.decode(b"", final=True):
                said += piece
                yield piece
        finally:
            if said or ended != "stopped":
                spent = time.perf_counter() - begin
                self.messages += [Message("user", text), Message("assistant", said)]
                scored = self._score(text, said) if ended != "stopped" else {}
                self.answers.append(Answer(said, ended, count, first, spent, **scored))

    def _score(self, request: str, response: str) -> dict[str, float | str]:
        if self.reward is None:
            return {}
        try:
            reward = self.reward([request], [response]).item()
        except ValueError as problem:  # too long for the reward model, or no request of its world
            return {"problem": str(problem)}
        return {"reward": reward} if math.isfinite(reward) else {"problem": f"it is {reward}"}
