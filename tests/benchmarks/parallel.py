"""Step times of our data, ZeRO and tensor parallelism beside PyTorch's own, on the same ranks.

    python tests/benchmarks/parallel.py [--quick] [--ranks 4]

All sides hold the same model (RoPE, RMSNorm, SwiGLU, untied embeddings, 4.2 M parameters), start
from the same weights and read the same tokens, on gloo ranks of one thread each. A step is forward,
backward, synchronization of gradients and PyTorch's own AdamW. The sides take turns, one step each,
all ranks together; a figure is the median of the time until the last rank is done, and the ratio is
the median of the ratios of neighboring steps. Our sides are run twice: over our rings of send and
recv, and over gloo's collectives ("native"). The losses of the last steps must agree. Writes
assets/benchmarks/parallel.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from _record import record  # first: it puts the course on the path
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel.data import DDP
from minillm.parallel.fsdp import FSDP
from minillm.parallel.group import Group, world
from minillm.parallel.tensor import parallelize
from minillm.parallel.vocabulary import vocabulary_cross_entropy
from minillm.parallel.zero import ShardedOptimizer

CFG = ModelConfig(
    *(2048, 256, 4, 8),
    max_len=256,
    position="rope",
    norm="rms",
    mlp="swiglu",
    tie_embeddings=False,
)
ROWS, LENGTH = 2, 128
"""of each rank where data is divided; ranks of one tensor-parallel model share theirs"""
LR = 1e-3
Step = Callable[[], float]


def rows(shared: bool) -> Tensor:
    """[b, t + 1], each rank's own, or the same for all."""
    seed = 0 if shared else dist.get_rank()
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(CFG.vocab_size, (ROWS, LENGTH + 1), generator=rng)


def adamw(parameters: object) -> torch.optim.Optimizer:
    """The same on all sides."""
    return torch.optim.AdamW(parameters, lr=LR, foreach=True)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """In nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def stepper(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    finish: Callable[[], None] = lambda: None,
    shared: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = mean_loss,
) -> Step:
    """One step of training, as a function without arguments that returns the loss."""
    tokens = rows(shared)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(forward(tokens[:, :-1]), tokens[:, 1:])
        value.backward()
        finish()
        optimizer.step()
        return value.item()

    return step


def our_ddp(group: Group) -> Step:
    """Our DDP."""
    model = DDP(LM(CFG, seed=0), group)
    return stepper(model, adamw(model.parameters()), model.finish_gradient_synchronization)


def torch_ddp(_: Group) -> Step:
    """PyTorch's DDP."""
    model = DistributedDataParallel(LM(CFG, seed=0))
    return stepper(model, adamw(model.parameters()))


def our_zero2(group: Group) -> Step:
    """Our ZeRO-2."""
    model = LM(CFG, seed=0)
    settings = {"stage": 2, "bucket_bytes": 4 * 2**20, "lr": LR, "foreach": True}
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, group, **settings)
    return stepper(model, optimizer, optimizer.finish_gradient_synchronization)


def our_zero3(group: Group) -> Step:
    """Our FSDP, block by block."""
    model = FSDP(LM(CFG, seed=0), group)
    return stepper(model, adamw(model.parameters()), model.finish_gradient_synchronization)


def fsdp2(_: Group, reshard: bool = True) -> Step:
    """PyTorch's FSDP2, block by block."""
    model = LM(CFG, seed=0)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    return stepper(model, adamw(model.parameters()))


def fsdp2_stage2(group: Group) -> Step:
    """FSDP2 that keeps parameters whole between forward and backward: ZeRO-2's traffic."""
    return fsdp2(group, reshard=False)


def our_tensor(group: Group) -> Step:
    """Our tensor parallelism, the vocabulary cut too."""
    model = parallelize(LM(CFG, seed=0), group)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return vocabulary_cross_entropy(logits, targets, CFG.vocab_size, group).mean()

    return stepper(model, adamw(model.parameters()), shared=True, loss=loss)


def dtensor(_: Group) -> Step:
    """PyTorch's tensor parallelism by DTensor, with its parallel loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = LM(CFG, seed=0)
    plan = {"tokens": RowwiseParallel(input_layouts=Replicate())}
    for i in range(CFG.n_layers):
        plan |= {f"blocks.{i}.attn.{name}": ColwiseParallel() for name in "qkv"}
        plan |= {f"blocks.{i}.mlp.{name}": ColwiseParallel() for name in ("up", "gate")}
        plan |= {f"blocks.{i}.{name}": RowwiseParallel() for name in ("attn.out", "mlp.down")}
    plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    model = parallelize_module(model, mesh, plan)
    # mixed lists of DTensors and tensors (the norms) cannot share one foreach call
    whole = [p for p in model.parameters() if not hasattr(p, "placements")]
    cut = [p for p in model.parameters() if hasattr(p, "placements")]
    optimizer = adamw([{"params": cut}, {"params": whole}])
    tokens = rows(shared=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with loss_parallel():
            value = mean_loss(model(tokens[:, :-1]), tokens[:, 1:])
            value.backward()
        optimizer.step()
        return value.full_tensor().item()

    return step


RACES: dict[str, tuple[Callable[[Group], Step], Callable[[Group], Step]]] = {
    "DDP": (our_ddp, torch_ddp),
    "ZeRO-2": (our_zero2, fsdp2_stage2),
    "ZeRO-3": (our_zero3, fsdp2),
    "TP": (our_tensor, dtensor),
}


def timed(step: Step) -> tuple[float, float]:
    """Seconds until the last rank is done, and the loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = step()
    dist.barrier()
    return time.perf_counter() - start, loss


def race(name: str, rounds: int) -> dict[str, object]:
    """Our two sides and PyTorch's, in turns."""
    ours, theirs = RACES[name]
    sides = {
        "ring": ours(world()),
        "native": ours(world(algorithm="native")),
        "torch": theirs(world()),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, float] = {}
    for turn in range(rounds + 3):
        for side, step in sides.items():
            seconds, losses[side] = timed(step)
            if turn >= 3:  # the first steps allocate, and learn the order
                times[side].append(seconds)
    if max(losses.values()) - min(losses.values()) > 1e-3:
        raise RuntimeError(f"the sides of {name} have different losses: {losses}")
    medians = {side: statistics.median(x) for side, x in times.items()}
    ratios = {
        f"{side} over torch": statistics.median(
            a / b for a, b in zip(times[side], times["torch"], strict=True)
        )
        for side in ("ring", "native")
    }
    return {"seconds": medians, **ratios, "loss": losses["ring"], "runs": times}


@dataclass
class Options:
    """How many ranks and rounds."""

    ranks: int = 4
    rounds: int = 40
    quick: bool = False


def main(options: Options) -> None:
    """Race, print, and write."""
    found: dict[str, object] = {"ranks": options.ranks}
    for name in RACES:
        rounds = 3 if options.quick else options.rounds
        row = launch(race, name, rounds, world_size=options.ranks, timeout=900, echo=False)[0]
        seconds = "  ".join(f"{k} {v * 1e3:7.1f} ms" for k, v in row["seconds"].items())
        ratios = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if "over" in k)
        print(f"{name:8} {seconds}   {ratios}", flush=True)
        found[name] = row
    record("parallel", found, ("torch",), options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options))
