"""Short stories from a grammar whose entropy is known exactly.

Every story has a hero, a home, a wish or a worry, a cause and its effect, a feeling that follows
from the outcome, and questions with answers. Names, objects and places come up again far from
where they were introduced, so a model that cannot look back predicts them badly; and no model, of
any size, has a lower expected loss on whole stories than ``entropy()``.

    H = E[-log P(story)] in nats, from the grammar itself (see ``story_engine.py``)

The grammar is text: `assets/data/stories.txt`. A story's text holds no questions, they are apart.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from minillm.data.story_engine import Derivation, Grammar
from minillm.data.story_reader import Script, read_script
from minillm.paths import ASSETS


@dataclass(frozen=True)
class Story:
    """A story, the (question, answer) pairs that can be read off it, and log P(text) in nats."""

    text: str
    questions: tuple[tuple[str, str], ...]
    log_prob: float


class Encoder(Protocol):
    """What is asked of a tokenizer here."""

    def encode(self, text: str) -> Sequence[int]:
        """The token ids of ``text``."""
        ...


@functools.cache
def _script() -> Script:
    return read_script((ASSETS / "data" / "stories.txt").read_text(encoding="utf-8"))


@functools.cache
def grammar() -> Grammar:
    """The grammar of all stories (built once: nothing in it ever changes)."""
    return Grammar(_script().nodes)


def sample(seed: int) -> Story:
    """One story drawn from the grammar; the same seed gives the same story.

    >>> sample(1) == sample(1), sample(1) == sample(2)
    (True, False)
    """
    return _story(grammar().sample(random.Random(seed)))


def generate(n: int, seed: int) -> list[str]:
    """The texts of ``n`` independent stories; a longer list begins with the shorter one.

    >>> generate(2, seed=0) == generate(3, seed=0)[:2]
    True

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n={n} must not be negative")
    rng = random.Random(seed)
    return [grammar().sample(rng).text for _ in range(n)]


def parse(text: str) -> Story:
    """The story ``text`` read back: its questions and its log-probability.

    Raises:
        ValueError: the grammar does not say ``text``; the message shows where reading stopped.
    """
    return _story(grammar().parse(text))


def log_prob(text: str) -> float:
    """Exact log P(text) in nats.

    Raises:
        ValueError: as ``parse``.

    >>> story = sample(0)
    >>> log_prob(story.text) == story.log_prob
    True
    """
    return grammar().log_prob(text)


@functools.cache
def entropy() -> float:
    """The exact entropy of a story in nats: E[-log P], computed from the grammar, not sampled.

    It is the lowest expected loss per story (summed over its tokens, end marker included) that any
    model can have. The end marker adds nothing: a complete story can only end.
    """
    return grammar().entropy()


def entropy_per_token(tokenizer: Encoder, n: int, seed: int) -> float:
    """Nats per token under ``tokenizer``: mean of -log P over mean tokens, end marker included.

    Both means are over the same ``n`` stories, so that their errors largely cancel. ``tokenizer``
    turns a text into tokens in one way (its canonical encoding), to which an end marker is added.
    A model also spends probability on other token sequences of the same text, so its loss per
    token can approach this value but not fall below it, up to the sampling error of the mean.

    Raises:
        ValueError: ``n`` is not positive.

    >>> class Letters:
    ...     def encode(self, text):
    ...         return list(text.encode())
    >>> 0.05 < entropy_per_token(Letters(), n=20, seed=0) < 0.10
    True
    """
    if n < 1:
        raise ValueError(f"n={n} must be positive")
    rng = random.Random(seed)
    stories = [grammar().sample(rng) for _ in range(n)]
    nats = -sum(story.log_prob for story in stories)
    return nats / sum(len(tokenizer.encode(story.text)) + 1 for story in stories)


def _story(derivation: Derivation) -> Story:
    asked = []
    for condition, question, answer in _script().questions:
        choice, _, value = condition.partition("=")
        if not condition or derivation.keys[choice] == value:
            asked.append((derivation.fill(question), derivation.fill(answer)))
    return Story(derivation.text, tuple(asked), derivation.log_prob)
