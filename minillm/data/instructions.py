"""Instructions as data: what is asked, the material it is asked about, and the answer.

A file holds one example a line, {"instruction": ..., "input": ..., "output": ...}. A template turns
an example into what a user writes; the same example in several wordings teaches a model to follow
what is meant. (Wei et al., Finetuned Language Models Are Zero-Shot Learners, 2022; the file format:
Taori et al., Stanford Alpaca, 2023.)
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter

from minillm.paths import write_atomically

FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Instruction:
    """One example: what is asked, what it is asked about ("" where there is nothing), the answer.

    Raises ValueError for an empty instruction or output: there would be nothing to follow, or
    nothing to learn.

    >>> Instruction("Sort the numbers.", "3 1 2", "1 2 3").input
    '3 1 2'
    """

    instruction: str
    input: str
    output: str

    def __post_init__(self) -> None:
        for name in ("instruction", "output"):
            if not getattr(self, name).strip():
                raise ValueError(f"an example with an empty {name}: {self!r}")


def read_jsonl(path: Path | str) -> list[Instruction]:
    """The examples of a file, one JSON object a line with the three fields as strings.

    Raises ValueError that names file and line for what is not JSON in UTF-8, for fields that are
    missing, unknown or no strings, and for an empty instruction or output.
    """
    lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    found = []
    for number, line in enumerate(lines if lines != [b""] else [], start=1):
        try:
            found.append(_example(json.loads(line.decode())))
        except ValueError as problem:
            raise ValueError(f"{Path(path).name}, line {number}: {problem}") from problem
    return found


def _example(record: object) -> Instruction:
    if not isinstance(record, dict):
        raise ValueError(f"an object with the fields {list(FIELDS)} is due, got {record!r}")
    if record.keys() != set(FIELDS):
        missing = [name for name in FIELDS if name not in record]
        unknown = sorted(record.keys() - set(FIELDS))
        raise ValueError(f"fields missing: {missing}, unknown: {unknown}; due are {list(FIELDS)}")
    if wrong := {name: value for name, value in record.items() if not isinstance(value, str)}:
        raise ValueError(f"fields must be strings, got {wrong}")
    return Instruction(**record)


def write_jsonl(path: Path | str, examples: Iterable[Instruction]) -> None:
    """Write examples as `read_jsonl` reads them; the file is there as a whole or not at all."""
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    write_atomically(Path(path), "".join(lines).encode())


@dataclass(frozen=True)
class Template:
    """A wording: what the user writes about an example with an input, and about one without.

    `full` names the fields {instruction} and {input}, `bare` {instruction} alone. Raises ValueError
    for a field that is not used, since the model could not see it, and for one that is not known.

    >>> template = Template("{instruction}\\nText: {input}", "{instruction}")
    >>> template.fill(Instruction("Copy.", "a", "a"))
    'Copy.\\nText: a'
    """

    full: str
    bare: str

    def __post_init__(self) -> None:
        for text, due in ((self.full, {"instruction", "input"}), (self.bare, {"instruction"})):
            _check_fields(text, due, due)

    def fill(self, example: Instruction) -> str:
        """The user's message. Braces in an example are ordinary characters."""
        text = self.full if example.input else self.bare
        return text.format(instruction=example.instruction, input=example.input)


def _check_fields(text: str, known: set[str], due: set[str]) -> None:
    used = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    if not due <= used <= known:
        raise ValueError(
            f"the template {text!r} uses the fields {sorted(used)}; it must use {sorted(due)} "
            f"and knows {sorted(known)}"
        )


TEMPLATES = (
    Template("{instruction}\n{input}", "{instruction}"),
    Template("{input}\n{instruction}", "{instruction}"),
    Template("Task: {instruction}\nInput: {input}", "Task: {instruction}"),
    Template("Here is some text: {input}\n{instruction}", "Please answer. {instruction}"),
)


def conversation(
    example: Instruction,
    rng: random.Random | None = None,
    templates: Sequence[Template] = TEMPLATES,
) -> list[tuple[str, str]]:
    """(role, content) pairs: the example in one of the wordings, and its answer.

    `rng` draws the wording; without it, it is the first.

    >>> conversation(Instruction("Sort.", "b a", "a b"))
    [('user', 'Sort.\\nb a'), ('assistant', 'a b')]
    """
    template = templates[0] if rng is None else rng.choice(templates)
    return [("user", template.fill(example)), ("assistant", example.output)]


def inverted(example: Instruction, ask: str) -> Instruction:
    """The task turned round: the answer is given, and what it was asked about is to be found.

    `ask` is the new instruction; {instruction} in it stands for the old one. An example without
    an input gives its instruction as the answer: there `ask` must not hold it (ValueError).
    Sources: Wei et al., Finetuned Language Models Are Zero-Shot Learners, 2022 (templates that
    "turn the task around"); Li et al., Self-Alignment with Instruction Backtranslation, 2024.

    >>> inverted(Instruction("Name a color.", "", "red"), "Which question has this answer?").output
    'Name a color.'
    """
    _check_fields(ask, {"instruction"} if example.input else set(), set())
    asked = ask.format(instruction=example.instruction)
    return Instruction(asked, example.output, example.input or example.instruction)


def _question(example: Instruction) -> str:
    """What is asked, with case and white space evened out."""
    return " ".join(f"{example.instruction}\n{example.input}".lower().split())


def unique(examples: Iterable[Instruction]) -> list[Instruction]:
    """Every question once, with the answer that came first; case and white space do not count."""
    kept: dict[str, Instruction] = {}
    for example in examples:
        kept.setdefault(_question(example), example)
    return list(kept.values())


def leaked(train: Iterable[Instruction], held_out: Iterable[Instruction]) -> list[Instruction]:
    """The held-out examples whose question is asked in `train` as well: there should be none.

    Exact apart from case and white space; `minillm.data.dedup` finds copies that are merely near.
    """
    known = {_question(example) for example in train}
    return [example for example in held_out if _question(example) in known]
