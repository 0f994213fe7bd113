"""Chains of thought: ask for steps, find the answer behind them, vote, take a problem apart.

A model that answers at once has a fixed amount of computation for it; one that writes steps has
more with every token, and can read what it has found. Everything here is text in, text out, around
a `Generate`, which decides itself how it samples. Parts of problems are solved in turn in `parts`;
chains that the model makes for itself are in `bootstrap`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from minillm.prompting import Generate

Extract = Callable[[str], str | None]
"""a text -> the answer in it, or None"""

TEMPLATE = "Q: {question}\nA: {chain} The answer is {answer}."
DIRECT = "Q: {question}\nA: The answer is {answer}."
TRIGGER = "Let's think step by step."
ASK = "Therefore, the answer is"
NUMBER = r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?"


@dataclass(frozen=True)
class Worked:
    """A question, the steps taken, and the answer that they lead to."""

    question: str
    chain: str
    answer: str | None
    """None where no answer was found"""


def few_shot(
    demonstrations: Sequence[Worked],
    question: str,
    template: str = TEMPLATE,
    separator: str = "\n\n",
) -> str:
    """Demonstrations written out, then `question` with what comes next left to the model.

    `template` holds {question}, then {chain} or {answer} or both. The prompt ends before the first
    of these two, without the blank there: most tokenizers make it part of the next word. With
    `DIRECT` the demonstrations show answers only; without demonstrations the question stands
    alone. (Wei et al., Chain-of-Thought Prompting Elicits Reasoning in Large Language Models,
    2022.)

    Raises ValueError for a template without these fields, or a demonstration without an answer.

    >>> shown = Worked("2 + 3 + 4?", "2 + 3 = 5, 5 + 4 = 9.", "9")
    >>> print(few_shot([shown], "1 + 1 + 6?"))
    Q: 2 + 3 + 4?
    A: 2 + 3 = 5, 5 + 4 = 9. The answer is 9.
    <BLANKLINE>
    Q: 1 + 1 + 6?
    A:
    """
    if missing := [d.question for d in demonstrations if d.answer is None]:
        raise ValueError(f"demonstrations without an answer: {missing}")
    head, _ = opening(template)
    shown = [
        template.format(question=d.question, chain=d.chain, answer=d.answer) for d in demonstrations
    ]
    return separator.join([*shown, head.format(question=question)])


def opening(template: str) -> tuple[str, str]:
    """What stands before the first of {chain} and {answer}, and the blanks behind that.

    >>> opening(TEMPLATE)
    ('Q: {question}\\nA:', ' ')
    """
    cut = re.search(r"\{(chain|answer)\}", template)
    if cut is None or "{question}" not in template[: cut.start()]:
        raise ValueError(f"template={template!r} needs {{question}}, then {{chain}} or {{answer}}")
    head = template[: cut.start()].rstrip()
    return head, template[len(head) : cut.start()]


def canonical(answer: str) -> str:
    """One spelling for equal answers, so that votes for them count together.

    Numbers lose commas, leading zeros and zeros at the end of a fraction; words lose case, blanks
    around them and a full stop.

    >>> [canonical(text) for text in ("1,200", "007.50", "-0", " Even. ")]
    ['1200', '7.5', '0', 'even']
    """
    text = answer.strip().rstrip(".").casefold()
    if not re.fullmatch(NUMBER, text):
        return text
    whole, _, fraction = text.lstrip("-").replace(",", "").partition(".")
    value = whole.lstrip("0") or "0"  # as text: a float would round a long number
    value += f".{fraction.rstrip('0')}" if fraction.rstrip("0") else ""
    return f"-{value}" if text.startswith("-") and value != "0" else value


def find_answer(
    text: str, pattern: str = NUMBER, marker: str = "The answer is", stop: str | None = "\n\n"
) -> str | None:
    """The answer in a model's text, in its `canonical` spelling; None if there is none.

    Only what stands before `stop` counts (a base model goes on with a question of its own). After
    the last `marker` it is the first match of `pattern`; in a text without marker it is the last
    match, since chains end with their result. A pattern with a group stands for that group. Case
    is ignored.

    >>> find_answer("3 + 4 = 7, 7 + 5 = 12. The answer is 12. So 7 was on the way.")
    '12'
    >>> find_answer("3 + 4 = 7, 7 + 5 = 12")
    '12'
    >>> find_answer("1 one: odd. 2 ones: even. The answer is", pattern="odd|even")
    """
    body = text.strip()
    if stop:
        body = body.partition(stop)[0]
    marks = list(re.finditer(re.escape(marker), body, re.IGNORECASE))
    tail = body[marks[-1].end() :] if marks else body
    found = list(re.finditer(pattern, tail, re.IGNORECASE))
    if not found:
        return None
    match = found[0] if marks else found[-1]
    return canonical(match[1] if match.re.groups else match[0])


def zero_shot(
    generate: Generate,
    questions: Sequence[str],
    trigger: str = TRIGGER,
    ask: str = ASK,
    extract: Extract = find_answer,
    template: str = TEMPLATE,
) -> list[Worked]:
    """Two calls for each question: `trigger` draws out a chain, then `ask` the answer to it.

    The second prompt is the first, the chain, and `ask` on a line of its own. `extract` sees `ask`
    with what the model puts behind it. How questions are written is taken from `template`.
    (Kojima et al., Large Language Models are Zero-Shot Reasoners, 2022.)
    """
    _, blank = opening(template)
    heads = [few_shot((), question, template) + blank + trigger for question in questions]
    chains = [text.rstrip() for text in generate(heads)]
    whole = [f"{head}{chain}\n{ask}" for head, chain in zip(heads, chains, strict=True)]
    answers = [extract(ask + text) for text in generate(whole)]
    return [
        Worked(question, chain.strip(), answer)
        for question, chain, answer in zip(questions, chains, answers, strict=True)
    ]


@dataclass(frozen=True)
class Vote:
    """What several chains for one question voted for."""

    answer: str | None
    """the winner; None if no chain has an answer"""
    votes: Mapping[str, float]
    """weight of each answer, in the order in which they first came"""
    texts: tuple[str, ...]
    answers: tuple[str | None, ...]
    """one for each text"""


def vote(
    answers: Sequence[str | None], weights: Sequence[float] | None = None
) -> tuple[str | None, dict[str, float]]:
    """The answer with the largest sum of weights (1 each if None), and all sums.

    None is no vote. Of equal sums the answer wins that came first: of two samples that disagree
    the first. With two answers, 2m samples are therefore right just as often as 2m - 1.

    >>> vote(["7", None, "9", "9", "7"])
    ('7', {'7': 2.0, '9': 2.0})
    """
    weights = [1.0] * len(answers) if weights is None else weights
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return max(sums, key=sums.__getitem__, default=None), sums


def steps(chain: str) -> int:
    """Lines of a chain that are not empty: its complexity (Fu et al., 2022)."""
    return sum(bool(line.strip()) for line in chain.splitlines())


def most_complex(
    demonstrations: Sequence[Worked], k: int, complexity: Callable[[str], float] = steps
) -> list[Worked]:
    """The k demonstrations with the most complex chains, of equals the first, most complex first.

    (Fu et al., Complexity-Based Prompting for Multi-Step Reasoning, 2022.) Raises ValueError if
    there are fewer than k.
    """
    if not 0 <= k <= len(demonstrations):
        raise ValueError(f"k={k} of {len(demonstrations)} demonstrations cannot be chosen")
    return sorted(demonstrations, key=lambda d: -complexity(d.chain))[:k]


def self_consistency(
    generate: Generate,
    prompts: Sequence[str],
    samples: int,
    extract: Extract = find_answer,
    keep: int | None = None,
    complexity: Callable[[str], float] = steps,
) -> list[Vote]:
    """Sample `samples` chains for each prompt and let their answers vote; see `vote`.

    Samples of one prompt stand side by side in one call of `generate`, which must draw at random:
    a greedy one votes with itself. (Wang et al., Self-Consistency Improves Chain of Thought
    Reasoning in Language Models, 2022.) With `keep`, only the `keep` most complex chains that have
    an answer vote (Fu et al., Complexity-Based Prompting, 2022).
    """
    if samples < 1 or (keep is not None and not 1 <= keep <= samples):
        raise ValueError(f"samples={samples} must be at least 1, keep={keep} between 1 and it")
    texts = generate([prompt for prompt in prompts for _ in range(samples)])
    result = []
    for start in range(0, len(prompts) * samples, samples):
        mine = texts[start : start + samples]
        answers = [extract(text) for text in mine]
        voters = [i for i, answer in enumerate(answers) if answer is not None]
        if keep is not None:  # in the order in which they came, for ties
            voters = sorted(sorted(voters, key=lambda i: -complexity(mine[i]))[:keep])
        result.append(Vote(*vote([answers[i] for i in voters]), tuple(mine), tuple(answers)))
    return result


def vote_accuracy(probabilities: Sequence[float], samples: int) -> float:
    """Chance that a vote of independent samples goes to the first of several answers.

    `probabilities` are those of the answers in one sample, the right one first; what they lack
    to 1 is samples without an answer. Sums over all counts of votes; j answers that tie share the
    win, for each of them comes first equally often. With two answers and odd n this is the
    binomial sum over k > n/2. Raises ValueError for anything that is not a distribution.

    >>> round(vote_accuracy([0.6, 0.4], 3), 6)     # 0.6³ + 3 · 0.6² · 0.4
    0.648
    """
    rest = 1 - math.fsum(probabilities)
    if samples < 1 or not probabilities or min(*probabilities, rest + 1e-9) < 0:
        raise ValueError(f"{list(probabilities)} is no distribution, or samples={samples} < 1")

    p = probabilities

    @cache
    def wins(most: int, left: int, i: int, ties: int) -> float:
        """The first has `most` votes; answers from i on share `left`, `ties` before them tie."""
        if i == len(p):
            return max(rest, 0.0) ** left / (ties + 1)
        return sum(
            math.comb(left, k) * p[i] ** k * wins(most, left - k, i + 1, ties + (k == most))
            for k in range(min(most, left) + 1)
        )

    first = [math.comb(samples, k) * p[0] ** k for k in range(samples + 1)]
    return sum(first[k] * wins(k, samples - k, 1, 0) for k in range(1, samples + 1))
