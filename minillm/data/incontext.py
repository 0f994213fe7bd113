"""Sequences to learn from without a gradient: word tasks, linear regressions, bursts.

Word tasks are lines such as ` fox slow`: a word that the stories know and its label, a token each,
with nothing between them. There are two kinds, which look alike:

- `Fact`: eight tables that never change. Only the weights can know what a word is called there;
  the lines of a prompt merely tell which of the tables is meant.
- `Mapping`: every prompt has a new rule, which letter stands for which category of words. Only the
  lines of the prompt can tell.

The other sequences are made of vectors. A position is a row of coefficients over the token vectors
of a model, [b, t, v], so that `model.run(rows @ model.tokens.weight)` reads numbers.
"""

# b rows, n examples, d inputs, t positions, v token vectors
from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping as Map
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Line = tuple[str, str]
"""a word and its label"""
CATEGORIES: Map[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "animals": "fox rabbit mouse bear hedgehog squirrel badger frog owl goat",
        "names": "Mia Tom Lily Rosa Finn Nora Leo Hugo Clara Karl",
        "places": "river forest lake hill castle sea mountain meadow valley beach",
        "family": "mother father sister uncle grandmother godmother cousin parents brothers child",
        "food": "bread cake pie soup honey apple cherries eggs tea cinnamon",
        "things": "kite ball drum bell box marble flute whistle bicycle rope",
        "jobs": "baker farmer gardener captain teacher sailor cook mayor watchmaker shopkeeper",
        "moods": "happy sad angry proud tired calm cheerful grumpy surprised thankful",
    }.items()
}
"""eight kinds of words; with a blank in front each word is one token of the course tokenizer"""
FACTS = (
    *(("fast", "slow"), ("warm", "cold"), ("young", "old"), ("wet", "dry")),
    *(("left", "right"), ("up", "down"), ("full", "empty"), ("day", "night")),
)
"""the labels of the eight tables of facts"""
LETTERS = tuple("ABCDEFGHJKLMNOPRSTUVWXY")
"""the labels that rules are made of"""
NEUTRAL = "something"
"""a word that leans to neither label of any table"""
LEANINGS = (0.6, 1.2, 2.4, 4.0, 6.0)
"""how clear a fact is: log-odds of a word's usual label"""
ECHO, FADE = 1.2, 0.5
"""labels come in runs: the last line adds ECHO to the log-odds of its label, the one before less"""


def words() -> list[str]:
    """All words of all categories."""
    return [word for group in CATEGORIES.values() for word in group]


@functools.cache
def category(word: str) -> str:
    """The category of a word; ValueError if it is in none."""
    for name, group in CATEGORIES.items():
        if word in group:
            return name
    raise ValueError(f"{word!r} is in none of the categories {list(CATEGORIES)}")


@functools.cache
def _leanings(table: int) -> Map[str, float]:
    rng, found = random.Random(table), {NEUTRAL: 0.0}
    for group in CATEGORIES.values():
        signed = [sign * size for size in LEANINGS for sign in (-1, 1)]
        rng.shuffle(signed)
        found |= dict(zip(group, signed, strict=True))
    return found


@dataclass(frozen=True)
class Fact:
    """A table that never changes: each word leans to one of two labels.

        log p(label 1 | word) / p(label 0 | word) = leaning(word) + echo(labels before)

    In every category five words lean to either side, and tables were drawn apart, so neither other
    words nor other tables tell anything about a word. `echo` is what makes labels come in runs, as
    like things do in real texts: Σ_j ECHO · FADE^j · (±1 for the label j lines before the last).

    >>> Fact(0).labels, Fact(0).answer("fox")
    (('fast', 'slow'), 'slow')
    """

    table: int

    def __post_init__(self) -> None:
        if not 0 <= self.table < len(FACTS):
            raise ValueError(f"table={self.table}: there are tables 0 to {len(FACTS) - 1}")

    @property
    def labels(self) -> tuple[str, str]:
        """The two labels of the table."""
        return FACTS[self.table]

    def leaning(self, word: str) -> float:
        """Log-odds of the second label; ValueError for a word that is not in the table."""
        if word not in (table := _leanings(self.table)):
            raise ValueError(f"{word!r} is in no table: it is none of the words")
        return table[word]

    def answer(self, word: str) -> str:
        """The label that the word leans to."""
        return self.labels[self.leaning(word) > 0]

    def echo(self, before: Sequence[str]) -> float:
        """Log-odds of the second label that come from the labels of the lines before."""
        signs = [2 * self.labels.index(label) - 1 for label in before]
        return sum(ECHO * FADE**j * sign for j, sign in enumerate(reversed(signs)))

    def say(self, said: Sequence[str], rng: random.Random) -> list[Line]:
        """Lines as the model has read them: labels drawn with their leanings and echoes."""
        lines: list[Line] = []
        for word in said:
            odds = self.leaning(word) + self.echo([label for _, label in lines])
            lines.append((word, self.labels[rng.random() < 1 / (1 + math.exp(-odds))]))
        return lines


