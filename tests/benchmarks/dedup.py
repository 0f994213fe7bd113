"""How long MinHash de-duplication takes on 10,000 documents, and how many planted copies it finds.

Run `python tests/benchmarks/dedup.py [--quick]` from the repository root. Prints a table and
writes assets/benchmarks/dedup.json. The documents are pieces of 200 words of the standard
library's source, 80 % of them or as many as there are; the rest are copies of these in which 2 %
of the words were changed.
"""

from __future__ import annotations

import random
import time

import numpy as np
import tyro
from _record import record

from minillm.data import corpora, dedup


def documents(n: int, seed: int = 0) -> tuple[list[str], list[tuple[int, int]]]:
    """`n` documents, and the pairs (original, copy) among them."""
    rng = random.Random(seed)
    words = [word for text in corpora.stdlib() for word in text.split()]
    originals = [" ".join(words[i : i + 200]) for i in range(0, len(words) - 200, 200)]
    texts, pairs = rng.sample(originals, min(len(originals), n * 4 // 5)), []
    while len(texts) < n:
        source = rng.randrange(n * 4 // 5 if len(originals) >= n * 4 // 5 else len(originals))
        copy = texts[source].split()
        for place in rng.sample(range(200), 4):
            copy[place] = rng.choice(words)
        pairs.append((source, len(texts)))
        texts.append(" ".join(copy))
    return texts, pairs


def main(quick: bool = False) -> None:
    """Measure; `--quick` takes 1,000 documents."""
    n = 1_000 if quick else 10_000
    texts, pairs = documents(n)
    k, bands, threshold = 128, 16, 0.7
    t0 = time.perf_counter()
    shingled = [dedup.shingles(text) for text in texts]
    t1 = time.perf_counter()
    hasher = dedup.MinHash(k)
    np.stack([hasher.signature(members) for members in shingled])
    t2 = time.perf_counter()
    clusters = dedup.near_duplicates(texts, threshold, k=k, bands=bands)
    t3 = time.perf_counter()
    where = {i: number for number, cluster in enumerate(clusters) for i in cluster}
    found = sum(where.get(a, -1) == where.get(b, -2) for a, b in pairs)
    result = {
        "documents": n,
        "megabytes": round(sum(map(len, texts)) / 1e6, 1),
        "hash functions": k,
        "bands": bands,
        "threshold": threshold,
        "seconds, shingles": round(t1 - t0, 2),
        "seconds, signatures": round(t2 - t1, 2),
        "seconds, whole (limit for 10,000: 20)": round(t3 - t2, 2),
        "planted copies": len(pairs),
        "planted copies found": found,
        "clusters": len(clusters),
    }
    for name, value in result.items():
        print(f"{name:>40}  {value}")
    record("dedup", result, ("numpy",), quick)


if __name__ == "__main__":
    tyro.cli(main)
