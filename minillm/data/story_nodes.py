"""The parts that story grammars are made of, and the checks that keep them readable one way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

REFERENCE = re.compile(r"\{(\w+)(?:\.(\w+))?\}")


@dataclass(frozen=True, eq=False)
class Option:
    """One way to go on: what is said, how often, and other forms that later texts may use."""

    text: str
    weight: float
    forms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Choice:
    """Says one of ``options`` and remembers it as ``name``.

    ``given`` maps an earlier choice (``"trait"``) or one of its forms (``"place.kind"``) to
    factors: ``{"place.kind": {"water": {"drift": 5.0}}}`` makes the option ``drift`` five times as
    likely where the place is at the water; a factor of 0 rules an option out.
    """

    name: str
    options: Mapping[str, Option]
    given: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Case:
    """Goes on with the nodes that belong to the value of an earlier choice (or of its form)."""

    of: str
    then: Mapping[str, Sequence[Node]]


Node = str | Choice | Case


def pick(
    name: str,
    options: Mapping[str, tuple[str, Mapping[str, str]]] | str,
    given: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> Choice:
    """A choice among options listed from common to rare: weights 1/3, 1/4, 1/5, ...

    They fall as in Zipf's law (shifted by two), as the frequencies of words do in real text.
    Options are ``"text|text|text"`` or ``key: (text, {form: words})``; ``given`` as in ``Choice``.
    """
    if isinstance(options, str):
        options = {text: (text, {}) for text in options.split("|")}
    made = {
        key: Option(text, 1 / (rank + 3), forms)
        for rank, (key, (text, forms)) in enumerate(options.items())
    }
    return Choice(name, made, given or {})


def fill(template: str, chosen: Mapping[str, Option]) -> str:
    def words(match: re.Match) -> str:
        name, form = match.groups()
        option = chosen[name]
        if form is None:
            return option.text
        if form in option.forms:
            return option.forms[form]
        plain = option.forms[form[0].lower() + form[1:]]  # {name.They}: the form, capitalized
        return plain[0].upper() + plain[1:]

    return REFERENCE.sub(words, template) if "{" in template else template


def value_of(key: str, keys: Mapping[str, str], chosen: Mapping[str, Option]) -> str:
    name, _, form = key.partition(".")
    return chosen[name].forms[form] if form else keys[name]


def choices_in(nodes: Sequence[Node]) -> Iterator[Choice]:
    for node in nodes:
        if isinstance(node, Choice):
            yield node
        elif isinstance(node, Case):
            for branch in node.then.values():
                yield from choices_in(branch)


def looks_at(nodes: Sequence[Node]) -> dict[str, set[str]]:
    """The values of earlier choices that ``nodes`` treat in a way of their own, by key."""
    special: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, Choice):
            for key, factors in node.given.items():
                special.setdefault(key, set()).update(factors)
        elif isinstance(node, Case):
            special.setdefault(node.of, set()).update(node.then)
            for branch in node.then.values():
                for key, values in looks_at(branch).items():
                    special.setdefault(key, set()).update(values)
    return special


def domain(key: str, options: Mapping[str, Mapping[str, Option]]) -> dict[str, None]:
    """The values that an earlier choice, or a form of it, can have, in order."""
    name, _, form = key.partition(".")
    of = options[name]
    return dict.fromkeys(option.forms[form] if form else value for value, option in of.items())


def check(
    nodes: Sequence[Node], options: Mapping[str, Mapping[str, Option]], known: frozenset[str]
) -> frozenset[str]:
    """Check every reference in ``nodes`` when ``known`` has been said; what is known after them.

    Raises:
        ValueError: a reference to something that is not said before on every path, a form that an
            option lacks, a name said twice, a factor or a case that does not exist.
    """
    for node in nodes:
        if isinstance(node, str):
            _check_text(node, options, known)
            continue
        keys = [node.of] if isinstance(node, Case) else list(node.given)
        for key in keys:
            if key.partition(".")[0] not in known:
                raise ValueError(f"{key!r} is looked at before it is said")
        if isinstance(node, Case):
            if missing := set(domain(node.of, options)) - set(node.then):
                raise ValueError(f"case of {node.of!r} has no branch for {sorted(missing)}")
            branches = [check(branch, options, known) for branch in node.then.values()]
            known = frozenset.intersection(*branches)
            continue
        if node.name in known:
            raise ValueError(f"{node.name!r} is chosen twice on one path")
        for option in node.options.values():
            _check_text(option.text, options, known)
            if any(REFERENCE.search(words) for words in option.forms.values()):
                raise ValueError(f"choice {node.name!r}: the forms of {option.text!r} refer")
        for key, factors in node.given.items():
            if wrong := set(factors) - set(domain(key, options)):
                raise ValueError(f"choice {node.name!r}: {key!r} never is {sorted(wrong)}")
            if wrong := set().union(*factors.values()) - set(node.options):
                raise ValueError(f"choice {node.name!r} has no options {sorted(wrong)}")
        known |= {node.name}
    return known


def check_apart(name: str, first: str, second: str) -> None:
    """Check that the texts of two options differ before either of them ends.

    A reference stands for words that only the derivation knows, so from the first place on where
    just one of the texts has a reference nothing is certain, and they count as confusable.
    """
    for one, other in zip(_pieces(first), _pieces(second), strict=False):
        if one != other:
            if one.startswith("{") or other.startswith("{"):
                break
            return
    raise ValueError(f"choice {name!r}: {first!r} and {second!r} could be confused")


def _pieces(template: str) -> list[str]:
    """Single characters and whole references."""
    return re.findall(r"\{[^}]*\}|.", template, flags=re.DOTALL)


def _check_text(
    template: str, options: Mapping[str, Mapping[str, Option]], known: frozenset[str]
) -> None:
    for name, form in REFERENCE.findall(template):
        if name not in known:
            raise ValueError(f"{template!r} refers to {name!r}, which is not said before it")
        for option in options[name].values():
            if form and not {form, form[0].lower() + form[1:]} & set(option.forms):
                raise ValueError(f"{template!r}: {option.text!r} has no form {form!r}")
            if not form and REFERENCE.search(option.text):
                raise ValueError(f"{template!r} refers to {option.text!r}, which refers itself")
