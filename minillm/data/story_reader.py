"""Reads a story grammar from text: the format of `assets/data/stories.txt`, described there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.data.story_nodes import Case, Choice, Node, choices_in, pick

_HEADER = re.compile(r"(TEXT|CHOICE|QUESTIONS)\b *(.*)")
_PART = re.compile(r"(\[[^\]]+\]|<[^>]+>)")
_GIVEN = re.compile(r"given (\S+) ([^:]+): (only )?(.+)")


@dataclass(frozen=True)
class Script:
    """A grammar's nodes, and its questions: (condition, question, answer), all with references.

    A condition is "name=value", or empty for questions that every story answers.
    """

    nodes: tuple[Node, ...]
    questions: tuple[tuple[str, str, str], ...]


def read_script(text: str) -> Script:
    """The script written in `text`, beginning at `TEXT story`.

    >>> script = read_script('''
    ... TEXT story
    ... I have [pet]. {pet.says}!
    ...
    ... CHOICE pet
    ... cat = a cat ; says=Meow
    ... owl = an owl ; says=Hoo
    ...
    ... QUESTIONS
    ... What do I have? {pet}
    ... ''')
    >>> script.questions
    (('', 'What do I have?', '{pet}'),)

    Raises:
        ValueError: a line that cannot be read, a block that is missing, twice there or never used.
    """
    blocks = _blocks(text)
    choices = {name: _choice(name, blocks) for kind, name in blocks if kind == "CHOICE"}
    used: set[str] = set()

    def nodes(name: str) -> tuple[Node, ...]:
        if ("TEXT", name) not in blocks:
            raise ValueError(f"there is no TEXT {name}")
        used.add(name)
        made: list[Node] = []
        for part in _PART.split(" ".join(blocks["TEXT", name])):
            inner = part[1:-1]
            if part.startswith("["):
                if inner not in choices:
                    raise ValueError(f"TEXT {name} has {part}, but there is no CHOICE {inner}")
                made.append(choices[inner])
            elif part.startswith("<") and ("TEXT", inner) in blocks:
                made.extend(nodes(inner))
            elif part.startswith("<"):
                values = [v.partition("=") for kind, v in blocks if kind == "TEXT"]
                then = {v: nodes(f"{of}={v}") for of, sign, v in values if sign and of == inner}
                made.append(Case(inner, then))
            elif part:
                made.append(part)
        return tuple(made)

    story = nodes("story")
    unused = {name for kind, name in blocks if kind == "TEXT"} - used
    said = set(choices_in(story))
    unused |= {name for name, choice in choices.items() if choice not in said}
    if unused := {name for name in unused if not _is_base(name, blocks)}:
        raise ValueError(f"these blocks are never used: {', '.join(sorted(unused))}")
    questions = []
    for (kind, condition), lines in blocks.items():
        for line in lines if kind == "QUESTIONS" else ():
            question, mark, answer = line.partition("? ")
            if not mark:
                raise ValueError(f"{line!r} is not 'question? answer'")
            questions.append((condition, question + "?", answer))
    return Script(story, tuple(questions))


def _blocks(text: str) -> dict[tuple[str, str], list[str]]:
    blocks: dict[tuple[str, str], list[str]] = {}
    lines: list[str] | None = None
    for line in map(str.strip, text.splitlines()):
        if header := _HEADER.match(line):
            kind, name = header.groups()
            if (kind, name) in blocks:
                raise ValueError(f"{kind} {name} is there twice")
            lines = blocks[kind, name] = []
        elif line and not line.startswith("#"):
            if lines is None:
                raise ValueError(f"{line!r} stands before the first TEXT, CHOICE or QUESTIONS")
            lines.append(line)
    return blocks


def _is_base(name: str, blocks: dict[tuple[str, str], list[str]]) -> bool:
    """Whether a variant such as day/learn takes its options from CHOICE `name`."""
    return any(kind == "CHOICE" and other.startswith(f"{name}/") for kind, other in blocks)


def _choice(name: str, blocks: dict[tuple[str, str], list[str]]) -> Choice:
    variable = name.partition("/")[0]
    options = _options(blocks["CHOICE", name]) or _options(blocks.get(("CHOICE", variable), []))
    if not options:
        raise ValueError(f"CHOICE {name} has no options")
    given: dict[str, dict[str, dict[str, float]]] = {}
    for line in blocks["CHOICE", name]:
        if not line.startswith("given "):
            continue
        if not (parts := _GIVEN.fullmatch(line)):
            raise ValueError(f"CHOICE {name}: {line!r} is not 'given choice value: option*factor'")
        key, values, only, entries = parts.groups()
        if only:
            possible = entries.split(", ")
            if unknown := set(possible) - set(options):
                raise ValueError(f"CHOICE {name} has no options {sorted(unknown)}: {line!r}")
            row = {option: 0.0 for option in options if option not in possible}
        else:
            pairs = [entry.rpartition("*") for entry in entries.split(", ")]
            row = {option: float(factor) for option, _, factor in pairs}
        for value in values.split("|"):
            given.setdefault(key, {})[value] = row
    return pick(variable, options, given)


def _options(lines: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """Key -> (what is said, forms) from lines `key = words ; form=words` or `words | words`."""
    options: dict[str, tuple[str, dict[str, str]]] = {}
    for line in lines:
        if line.startswith("given "):
            continue
        for entry in filter(None, map(str.strip, line.split("|"))):
            said, *forms = (part.strip() for part in entry.split(" ; "))
            key, _, words = said.partition(" = ")
            if key in options:
                raise ValueError(f"the option {key!r} is there twice")
            pairs = (form.partition("=") for form in forms)
            options[key] = (words or key, {form: text for form, _, text in pairs})
    return options
