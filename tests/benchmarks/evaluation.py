"""Seconds for 1,000 prompts of different lengths: batched, one by one, and with transformers.

    python tests/benchmarks/evaluation.py [--quick]

The zoo's storyteller continues beginnings of 1,000 stories by at most 32 tokens, greedily. One by
one and transformers (left padding, same batches, same order) do a part of the prompts, between the
parts of the others, so that other work on the machine falls on all. Every text must be the same.
Writes assets/benchmarks/evaluation.json.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import transformers
import tyro
from _record import record

from minillm import zoo
from minillm.data import stories
from minillm.infer.batching import by_length, complete, pad_left, prompt_ids
from minillm.model.load import save_pretrained

NEW, BATCH, PARTS = 32, 64, 5


def beginnings(n: int) -> list[str]:
    """Beginnings of held-out stories, 0 to 400 letters long."""
    rng = random.Random(0)
    texts = (stories.sample(10**9 + i).text for i in range(n))
    return [text[: rng.randrange(400)] for text in texts]


def their_texts(model: torch.nn.Module, tokenizer: object, prompts: Sequence[str]) -> list[str]:
    """What transformers generates, in batches of prompts of about the same length."""
    end = tokenizer.special_ids["<|endoftext|>"]
    rows, texts = [prompt_ids(tokenizer, p) for p in prompts], [""] * len(prompts)
    for group in by_length(rows, BATCH):
        tokens, mask = pad_left([rows[i] for i in group], end)
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end}
        out = model.generate(tokens, attention_mask=mask.long(), pad_token_id=end, **settings)
        for i, row in zip(group, out[:, tokens.shape[1] :].tolist(), strict=True):
            texts[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


def main(quick: bool = False) -> None:
    """Run, print, write JSON. `quick`: 50 prompts, nothing written."""
    torch.set_flush_denormal(True)
    transformers.logging.set_verbosity_error()
    model, tokenizer = zoo.load("storyteller")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = beginnings(50 if quick else 1000)
    ours = partial(complete, model, tokenizer, max_new_tokens=NEW, batch=BATCH)
    runs: dict[str, Callable[[Sequence[str]], list[str]]] = {
        "batched": ours,
        "transformers": partial(their_texts, theirs, tokenizer),
        "one by one": lambda some: [ours([prompt])[0] for prompt in some],
    }
    share = {"batched": 1.0, "transformers": 1.0, "one by one": 0.1}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(prompts[:8])  # warm up
    said = runs["batched"](prompts)
    for _ in range(PARTS):
        for name, run in runs.items():
            some = prompts[: int(share[name] * len(prompts))]
            start = time.perf_counter()
            texts = run(some)
            seconds[name].append((time.perf_counter() - start) / len(some))
            if texts != said[: len(some)]:
                raise RuntimeError(f"{name} says something else")
    each = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time_each in each.items():
        print(f"{name:>12}: {time_each * 1000:7.1f} s for 1,000 prompts")
    result = {
        "new": NEW,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "prompt_tokens": sum(len(prompt_ids(tokenizer, p)) for p in prompts),
        "new_tokens": sum(len(tokenizer.encode(text)) for text in said),
        "seconds_for_1000": {name: 1000 * t for name, t in each.items()},
        "seconds_per_prompt": seconds,
    }
    record("evaluation", result, ("torch", "transformers"), quick)


if __name__ == "__main__":
    tyro.cli(main)
