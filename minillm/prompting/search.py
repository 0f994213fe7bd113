"""Automatic prompt engineering: the model proposes instructions, examples decide between them.

    measure = partial(by_log_prob, score)
    *_, last = ape(generate, measure, shown, pairs, candidates=16, rounds=1, budget=600, seed=0)
    print(last.ranking[0].instruction)

(Zhou et al., Large Language Models Are Human-Level Prompt Engineers, 2022.)
"""

# c instructions, m pairs of input and output

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.prompting import Generate, Score

Pair = tuple[str, str]
"""input and the output that belongs to it"""
Measure = Callable[[Sequence[str], Sequence[Pair]], Tensor]
"""c instructions, m pairs -> how well each instruction does on each pair, [c, m]"""

SHOW = "Input: {input}\nOutput: {output}"
PROPOSE = "A friend was given an instruction and wrote these outputs:\n\n{pairs}\n\nIt said:"
VARY = "The same instruction in other words.\n\nInput: {instruction}\nOutput:"
APPLY = "{instruction}\n\nInput: {input}\nOutput: {output}"


def first_lines(texts: Sequence[str]) -> list[str]:
    """The first line of each text without blanks around it; empty ones and repetitions go.

    >>> first_lines([" Say it backward.\\nInput:", "", "Say it backward."])
    ['Say it backward.']
    """
    lines = [text.strip().partition("\n")[0].strip() for text in texts]
    return list(dict.fromkeys(line for line in lines if line))


def propose(
    generate: Generate,
    demonstrations: Sequence[Pair],
    n: int,
    *,
    seed: int,
    shown: int = 5,
    show: str = SHOW,
    template: str = PROPOSE,
) -> list[str]:
    """Ask n times for the instruction behind `shown` random demonstrations: at most n instructions.

    The demonstrations of each prompt and their order are drawn anew. Raises ValueError if there
    are fewer than `shown`.
    """
    if not 1 <= shown <= len(demonstrations):
        raise ValueError(f"shown={shown} of {len(demonstrations)} demonstrations")
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        pairs = [show.format(input=x, output=y) for x, y in rng.sample(demonstrations, shown)]
        prompts.append(template.format(pairs="\n\n".join(pairs)))
    return first_lines(generate(prompts))


def vary(
    generate: Generate, instructions: Sequence[str], n: int, template: str = VARY
) -> list[str]:
    """Ask n times for other words, for the instructions in turn: at most n new instructions."""
    asked = [instructions[i % len(instructions)] for i in range(n)]
    found = first_lines(generate([template.format(instruction=each) for each in asked]))
    return [each for each in found if each not in instructions]


def _applied(template: str, instruction: str, pair: Pair) -> tuple[str, str]:
    """Prompt, and its output with the blanks that stand before it in the template."""
    head, place, _ = template.partition("{output}")
    if not place:
        raise ValueError(f"template={template!r} has no place for {{output}}")
    bare = head.rstrip()
    prompt = bare.format(instruction=instruction, input=pair[0])
    return prompt, head[len(bare) :] + pair[1]


def by_log_prob(
    score: Score, instructions: Sequence[str], pairs: Sequence[Pair], template: str = APPLY
) -> Tensor:
    """log p(output | instruction, input) in nats: [c, m].

    One call of `score` for each distinct output, so that no output is scored for another's input.
    """
    result = torch.zeros(len(instructions), len(pairs), dtype=torch.float64)
    for output in dict.fromkeys(y for _, y in pairs):
        places = [j for j, (_, y) in enumerate(pairs) if y == output]
        both = [_applied(template, each, pairs[j]) for each in instructions for j in places]
        values = score([prompt for prompt, _ in both], [both[0][1]])
        result[:, places] = values.double().cpu().view(len(instructions), len(places))
    return result


def by_accuracy(
    generate: Generate,
    instructions: Sequence[str],
    pairs: Sequence[Pair],
    template: str = APPLY,
    extract: Callable[[str], str | None] = lambda text: text.strip().partition("\n")[0].strip(),
) -> Tensor:
    """1 where the model's answer, as `extract` reads it, is the output, else 0: [c, m]."""
    texts = generate([_applied(template, each, pair)[0] for each in instructions for pair in pairs])
    wanted = [y for _ in instructions for _, y in pairs]
    right = [float(extract(text) == y) for text, y in zip(texts, wanted, strict=True)]
    return torch.tensor(right, dtype=torch.float64).view(len(instructions), len(pairs))


