"""Greeting cards: a small world in which it is known what a good answer is.

A request asks for a card to somebody about something of theirs; a card greets the person and says
a few lines, kind ones and others. `judge` says what a card is really worth, point by point. People
cannot be asked for such a number, only which of two cards they like better; here both can be had,
so that one can see how far a reward learned from comparisons may be trusted.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.families_makers import WORDS
from minillm.data.instructions import Instruction

NAMES = tuple(WORDS["names"])
THINGS = tuple(WORDS["things"])
WORDINGS = (
    "Write a card for {name} about the {thing}.",
    "Please write {name} a card about the {thing}.",
    "{name} has a {thing}. Write a card.",
)
_TRAITS = {
    "kind": 0.5,
    "brave": 0.4,
    "clever": 0.4,
    "gentle": 0.4,
    "funny": 0.3,
    "strong": 0.2,
    "quick": 0.1,
    "quiet": 0.0,
    "slow": -0.3,
    "loud": -0.4,
    "lazy": -0.6,
    "rude": -0.8,
}
_OTHERS = {
    "I miss you.": 0.5,
    "Thank you for your help.": 0.5,
    "Come and see me.": 0.3,
    "I saw a frog.": 0.0,
    "It rained here today.": 0.0,
    "I am busy now.": -0.3,
    "Do not call me.": -0.7,
}
_ABOUT = {
    "Your {thing} is lovely.": 0.5,
    "I like your {thing}.": 0.4,
    "I saw your {thing}.": 0.1,
    "Your {thing} is old.": -0.2,
    "I lost your {thing}.": -0.5,
}
LINES = {**{f"You are {trait}.": value for trait, value in _TRAITS.items()}, **_OTHERS, **_ABOUT}
"""what a card may say -> how kind it is, between -1 and 1"""
LONGEST = 4
"""lines that somebody likes to read; every further one costs"""
COUNTS = {1: 0.22, 2: 0.28, 3: 0.24, 4: 0.14, 5: 0.08, 6: 0.04}
"""how many lines the demonstrations have"""
REPEATS = 0.08
"""how often a line of a demonstration is one that was there before"""


@dataclass(frozen=True)
class Request:
    """Somebody wants a card for `name` about `thing`."""

    name: str
    thing: str
    wording: str

    @property
    def text(self) -> str:
        """What the user says."""
        return self.wording.format(name=self.name, thing=self.thing)


@dataclass(frozen=True)
class Judged:
    """What a card is worth, point by point; `total` is the true reward."""

    greeting: float
    """1 if it begins with `Dear NAME,` and the right name"""
    topic: float
    """1 if a line is about the thing that was asked for"""
    kindness: float
    """the sum over the lines, each counted once; lines about another thing count 0"""
    repeats: int
    """lines that were there before"""
    extra: int
    """lines beyond the first four"""
    unknown: int
    """pieces that are no line of this world; the greeting, if it is none, is one of them"""

    @property
    def total(self) -> float:
        """greeting + topic + kindness - repeats - extra / 2 - unknown."""
        points = self.greeting + self.topic + self.kindness
        return points - self.repeats - 0.5 * self.extra - self.unknown


def requests(n: int, seed: int, split: str = "train") -> list[Request]:
    """`n` requests; those of split "held_out" join a name and a thing that "train" never joins.

    Raises ValueError for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r} must be 'train' or 'held_out'")
    apart = [  # one thing in six of each name
        (name, thing)
        for i, name in enumerate(NAMES)
        for j, thing in enumerate(THINGS)
        if ((i + j) % 6 == 0) == (split == "held_out")
    ]
    rng = random.Random(f"cards {split} {seed}")
    return [Request(*rng.choice(apart), rng.choice(WORDINGS)) for _ in range(n)]


def demonstration(request: Request, rng: random.Random) -> Instruction:
    """A card as people write them: of one to six lines, kind or not, now and then one twice."""
    count = rng.choices(list(COUNTS), list(COUNTS.values()))[0]
    said: list[str] = []
    for _ in range(count):
        again = bool(said) and rng.random() < REPEATS
        left = said if again else [line for line in LINES if line not in said]
        said.append(rng.choice(left))
    text = " ".join(line.format(thing=request.thing) for line in said)
    return Instruction(request.text, "", f"Dear {request.name}, {text}")


@functools.cache
def _asked(text: str) -> Request:
    """The request that says `text`."""
    for wording in WORDINGS:
        pattern = re.escape(wording).replace(r"\{name\}", r"(?P<name>\w+)")
        if found := re.fullmatch(pattern.replace(r"\{thing\}", r"(?P<thing>\w+)"), text):
            return Request(found["name"], found["thing"], wording)
    raise ValueError(f"{text!r} asks for no card; for example: {WORDINGS[0]!r}")


def split_lines(card: str) -> list[str]:
    """A card cut behind each full stop; the greeting is a piece of its own.

    >>> split_lines("Dear Mia, I miss you. You are kind.")
    ['Dear Mia,', 'I miss you.', 'You are kind.']
    """
    head = re.match(r"\s*(Dear \w+,)", card)
    rest = card[head.end() :] if head else card
    pieces = [piece.strip() for piece in re.split(r"(?<=[.!?])", rest) if piece.strip()]
    return [head[1], *pieces] if head else pieces


def judge(request: Request | str, card: str) -> Judged:
    """What `card` is worth as an answer; ValueError if the text is no request for a card.

    >>> judge("Write a card for Mia about the kite.", "Dear Mia, I like your kite.").total
    2.4
    """
    request = _asked(request) if isinstance(request, str) else request
    pieces = split_lines(card)
    greeted = bool(pieces) and pieces[0].startswith("Dear ") and pieces[0].endswith(",")
    said = pieces[1:] if greeted else pieces
    kindness, unknown, topic = 0.0, not greeted, False
    for line in dict.fromkeys(said):
        value, about = _value(line)
        if value is None:
            unknown += said.count(line)
        elif about in (None, request.thing):
            kindness += value
            topic = topic or about is not None
    return Judged(
        greeting=float(greeted and pieces[0] == f"Dear {request.name},"),
        topic=float(topic),
        kindness=round(kindness, 6),
        repeats=len(said) - len(set(said)),
        extra=max(0, len(said) - LONGEST),
        unknown=int(unknown),
    )


@functools.cache
def _about() -> dict[str, tuple[float, str]]:
    """All lines about a thing: text -> kindness, thing."""
    return {
        line.format(thing=thing): (value, thing)
        for line, value in _ABOUT.items()
        for thing in THINGS
    }


def _value(line: str) -> tuple[float | None, str | None]:
    """How kind a line is (None: it is not of this world), and which thing it is about, if any."""
    if line in _about():
        return _about()[line]
    return (None if "{" in line else LINES.get(line)), None


def true_reward(asked: Sequence[str], cards: Sequence[str]) -> Tensor:
    """The totals of `judge`, [n], for n requests and n cards."""
    pairs = zip(asked, cards, strict=True)
    return torch.tensor([judge(request, card).total for request, card in pairs])
