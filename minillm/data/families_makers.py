"""What the families of `minillm.data.families` draw: each maker gives fields, input and output.

A maker takes a generator and a material (`""` where there is one only) and returns what fills the
placeholders of a wording, the input, and the right answer, in that order.
"""

from __future__ import annotations

import random

Drawn = tuple[dict[str, str], str, str]


def _split(text: str) -> list[str]:
    return text.split()


WORDS = {
    "names": _split("Mia Tom Lily Ben Rosa Finn Nora Leo Ida Max Clara Hugo"),
    "animals": _split("fox rabbit mouse bear owl beaver lizard crow frog mole turtle cat"),
    "things": _split("kite ball boat scarf drum bell box hat marble basket letter key"),
    "colors": _split("red blue golden striped orange green yellow gray tiny spotted"),
    "places": _split("meadow fair beach bridge pier market river mill forest lake castle sea"),
    "digits": list("0123456789"),
}
"""The materials of lists: words of the stories, most of them one token each."""
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split(
    "January February March April May June July August September October November December"
)
_LODO = (
    ("fox owl bear cat frog crow mouse mole", "bo ri pa fe do ra di le"),
    ("red blue old tiny golden", "go po ru sa mo"),
    ("sees finds helps", "lo to no"),
)
NOUNS, ADJECTIVES, ACTIONS = (
    dict(zip(english.split(), lodo.split(), strict=True)) for english, lodo in _LODO
)
"""English -> Lodo. There the adjective stands behind its noun, the verb at the end, and there is
no article: `the red fox sees the owl` is `bo go ri lo`."""


def _list(rng: random.Random, material: str, low: int = 3, high: int = 5) -> list[str]:
    return rng.sample(WORDS[material], rng.randint(low, high))


def _said(words: list[str]) -> str:
    return " ".join(words)


def copy(rng: random.Random, material: str) -> Drawn:
    """The list as it is."""
    words = _list(rng, material)
    return {}, _said(words), _said(words)


def reverse(rng: random.Random, material: str) -> Drawn:
    """The list backwards."""
    words = _list(rng, material)
    return {}, _said(words), _said(words[::-1])


def first(rng: random.Random, material: str) -> Drawn:
    """The first word."""
    words = _list(rng, material)
    return {}, _said(words), words[0]


def last(rng: random.Random, material: str) -> Drawn:
    """The last word."""
    words = _list(rng, material)
    return {}, _said(words), words[-1]


def nth(rng: random.Random, material: str) -> Drawn:
    """The second, third or fourth word."""
    words, at = _list(rng, material, 4), rng.randint(2, 4)
    place = ("second", "third", "fourth")[at - 2]
    return {"place": place, "digit": str(at)}, _said(words), words[at - 1]


def after(rng: random.Random, material: str) -> Drawn:
    """The word behind a given one."""
    words = _list(rng, material)
    at = rng.randrange(len(words) - 1)
    return {"word": words[at]}, _said(words), words[at + 1]


def before(rng: random.Random, material: str) -> Drawn:
    """The word in front of a given one."""
    words = _list(rng, material)
    at = rng.randrange(1, len(words))
    return {"word": words[at]}, _said(words), words[at - 1]


def first_and_last(rng: random.Random, material: str) -> Drawn:
    """Both ends."""
    words = _list(rng, material)
    return {}, _said(words), f"{words[0]} {words[-1]}"


def swap(rng: random.Random, material: str) -> Drawn:
    """The list with its ends exchanged."""
    words = _list(rng, material)
    return {}, _said(words), _said([words[-1], *words[1:-1], words[0]])


def remove(rng: random.Random, material: str) -> Drawn:
    """The list without one word."""
    words = _list(rng, material)
    word = rng.choice(words)
    return {"word": word}, _said(words), _said([w for w in words if w != word])


def count(rng: random.Random, material: str) -> Drawn:
    """How many words there are, one to six."""
    words = _list(rng, material, 1, 6)
    return {}, _said(words), str(len(words))


def contains(rng: random.Random, material: str) -> Drawn:
    """Whether a word is in the list, yes or no; both equally often."""
    words = _list(rng, material)
    others = [w for w in WORDS[material] if w not in words]
    inside = rng.random() < 0.5
    word = rng.choice(words if inside else others)
    return {"word": word}, _said(words), "yes" if inside else "no"


def sort(rng: random.Random, material: str) -> Drawn:
    """Digits by size, words by the alphabet."""
    words = _list(rng, material)
    return {}, _said(words), _said(sorted(words))


def add(rng: random.Random, material: str) -> Drawn:
    """The sum of two numbers up to 20."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return {}, f"{a} {b}", str(a + b)


def subtract(rng: random.Random, material: str) -> Drawn:
    """The difference of two numbers up to 20; never negative."""
    b, a = sorted((rng.randint(0, 20), rng.randint(0, 20)))
    return {}, f"{a} {b}", str(a - b)


def larger(rng: random.Random, material: str) -> Drawn:
    """The larger of two numbers below 100."""
    a, b = rng.sample(range(100), 2)
    return {}, f"{a} {b}", str(max(a, b))


def _range(rng: random.Random) -> tuple[int, int]:
    low = rng.randint(0, 25)
    return low, low + rng.randint(2, 5)


def count_up(rng: random.Random, material: str) -> Drawn:
    """All whole numbers of a short range."""
    low, high = _range(rng)
    return {"low": str(low), "high": str(high)}, "", _said(list(map(str, range(low, high + 1))))


def count_down(rng: random.Random, material: str) -> Drawn:
    """The same, from above."""
    low, high = _range(rng)
    numbers = range(high, low - 1, -1)
    return {"low": str(low), "high": str(high)}, "", _said(list(map(str, numbers)))


def _calendar(rng: random.Random, names: list[str], what: str) -> Drawn:
    at, steps = rng.randrange(len(names)), rng.randint(2, 4)
    direction, sign = rng.choice((("after", 1), ("before", -1)))
    fields = {"steps": str(steps), "direction": direction, what: names[at]}
    return fields, "", names[(at + sign * steps) % len(names)]


def days(rng: random.Random, material: str) -> Drawn:
    """A day of the week two to four days before or after another."""
    return _calendar(rng, DAYS, "day")


def months(rng: random.Random, material: str) -> Drawn:
    """A month two to four months before or after another."""
    return _calendar(rng, MONTHS, "month")


def _bilingual(rng: random.Random) -> tuple[str, str]:
    """A sentence in English and in Lodo."""
    english, lodo = [], []
    for _ in range(2):
        noun, adjective = rng.choice(list(NOUNS)), rng.choice([None, *ADJECTIVES])
        english.append(f"the {adjective} {noun}" if adjective else f"the {noun}")
        lodo += [NOUNS[noun], *([ADJECTIVES[adjective]] if adjective else [])]
    action = rng.choice(list(ACTIONS))
    return f"{english[0]} {action} {english[1]}", _said([*lodo, ACTIONS[action]])


def to_lodo(rng: random.Random, material: str) -> Drawn:
    """English into Lodo."""
    english, lodo = _bilingual(rng)
    return {}, english, lodo


def from_lodo(rng: random.Random, material: str) -> Drawn:
    """Lodo into English."""
    english, lodo = _bilingual(rng)
    return {}, lodo, english
