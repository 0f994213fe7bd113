"""Least to most: take a problem apart, solve the parts in turn, with earlier answers in view.

(Zhou et al., Least-to-Most Prompting Enables Complex Reasoning in Large Language Models, 2022.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minillm.prompting import Generate
from minillm.prompting.cot import DIRECT, Extract, Worked, few_shot, find_answer

SPLIT = "Q: {question}\nTo solve this, answer in turn:\n{chain}"


@dataclass(frozen=True)
class Solution:
    """A question solved part by part."""

    question: str
    parts: tuple[tuple[str, str | None], ...]
    """(part, its answer); the last answer is the answer to the question"""

    @property
    def answer(self) -> str | None:
        return self.parts[-1][1]


def decompose(
    generate: Generate,
    questions: Sequence[str],
    demonstrations: Sequence[Worked] = (),
    template: str = SPLIT,
) -> list[list[str]]:
    """Ask the model for the parts of each question, easiest first, one a line; see `listed`.

    A demonstration's chain holds the lines. Where the model writes none, the question is its own
    only part.
    """
    texts = generate([few_shot(demonstrations, q, template) for q in questions])
    return [listed(text) or [q] for text, q in zip(texts, questions, strict=True)]


def listed(text: str) -> list[str]:
    """The lines up to the first empty one, without numbers and bullets in front.

    >>> listed("1. Bo's apples?\\n2) Together?\\n\\nQ: next")
    ["Bo's apples?", 'Together?']
    """
    lines = text.strip().partition("\n\n")[0].splitlines()
    bare = [re.sub(r"^\s*(?:\d+[.)]|[-*•])\s+", "", line).strip() for line in lines]
    return [line for line in bare if line]


def part_prompt(question: str, solved: Sequence[tuple[str, str]], part: str) -> str:
    """The question, the parts solved so far with their answers, and the next part.

    >>> part_prompt("Ann has 2, Bo 3 more.", [("Bo's?", "5")], "Together?")
    "Ann has 2, Bo 3 more.\\n\\nQ: Bo's?\\nA: The answer is 5.\\n\\nQ: Together?\\nA:"
    """
    known = [Worked(each, "", answer) for each, answer in solved]
    shown = [DIRECT.format(question=w.question, answer=w.answer) for w in known]
    return "\n\n".join([question, *shown, few_shot((), part)])


def least_to_most(
    generate: Generate,
    questions: Sequence[str],
    split: Callable[[Sequence[str]], Sequence[Sequence[str]]],
    prompt: Callable[[str, Sequence[tuple[str, str]], str], str] = part_prompt,
    extract: Extract = find_answer,
) -> list[Solution]:
    """Split each question, then solve its parts in turn with earlier answers in the prompt.

    `split` maps questions to lists of parts (a function, or `partial(decompose, generate)`);
    `prompt(question, [(part, answer), ...], part)` writes what the model sees. All i-th parts go
    into one call. A question whose part gets no answer is given up: its answer is None. (Zhou et
    al., Least-to-Most Prompting Enables Complex Reasoning in Large Language Models, 2022.)

    Raises ValueError when a question has no parts.
    """
    parts = [list(each) for each in split(questions)]
    if len(parts) != len(questions) or not all(parts):
        raise ValueError(f"{len(questions)} questions need as many lists of parts, none empty")
    solved: list[list[tuple[str, str | None]]] = [[] for _ in questions]
    for i in range(max(map(len, parts), default=0)):
        going = [
            n
            for n, done in enumerate(solved)
            if i < len(parts[n]) and not (done and done[-1][1] is None)
        ]
        prompts = [prompt(questions[n], solved[n], parts[n][i]) for n in going]
        texts = generate(prompts) if going else []
        for n, text in zip(going, texts, strict=True):
            solved[n].append((parts[n][i], extract(text)))
    return [Solution(q, tuple(done)) for q, done in zip(questions, solved, strict=True)]
