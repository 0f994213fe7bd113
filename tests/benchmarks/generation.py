"""Generated tokens per second beside `transformers.generate`, with the same GPT-2 weights.

    python tests/benchmarks/generation.py [--quick]

Both keep old keys and values in a cache, in float32, on the threads that PyTorch takes by itself.
They continue the same prompts of 16 tokens by the same number of tokens, greedily (the answers must
be equal) and sampled (temperature 0.8, top-k 50). Ours is measured as it is, and prepared (a copy
laid out for generating, made before the clock starts). They take turns, and each figure is a
median, so that other work on the machine falls on both. Writes assets/benchmarks/generation.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import transformers
import tyro
from _record import record

from minillm.infer import generate, prepare
from minillm.model.load import Model, from_huggingface

PROMPT = 16
SIZES = {
    "1M": {"vocab_size": 2048, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "10M": {"vocab_size": 4096, "n_embd": 320, "n_layer": 8, "n_head": 8},
}
HEADINGS = ("prepared", "ours", "theirs", "ratio")
SAMPLED = {"temperature": 0.8, "top_k": 50}


def models(size: dict[str, int], context: int) -> tuple[torch.nn.Module, Model]:
    """Theirs with random weights, and ours with the same."""
    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(n_positions=context, **size, **nothing)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    return theirs, from_huggingface(theirs.state_dict(), theirs.config.to_dict())


def contestants(
    theirs: torch.nn.Module, ours: Model, prompts: torch.Tensor, new: int, sampled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that return the new tokens, [batch, new]."""
    options = {**SAMPLED, "do_sample": True} if sampled else {"do_sample": False}
    real = torch.ones_like(prompts)

    def run_theirs() -> torch.Tensor:
        length = {"max_new_tokens": new, "min_new_tokens": new}
        return theirs.generate(prompts, attention_mask=real, **length, **options)[:, PROMPT:]

    settings = SAMPLED if sampled else {"temperature": 0.0}

    def run_ours(model: Model) -> Callable[[], torch.Tensor]:
        return lambda: torch.stack(list(generate(model, prompts, new, **settings)), 1)

    return {"theirs": run_theirs, "ours": run_ours(ours), "prepared": run_ours(prepare(ours))}


def measure(
    size: dict[str, int], batch: int, sampled: bool, new: int, repeats: int
) -> dict[str, object]:
    """Medians of both, and their ratio."""
    theirs, ours = models(size, PROMPT + new)
    prompts = torch.randint(size["vocab_size"], (batch, PROMPT))
    runs = contestants(theirs, ours, prompts, new, sampled)
    first = {name: run() for name, run in runs.items()}  # also warms both up
    if not sampled and not all(torch.equal(first["theirs"], x) for x in first.values()):
        raise RuntimeError("the contestants generate different tokens")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: batch * new / statistics.median(times) for name, times in seconds.items()}
    return {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "batch": batch,
        "sampled": sampled,
        "tokens_per_s": rates,
        "ours_over_theirs": rates["ours"] / rates["theirs"],
        "prepared_over_theirs": rates["prepared"] / rates["theirs"],
        "seconds": seconds,
    }


def main(quick: bool = False) -> None:
    """Run, print a table, write JSON. `quick`: few tokens, one run, nothing written."""
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    new, repeats = (16, 1) if quick else (112, 7)
    rows = []
    threads = torch.get_num_threads()
    print(f"tokens/s, {new} new tokens, median of {repeats} run(s), {threads} threads")
    print(
        f"{'model':>6} {'batch':>6} {'':>8} {'prepared':>9} {'ours':>9} {'theirs':>9} {'ratio':>7}"
    )
    for name, size in SIZES.items():
        for batch in (1, 8):
            for sampled in (False, True):
                row = measure(size, batch, sampled, new, repeats)
                rows.append({"model": name, **row})
                rates = row["tokens_per_s"]
                print(
                    f"{name:>6} {batch:>6} {'sampled' if sampled else 'greedy':>8} "
                    f"{rates['prepared']:>9,.0f} {rates['ours']:>9,.0f} {rates['theirs']:>9,.0f} "
                    f"{row['prepared_over_theirs']:>9.2f}"
                )
    result = {"prompt": PROMPT, "new": new, "threads": threads, "rows": rows}
    record("generation", result, ("torch", "transformers"), quick)


if __name__ == "__main__":
    tyro.cli(main)
