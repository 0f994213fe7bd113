"""Chains that nobody wrote: demonstrations by clustering (Auto-CoT), training data by STaR."""

# n questions, d width of their vectors, k clusters

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from torch import Tensor

from minillm.prompting import Embed, Generate
from minillm.prompting.cot import Extract, Worked, canonical, few_shot, find_answer, steps


def by_cluster(vectors: Tensor, k: int, *, seed: int) -> list[list[int]]:
    """k-means over vectors [n, d]: rows of each cluster, nearest to its centre first.

    Clusters stand in the order of their smallest row, so that their numbers mean nothing. The best
    of ten starts is taken. Raises ValueError if there are fewer than k distinct rows.
    """
    from sklearn.cluster import KMeans  # here, for it takes a second to import

    points = vectors.detach().cpu().double().numpy()
    if not 1 <= k <= (distinct := len(np.unique(points, axis=0))):
        raise ValueError(f"k={k} clusters need as many distinct vectors, there are {distinct}")
    found = KMeans(n_clusters=k, n_init=10, random_state=seed).fit(points)
    away = np.linalg.norm(points - found.cluster_centers_[found.labels_], axis=1)
    order = np.lexsort((np.arange(len(points)), away.round(12)))
    clusters = [[int(i) for i in order if found.labels_[i] == c] for c in range(k)]
    return sorted(clusters, key=min)


def auto_cot(
    solve: Callable[[Sequence[str]], list[Worked]],
    embed: Embed,
    questions: Sequence[str],
    k: int,
    *,
    seed: int,
    max_words: int = 60,
    max_steps: int = 5,
) -> list[Worked]:
    """k demonstrations that are unlike each other, worked out by the model itself.

    Questions are clustered by meaning; each cluster gives the question nearest to its centre that
    is simple: at most `max_words` words, a chain of at most `max_steps` steps, and an answer.
    A cluster without such a question gives none. `solve` works questions out, for example
    `partial(zero_shot, generate)`; it is asked only as far as needed. Diversity is the point:
    wrong chains gather in clusters, so at most few demonstrations are wrong in the same way.
    (Zhang et al., Automatic Chain of Thought Prompting in Large Language Models, 2022.)
    """
    clusters = [
        [i for i in members if len(questions[i].split()) <= max_words]
        for members in by_cluster(embed(questions), k, seed=seed)
    ]
    chosen: dict[int, Worked] = {}
    for rank in range(max(map(len, clusters))):
        asked = [c for c in range(k) if c not in chosen and rank < len(clusters[c])]
        if not asked:
            break
        found = solve([questions[clusters[c][rank]] for c in asked])
        for c, worked in zip(asked, found, strict=True):
            if worked.answer is not None and steps(worked.chain) <= max_steps:
                chosen[c] = worked
    return [chosen[c] for c in sorted(chosen)]


@dataclass(frozen=True)
class Round:
    """One round of STaR."""

    round: int
    """counts from 1"""
    solved: float
    """share of the samples that were right, without a hint, before this round's training"""
    kept: tuple[Worked, ...]
    """found without a hint; the chain is the whole text"""
    rationalized: tuple[Worked, ...]
    """found only with the answer in the prompt"""
    generate: Generate
    """the model after this round's training"""


def star(
    generate: Generate,
    problems: Sequence[tuple[str, str]],
    fine_tune: Callable[[list[Worked]], Generate],
    rounds: int,
    *,
    prompt: Callable[[str], str] = lambda question: few_shot((), question),
    hint: Callable[[str, str], str] | None = None,
    extract: Extract = find_answer,
    samples: int = 1,
) -> Iterator[Round]:
    """A model teaches itself: train on the chains of its own that reach the right answer, again.

    For each (question, answer) of `problems`, `samples` chains are sampled from `prompt(question)`
    and those kept whose `extract`ed answer is right, equal ones once. Where none is,
    `hint(question, answer)` shows the answer, and chains that end in it are kept too, for the
    question *without* the hint (rationalization; None: left out). `fine_tune` gets all of them and
    returns the model for the next round. In the paper it begins from the base model every time,
    which is its business. A right answer does not make a right chain: the filter sees answers only.
    Stops after `rounds`, or after a round in which nothing was right, for then nothing is learned.
    (Zelikman et al., STaR: Bootstrapping Reasoning With Reasoning, 2022.)
    """
    if samples < 1 or not problems:
        raise ValueError(f"samples={samples} must be at least 1, {len(problems)} problems as well")
    for number in range(1, rounds + 1):
        own = _right(generate, [prompt(q) for q, _ in problems], problems, extract, samples)
        unsolved = [p for p, found in zip(problems, own, strict=True) if hint and not found]
        hinted = _right(generate, [hint(*p) for p in unsolved], unsolved, extract, samples)
        kept, rationalized = _worked(problems, own), _worked(unsolved, hinted)
        if kept or rationalized:
            generate = fine_tune([*kept, *rationalized])
        solved = sum(map(len, own)) / (samples * len(problems))
        yield Round(number, solved, kept, rationalized, generate)
        if not kept and not rationalized:
            return


def _right(
    generate: Generate, prompts: list[str], problems: Sequence[tuple[str, str]],
    extract: Extract, samples: int,
) -> list[list[str]]:  # fmt: skip
    """For each problem those of `samples` texts whose answer is right."""
    texts = generate([p for p in prompts for _ in range(samples)]) if prompts else []
    wanted = [canonical(answer) for _, answer in problems for _ in range(samples)]
    found = [extract(text) for text in texts]
    right = [a is not None and canonical(a) == w for a, w in zip(found, wanted, strict=True)]
    rows = [slice(i, i + samples) for i in range(0, len(texts), samples)]
    return [list(compress(texts[row], right[row])) for row in rows]


def _worked(
    problems: Sequence[tuple[str, str]], texts: Sequence[Sequence[str]]
) -> tuple[Worked, ...]:
    pairs = zip(problems, texts, strict=True)
    return tuple(Worked(q, text, a) for (q, a), mine in pairs for text in dict.fromkeys(mine))
