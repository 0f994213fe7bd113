"""A self-check of multiple-choice questions: pure grading, radio buttons, a folded static page."""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LETTERS = "abcd"
_RIGHT, _WRONG = "#3f8024", "#c0502b"  # both read on white and on black


@dataclass(frozen=True)
class Question:
    """`answer` is the letter of the right choice, `why` the sentence shown afterwards."""

    text: str
    choices: tuple[str, ...]
    answer: str
    why: str

    def __post_init__(self) -> None:
        letters = LETTERS[: len(self.choices)]
        if not 2 <= len(self.choices) <= len(LETTERS) or self.answer not in tuple(letters):
            raise ValueError(f"{self.text!r}: answer {self.answer!r} must be one of {letters!r}")
        if len(set(self.choices)) != len(self.choices) or not all(self.choices):
            raise ValueError(f"{self.text!r}: the choices {self.choices} must differ")


def read_questions(path: Path) -> list[Question]:
    """Questions from a csv file with the columns question, a, b, c, d, answer, why."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Question(row["question"], tuple(row[x] for x in LETTERS), row["answer"], row["why"])
            for row in csv.DictReader(file)
        ]


def grade(questions: Sequence[Question], answers: Mapping[int, str | None]) -> list[bool | None]:
    """True, False or None (not answered) for each question; `answers` maps its index to a letter.

    Raises ValueError for an index without a question or a letter that is no choice.

    >>> q = Question("1 + 1?", ("2", "3"), "a", "count")
    >>> grade([q, q, q], {0: "a", 1: "b"})
    [True, False, None]
    """
    for index, letter in answers.items():
        if not 0 <= index < len(questions):
            raise ValueError(f"there is no question {index}, only 0 to {len(questions) - 1}")
        if letter is not None and letter not in tuple(LETTERS[: len(questions[index].choices)]):
            raise ValueError(f"{letter!r} is no choice of question {index}")
    given = [answers.get(i) for i in range(len(questions))]
    return [
        None if letter is None else letter == question.answer
        for letter, question in zip(given, questions, strict=True)
    ]


def static_html(questions: Sequence[Question]) -> str:
    """The questions with their choices, each answer folded away: needs no kernel."""
    blocks = []
    for number, question in enumerate(questions, 1):
        choices = "".join(
            f"<div style='margin-left:1.6em'>{letter}. {html.escape(choice)}</div>"
            for letter, choice in zip(LETTERS, question.choices, strict=False)
        )
        blocks.append(
            f"<div style='margin:.9em 0'><b>{number}. {html.escape(question.text)}</b>{choices}"
            f"<details style='margin-left:1.6em'><summary>answer</summary>{question.answer}: "
            f"{html.escape(question.why)}</details></div>"
        )
    return "".join(blocks)


def feedback(questions: Sequence[Question], answers: Mapping[int, str | None], index: int) -> str:
    """What to say about one answer, as HTML; empty while there is none."""
    right = grade(questions, answers)[index]
    if right is None:
        return ""
    color, verdict = (_RIGHT, "Right.") if right else (_WRONG, "Not quite.")
    why = html.escape(questions[index].why)
    return f'<span style="color:{color}"><b>{verdict}</b></span> {why}'


class Quiz:
    """Radio buttons over `questions`; displays itself, as a static page without a kernel."""

    def __init__(self, questions: Sequence[Question]) -> None:
        import ipywidgets

        self.questions = list(questions)
        self.score = ipywidgets.HTML()
        self.radios, self.notes, rows = [], [], []
        for number, question in enumerate(self.questions, 1):
            options = [
                (choice, letter) for letter, choice in zip(LETTERS, question.choices, strict=False)
            ]
            wide = ipywidgets.Layout(width="98%")
            radio = ipywidgets.RadioButtons(options=options, value=None, layout=wide)
            note = ipywidgets.HTML()
            radio.observe(self._answered, names="value")
            head = ipywidgets.HTML(f"<b>{number}. {html.escape(question.text)}</b>")
            self.radios.append(radio)
            self.notes.append(note)
            rows += [head, radio, note]
        self.box = ipywidgets.VBox([*rows, self.score])

    def answers(self) -> dict[int, str | None]:
        """The letter chosen for each question so far, None where there is none."""
        return {i: radio.value for i, radio in enumerate(self.radios)}

    def _answered(self, _change: object) -> None:
        answers = self.answers()
        for i, note in enumerate(self.notes):
            note.value = feedback(self.questions, answers, i)
        results = grade(self.questions, answers)
        done = sum(result is not None for result in results)
        self.score.value = f"<b>{sum(map(bool, results))} of {done} right</b>" + (
            f", {len(results) - done} to go" if done < len(results) else ""
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        widget = self.box._repr_mimebundle_() or {}
        return {
            **widget,
            "text/html": static_html(self.questions),
            "text/plain": f"a self-check of {len(self.questions)} questions",
        }
