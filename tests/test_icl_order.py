"""Choosing and ordering demonstrations: against scikit-learn, NumPy and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from minillm.prompting import icl_order as order
from minillm.prompting.icl import Demonstration, Template, accuracy, place_bias

DEMOS = [Demonstration(f"t{i}", "+-"[i % 2]) for i in range(4)]
LABELS = ["+", "-"]
seeds = st.integers(0, 10_000)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cosines(n, d, seed):
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=seeded(seed)).double(), dim=-1)
    return x @ x.T


def test_tfidf_similarity_is_scikit_learn_s():
    pool = ["one two two", "three 4 one", "five", "one -1"]
    queries = ["one 4", "unknown", "five five"]
    table = TfidfVectorizer(token_pattern=r"\S+").fit(pool)
    want = (table.transform(queries) @ table.transform(pool).T).toarray()
    got = order.similarities(order.tfidf(pool), queries, pool)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert got[1].tolist() == [0, 0, 0, 0] and got[0, 1] > got[0, 0] > 0


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 9))
def test_nearest_is_scikit_learn_s(seed, k):
    x = torch.randn(12, 4, generator=seeded(seed)).double()
    similarity = order.similarities(
        lambda some: x[[int(i) for i in some]], ["0"], list(map(str, range(12)))
    )
    search = NearestNeighbors(metric="cosine").fit(x.numpy())
    want = search.kneighbors(x[:1].numpy(), k, return_distance=False)[0]
    assert order.nearest(similarity[0], k) == want.tolist()


def test_ties_go_to_the_lower_place():
    assert order.nearest(torch.tensor([0.1, 0.5, 0.5, 0.5]), 3) == [1, 2, 3]


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_mmr_against_the_formula(seed, weight):
    between = cosines(8, 4, seed)
    near = torch.rand(8, generator=seeded(seed + 1)).double()
    chosen = []
    for _ in range(5):
        gains = {
            i: weight * near[i].item()
            - (1 - weight) * max((between[i, j].item() for j in chosen), default=0)
            for i in range(8)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    assert order.mmr(near, between, 5, weight) == chosen
    assert order.mmr(near, between, 8, 1.0) == order.nearest(near, 8)


def test_mmr_leaves_a_twin_for_later():
    x = torch.nn.functional.normalize(torch.tensor([[1, 0.1], [1, 0.1], [0.6, -1.0]]), dim=-1)
    near = x @ torch.tensor([1.0, 0.0])
    assert order.nearest(near, 2) == [0, 1]
    assert order.mmr(near, x @ x.T, 2) == [0, 2]


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(1, 5))
def test_vote_k_against_the_formula(seed, neighbors):
    n, between = 9, cosines(9, 3, seed)
    edges = {
        v: sorted((u for u in range(n) if u != v), key=lambda u: -between[v, u])[:neighbors]
        for v in range(n)
    }
    chosen = []
    for _ in range(4):
        free = [u for u in range(n) if u not in chosen]
        votes = {v: 10.0 ** -len(set(edges[v]) & set(chosen)) for v in free}
        score = {u: sum(s for v, s in votes.items() if u in edges[v]) for u in free}
        best = order.vote_k(between, len(chosen) + 1, neighbors)
        assert best[:-1] == chosen  # greedy: a longer choice only adds
        assert score[best[-1]] == pytest.approx(max(score.values()))
        chosen = best
    assert len(set(chosen)) == 4


def test_vote_k_takes_one_of_each_cluster():
    # three tight clusters of 5, 4 and 3 points: the largest is served first, none twice
    centers = [0] * 5 + [1] * 4 + [2] * 3
    x = torch.eye(3)[centers] + 0.05 * torch.randn(12, 3, generator=seeded(0))
    x = torch.nn.functional.normalize(x, dim=-1)
    assert [centers[i] for i in order.vote_k(x @ x.T, 3, neighbors=2)] in ([0, 1, 2], [1, 0, 2])
    assert sorted(centers[i] for i in order.determinantal(x @ x.T, 3)) == [0, 1, 2]


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans())
def test_determinantal_is_greedy_in_the_log_determinant(seed, weighted):
    between = cosines(7, 5, seed) + 0.01 * torch.eye(7)
    quality = 0.5 + torch.rand(7, generator=seeded(seed)).double() if weighted else None
    kernel = between.numpy()
    if weighted:
        kernel = kernel * np.outer(quality, quality)
    chosen = []
    for _ in range(5):
        free = [i for i in range(7) if i not in chosen]
        gains = [np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in free]
        chosen.append(free[int(np.argmax(gains))])
    assert order.determinantal(between, 5, quality) == chosen


def test_determinantal_stops_where_nothing_is_left():
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    assert order.determinantal(x @ x.T, 4) == [0, 3]


def test_random_choice_is_fair_and_without_repetition():
    draws = [order.random_choice(5, 2, seeded(s)) for s in range(600)]
    assert all(len(set(draw)) == 2 for draw in draws)
    share = np.bincount(np.ravel(draws), minlength=5) / 1200
    np.testing.assert_allclose(share, 0.2, atol=0.05)


def test_orders():
    assert order.orders(3) == list(itertools.permutations(range(3))) == order.orders(3, 6)
    some = order.orders(4, 23, seeded(0))
    assert len(set(some)) == 23 and set(some) < set(itertools.permutations(range(4)))
    assert some == order.orders(4, 23, seeded(0)) != order.orders(4, 23, seeded(1))


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_entropies_against_numpy(seed):
    probs = (2 * torch.randn(4, 6, 3, generator=seeded(seed)).double()).softmax(-1)
    for m, p in enumerate(probs.numpy()):
        local = np.mean([-sum(x * math.log(x) for x in row) for row in p])
        counts = np.bincount(p.argmax(1), minlength=3) / 6
        overall = -sum(x * math.log(x) for x in counts if x)
        assert order.local_entropy(probs)[m].item() == pytest.approx(local)
        assert order.global_entropy(probs)[m].item() == pytest.approx(overall, abs=1e-12)


def recent(prompts, options):
    """A model that sees a text's sign, but leans to the labels shown last: a known order bias."""
    rows = []
    for prompt in prompts:
        *shown, question = prompt.split("\n")
        lean = sum((i + 1) * (1 if x.endswith("+") else -1) for i, x in enumerate(shown))
        signal = 4.0 * float(question.split()[0].removeprefix("t"))
        rows.append([(signal + lean) / 2, -(signal + lean) / 2])
    return torch.tensor(rows)


