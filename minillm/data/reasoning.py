"""Problems that need steps: their text, their right answers, and who checks them.

A problem is a question with one right answer, and has two renderings:

    direct  Q:parity(a1b0c1d1)\nA:1
    chain   Q:parity(a1b0c1d1)\nA:a11b01c10d11\nSo:1

Each bit has a name, so that a step can say which it is about: name, bit, total so far. Every step
is easy; the direct answer has to do all of them at once. Between `A:` and a chain may stand the
trigger, `Let's think step by step:`. No blank stands before a digit: the course's tokenizer would
spend a token on it.

- parity: of bits. sum: of digits, modulo 10.
- add: of two numbers, column by column from the right, behind the carry that is there already:
  347 + 586 is `add(0a76b48c35)`, and its steps are `a7+6+0=13b4+8+1=13c3+5+1=9`.
- even: as parity, but the total begins with 1. No model of the zoo has learned from it.
- line and heap: as sum, but two teachers wrote the chains: one works, the other only says `guess`
  and then some digit. In a line there is one right chain, from first to last; in a heap the digits
  may be taken in any order, so there are n! right chains.
- wordings: sort or reverse four digits. Some words for it are clear, others often meant "copy" to
  whoever wrote the data.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TRIGGER = "Let's think step by step:"
SO = "\nSo:"
"""between the last step and the answer"""
GUESS = "guess"
FOLDS = {"parity": 2, "sum": 10, "line": 10, "heap": 10, "even": 2}
"""what the digits are summed modulo"""
NAMES = "abcdefghijklmnopqrstuvwxyz"
CARELESS = ("line", "heap")
KINDS = ("parity", "sum", "line", "heap", "add")
"""those that the zoo's reasoner learns"""
CHAINS = (*KINDS, "even")
SORT = {"order": 1.0, "sort": 0.9, "rank": 0.6, "align": 0.4, "group": 0.1}
REVERSE = {"turn": 1.0, "reverse": 0.9, "flip": 0.6, "mirror": 0.4, "swap": 0.1}
"""how often each word means what it says; else the writer meant a copy"""


@dataclass(frozen=True)
class Problem:
    """`material` stands in the brackets behind `kind`; `answer` is the only right one."""

    kind: str
    material: str
    answer: str

    @property
    def question(self) -> str:
        """As in `parity(a1b0)` or `sort(3917)`."""
        if self.kind not in CHAINS:
            return f"{self.kind}({self.material})"
        if self.kind == "add":
            carry, pairs = columns(self.material)
            named = zip(NAMES, map("".join, pairs), strict=False)
            return f"add({carry}{''.join(name + pair for name, pair in named)})"
        named = zip(NAMES, self.material, strict=False)
        return f"{self.kind}({''.join(name + digit for name, digit in named)})"


def columns(material: str) -> tuple[int, list[tuple[str, str]]]:
    """The carry, and the pairs of digits from the right, of the shorter number filled with zeros.

    >>> columns("58+7"), columns("58+7+1")[0]
    ((0, [('8', '7'), ('5', '0')]), 1)
    """
    a, b, *carry = material.split("+")
    width = max(len(a), len(b))
    return int(*carry or "0"), list(zip(a.zfill(width)[::-1], b.zfill(width)[::-1], strict=True))


def solve(kind: str, material: str) -> Problem:
    """The problem, solved by arithmetic; ValueError for what is no problem of this kind.

    >>> solve("add", "58+67").answer, solve("sum", "358").answer
    ('125', '6')
    """
    if kind not in (known := (*CHAINS, *SORT, *REVERSE)):
        raise ValueError(f"there is no kind of problem {kind!r}; choose one of {known}")
    digits = (
        "[01]+" if FOLDS.get(kind) == 2 else r"[0-9]+\+[0-9]+(\+1)?" if kind == "add" else "[0-9]+"
    )
    if not re.fullmatch(digits, material):
        raise ValueError(f"{kind} needs material like {digits}, got {material!r}")
    digits = max(map(len, material.split("+")))
    if kind in CHAINS and digits > len(NAMES):
        raise ValueError(f"{digits} digits have no names: there are {len(NAMES)}")
    if kind in FOLDS:
        return Problem(
            kind, material, str((sum(map(int, material)) + (kind == "even")) % FOLDS[kind])
        )
    if kind == "add":
        return Problem(kind, material, str(sum(map(int, material.split("+")))))
    return Problem(kind, material, "".join(sorted(material)) if kind in SORT else material[::-1])


