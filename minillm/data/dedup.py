"""De-duplication: exact copies by hash, near copies by MinHash and LSH, leaks by n-gram overlap.

Broder, On the Resemblance and Containment of Documents, 1997: for a random order of all shingles,
two sets have the same smallest shingle with probability J(A, B) = |A ∩ B| / |A ∪ B|. A signature
of k such minima estimates J; locality-sensitive hashing finds pairs without comparing all of them.
"""
# n documents, k hash functions, s shingles

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from minillm.data.clean import sentences

PRIME = (1 << 31) - 1  # shingles and hash values live below it, so products fit into 64 bits
# Numbers count as words here ("version 2" is no copy of "version 3"), and so does each Chinese
# character: there are no spaces to find words by.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _mix(x: np.ndarray) -> np.ndarray:
    """Scatter 64-bit integers (the finalizer of SplitMix64): neighbours end up far apart."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """64-bit hashes of the runs of `n` words, in order: uint64 [max(words - n + 1, 0)].

    The same in every process (Python's own `hash` of a string is not).
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    hashed = np.array([zlib.crc32(word.encode()) for word in _words(text)], dtype=np.uint64)
    hashed, length = _mix(hashed + np.uint64(1)), max(len(hashed) - n + 1, 0)
    total = np.zeros(length, dtype=np.uint64)
    for offset in range(n):  # a polynomial in the words' hashes, modulo 2^64: order matters
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashed[offset : offset + length]
    return _mix(total)


def shingles(text: str, n: int = 5) -> np.ndarray:
    """The set of runs of `n` words as sorted integers below PRIME: int64 [s].

    A text shorter than `n` words is one shingle of all its words, a text without words has none.

    >>> len(shingles("to be or not to be", 2))
    4
    """
    count = len(_words(text))
    return np.unique(ngram_hashes(text, max(1, min(n, count))) % np.uint64(PRIME)).astype(np.int64)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets; two empty sets are equal: 1."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    either = len(a) + len(b) - both
    return both / either if either else 1.0


class MinHash:
    """k universal hash functions h(x) = (a x + b) mod PRIME, drawn from a seed.

    `signature(A)[i]` is the minimum of h_i over A. The share of equal entries of two signatures
    estimates their Jaccard similarity J with standard error sqrt(J (1 - J) / k).
    The members should be scattered (hashes are): for regular ones, such as 7, 14, 21, ..., a
    linear h is not random enough. (Carter and Wegman, Universal Classes of Hash Functions, 1979.)

    >>> hasher, rng = MinHash(k=256), np.random.default_rng(0)
    >>> all_members = rng.integers(0, PRIME, 400)
    >>> a, b = hasher.signature(all_members[:300]), hasher.signature(all_members[100:])
    >>> abs(similarity(a, b) - 200 / 400) < 3 * standard_error(200 / 400, 256)
    True
    """

    def __init__(self, k: int = 128, seed: int = 0) -> None:
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        rng = np.random.default_rng(seed)
        self.a = rng.integers(1, PRIME, (k, 1), dtype=np.uint64)
        self.b = rng.integers(0, PRIME, (k, 1), dtype=np.uint64)

    def signature(self, members: np.ndarray) -> np.ndarray:
        """Minima over a set of integers in [0, PRIME): uint32 [k]; all PRIME for the empty set."""
        if not len(members):
            return np.full(len(self.a), PRIME, dtype=np.uint32)
        if members.min() < 0 or members.max() >= PRIME:
            raise ValueError(
                f"members must lie in [0, {PRIME}), got {members.min()}..{members.max()}"
            )
        return ((self.a * members.astype(np.uint64) + self.b) % PRIME).min(1).astype(np.uint32)

    def signatures(self, documents: Iterable[str], n: int = 5) -> np.ndarray:
        """Signatures of the shingles of documents: uint32 [documents, k]."""
        rows = [self.signature(shingles(document, n)) for document in documents]
        return np.stack(rows) if rows else np.zeros((0, len(self.a)), dtype=np.uint32)


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Estimated Jaccard similarity: the share of equal entries of two signatures."""
    return float(np.mean(a == b))


def standard_error(j: float, k: int) -> float:
    """Of the estimate from k hash functions at true similarity j."""
    return math.sqrt(j * (1 - j) / k)


def lsh_recall(s: float, bands: int, rows: int) -> float:
    """Probability 1 - (1 - s^r)^b that a pair of similarity s shares at least one band.

    >>> round(lsh_recall(0.8, bands=20, rows=5), 4)
    0.9996
    """
    return 1 - (1 - s**rows) ** bands


def lsh_buckets(signatures: np.ndarray, bands: int) -> Iterator[np.ndarray]:
    """Groups of documents that agree in all rows of a band, band after band: int64 [group].

    The k entries are cut into `bands` bands; raises ValueError if k is not a multiple.
    """
    n, k = signatures.shape
    if bands < 1 or k % bands:
        raise ValueError(f"{k} hash functions cannot be cut into {bands} bands of equal size")
    rows = k // bands
    for band in range(bands):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = part.view(f"V{part.itemsize * rows}").ravel() if n else part[:, 0]
        groups = defaultdict(list)
        for document, key in enumerate(keys.tolist()):
            groups[key].append(document)
        yield from (np.array(group) for group in groups.values() if len(group) > 1)


def candidate_pairs(signatures: np.ndarray, bands: int) -> set[tuple[int, int]]:
    """All pairs (i < j) that share a bucket in at least one band."""
    buckets = lsh_buckets(signatures, bands)
    return {pair for bucket in buckets for pair in combinations(bucket.tolist(), 2)}


class UnionFind:
    """Disjoint sets over 0..n-1, with path halving; a set's root is its smallest member.

    >>> sets = UnionFind(4); sets.union(3, 1); sets.union(1, 2); sets.clusters()
    [[1, 2, 3]]
    """

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))

    def find(self, i: int) -> int:
        """The root of i's set."""
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def union(self, i: int, j: int) -> None:
        """Join the sets of i and j."""
        low, high = sorted((self.find(i), self.find(j)))
        self.parent[high] = low

    def clusters(self) -> list[list[int]]:
        """Sets of two or more, members in order."""
        groups = defaultdict(list)
        for i in range(len(self.parent)):
            groups[self.find(i)].append(i)
        return [group for group in groups.values() if len(group) > 1]


def near_duplicates(
    documents: Sequence[str],
    threshold: float = 0.8,
    k: int = 128,
    bands: int = 16,
    n: int = 5,
    seed: int = 0,
) -> list[list[int]]:
    """Clusters of documents joined by pairs whose estimated similarity is at least `threshold`.

    Candidates come from LSH; only they are compared. The clusters are the connected components,
    so two members may be less similar than the threshold when a third stands between them.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in (0, 1]")
    signatures = MinHash(k, seed).signatures(documents, n)
    sets = UnionFind(len(documents))
    for bucket in lsh_buckets(signatures, bands):
        for i in range(len(bucket) - 1):
            if len({sets.find(j) for j in bucket.tolist()}) == 1:
                break  # all joined: a bucket of a thousand copies costs one row, not a square
            same = (signatures[bucket[i + 1 :]] == signatures[bucket[i]]).mean(1) >= threshold
            for j in bucket[i + 1 :][same].tolist():
                sets.union(int(bucket[i]), j)
    return sets.clusters()


def _key(text: str) -> bytes:
    """Digest of the words alone: case, spaces and punctuation make no difference."""
    spoken = " ".join(_words(text)) or text.strip()  # no words at all: compare what is there
    return hashlib.blake2b(spoken.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def unique_documents(documents: Iterable[str]) -> Iterator[str]:
    """Each document once, its first copy; case, spaces and punctuation make no difference."""
    seen: set[bytes] = set()
    for document in documents:
        if (key := _key(document)) not in seen:
            seen.add(key)
            yield document


def unique_sentences(documents: Iterable[str], min_words: int = 4) -> Iterator[str]:
    """Documents without the sentences that occurred before; empty ones are dropped.

    Sentences under `min_words` words stay: "Yes." is no copy. (After Raffel et al., Exploring the
    Limits of Transfer Learning, 2020, section 2.2, which uses spans of three sentences.)
    """
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for sentence in sentences(document):
            if len(_words(sentence)) >= min_words:
                if (key := _key(sentence)) in seen:
                    continue
                seen.add(key)
            kept.append(sentence)
        if kept:
            yield " ".join(kept)


def unique_across(
    datasets: Mapping[str, Sequence[str]], threshold: float = 0.8, **options: int
) -> dict[str, list[str]]:
    """Datasets without (near) copies within or between them: the first one named keeps its copy.

    `options` go to `near_duplicates`.
    """
    everything = [(name, text) for name, texts in datasets.items() for text in texts]
    clusters = near_duplicates([text for _, text in everything], threshold, **options)
    drop = {i for cluster in clusters for i in cluster[1:]}
    kept: dict[str, list[str]] = {name: [] for name in datasets}
    for i, (name, text) in enumerate(everything):
        if i not in drop:
            kept[name].append(text)
    return kept


def contamination(train: Iterable[str], test: Iterable[str], n: int = 13) -> list[float]:
    """For each test document, the share of its runs of `n` words that stand in the training texts.

    1.0 is a full leak; NaN for a test document shorter than `n` words. n = 13 as in Brown et al.,
    Language Models are Few-Shot Learners, 2020, appendix C.
    """
    parts = [np.unique(ngram_hashes(text, n)) for text in train]
    known = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
    grams = [ngram_hashes(text, n) for text in test]
    return [float(np.isin(gram, known).mean()) if len(gram) else math.nan for gram in grams]
