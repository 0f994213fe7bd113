"""Tokenizing a large file into a shard and reading it back: time, and memory that is really held.

Run `python tests/benchmarks/shards.py [--quick]` from the repository root. Writes a text file of
1 GB (64 MB) into a temporary folder, tokenizes it with the course's tokenizer through tiktoken in
a process of its own, and opens the shard with each reader in a process of its own. A thread there
samples RssAnon, the memory that cannot be given back to the file it came from. Prints a table and
writes assets/benchmarks/shards.json.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from _record import record

EOT = "<|endoftext|>"


def rss_anon() -> float:
    """Anonymous memory of this process in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("RssAnon is only counted on Linux, in /proc/self/status")


def watch(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Run `work`, sampling RssAnon every 20 ms."""
    stop, before, samples = threading.Event(), rss_anon(), [rss_anon()]

    def sample() -> None:
        while not stop.wait(0.02):
            samples.append(rss_anon())

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    peak = max([*samples, rss_anon()])
    memory = {"RssAnon before, MB": round(before, 1), "RssAnon peak, MB": round(peak, 1)}
    return {**result, "seconds": round(seconds, 2), **memory}


def tokenize(folder: Path) -> dict[str, object]:
    """Text to shard."""
    from minillm.data.shards import read_documents, tokenize_to_shards
    from minillm.tokenizers import load_course_tokenizer
    from minillm.tokenizers.export import to_tiktoken

    bpe = load_course_tokenizer()
    encoding = to_tiktoken(bpe)

    def work() -> dict[str, object]:
        texts = read_documents(folder / "text.txt", EOT)
        shard = tokenize_to_shards(texts, encoding, folder / "x", eos=bpe.special_ids[EOT])
        return {"tokens": shard.n_tokens, "documents": len(shard)}

    return watch(work)


def read(folder: Path, mode: str) -> dict[str, object]:
    """20,000 random rows of 512 tokens, then every token once."""
    from minillm.data.shards import Shard

    def work() -> dict[str, object]:
        start = time.perf_counter()
        shard = Shard(folder / "x", mode)
        opened = time.perf_counter()
        rng = np.random.default_rng(0)
        for at in rng.integers(0, shard.n_tokens - 512, 20_000).tolist():
            shard.read(at, 512).sum()
        drawn = time.perf_counter()
        total = sum(
            int(shard.read(at, min(1 << 20, shard.n_tokens - at)).sum(dtype=np.int64))
            for at in range(0, shard.n_tokens, 1 << 20)
        )
        return {
            "open, ms": round((opened - start) * 1e3, 2),
            "random row, us": round((drawn - opened) / 20_000 * 1e6, 2),
            "scan, s": round(time.perf_counter() - drawn, 2),
            "sum": total,
        }

    return watch(work)


def write_text(path: Path, size: int) -> None:
    """About `size` bytes of the interpreter's own documentation, documents in random order."""
    from minillm.data import corpora

    texts, rng, written = corpora.pydocs(), random.Random(0), 0
    with open(path, "w", encoding="utf-8", newline="") as out:
        while written < size:
            text = rng.choice(texts)[: size - written]
            written += len(text.encode()) + len(EOT)
            out.write(text + EOT)


def in_subprocess(folder: Path, part: str) -> dict[str, object]:
    """One part in a fresh process, which shares no memory with the others."""
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(quick: bool = False, folder: Path | None = None, part: str | None = None) -> None:
    """Measure; `--quick` takes 64 MB of text. `--folder --part` is one part, used internally."""
    if folder is not None and part is not None:
        print(json.dumps(tokenize(folder) if part == "tokenize" else read(folder, part)))
        return
    size = 64_000_000 if quick else 1_000_000_000
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        write_text(temporary / "text.txt", size)
        parts = ("tokenize", "lazy", "cached", "mmap")
        result = {part: in_subprocess(temporary, part) for part in parts}
        sums = {result[part].pop("sum") for part in parts[1:]}
        if len(sums) != 1:
            raise ValueError(f"the readers disagree about the sum of all tokens: {sums}")
        result["tokenize"]["text, MB"] = round((temporary / "text.txt").stat().st_size / 1e6, 1)
        shard = (temporary / "x.bin").stat().st_size + (temporary / "x.idx").stat().st_size
        result["tokenize"]["shard, MB"] = round(shard / 1e6, 1)
    for part, values in result.items():
        print(part)
        for key, value in values.items():
            print(f"{key:>24}  {value}")
    record("shards", result, ("numpy", "tiktoken"), quick)


if __name__ == "__main__":
    tyro.cli(main)
