"""What really travels: bytes counted at each send, beside the loopback interface's own counter.

    unshare --user --map-root-user --net python tests/benchmarks/traffic.py

Run it like this, in a network of its own, so that nobody else's messages are counted. Each of our
collectives moves `--mib` MiB among 4 ranks; "sent" is what the tracer counted at each send, over
all ranks, "formula" what the algorithm needs, and "wire" what the kernel says the loopback carried
(headers and acknowledgements included). The library's own collectives, of which nobody counts the
sends, are reported by the wire alone. "profiler" is what PyTorch's profiler says that a step of its
DDP and of its FSDP2 hands to collectives. Writes assets/benchmarks/traffic.json.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from _record import record  # first: it puts the course on the path
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from classroom.jail import raise_loopback
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import collectives as C
from minillm.parallel import launch
from minillm.parallel.group import Tracer, world

RANKS = 4
FORMULAS: dict[str, Callable[[int, int], float]] = {
    # of n ranks with k bytes each, over all ranks
    "all_reduce": lambda n, k: 2 * (n - 1) * k,
    "reduce_scatter": lambda n, k: (n - 1) * k,
    "all_gather": lambda n, k: (n - 1) * n * k,
    "broadcast": lambda n, k: (n - 1) * k,
    "reduce": lambda n, k: (n - 1) * k,
    "all_to_all": lambda n, k: (n - 1) * k,
    "parameter_server": lambda n, k: 2 * (n - 1) * k,
}


def carried() -> int:
    """Bytes that the loopback interface has sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("this machine has no loopback interface")


def wired(work: Callable[[], Any]) -> int:
    """What the wire carries while all ranks do `work`, over all of them."""
    dist.barrier()
    before = carried()
    dist.barrier()
    work()
    dist.barrier()
    return carried() - before


def native(name: str, x: Tensor) -> None:
    """The library's own collective."""
    if name == "all_reduce":
        dist.all_reduce(x.clone())
    elif name == "reduce_scatter":
        C.native_reduce_scatter(torch.empty_like(x.chunk(RANKS)[0]), x)
    else:
        C.native_all_gather(x.new_empty(RANKS * len(x)), x)


def measure(mib: float) -> dict[str, dict[str, float]]:
    """Bytes of each collective over all ranks; on each rank the same."""
    tracer = Tracer()
    group = world(tracer=tracer)
    x = torch.ones(int(mib * 2**20) // 4 // RANKS * RANKS)
    found: dict[str, dict[str, float]] = {}
    for name, formula in FORMULAS.items():
        tracer.clear()
        wire = wired(lambda name=name: getattr(C, name)(x, group))
        sent = torch.tensor(tracer.sent(), dtype=torch.int64)
        dist.all_reduce(sent)
        found[name] = {"formula": formula(RANKS, x.nbytes), "sent": sent.item(), "wire": wire}
    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        found[f"gloo {name}"] = {
            "formula": FORMULAS[name](RANKS, x.nbytes),
            "wire": wired(lambda name=name: native(name, x)),
        }
    return found


def payload(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, int]:
    """Bytes that one rank hands to collectives in a step of PyTorch's own, by its profiler."""
    model = LM(ModelConfig(512, 128, 4, 4, max_len=64), seed=0)
    weights = sum(p.nbytes for p in model.parameters())
    wrapped = wrap(model)
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            wrapped(tokens).logsumexp(-1).mean().backward()
    found = {"weights": weights}
    for event in profiler.events():
        if event.name.startswith("gloo:"):
            numbers = sum(torch.Size(shape).numel() for shape in event.input_shapes if shape)
            found[event.name] = found.get(event.name, 0) + 4 * numbers
    return found


def sharded(model: nn.Module) -> nn.Module:
    """PyTorch's FSDP2, block by block."""
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def payloads() -> dict[str, dict[str, int]]:
    """Of PyTorch's DDP and FSDP2."""
    return {"DDP": payload(DistributedDataParallel), "FSDP2": payload(sharded)}


@dataclass
class Options:
    """How much moves, and whether to print it only."""

    mib: float = 8.0
    quick: bool = False


def main(options: Options) -> None:
    """Measure, print as JSON, and write."""
    alone = [name for _, name in socket.if_nameindex()] == ["lo"]
    if alone:
        raise_loopback()  # a new network's is down
    rows = launch(measure, options.mib, world_size=RANKS, timeout=300)[0]
    found = {"mib": options.mib, "ranks": RANKS, "alone": alone, "collectives": rows}
    found["profiler"] = launch(payloads, world_size=RANKS, timeout=300, echo=False)[0]
    print(json.dumps(found))
    record("traffic", found, ("torch",), options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options))
