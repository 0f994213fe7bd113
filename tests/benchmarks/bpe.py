"""Speed of our BPE beside the Rust `tokenizers` trainer and tiktoken, on the standard library.

    python tests/benchmarks/bpe.py [--quick]

Training: the same text and the same split pattern for both, wall time of the whole call. Encoding:
the same merges for all, on one thread. The contestants take turns, and each figure is a median, so
that other work on the machine falls on all of them. Writes assets/benchmarks/bpe.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import tiktoken
import tiktoken_ext.openai_public as shipped
import tokenizers
import tyro
from _record import record
from tokenizers import pre_tokenizers

from minillm.data import corpora
from minillm.tokenizers import BPE, to_tiktoken, train_bpe
from minillm.tokenizers.pretokenize import GPT2_PATTERN


def train_rust(documents: list[str], merges: int) -> tokenizers.Tokenizer:
    """The peer: the same pattern, then bytes, then its own trainer on all cores."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tiktoken_of(bpe: BPE) -> tiktoken.Encoding:
    """tiktoken with the same merges and its own spelling of the pattern, made by hand."""
    ranks = {text: i for i, text in bpe.vocab.items()}
    return tiktoken.Encoding(
        "by hand", pat_str=shipped.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )


def seconds(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall time of each, `repeats` times in turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in times.items()}


def benchmark_training(documents: list[str], merges: int, repeats: int) -> dict[str, object]:
    """Our trainer with two counting processes against the Rust trainer."""
    times = seconds(
        {
            "ours_s": lambda: train_bpe(documents, 256 + merges, processes=2),
            "rust_s": lambda: train_rust(documents, merges),
        },
        repeats,
    )
    found = medians(times)
    ratio = found["ours_s"] / found["rust_s"]
    return {"merges": merges, **found, "ours_over_rust": ratio, "runs": times}


def benchmark_encoding(documents: list[str], repeats: int) -> dict[str, object]:
    """Tokens per second over all documents, with 4,096 merges."""
    bpe = train_bpe(documents, 256 + 4096, processes=2)
    exported, by_hand = to_tiktoken(bpe), tiktoken_of(bpe)
    tokens = sum(len(bpe.encode_ordinary(document)) for document in documents)
    for document in documents[::20]:
        ids = bpe.encode_ordinary(document)
        if not ids == exported.encode_ordinary(document) == by_hand.encode_ordinary(document):
            raise RuntimeError("the contestants disagree on the ids")

    def over(encode: Callable[[str], list[int]]) -> Callable[[], None]:
        return lambda: [len(encode(document)) for document in documents] and None

    def ours_cold() -> None:
        fresh = BPE(bpe.vocab, bpe.merges, bpe.special_tokens, bpe.pattern)
        over(fresh.encode_ordinary)()

    contestants = {
        "ours": ours_cold,
        "exported": over(exported.encode_ordinary),
        "tiktoken": over(by_hand.encode_ordinary),
    }
    times = seconds(contestants, repeats)
    found = medians(times)
    return {
        "tokens": tokens,
        "tokens_per_s": {name: tokens / value for name, value in found.items()},
        "ours_over_tiktoken": found["ours"] / found["tiktoken"],
        "exported_over_tiktoken": found["exported"] / found["tiktoken"],
        "runs": times,
    }


def main(quick: bool = False) -> None:
    """Run, print a table, write JSON. `quick`: a tenth of the text, one run, nothing written."""
    documents = corpora.stdlib()[:: 10 if quick else 1]
    size = sum(len(document.encode()) for document in documents)
    repeats = 1 if quick else 5
    print(f"{size / 1e6:.1f} MB in {len(documents)} documents, median of {repeats} run(s)\n")
    training = []
    print(f"{'training':>14} {'ours':>9} {'rust':>9} {'ratio':>7}")
    for merges in (512, 4096) if quick else (4096, 32768):
        row = benchmark_training(documents, merges, repeats)
        training.append(row)
        print(
            f"{merges:>7} merges {row['ours_s']:>7.2f} s {row['rust_s']:>7.2f} s "
            f"{row['ours_over_rust']:>7.2f}"
        )
    encoding = benchmark_encoding(documents, repeats)
    print(f"\n{'encoding':>14} {'tokens/s':>12}")
    for name, rate in encoding["tokens_per_s"].items():
        print(f"{name:>14} {rate:>12,.0f}")
    print(f"\nour encoder takes {encoding['ours_over_tiktoken']:.2f} times as long as tiktoken,")
    print(f"our merges exported to tiktoken {encoding['exported_over_tiktoken']:.2f} times")
    result = {"bytes": size, "repeats": repeats, "training": training, "encoding": encoding}
    record("bpe", result, ("tokenizers", "tiktoken", "regex"), quick)


if __name__ == "__main__":
    tyro.cli(main)
