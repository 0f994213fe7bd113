"""Training speed beside a plain GPT-2 of PyTorch's own modules and beside `transformers`.

    python tests/benchmarks/training.py [--quick] [--threads 2]

All sides train the same shape (GPT-2: learned positions, LayerNorm, GELU, biases, tied embeddings,
no dropout) on the same random tokens, rows of 256, with gradients clipped to norm 1. bf16 means
autocast, with the weights in fp32, on every side. The sides take turns, one step each, and each
figure is a median of steps, so that other work on the machine falls on all of them. "where" is the
share of our step that goes to each part, by PyTorch's profiler. Writes
assets/benchmarks/training.json.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import tyro
from _record import record
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config, GPT2LMHeadModel

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.recipes.storyteller import loss as fused_loss
from minillm.train import train
from minillm.train.optim import AdamW, decay_groups

VOCAB, ROWS, LENGTH, LR = 4096, 8, 256, 3e-4
SIZES = {"1M": (128, 3, 4), "10M": (320, 7, 5)}
"""width, layers, heads"""


class PlainBlock(nn.Module):
    """A block as anyone would write it with PyTorch's modules."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc, self.fc_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(d, dim=2)
        q, k, v = (y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.fc_out(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """GPT-2, independent of the course."""

    def __init__(self, d: int, layers: int, heads: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, d), nn.Embedding(LENGTH, d)
        self.blocks = nn.Sequential(*(PlainBlock(d, heads) for _ in range(layers)))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, VOCAB, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        return self.head(self.ln_f(self.blocks(x)))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The same random rows for every side, forever."""
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=rng) for _ in range(8)]
    return itertools.cycle((row[:, :-1], row[:, 1:]) for row in rows)


def by_hand(model: nn.Module, bf16: bool, loss_of: Callable[..., Tensor]) -> Iterator[float]:
    """The usual loop with PyTorch's optimizer; yields the loss of each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    for inputs, targets in batches():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def ours(size: tuple[int, int, int], bf16: bool) -> tuple[nn.Module, Iterator[float]]:
    """The course's model, loss, optimizer and loop."""
    d, layers, heads = size
    cfg = ModelConfig(VOCAB, d, layers, heads, max_len=LENGTH, bias=True, mlp="gelu_tanh")
    model = LM(cfg, seed=0)
    optimizer = AdamW(decay_groups(model, 0.1), lr=LR, fused=True)
    steps = train(
        *(model, batches(), optimizer),
        clip=1.0,
        autocast=torch.bfloat16 if bf16 else None,
        loss_fn=fused_loss,
    )
    return model, (step.loss for step in steps)


def plain(size: tuple[int, int, int], bf16: bool) -> tuple[nn.Module, Iterator[float]]:
    """PyTorch's modules."""

    def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    torch.manual_seed(0)
    model = PlainGPT2(*size)
    return model, by_hand(model, bf16, loss_of)


def hugging_face(size: tuple[int, int, int], bf16: bool) -> tuple[nn.Module, Iterator[float]]:
    """transformers' GPT-2; its labels are shifted inside, so the last target is not counted."""

    def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        del targets
        return model(inputs, labels=inputs).loss

    d, layers, heads = size
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": d}
    cfg = GPT2Config(**shape, n_layer=layers, n_head=heads, use_cache=False, **off)
    model = GPT2LMHeadModel(cfg)
    return model, by_hand(model, bf16, loss_of)


def compare(size: tuple[int, int, int], bf16: bool, rounds: int) -> dict[str, object]:
    """Seconds a step of each side, in turns."""
    makers = {"ours": ours, "plain": plain, "transformers": hugging_face}
    sides = {name: make(size, bf16) for name, make in makers.items()}
    counts = {
        name: sum(p.numel() for p in model.parameters()) for name, (model, _) in sides.items()
    }
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the sides differ in size: {counts}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, (_, steps) in sides.items():
            start = time.perf_counter()
            loss = next(steps)
            if turn >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - start)
            if turn == 0 and abs(loss - 8.32) > 0.2:
                raise RuntimeError(f"{name} starts with a loss of {loss}, not log 4096")
    found = {name: statistics.median(values) for name, values in times.items()}
    return {
        "parameters": counts["ours"],
        "dtype": "bf16" if bf16 else "fp32",
        "tokens_per_s": {name: ROWS * LENGTH / value for name, value in found.items()},
        "over_plain": found["plain"] / found["ours"],
        "over_transformers": found["transformers"] / found["ours"],
        "where": where(size, bf16),
        "runs": times,
    }


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("attention",),
    "norms": ("layer_norm",),
    "activation": ("gelu",),
    "optimizer and clipping": ("_fused_adam", "_foreach", "aten::linalg_vector_norm"),
    "softmax and loss": ("softmax", "aten::exp_", "aten::scatter", "aten::gather", "nll"),
    "copies and casts": ("aten::copy_", "aten::fill_", "aten::empty"),
    "sums and products": ("aten::add", "aten::mul", "aten::sum"),
}


def where(size: tuple[int, int, int], bf16: bool) -> dict[str, float]:
    """Shares of the time of our step by kind of operation; the rest is mostly Python."""
    _, steps = ours(size, bf16)
    for _ in range(2):
        next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("steps"):
        for _ in range(3):
            next(steps)
    shares = dict.fromkeys([*KINDS, "the rest"], 0.0)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    for event in events:
        kinds = [kind for kind, names in KINDS.items() if any(n in event.key for n in names)]
        shares[kinds[0] if kinds else "the rest"] += event.self_cpu_time_total / total
    return {kind: round(share, 3) for kind, share in shares.items()}


def main(quick: bool = False, threads: int = 2, rounds: int = 15) -> None:
    """Run, print a table, write JSON. `quick`: three rounds of the small model, nothing written."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    rounds = 3 if quick else rounds
    print(f"tokens/s, median of {rounds} steps of {ROWS * LENGTH} tokens, {threads} threads\n")
    print(f"{'':>11} {'ours':>9} {'plain':>9} {'ratio':>6} {'transformers':>13} {'ratio':>6}")
    result = []
    for name, size in list(SIZES.items())[: 1 if quick else None]:
        for bf16 in (False, True):
            row = compare(size, bf16, rounds)
            result.append(row)
            rate = row["tokens_per_s"]
            print(
                f"{name:>5} {row['dtype']:>5} {rate['ours']:>9,.0f} {rate['plain']:>9,.0f} "
                f"{row['over_plain']:>6.2f} {rate['transformers']:>13,.0f} "
                f"{row['over_transformers']:>6.2f}"
            )
            print(f"{'':>11} {row['where']}")
    setup = {"threads": threads, "rounds": rounds, "rows": ROWS, "length": LENGTH}
    record("training", {**setup, "training": result}, ("torch", "transformers"), quick)


if __name__ == "__main__":
    tyro.cli(main)
