"""What LoRA saves in training, and what it and others cost in generation, beside the whole model.

    python tests/benchmarks/lora.py [--quick] [--threads 2]

Training: a step of full fine-tuning, of LoRA on the queries' and values' matrices, and of LoRA on
every matrix of the blocks, all with the course's loop, loss and AdamW on the same random rows. The
sides take turns, one step each; a figure is a median of steps, and a ratio the median of the ratios
of neighboring steps, so that other work on the machine falls on all of them. Beside it stand the
FLOPs of a step, counted by PyTorch, and the bytes of Adam's moments, which must be what
`minillm.accounting.memory.states` says.

Generation: tokens per second of the base, of LoRA merged and not, and of other methods, by greedy
`generate` with a cache, in turns as well. Writes assets/benchmarks/lora.json.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import tyro
from _record import record
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minillm.accounting.memory import states
from minillm.config import ModelConfig
from minillm.infer import generate
from minillm.model import LM
from minillm.peft.adapters import AdapterConfig, apply_adapter
from minillm.peft.ia3 import apply_ia3
from minillm.peft.inject import trainable
from minillm.peft.llama_adapter import apply_llama_adapter
from minillm.peft.lora import LoRAConfig, apply_lora, remove_lora
from minillm.peft.lora import merge as merge_lora
from minillm.peft.prefix import PrefixConfig, apply_prefix
from minillm.peft.prompt import PromptConfig, apply_prompt
from minillm.train import train
from minillm.train.loop import next_token_loss
from minillm.train.optim import AdamW

VOCAB, ROWS, LENGTH, LR, RANK = 4096, 8, 256, 3e-4, 8
SIZES = {"1M": (128, 4, 4), "10M": (320, 7, 5)}
"""width, layers, heads; the small one is the storyteller's"""
EVERY = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
SIDES: dict[str, tuple[str, ...] | None] = {
    "full": None,
    "LoRA q v": ("attn.q", "attn.v"),
    "LoRA all": EVERY,
}
Batch = tuple[Tensor, Tensor]


def base(size: tuple[int, int, int], impl: str = "auto") -> LM:
    """The storyteller's kind of model: RoPE, RMSNorm, SwiGLU, tied embeddings."""
    kind = {"position": "rope", "norm": "rms", "mlp": "swiglu", "max_len": 2 * LENGTH}
    return LM(ModelConfig(VOCAB, *size, **kind, impl=impl), seed=0)


def side(name: str, size: tuple[int, int, int], impl: str = "auto") -> LM:
    """A model of which everything is trained, or LoRA's part."""
    model, targets = base(size, impl), SIDES[name]
    return (
        model if targets is None else apply_lora(model, LoRAConfig(RANK, targets=targets), seed=0)
    )


def batches() -> Iterator[Batch]:
    """The same random rows for every side, forever."""
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=rng) for _ in range(8)]
    return itertools.cycle((row[:, :-1], row[:, 1:]) for row in rows)


def flops(name: str, size: tuple[int, int, int]) -> int:
    """Of one forward and backward pass, counted by PyTorch on the explicit form of attention."""
    model = side(name, size, "reference")
    with FlopCounterMode(display=False) as counter:
        next_token_loss(model, *next(batches()))[0].backward()
    return counter.get_total_flops()


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, its counters of steps left out."""
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor) and x.ndim)


def neighbors(runs: dict[str, list[float]], reference: str) -> dict[str, float]:
    """Median of the ratios to the reference's run of the same turn."""
    return {
        name: statistics.median(a / b for a, b in zip(times, runs[reference], strict=True))
        for name, times in runs.items()
    }


