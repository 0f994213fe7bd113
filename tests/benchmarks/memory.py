"""What training really keeps in memory beside what `minillm.accounting.memory` predicts.

Run `python tests/benchmarks/memory.py [--quick]` from the repository root. Each config gets a
process of its own, which trains one step. Parameters, gradients and Adam's moments are summed over
their storages, activations over the storages that autograd saves (saved-tensor hooks, parameters
excluded): these must equal the prediction to the byte. The memory that the process really holds
(RssAnon) is reported beside them: at this size it is mostly libraries and what the allocator keeps.
Prints a table and writes assets/benchmarks/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from _record import record

LLAMA = {"norm": "rms", "position": "rope", "mlp": "swiglu", "tie_embeddings": False}


@dataclass(frozen=True)
class Case:
    """One config, and how it is trained."""

    d_model: int
    n_layers: int
    batch: int
    precision: str = "fp32"
    seq: int = 256
    other: dict[str, object] = field(default_factory=dict)


CASES = {
    "default, 1 M, fp32": Case(128, 4, 8),
    "default, 1 M, bf16": Case(128, 4, 8, "bf16"),
    "default, 10 M, fp32": Case(320, 7, 8),
    "default, 10 M, bf16": Case(320, 7, 8, "bf16"),
    "default, 10 M, explicit attention": Case(320, 7, 8, other={"impl": "reference"}),
    "Llama-like, 10 M, fp32": Case(320, 7, 8, other=LLAMA),
    "Llama-like, 10 M, bf16": Case(320, 7, 8, "bf16", other=LLAMA),
    "Llama-like, grouped, 10 M, fp32": Case(320, 7, 8, other=LLAMA | {"n_kv_heads": 2}),
    "default, 10 M, rows of 1,024": Case(320, 7, 2, seq=1024),
}


def rss_anon() -> int:
    """Anonymous memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is only counted on Linux, in /proc/self/status")


def measure(case: Case) -> dict[str, object]:
    """One training step: bytes of each kind, measured and predicted."""
    import torch

    from minillm.accounting import memory, parameters
    from minillm.config import ModelConfig
    from minillm.model import LM
    from minillm.train.losses import cross_entropy
    from minillm.train.optim import AdamW

    cfg = ModelConfig(
        vocab_size=2048,
        d_model=case.d_model,
        n_layers=case.n_layers,
        n_heads=case.d_model // 32,
        max_len=case.seq,
        **case.other,
    )
    before = rss_anon()
    model = LM(cfg, seed=0).to({"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision])
    optimizer = AdamW(model.parameters(), lr=1e-3)
    rows = torch.randint(2048, (case.batch, case.seq + 1))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def held(tensors: list[torch.Tensor]) -> int:
        storages = [x.untyped_storage() for x in tensors]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = cross_entropy(model(inputs), targets)
    activations, at_peak = held(saved), rss_anon()
    saved.clear()
    loss.backward()
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    states = memory.states(parameters.count(cfg).total, case.precision)
    return {
        "parameters": parameters.count(cfg).total,
        "measured": {
            "parameters": held(list(model.parameters())),
            "gradients": held([p.grad for p in model.parameters()]),
            "optimizer": held(moments),
            "activations": activations,
        },
        "predicted": {
            "parameters": states.parameters,
            "gradients": states.gradients,
            "optimizer": states.optimizer,
            "activations": memory.activations(cfg, case.batch, case.seq, case.precision),
        },
        "RssAnon before the model": before,
        "RssAnon after the forward pass": at_peak,
        "RssAnon after the step": rss_anon(),
    }


def in_subprocess(name: str) -> dict[str, object]:
    """One case in a fresh process, which shares no memory with the others."""
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(quick: bool = False, case: str | None = None) -> None:
    """Measure; `--quick` takes two cases. `--case` is one of them, used internally."""
    if case is not None:
        print(json.dumps(measure(CASES[case])))
        return
    kinds = ("parameters", "gradients", "optimizer", "activations")
    print(f"{'bytes':>33}", *(f"{kind:>12}" for kind in (*kinds, "RssAnon")), flush=True)
    result = {}
    for name in list(CASES)[: 2 if quick else None]:
        row = result[name] = in_subprocess(name)
        row["exact"] = row["measured"] == row["predicted"]
        grown = row["RssAnon after the step"] - row["RssAnon before the model"]
        numbers = [*(row["measured"][kind] for kind in kinds), grown]
        verdict = "" if row["exact"] else f"predicted {row['predicted']}"
        print(f"{name:>33}", *(f"{n:>12,}" for n in numbers), verdict, flush=True)
    record("memory", result, ("torch",), quick)
    if not all(row["exact"] for row in result.values()):
        raise ValueError("a prediction is wrong")


if __name__ == "__main__":
    tyro.cli(main)