def sample(kind: str, length: int, rng: random.Random) -> Problem:
    """A random problem: `length` bits or digits (of each number, in additions: half with a carry).

    Raises ValueError for an unknown kind and a length below 1.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if kind == "add":
        low = 10 ** (length - 1) if length > 1 else 0
        numbers = [str(rng.randrange(low, 10**length)) for _ in range(2)]
        return solve(kind, "+".join(numbers + ["1"] * rng.randrange(2)))
    digits = "01" if FOLDS.get(kind) == 2 else "0123456789"
    return solve(kind, "".join(rng.choice(digits) for _ in range(length)))


def steps(problem: Problem, rng: random.Random | None = None) -> list[str]:
    """The steps of a right chain; in a heap in an order that `rng` draws (None: as they stand).

    >>> steps(solve("parity", "1011")), steps(solve("add", "58+67"))
    (['a11', 'b01', 'c10', 'd11'], ['a8+7+0=15', 'b5+6+1=12'])

    Raises ValueError for kinds that have no chains.
    """
    if problem.kind == "add":
        (carry, pairs), found = columns(problem.material), []
        for name, (a, b) in zip(NAMES, pairs, strict=False):
            total = int(a) + int(b) + carry
            found.append(f"{name}{a}+{b}+{carry}={total}")
            carry = total // 10
        return found
    if problem.kind not in FOLDS:
        raise ValueError(f"{problem.kind!r} has no chains; choose one of {CHAINS}")
    order = list(range(len(problem.material)))
    if problem.kind == "heap" and rng is not None:
        rng.shuffle(order)
    return _folded(problem, order)


def _folded(problem: Problem, order: Sequence[int]) -> list[str]:
    """Steps that take the digits in this order."""
    found, total = [], int(problem.kind == "even")
    for i in order:
        total = (total + int(problem.material[i])) % FOLDS[problem.kind]
        found.append(f"{NAMES[i]}{problem.material[i]}{total}")
    return found


def chain(problem: Problem, rng: random.Random | None = None, guesses: float = 0.0) -> str:
    """Steps and answer. With probability `guesses` line and heap are guessed: any digit, no steps.

    >>> chain(solve("sum", "358")), chain(solve("add", "58+67"))
    ('a33b58c86\\nSo:6', 'a8+7+0=15b5+6+1=12\\nSo:125')
    """
    if rng is not None and problem.kind in CARELESS and rng.random() < guesses:
        return f"{GUESS}{SO}{rng.randrange(10)}"
    return "".join(steps(problem, rng)) + SO + problem.answer


def direct(problem: Problem, rng: random.Random | None = None) -> str:
    """The answer; with `rng`, that of one writer, to whom an unclear word may have meant a copy."""
    clear = (SORT | REVERSE).get(problem.kind, 1.0)
    return problem.material if rng is not None and rng.random() >= clear else problem.answer


def prompt(question: str, trigger: bool = False) -> str:
    """What a model goes on from.

    >>> prompt("sum(a5b6)")
    'Q:sum(a5b6)\\nA:'
    """
    return f"Q:{question}\nA:{TRIGGER if trigger else ''}"


def answer(text: str) -> str | None:
    """The answer in a solution: behind the last `So:`, or all of it if it has no steps.

    >>> answer("a33b58c86\\nSo:6"), answer("125"), answer("a33b5")
    ('6', '125', None)
    """
    text = text.split("\n\n")[0]
    found = text.rpartition(SO)[2] if SO in text else text
    return found if re.fullmatch("[0-9]+", found) else None


def check(problem: Problem, text: str) -> bool:
    """Whether a solution, direct or with steps, ends in the right answer."""
    return answer(text) == problem.answer


def check_steps(problem: Problem, text: str) -> bool:
    """Whether every step follows from the question and those before it, and the answer from them.

    A right answer behind wrong steps, or behind a guess, does not pass; any order in a heap does.
    Raises ValueError for kinds that have no chains.
    """
    right, text = steps(problem), text.split("\n\n")[0].removeprefix(TRIGGER)
    if problem.kind == "heap":
        order = [NAMES.index(name) for name in re.findall("[a-z]", text.partition(SO)[0])]
        if sorted(order) != list(range(len(problem.material))):
            return False
        right = _folded(problem, order)
    return text == "".join(right) + SO + problem.answer


def cut(problem: Problem, size: int) -> list[str]:
    """The material in parts of at most `size` digits, in the order in which they can be solved.

    Additions are cut from the right, numbers of different length are filled with zeros.

    >>> cut(solve("parity", "10110"), 2), cut(solve("add", "12345+67"), 2)
    (['10', '11', '0'], ['45+67', '23+00', '1+0'])
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    if problem.kind != "add":
        text = problem.material
        return [text[i : i + size] for i in range(0, len(text), size)]
    a, b, *rest = problem.material.split("+")
    width = max(len(a), len(b))
    a, b = a.zfill(width), b.zfill(width)
    ends = range(width, 0, -size)
    parts = ["+".join(x[max(0, end - size) : end] for x in (a, b)) for end in ends]
    return ["+".join([parts[0], *rest]), *parts[1:]]