def training(size: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Steps of all sides, in turns."""
    models = {name: side(name, size) for name in SIDES}
    optimizers = {
        name: AdamW(trainable(model), lr=LR, fused=True) for name, model in models.items()
    }
    loops = {
        name: train(model, batches(), optimizers[name], clip=1.0) for name, model in models.items()
    }
    runs: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(rounds + 2):
        for name, steps in loops.items():
            start = time.perf_counter()
            losses[name].append(next(steps).loss)
            if turn >= 2:  # the first steps allocate
                runs[name].append(time.perf_counter() - start)
    if max(x[0] for x in losses.values()) - min(x[0] for x in losses.values()) > 1e-4:
        raise RuntimeError(f"the sides do not start from one function: {losses}")
    counts = {name: sum(p.numel() for p in trainable(model)) for name, model in models.items()}
    measured = {name: moments(optimizer) for name, optimizer in optimizers.items()}
    predicted = {name: states(n, "fp32").optimizer for name, n in counts.items()}
    if measured != predicted:
        raise RuntimeError(f"Adam keeps {measured} bytes, accounting says {predicted}")
    counted = {name: flops(name, size) for name in SIDES}
    return {
        "parameters": sum(p.numel() for p in models["full"].parameters()),
        "trained": counts,
        "optimizer_bytes": measured,
        "predicted_optimizer_bytes": predicted,
        "seconds": {name: statistics.median(times) for name, times in runs.items()},
        "time_over_full": neighbors(runs, "full"),
        "flops_over_full": {name: n / counted["full"] for name, n in counted.items()},
        "runs": runs,
    }


def shaken(model: LM) -> LM:
    """With what is attached moved away from the start, as if it had been trained."""
    rng = torch.Generator().manual_seed(1)
    for p in trainable(model):
        p.data += 0.02 * torch.randn(p.shape, generator=rng)
    return model


def adapted(size: tuple[int, int, int]) -> dict[str, LM]:
    """Models that generate, by the way they were adapted."""
    bare = base(size).eval()
    lora = shaken(apply_lora(copy.deepcopy(bare), LoRAConfig(RANK, targets=EVERY), seed=0))
    in_place, merged = copy.deepcopy(lora), remove_lora(copy.deepcopy(lora), keep=True)
    merge_lora(in_place)
    apply: dict[str, Callable[[LM], LM]] = {
        "(IA)3": apply_ia3,
        "serial adapters": lambda m: apply_adapter(m, AdapterConfig(16)),
        "parallel adapters": lambda m: apply_adapter(m, AdapterConfig(16, parallel=True)),
        "prefix of 16": lambda m: apply_prefix(m, PrefixConfig(16)),
        "prompt of 16": lambda m: apply_prompt(m, PromptConfig(16)),
        "LLaMA-Adapter": apply_llama_adapter,
    }
    others = {name: shaken(attach(copy.deepcopy(bare))) for name, attach in apply.items()}
    models = {"base": bare, "LoRA merged": merged, "LoRA merged in place": in_place}
    return {**models, "LoRA": lora, **others}


def generation(size: tuple[int, int, int], batch: int, new: int, rounds: int) -> dict[str, object]:
    """Seconds for `new` tokens, in turns."""
    models = adapted(size)
    prompts = torch.randint(VOCAB, (batch, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = {name: models[name](prompts) for name in models if name.startswith("LoRA")}
    for name, x in logits.items():
        torch.testing.assert_close(x, logits["LoRA"], rtol=0, atol=1e-4, msg=name)
    runs: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in generate(model, prompts, new, temperature=0):
                pass
            if turn:  # the first one warms up
                runs[name].append(time.perf_counter() - start)
    ratios = {name: 1 / x for name, x in neighbors(runs, "base").items()}
    rates = {name: batch * new / statistics.median(times) for name, times in runs.items()}
    return {"batch": batch, "tokens_per_s": rates, "speed_over_base": ratios, "runs": runs}


def main(quick: bool = False, threads: int = 2, rounds: int = 25) -> None:
    """Run, print two tables, write JSON. `quick`: few rounds of the small model, not written."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    rounds, new = (2, 16) if quick else (rounds, 112)
    sizes = dict(list(SIZES.items())[: 1 if quick else None])
    tokens, trained, generated = ROWS * LENGTH, {}, []
    print(f"a step of {tokens} tokens, median of {rounds}, {threads} threads, rank {RANK}")
    for name, size in sizes.items():
        row = trained[name] = training(size, rounds)
        for kind in SIDES:
            print(
                f"{name:>5} {kind:>9} {row['seconds'][kind] * 1e3:7.1f} ms  "
                f"time {row['time_over_full'][kind]:.2f}  FLOPs {row['flops_over_full'][kind]:.2f}"
                f"  {row['trained'][kind]:>10,} trained  {row['optimizer_bytes'][kind]:>11,} bytes"
            )
    print(f"\ntokens/s, {new} new tokens, greedy")
    for (name, size), batch in itertools.product(sizes.items(), (1, 8)):
        row = generation(size, batch, new, max(2, rounds // 3))
        generated.append({"model": name, **row})
        for kind, rate in row["tokens_per_s"].items():
            ratio = row["speed_over_base"][kind]
            print(f"{name:>5} batch {batch} {kind:>20} {rate:8,.0f}  {ratio:.2f} of the base's")
    setup = {"threads": threads, "rounds": rounds, "rows": ROWS, "length": LENGTH, "rank": RANK}
    result = {**setup, "new": new, "training": trained, "generation": generated}
    record("lora", result, ("torch",), quick)


if __name__ == "__main__":
    tyro.cli(main)