@dataclass(frozen=True)
class Candidate:
    """An instruction and how well it did."""

    instruction: str
    score: float
    """mean over the pairs that it was measured on"""
    seen: int
    """how many pairs that were"""


@dataclass(frozen=True)
class Search:
    """One round of `ape`."""

    round: int
    """0: proposed from demonstrations; from 1 on: varied"""
    ranking: tuple[Candidate, ...]
    """best first; what was measured on more pairs stands before what was dropped earlier"""
    calls: int
    """since the start: prompts to propose with, and pairs of instruction and example measured"""


def ape(
    generate: Generate,
    measure: Measure,
    demonstrations: Sequence[Pair],
    pairs: Sequence[Pair],
    *,
    candidates: int = 16,
    rounds: int = 0,
    keep: int = 4,
    budget: int | None = None,
    shown: int = 5,
    seed: int,
) -> Iterator[Search]:
    """Propose `candidates` instructions, rank them on `pairs`; then vary the best, `rounds` times.

    Yields once after the proposals and once a round. A round keeps the best `keep` and fills up
    with variations of them; nothing is measured twice. Without `budget` every candidate is
    measured on every pair. With it, no more than `budget` calls are made, the same number in each
    round: the better half goes on to more pairs, again and again, so that most calls go to the
    candidates between which it is close. The same seed and callables give the same search.

    Raises ValueError when no instruction is proposed, and for a budget in which the first half
    could not be told from the second.
    """
    halvings = max(1, math.ceil(math.log2(max(1, candidates))))
    least = (rounds + 1) * candidates * (1 + halvings)
    if not 1 <= keep <= candidates or not pairs:
        raise ValueError(f"keep={keep} of candidates={candidates}, measured on {len(pairs)} pairs")
    if budget is not None and budget < least:
        raise ValueError(f"budget={budget} is too small for {candidates} candidates: {least}")
    pairs = random.Random(seed).sample(list(pairs), len(pairs))
    known: dict[str, list[float]] = {}
    pool = propose(generate, demonstrations, candidates, seed=seed, shown=shown)
    if not pool:
        raise ValueError(f"none of {candidates} texts holds an instruction")
    calls = candidates
    for number in range(rounds + 1):
        alive, ranking, seen = pool, [], 0
        for left in range(halvings, 0, -1):
            more, half = len(pairs) - seen, math.ceil(len(alive) / 2) if left > 1 else 0
            if budget is not None:
                free = budget * (number + 1) // (rounds + 1) - calls
                # an equal share for each halving; more if the better half can still see all pairs
                spare = (free - half * more) // max(1, len(alive) - half)
                more = min(more, max(free // left // len(alive), spare))
            seen += more
            calls += _learn(measure, known, alive, pairs[:seen])
            here = [Candidate(each, sum(known[each][:seen]) / seen, seen) for each in alive]
            here.sort(key=lambda c: -c.score)
            ranking = here[half:] + ranking
            alive = [c.instruction for c in here[:half]]
        yield Search(number, tuple(ranking), calls)
        if number < rounds:
            best = [c.instruction for c in ranking[:keep]]
            pool = best + vary(generate, best, candidates - keep)
            calls += candidates - keep


def _learn(
    measure: Measure, known: dict[str, list[float]], instructions: list[str], pairs: Sequence[Pair]
) -> int:
    """Add to `known` what is missing of the instructions' values on `pairs`; how much that was."""
    calls = 0
    for start in sorted({len(known.get(each, ())) for each in instructions}):
        group = [each for each in instructions if len(known.get(each, ())) == start < len(pairs)]
        if group:
            calls += len(group) * (len(pairs) - start)
            values = measure(group, pairs[start:]).tolist()
            for each, row in zip(group, values, strict=True):
                known.setdefault(each, []).extend(row)
    return calls
