"""Rewards that are written down instead of learned: weighted rules, and yes/no questions.

They cost no label, or a quick one, and one can read what they want. What they do not ask for, they
do not see.
"""

# n texts, k responses to a request, q questions

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.preferences import Comparison, compare

Rule = Callable[[str, str], float]
"""request, response -> points"""


def sentences(text: str) -> list[str]:
    """A text cut behind each full stop, question mark and exclamation mark.

    >>> sentences("Yes. I do! Do you")
    ['Yes.', 'I do!', 'Do you']
    """
    return [piece.strip() for piece in re.split(r"(?<=[.!?])", text) if piece.strip()]


def says(pattern: str) -> Rule:
    """1 if the regular expression is found in the response.

    >>> says("^Dear ")("Write to Mia.", "Dear Mia, hello.")
    1.0
    """
    return lambda request, response: float(re.search(pattern, response) is not None)


def recalls(pattern: str) -> Rule:
    """Share of what the groups of `pattern` find in the request that the response says as a word.

    0 where the request is of another form.

    >>> recalls(r"for (\\w+) about the (\\w+)")("A card for Mia about the kite.", "Dear Mia, hi.")
    0.5
    """

    def rule(request: str, response: str) -> float:
        found = re.search(pattern, request)
        asked = [word for word in found.groups() if word] if found else []
        said = set(re.findall(r"\w+", response))
        return sum(word in said for word in asked) / len(asked) if asked else 0.0

    return rule


def repeated(request: str, response: str) -> float:
    """How many sentences of the response were there before.

    >>> repeated("", "I do. I do. You too. I do.")
    2
    """
    said = sentences(response)
    return len(said) - len(set(said))


def beyond(limit: int) -> Rule:
    """How many sentences the response has more than `limit`."""
    return lambda request, response: max(0, len(sentences(response)) - limit)


def weighted(rules: Mapping[Rule, float]) -> Callable[[Sequence[str], Sequence[str]], Tensor]:
    """A reward [n] for `minillm.align.ppo`: Σ weight x rule. ValueError without rules.

    >>> brief = weighted({says("please"): 1.0, repeated: -0.5})
    >>> brief(["", ""], ["please go.", "Go. Go."]).tolist()
    [1.0, -0.5]
    """
    if not rules:
        raise ValueError("a reward of no rules is 0 for every response: there must be some")

    def reward(requests: Sequence[str], responses: Sequence[str]) -> Tensor:
        pairs = list(zip(requests, responses, strict=True))
        points = [[rule(*pair) for rule in rules] for pair in pairs]
        weights = torch.tensor([float(weight) for weight in rules.values()])
        return torch.tensor(points, dtype=torch.float32).view(len(pairs), len(rules)) @ weights

    return reward


@dataclass(frozen=True)
class Question:
    """Something about a response that is answered with yes or no, by a person or a program."""

    text: str
    weight: float
    """points for a yes; below 0 for what is not wanted"""
    answer: Callable[[str, str], bool]
    """request, response -> yes"""


def ask(questions: Sequence[Question], requests: Sequence[str], responses: Sequence[str]) -> Tensor:
    """The answers, [n, q], True for yes. ValueError for an answer that is neither yes nor no."""
    found = []
    for request, response in zip(requests, responses, strict=True):
        said = [question.answer(request, response) for question in questions]
        if odd := [(q.text, a) for q, a in zip(questions, said, strict=True) if a not in (0, 1)]:
            raise ValueError(f"{odd[0][0]!r} was answered {odd[0][1]!r}: yes or no are due")
        found.append([bool(answer) for answer in said])
    return torch.tensor(found, dtype=torch.bool).view(len(found), len(questions))


def label(
    questions: Sequence[Question],
    requests: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    generator: torch.Generator,
    noise: float = 0.0,
) -> list[Comparison]:
    """Rank k responses to each of n requests by the weighted sum of their answers.

    Small questions are answered more reliably than "which is better?", and who answers need not
    weigh one thing against another: the weights do. Responses with equal sums are not compared
    (see `compare` at temperature 0), so a ranking never rests on what no question asks about.
    Source: after the rules of Glaese et al., Improving Alignment of Dialogue Agents via Targeted
    Human Judgements, 2022.
    """
    weights = torch.tensor([question.weight for question in questions])
    if not requests:
        return []
    if len({len(some) for some in responses}) > 1:
        raise ValueError(f"{[len(some) for some in responses]} responses: as many to each request")
    asked = [request for request, some in zip(requests, responses, strict=True) for _ in some]
    said = ask(questions, asked, [text for some in responses for text in some])
    points = (said * weights).sum(-1).view(len(requests), -1)
    return compare(requests, responses, points, generator=generator, noise=noise, temperature=0)
