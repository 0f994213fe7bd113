"""Which demonstrations to show, and in which order: by similarity, by diversity, by entropy.

Choosers return places in the pool, the first choice first. What stands last in a prompt is nearest
to the question, so `[::-1]` puts the best choice there.
"""

# m queries or orders, n texts or demonstrations in the pool, k labels, d width of a vector

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.prompting import Embed, Generate, Score
from minillm.prompting.icl import Demonstration, Template, label_probs


def tfidf(texts: Sequence[str]) -> Embed:
    """An `Embed` from the words of `texts`, frequent ones weighing less, rows of length 1.

    Words are what blanks part, so that signs and digits count too. A text without a known word
    gets a zero vector. Needs scikit-learn.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = TfidfVectorizer(lowercase=False, token_pattern=r"\S+").fit(texts)
    return lambda some: torch.from_numpy(table.transform(some).toarray())


def similarities(embed: Embed, queries: Sequence[str], pool: Sequence[str]) -> Tensor:
    """Cosine of the vectors of each query and each text of the pool: [m, n]; 0 for zero vectors."""
    a, b = (torch.nn.functional.normalize(embed(some).double(), dim=-1) for some in (queries, pool))
    return a @ b.T


def _check_count(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} demonstrations must lie in [1, {n}], the size of the pool")


def random_choice(n: int, k: int, generator: torch.Generator) -> list[int]:
    """k of n places, without repetition."""
    _check_count(k, n)
    return torch.randperm(n, generator=generator)[:k].tolist()


def nearest(similarity: Tensor, k: int) -> list[int]:
    """The k places of largest `similarity` [n], ties to the lower place.

    Source: Liu et al., What Makes Good In-Context Examples for GPT-3?, 2022 (kNN demonstrations).
    """
    _check_count(k, len(similarity))
    return similarity.argsort(descending=True, stable=True)[:k].tolist()


def mmr(similarity: Tensor, between: Tensor, k: int, weight: float = 0.5) -> list[int]:
    """Maximal marginal relevance: near the question, far from what has been chosen.

    In each of k rounds the place with the largest weight · similarity − (1 − weight) · (largest
    similarity to a chosen one). `similarity` [n] is that to the question, `between` [n, n] that in
    the pool. weight = 1 is `nearest`. Source: Carbonell and Goldstein, The Use of MMR,
    Diversity-Based Reranking for Reordering Documents and Producing Summaries, 1998.
    """
    _check_count(k, len(similarity))
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} must lie in [0, 1]")
    chosen: list[int] = []
    for _ in range(k):
        near = between[:, chosen].max(-1).values if chosen else 0.0
        gain = weight * similarity - (1 - weight) * near
        gain[chosen] = -math.inf
        chosen.append(int(gain.argmax()))
    return chosen


def vote_k(between: Tensor, k: int, neighbors: int, discount: float = 10.0) -> list[int]:
    """Representative and diverse places: everyone votes for those it has as a near neighbor.

    Each place has edges to its `neighbors` nearest others. In each round the unchosen place with
    the largest sum of votes over the unchosen that have an edge to it is chosen; a vote weighs
    discount^−(chosen places the voter has an edge to). It needs no question and no label. Source:
    Su et al., Selective Annotation Makes Language Models Better Few-Shot Learners, 2023 (the
    graph's part of vote-k; theirs chooses the rest by the model's confidence).
    """
    n = len(between)
    _check_count(k, n)
    if not 1 <= neighbors < n or discount <= 1:
        raise ValueError(
            f"neighbors={neighbors} must lie in [1, {n - 1}] and discount={discount} be above 1"
        )
    others = between.clone().fill_diagonal_(-math.inf)
    edges = torch.zeros(n, n, dtype=torch.float64)  # row votes for column
    edges.scatter_(1, others.argsort(descending=True, stable=True)[:, :neighbors], 1.0)
    chosen: list[int] = []
    for _ in range(k):
        votes = discount ** -edges[:, chosen].sum(-1)
        votes[chosen] = 0.0
        total = votes @ edges
        total[chosen] = -1.0
        chosen.append(int(total.argmax()))
    return chosen


def determinantal(between: Tensor, k: int, quality: Tensor | None = None) -> list[int]:
    """Greedily the places whose kernel has the largest determinant: good ones that span a volume.

    The kernel is quality · between · quality, with `between` [n, n] positive semidefinite (such as
    cosines) and `quality` [n] positive, 1 by default. Each round takes the place whose vector has
    the most length left outside of the span of the chosen ones. Fewer than k places come back when
    nothing is left outside. Source: Chen et al., Fast Greedy MAP Inference for Determinantal Point
    Process, 2018; for demonstrations: Ye et al., Compositional Exemplars for In-context Learning,
    2023.
    """
    n = len(between)
    _check_count(k, n)
    q = torch.ones(n, dtype=torch.float64) if quality is None else quality.double()
    if not (q > 0).all():
        raise ValueError(f"quality must be positive, the smallest is {q.min():g}")
    kernel = q[:, None] * between.double() * q
    left = kernel.diagonal().clone()  # squared length outside of the span
    floor, rows, chosen = 1e-10 * left.max(), torch.zeros(0, n, dtype=torch.float64), []
    for _ in range(k):
        best = int(left.argmax())
        if left[best] <= floor:
            break
        row = (kernel[best] - rows[:, best] @ rows) / left[best].sqrt()
        rows, left = torch.cat([rows, row[None]]), left - row**2
        chosen.append(best)
        left[chosen] = -math.inf
    return chosen


def orders(
    n: int, limit: int | None = None, generator: torch.Generator | None = None
) -> list[tuple[int, ...]]:
    """All n! orders of n places, or `limit` different ones at random if there are more.

    Raises ValueError where a random choice lacks its generator.
    """
    if limit is None or math.factorial(n) <= limit:
        return list(itertools.permutations(range(n)))
    if generator is None:
        raise ValueError(f"{limit} of {math.factorial(n)} orders at random need a generator")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < limit:
        found[tuple(torch.randperm(n, generator=generator).tolist())] = None
    return list(found)


def probing_texts(
    generate: Generate,
    template: Template,
    demonstrations: Sequence[Demonstration],
    ways: Sequence[Sequence[int]],
) -> list[str]:
    """Texts like those of the demonstrations, written by the model itself, without labels.

    For each order the model goes on behind the demonstrations; the text of the example it writes
    is kept, its label is not, since nobody knows whether it is right. `generate` should sample (a
    temperature above 0). Source: Lu et al., Fantastically Ordered Prompts and Where to Find Them,
    2022. Raises ValueError if nothing it writes has the form of an example.
    """
    contexts = [template.context([demonstrations[i] for i in way]) for way in ways]
    said = generate(contexts)
    texts = [text for one in said if (text := template.parse(one)) is not None]
    if not texts:
        raise ValueError(f"none of {len(said)} texts has the form {template.form!r}: {said[:3]}")
    return texts


def order_probs(
    score: Score,
    template: Template,
    demonstrations: Sequence[Demonstration],
    ways: Sequence[Sequence[int]],
    texts: Sequence[str],
    labels: Sequence[str],
) -> Tensor:
    """p(label) of every text under every order of the demonstrations: [m, n, k]."""
    shown = [[demonstrations[i] for i in way] for way in ways for _ in texts]
    probs = label_probs(score, template, shown, [*texts] * len(ways), labels)
    return probs.view(len(ways), len(texts), len(labels))


def global_entropy(probs: Tensor) -> Tensor:
    """GlobalE: entropy, in nats, of how often each label wins: [m, n, k] -> [m].

    An order under which one label wins everywhere has 0, whatever its probabilities; the orders
    with the largest values are to be used. Source: Lu et al., Fantastically Ordered Prompts and
    Where to Find Them, 2022.
    """
    wins = torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).double()
    return torch.special.entr(wins.mean(-2)).sum(-1)


def local_entropy(probs: Tensor) -> Tensor:
    """LocalE: the mean over texts of the entropy, in nats, of p(label): [m, n, k] -> [m].

    Low values are overconfident orders; the orders with the largest values are to be used. Source:
    Lu et al., Fantastically Ordered Prompts and Where to Find Them, 2022.
    """
    return torch.special.entr(probs).sum(-1).mean(-1)
