"""Signatures against true similarity, LSH against its formula, clusters against brute force."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import dedup

VOCABULARY = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def _text(rng: random.Random, n: int = 60) -> str:
    return " ".join(rng.choices(VOCABULARY, k=n))


def _edit(rng: random.Random, text: str, changes: int) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), changes):
        words[place] = "edited"
    return " ".join(words)


def _python_jaccard(a: str, b: str, n: int) -> float:
    """With sets of tuples, no hashing."""

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_jaccard_of_hashed_shingles_is_that_of_tuples(n):
    rng = random.Random(n)
    for _ in range(30):
        a = _text(rng)
        b = _edit(rng, a, rng.randrange(30))
        assert dedup.jaccard(dedup.shingles(a, n), dedup.shingles(b, n)) == pytest.approx(
            _python_jaccard(a, b, n)
        )


def test_order_of_words_matters_and_short_texts_are_one_shingle():
    assert not np.array_equal(dedup.shingles("a b c d e"), dedup.shingles("b a c d e"))
    assert len(dedup.shingles("only three words", 5)) == 1
    assert len(dedup.shingles("  ", 5)) == 0
    assert dedup.jaccard(dedup.shingles(""), dedup.shingles("")) == 1
    assert len(dedup.shingles("天地玄黄宇宙", 5)) == 2  # a Chinese character is a word
    assert not np.array_equal(dedup.shingles("version 2"), dedup.shingles("version 3"))


def test_minhash_errors_have_the_predicted_size():
    """Over many hash functions z = error / standard error must have mean 0 and variance 1."""
    rng, z = np.random.default_rng(0), []
    for seed in range(40):
        hasher = dedup.MinHash(k=64, seed=seed)
        for j in (0.2, 0.5, 0.8):
            both = round(300 * j)
            members = np.unique(rng.integers(0, dedup.PRIME, 300))
            a = members[: (len(members) + both) // 2]
            b = members[(len(members) - both) // 2 :]
            true = dedup.jaccard(a, b)
            estimate = dedup.similarity(hasher.signature(a), hasher.signature(b))
            z.append((estimate - true) / dedup.standard_error(true, 64))
    assert abs(np.mean(z)) < 4 / math.sqrt(len(z))
    assert 0.7 < np.var(z) < 1.35


def test_signature_is_the_minimum_computed_with_big_integers():
    hasher = dedup.MinHash(k=8, seed=3)
    members = dedup.shingles("the minimum over all of the members of the set")
    for i, got in enumerate(hasher.signature(members)):
        a, b = int(hasher.a[i, 0]), int(hasher.b[i, 0])
        assert got == min((a * int(x) + b) % (2**31 - 1) for x in members)


def test_hashes_do_not_depend_on_the_process():
    code = "from minillm.data.dedup import *; print(MinHash(4, 1).signatures(['a b c']).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{dedup.MinHash(4, 1).signatures(['a b c']).tolist()}\n"}


@pytest.mark.parametrize(("bands", "rows"), [(16, 2), (8, 4), (4, 8)])
def test_lsh_recall_follows_the_formula(bands, rows):
    rng = np.random.default_rng(1)
    for j in (0.3, 0.6, 0.85):
        found = 0
        for trial in range(300):
            members = np.unique(rng.integers(0, dedup.PRIME, 200))
            both = round(len(members) * j)
            a, b = members[: (200 + both) // 2], members[(200 - both) // 2 :]
            signatures = np.stack(
                [dedup.MinHash(bands * rows, seed=trial).signature(x) for x in (a, b)]
            )
            found += len(dedup.candidate_pairs(signatures, bands))
        want = dedup.lsh_recall(dedup.jaccard(a, b), bands, rows)
        assert abs(found / 300 - want) < 4 * math.sqrt(want * (1 - want) / 300) + 0.01


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_candidates_are_the_pairs_that_share_a_band(seed):
    signatures = np.random.default_rng(seed).integers(0, 3, (25, 12)).astype(np.uint32)
    want = {
        (i, j)
        for i, j in combinations(range(25), 2)
        if any((signatures[i, b : b + 3] == signatures[j, b : b + 3]).all() for b in (0, 3, 6, 9))
    }
    assert dedup.candidate_pairs(signatures, bands=4) == want


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
@settings(max_examples=100, deadline=None)
def test_union_find_gives_connected_components(edges):
    sets = dedup.UnionFind(20)
    reach = np.eye(20, dtype=int)
    for i, j in edges:
        sets.union(i, j)
        reach[i, j] = reach[j, i] = 1
    closed = np.linalg.matrix_power(reach, 20) > 0
    want = {tuple(np.flatnonzero(row)) for row in closed if row.sum() > 1}
    assert {tuple(c) for c in sets.clusters()} == want


def test_near_duplicates_are_the_components_of_verified_candidates():
    rng = random.Random(2)
    documents = []
    for _ in range(30):
        original = _text(rng)
        documents += [original] + [_edit(rng, original, changes) for changes in (1, 3, 8)]
    signatures = dedup.MinHash(128, 0).signatures(documents)
    sets = dedup.UnionFind(len(documents))
    for i, j in dedup.candidate_pairs(signatures, 16):
        if dedup.similarity(signatures[i], signatures[j]) >= 0.7:
            sets.union(i, j)
    assert dedup.near_duplicates(documents, 0.7) == sets.clusters()
    assert len(sets.clusters()) >= 27  # one changed word of 60: J = 0.84, recall 0.99


def test_many_copies_do_not_cost_a_square():
    assert dedup.near_duplicates(["one and the same text for all"] * 3000) == [list(range(3000))]


def test_near_duplicates_edges():
    assert dedup.near_duplicates([]) == []
    assert dedup.near_duplicates(["one"]) == []
    with pytest.raises(ValueError, match="threshold=0"):
        dedup.near_duplicates(["a"], threshold=0)
    with pytest.raises(ValueError, match="128 hash functions cannot be cut into 24 bands"):
        dedup.near_duplicates(["a", "b"], bands=24)
    with pytest.raises(ValueError, match="k=0"):
        dedup.MinHash(0)
    with pytest.raises(ValueError, match=r"members must lie in \[0, 2147483647\)"):
        dedup.MinHash(4).signature(np.array([dedup.PRIME]))
    with pytest.raises(ValueError, match="n=0"):
        dedup.ngram_hashes("a", 0)


def test_unique_documents_ignores_spelling_but_not_numbers():
    documents = ["Hello,  world", "hello world!", "Hello world 2", "Hello world 3", "+", "-", "+"]
    assert list(dedup.unique_documents(documents)) == [documents[i] for i in (0, 2, 3, 4, 5)]


def test_unique_sentences_keeps_short_ones_and_drops_empty_documents():
    documents = [
        "Yes. This is a long sentence.",
        "Yes. This is a long sentence. And a new one here!",
    ]
    got = list(dedup.unique_sentences([*documents, "This is a long sentence."]))
    assert got == ["Yes. This is a long sentence.", "Yes. And a new one here!"]


def test_unique_across_keeps_the_copy_of_the_first_dataset():
    rng = random.Random(4)
    wiki, web = [_text(rng) for _ in range(5)], [_text(rng) for _ in range(5)]
    kept = dedup.unique_across({"wiki": wiki, "web": [*web, wiki[2], _edit(rng, wiki[3], 1)]})
    assert kept == {"wiki": wiki, "web": web}


def test_contamination_against_sets_of_tuples():
    rng = random.Random(5)
    train = [_text(rng, 80) for _ in range(20)]
    test = [
        " ".join(train[3].split()[10:50]),
        _text(rng, 30) + " " + " ".join(train[7].split()[:30]),
        _text(rng, 60),
        "too short",
    ]
    known = {tuple(t.split()[i : i + 13]) for t in train for i in range(80 - 12)}
    want = []
    for text in test:
        words = text.split()
        grams = [tuple(words[i : i + 13]) for i in range(len(words) - 12)]
        want.append(sum(g in known for g in grams) / len(grams) if grams else math.nan)
    got = dedup.contamination(train, test)
    assert got == pytest.approx(want, nan_ok=True)
    assert got[0] == 1 and 0 < got[1] < 1 and got[2] == 0 and math.isnan(got[3])
    assert dedup.contamination([], test[:1]) == [0]