def test_entropy_finds_the_order_that_brute_force_finds():
    ways = order.orders(4)
    probes, truth = ["t0.3", "t-0.3", "t0.8", "t-0.8"], ["+", "-", "+", "-"]
    probs = order.order_probs(recent, Template(), DEMOS, ways, probes, LABELS)
    assert probs.shape == (24, 4, 2)
    for way, row in zip(ways, probs, strict=True):  # one prompt at a time
        shown = "".join(f"{DEMOS[i].text} -> {DEMOS[i].label}\n" for i in way)
        want = torch.cat([recent([f"{shown}{x} ->"], LABELS) for x in probes]).double().softmax(-1)
        torch.testing.assert_close(row, want)
    right = [accuracy(row, LABELS, truth) for row in probs]
    assert max(right) == 1.0 and min(right) == 0.5
    overall, local = order.global_entropy(probs), order.local_entropy(probs)
    assert right[int(overall.argmax())] == 1.0 and right[int(overall.argmin())] == 0.5
    assert right[int(local.argmax())] == 1.0 and right[int(local.argmin())] == 0.5
    shown = [[DEMOS[i].label for i in way] for way in ways for _ in probes]
    predicted = [LABELS[i] for i in probs.argmax(-1).flatten().tolist()]
    bias = place_bias(shown, predicted).tolist()
    assert bias == sorted(bias) and bias[-1] > 0.1 > -0.1 > bias[0]


def test_probing_texts_are_written_behind_each_order():
    heard = []

    def generate(prompts):
        heard.extend(prompts)
        said = ["new one -> +\nmore -> -\n", "nonsense", "another -> never seen\n", "cut -> "]
        return said * (len(prompts) // 4)

    ways = order.orders(4)[:8]
    texts = order.probing_texts(generate, Template(), DEMOS, ways)
    assert texts == ["new one", "another"] * 2
    assert heard == ["".join(f"t{i} -> {'+-'[i % 2]}\n" for i in way) for way in ways]
    with pytest.raises(ValueError, match="none of 4 texts has the form"):
        order.probing_texts(lambda p: ["?"] * len(p), Template(), DEMOS, ways[:4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: order.random_choice(3, 4, seeded(0)), r"k=4 demonstrations must lie in \[1, 3\]"),
        (lambda: order.nearest(torch.ones(3), 0), "k=0"),
        (lambda: order.mmr(torch.ones(3), torch.eye(3), 4), "k=4"),
        (lambda: order.mmr(torch.ones(3), torch.eye(3), 2, 1.2), "weight=1.2"),
        (lambda: order.vote_k(torch.eye(3), 4, 1), "k=4"),
        (lambda: order.vote_k(torch.eye(3), 2, 3), "neighbors=3"),
        (lambda: order.vote_k(torch.eye(3), 2, 1, discount=1.0), "discount=1.0"),
        (lambda: order.determinantal(torch.eye(3), 9), "k=9"),
        (lambda: order.determinantal(torch.eye(2), 1, torch.tensor([1.0, 0.0])), "smallest is 0"),
        (lambda: order.orders(5, 10), "need a generator"),
    ],
)
def test_bad_use_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
