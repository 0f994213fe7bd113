"""A grammar with memory whose sentences have exactly known probabilities.

A grammar is a sequence of nodes: a string is said as it stands, a ``Choice`` says one of several
options and remembers it under a name, a ``Case`` continues as an earlier choice demands. Texts
refer back to what was chosen (``{name}``, ``{name.their}``), and the weights of a choice may depend
on earlier ones. Nothing is hidden:

- every choice is said at once, and its options differ before either of them ends. This is checked
  when the grammar is built, so a text has at most one derivation and reading needs no backtracking;
- weights are normalized over the options that earlier choices leave, so nothing is drawn and then
  thrown away, and the probability of a text is the product of those of its choices.

The same object samples, reads, enumerates and computes its entropy.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from minillm.data.story_nodes import (
    Case,
    Choice,
    Node,
    Option,
    check,
    check_apart,
    choices_in,
    domain,
    fill,
    looks_at,
    pick,
    value_of,
)

__all__ = ["Case", "Choice", "Derivation", "Grammar", "Option", "pick"]


@dataclass(frozen=True)
class Derivation:
    """A text, its log-probability in nats, and the choices that made it (name -> key)."""

    text: str
    log_prob: float
    keys: Mapping[str, str]
    chosen: Mapping[str, Option] = field(repr=False)

    def fill(self, template: str) -> str:
        """``template`` with its references replaced by what was chosen in this text."""
        return fill(template, self.chosen)


_OTHER = "*"  # any value without factors of its own


@dataclass(frozen=True)
class _Row:
    """The options of a choice in one context."""

    keys: tuple[str, ...]
    probabilities: tuple[float, ...]
    cumulative: tuple[float, ...]


class Grammar:
    """A grammar made of ``nodes``; see the module's docstring.

    ``keep`` cuts choices to their first options: by name, or ``""`` for those not named. In each
    context, that many of the options possible there are kept.

    >>> pet = pick("pet", {"cat": ("a cat", {"says": "Meow"}), "owl": ("an owl", {"says": "Hoo"})})
    >>> small = Grammar(["I have ", pet, ". {pet.says}!"])
    >>> for text, log_prob in small.enumerate():
    ...     print(f"{math.exp(log_prob):.2f} {text}")
    0.57 I have a cat. Meow!
    0.43 I have an owl. Hoo!
    >>> f"{small.entropy():.4f}"  # -4/7 log 4/7 - 3/7 log 3/7
    '0.6829'

    Raises:
        ValueError: two options could be confused, a reference is to nothing said before, or a name
            is misspelled.
    """

    def __init__(self, nodes: Sequence[Node], keep: Mapping[str, int] | None = None):
        self.nodes = tuple(nodes)
        choices = list(choices_in(self.nodes))
        options: dict[str, dict[str, Option]] = {}
        for choice in choices:
            options.setdefault(choice.name, {}).update(choice.options)
        check(self.nodes, options, frozenset())
        self._rows = {choice: _rows(choice, options, keep or {}) for choice in choices}

    def sample(self, rng: random.Random) -> Derivation:
        """A text drawn from the grammar's distribution."""

        def draw(choice: Choice, row: _Row, chosen: Mapping[str, Option]) -> int:
            return min(bisect_right(row.cumulative, rng.random()), len(row.keys) - 1)

        return self._derive(draw, lambda said: None)

    def parse(self, text: str) -> Derivation:
        """The one derivation of ``text``.

        Raises:
            ValueError: the grammar does not say ``text``; the message shows where reading stopped.
        """
        position = 0

        def stopped(expected: Sequence[str]) -> ValueError:
            wanted = " or ".join(repr(words) for words in expected[:3])
            more = f" (or {len(expected) - 3} more)" if len(expected) > 3 else ""
            return ValueError(
                f"not in the language: reading stopped at character {position} of {len(text)}, "
                f"at {text[position : position + 30]!r}, where {wanted}{more} was expected"
            )

        def read(choice: Choice, row: _Row, chosen: Mapping[str, Option]) -> int:
            said = [fill(choice.options[key].text, chosen) for key in row.keys]
            for index, words in enumerate(said):
                if text.startswith(words, position):
                    return index
            raise stopped(said)

        def advance(said: str) -> None:
            nonlocal position
            if not text.startswith(said, position):
                raise stopped([said])
            position += len(said)

        derivation = self._derive(read, advance)
        if position != len(text):
            raise stopped(["the end"])
        return derivation

    def log_prob(self, text: str) -> float:
        """log P(text) in nats; ``ValueError`` as in ``parse``."""
        return self.parse(text).log_prob

    def entropy(self) -> float:
        """H = -sum P(text) log P(text) in nats, exactly, without listing the texts.

        The chain rule, from the last choice to the first: what is still to come costs
        H(rest | context) = sum over options p (-log p + H(rest | context, option)). Of the context
        only those values count that a later weight or case treats in a way of its own, so most
        paths share their rest: dynamic programming over (place in the grammar, what matters there).
        """
        memo: dict[tuple, float] = {}
        special: dict[tuple[Node, ...], dict[str, set[str]]] = {}

        def without_words(nodes: Sequence[Node]) -> tuple[Node, ...]:
            return tuple(node for node in nodes if not isinstance(node, str))

        def rest(nodes: tuple[Node, ...], values: Mapping[str, str]) -> float:
            if not nodes:
                return 0.0
            if nodes not in special:
                special[nodes] = looks_at(nodes)
            live = {
                key: values[key] if values[key] in ahead else _OTHER
                for key, ahead in special[nodes].items()
                if key in values
            }
            state = (nodes, tuple(live.items()))
            if state not in memo:
                memo[state] = cost(nodes[0], nodes[1:], live)
            return memo[state]

        def cost(node: Node, after: tuple[Node, ...], values: Mapping[str, str]) -> float:
            if isinstance(node, Case):
                return rest((*without_words(node.then[values[node.of]]), *after), values)
            row = self._row(node, values.__getitem__)
            total = 0.0
            for key, p in zip(row.keys, row.probabilities, strict=True):
                forms = node.options[key].forms.items()
                new = {node.name: key} | {f"{node.name}.{form}": said for form, said in forms}
                total += p * (rest(after, {**values, **new}) - math.log(p))
            return total

        return rest(without_words(self.nodes), {})

    def enumerate(self) -> Iterator[tuple[str, float]]:
        """Every text with its log-probability; for grammars cut small by ``keep``."""

        def follow(nodes, chosen, keys, said, log_prob):
            if not nodes:
                yield said, log_prob
                return
            node, after = nodes[0], nodes[1:]
            if isinstance(node, str):
                yield from follow(after, chosen, keys, said + fill(node, chosen), log_prob)
            elif isinstance(node, Case):
                branch = node.then[value_of(node.of, keys, chosen)]
                yield from follow((*branch, *after), chosen, keys, said, log_prob)
            else:
                row = self._row(node, functools.partial(value_of, keys=keys, chosen=chosen))
                for key, p in zip(row.keys, row.probabilities, strict=True):
                    option = node.options[key]
                    new = (after, chosen | {node.name: option}, keys | {node.name: key})
                    yield from follow(
                        *new, said + fill(option.text, chosen), log_prob + math.log(p)
                    )

        yield from follow(self.nodes, {}, {}, "", 0.0)

    def _row(self, choice: Choice, value: Callable[[str], str]) -> _Row:
        """The row for the context in which ``value`` tells what was chosen."""
        values = ((value(key), factors) for key, factors in choice.given.items())
        return self._rows[choice][tuple(v if v in factors else _OTHER for v, factors in values)]

    def _derive(
        self,
        decide: Callable[[Choice, _Row, Mapping[str, Option]], int],
        say: Callable[[str], None],
    ) -> Derivation:
        chosen: dict[str, Option] = {}
        keys: dict[str, str] = {}
        parts, log_prob = [], 0.0
        to_do = list(reversed(self.nodes))
        while to_do:
            node = to_do.pop()
            if isinstance(node, Case):
                to_do.extend(reversed(node.then[value_of(node.of, keys, chosen)]))
                continue
            if isinstance(node, str):
                parts.append(fill(node, chosen))
            else:
                row = self._row(node, functools.partial(value_of, keys=keys, chosen=chosen))
                index = decide(node, row, chosen)
                keys[node.name] = row.keys[index]
                log_prob += math.log(row.probabilities[index])
                option = node.options[row.keys[index]]
                parts.append(fill(option.text, chosen))
                chosen[node.name] = option
            say(parts[-1])
        return Derivation("".join(parts), log_prob, keys, chosen)


def _rows(
    choice: Choice, options: Mapping[str, Mapping[str, Option]], keep: Mapping[str, int]
) -> dict[tuple[str, ...], _Row]:
    """The probabilities of ``choice`` for every combination of the values it depends on."""
    rows = {}
    seen = []
    for key, factors in choice.given.items():
        other = [_OTHER] if set(domain(key, options)) - set(factors) else []
        seen.append([*factors, *other])
    for values in itertools.product(*seen):
        weights = {}
        for key, option in choice.options.items():
            weight = option.weight
            for value, factors in zip(values, choice.given.values(), strict=True):
                weight *= factors.get(value, {}).get(key, 1.0)
            if weight > 0:
                weights[key] = weight
        if not weights:
            raise ValueError(f"choice {choice.name!r} has no option left for {values}")
        kept = list(weights)[: keep.get(choice.name, keep.get("", len(weights)))]
        total = math.fsum(weights[key] for key in kept)
        probabilities = tuple(weights[key] / total for key in kept)
        for first, second in itertools.combinations(kept, 2):
            check_apart(choice.name, choice.options[first].text, choice.options[second].text)
        rows[values] = _Row(tuple(kept), probabilities, tuple(itertools.accumulate(probabilities)))
    return rows