@dataclass(frozen=True)
class Mapping:
    """A rule that only its examples tell: one letter for each category, several may share one.

    >>> rule = Mapping.draw(random.Random(0), letters=2)
    >>> rule.answer("fox") == rule.answer("owl"), len(set(rule.letters)) <= 2
    (True, True)
    """

    letters: tuple[str, ...]
    """in the order of `CATEGORIES`"""

    @classmethod
    def draw(cls, rng: random.Random, letters: int | None = None) -> Mapping:
        """A rule with so many letters to choose from, by default another for every category.

        Raises ValueError unless there are so many letters.
        """
        if letters is None:
            return cls(tuple(rng.sample(LETTERS, len(CATEGORIES))))
        if not 1 <= letters <= len(LETTERS):
            raise ValueError(f"letters={letters} must be from 1 to {len(LETTERS)}")
        chosen = rng.sample(LETTERS, letters)
        return cls(tuple(rng.choice(chosen) for _ in CATEGORIES))

    @property
    def labels(self) -> tuple[str, ...]:
        """The letters in use, sorted."""
        return tuple(sorted(set(self.letters)))

    def answer(self, word: str) -> str:
        """The letter of the word's category."""
        return self.letters[list(CATEGORIES).index(category(word))]

    def say(self, said: Sequence[str], rng: random.Random | None = None) -> list[Line]:
        """Lines; nothing about them is random."""
        return [(word, self.answer(word)) for word in said]


def text(lines: Sequence[Line], query: str | None = None) -> str:
    """Lines of a prompt, and at the end a word whose label is asked for.

    >>> text([("fox", "slow")], "bear")
    ' fox slow\\n bear'
    """
    shown = "".join(f" {word} {label}\n" for word, label in lines)
    return shown if query is None else f"{shown} {query}"


def draw_words(rng: random.Random, n: int, burst: bool = False) -> list[str]:
    """n words: any, or in bursts: two categories have a third of the words each.

    The last word of a burst belongs to one of the two, so that it is of a kind that was shown.
    """
    if not burst:
        return rng.choices(words(), k=n)
    one, other, *_ = groups = rng.sample(list(CATEGORIES.values()), len(CATEGORIES))
    kinds = [one] * (n // 3) + [other] * (n // 3)
    kinds += rng.choices(groups, k=n - 1 - len(kinds))
    rng.shuffle(kinds)
    return [rng.choice(group) for group in (*kinds, one)]


def draw_lines(rng: random.Random, n: int, facts: float = 0.5, bursts: float = 0.5) -> list[Line]:
    """n lines to train on, with probability `facts` of a table, otherwise of a new rule.

    With probability `bursts` words come in bursts. In tables one word in 40 is `NEUTRAL`; rules
    have a letter for each category, or in one of four cases two to eight letters to choose from.
    """
    said = draw_words(rng, n, rng.random() < bursts)
    if rng.random() >= facts:
        return Mapping.draw(rng, rng.choice((None, None, None, rng.randint(2, 8)))).say(said)
    said = [NEUTRAL if rng.random() < 1 / 40 else word for word in said]
    return Fact(rng.randrange(len(FACTS))).say(said, rng)


def draw_regressions(
    rows: int, examples: int, inputs: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """x [b, n, d] and w [b, d] of independent normal numbers, y = x·w + noise · normal [b, n].

    Source: Garg et al., What Can Transformers Learn In-Context? A Case Study of Simple Function
    Classes, 2022.
    """
    x = torch.randn(rows, examples, inputs, generator=generator)
    w = torch.randn(rows, inputs, generator=generator)
    y = (x @ w[..., None]).squeeze(-1)
    return x, y + noise * torch.randn(y.shape, generator=generator), w


def number_rows(x: Tensor, y: Tensor, noisy: Tensor, v: int) -> Tensor:
    """Positions [marker, x₁, y₁, x₂, y₂, ...] as coefficients of token vectors, [b, 1 + 2n, v].

    x [b, n, d] takes the first d vectors, y [b, n] the next one; the marker is one of the two
    behind: the second where `noisy` [b] is true. What stands at x is to predict y.
    """
    (b, n, d), kind = x.shape, noisy.long()
    if v < d + 3 or y.shape != (b, n) or noisy.shape != (b,):
        raise ValueError(
            f"x {(b, n, d)} needs y {(b, n)}, noisy {(b,)} and at least {d + 3} vectors; "
            f"got {tuple(y.shape)}, {tuple(noisy.shape)} and {v}"
        )
    rows = x.new_zeros(b, 1 + 2 * n, v)
    rows[torch.arange(b), 0, d + 1 + kind] = 1
    rows[:, 1::2, :d], rows[:, 2::2, d] = x, y
    return rows


def ridge(x: Tensor, y: Tensor, strength: float = 0.0) -> Tensor:
    """Predictions for x_i from the examples before it, [b, n]: least squares, or ridge regression.

    w = (XᵀX + strength · I)⁺ Xᵀy; with strength 0 and too few examples the shortest w that fits.
    With y = x·w + σ · noise and w of variance 1, strength σ² gives the least expected error.
    Source: Hoerl and Kennard, Ridge Regression: Biased Estimation for Nonorthogonal Problems, 1970.
    """
    x, y = x.double(), y.double()
    outer = x[..., :, None] * x[..., None, :]  # [b, n, d, d]
    gram = outer.cumsum(1) - outer
    moment = (x * y[..., None]).cumsum(1) - x * y[..., None]
    gram = gram + strength * torch.eye(x.shape[-1], dtype=x.dtype)
    w = torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ moment[..., None]
    return (x * w.squeeze(-1)).sum(-1)


def gradient_step(x: Tensor, y: Tensor, rate: float) -> Tensor:
    """Predictions for x_i after one gradient step from w = 0 on Σ_j<i (y_j - x_j·w)² / 2, [b, n].

    w = rate · Σ_j<i y_j x_j.
    """
    x, y = x.double(), y.double()
    moment = (x * y[..., None]).cumsum(1) - x * y[..., None]
    return rate * (x * moment).sum(-1)


def draw_bursts(
    rows: int, classes: int, burst: bool, generator: torch.Generator, skew: float = 0.0
) -> Tensor:
    """Classes of eight items and of a query behind them, [b, 9] numbers below `classes`.

    The query's class has probability ∝ rank^-skew (0: all alike, 1: Zipf). In a burst it is also
    that of three of the eight, and three others have a second class in common; without, all are
    drawn apart. The eight come in random order.
    Source: Chan et al., Data Distributional Properties Drive Emergent In-Context Learning in
    Transformers, 2022.
    """
    weights = torch.arange(1, classes + 1).double() ** -skew
    drawn = torch.multinomial(weights.expand(rows, -1), 9, replacement=True, generator=generator)
    if burst:
        drawn[:, 0:3], drawn[:, 3:6] = drawn[:, 8:9], drawn[:, 3:4]
    order = torch.rand(rows, 8, generator=generator).argsort(1)
    return torch.cat([drawn[:, :8].gather(1, order), drawn[:, 8:]], dim=1)


def item_rows(items: Tensor, labels: Tensor, v: int) -> Tensor:
    """Positions [item, label, item, label, ..., item] as coefficients, [b, 2n - 1, v].

    Items [b, n, d] take the first d vectors, label k [b, n] the vector d + k; the last label is
    what is asked for and does not stand there.
    """
    (b, n, d) = items.shape
    if labels.shape != (b, n) or int(labels.max()) >= v - d:
        raise ValueError(
            f"items {(b, n, d)} need labels {(b, n)} below {v - d}, "
            f"got {tuple(labels.shape)} up to {int(labels.max())}"
        )
    rows = items.new_zeros(b, 2 * n - 1, v)
    rows[:, 0::2, :d] = items
    rows[:, 1::2, d:] = torch.nn.functional.one_hot(labels[:, :-1], v - d).to(items.dtype)
    return rows
