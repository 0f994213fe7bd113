"""Which cut of a model is fastest: all legal plans, simulated and ranked.

best = search(cfg, gpus=3072, batch=3072, cluster=SELENE)[0]
best.plan, best.seconds, best.bytes
"""

# K devices of a pipeline, v chunks a device, M micro-batches, n copies of the data

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from minillm.accounting import memory
from minillm.config import ModelConfig
from minillm.parallel.costs import Cluster, Plan, check, stage_parameters
from minillm.parallel.simulate import simulate


class Ranked(NamedTuple):
    """A plan that fits, what a step takes, and what the fullest device holds."""

    plan: Plan
    seconds: float
    teraflops: float
    bytes: float


def chunks_in_flight(plan: Plan, batch: int, device: int) -> int:
    """The most chunks of a device whose backward is still to come: `actions.in_flight`, as formula.

    >>> chunks_in_flight(Plan(pp=4), batch=8, device=0)
    4
    >>> chunks_in_flight(Plan(pp=4, schedule="interleaved", chunks=2), batch=8, device=0)
    11
    """
    K, v, M, ahead = plan.pp, plan.chunks, plan.micro_batches(batch), plan.pp - 1 - device
    interleaved = 2 * ahead + (v - 1) * K + 1 if v > 1 else ahead + 1
    most = {"naive": 1, "gpipe": M, "1f1b": ahead + 1, "zb-h1": K, "interleaved": interleaved}
    return min(most[plan.schedule], v * M)


def device_bytes(cfg: ModelConfig, plan: Plan, batch: int, seq: int | None = None) -> float:
    """Bytes on the fullest device: states, activations in flight, and what a pass works with.

    - states: 2 + 2 + 12 bytes a parameter, shared out by ZeRO (`accounting.memory.zero`)
    - activations: `accounting.memory.layer_activations` of a chunk's blocks, for each in flight
    - one block's, unrecomputed, while its backward runs, and the whole blocks that ZeRO 3 gathered
      (one in use, one on its way)
    - logits on the last device: in 16 bits, and in 32 with their exponentials

    Raises ValueError for what `costs.check` refuses.
    """
    check(cfg, plan, batch)
    seq, K = cfg.max_len if seq is None else seq, plan.pp
    held = stage_parameters(cfg, plan)
    shape = (plan.micro_batch, seq, cfg.d_model, cfg.n_heads, plan.tp, plan.sequence_parallel)
    kept = memory.layer_activations(*shape, recompute=plan.recompute)
    whole = memory.layer_activations(*shape)
    blocks = cfg.n_layers // (K * plan.chunks)
    logits = 10.0 * plan.micro_batch * seq * cfg.vocab_size / plan.tp

    def on(device: int) -> float:
        states = memory.zero(sum(held[device::K]), plan.dp, plan.zero)
        gathered = 2 * 2 * min(held) / blocks if plan.zero == 3 else 0.0
        flying = chunks_in_flight(plan, batch, device) * blocks * kept
        return states + gathered + flying + (whole - kept) + (logits if device == K - 1 else 0.0)

    return max(on(device) for device in {0, min(1, K - 1), K - 1})  # fewer in flight further on


def legal(
    cfg: ModelConfig,
    gpus: int,
    batch: int,
    *,
    tensor: Iterable[int] = (1, 2, 4, 8),
    micro_batches: Iterable[int] = (1, 2, 4, 8, 16),
    chunks: Iterable[int] = (1, 2, 3, 4),
    zero: Iterable[int] = (0, 1, 2, 3),
    recompute: Iterable[str] = ("none", "selective", "full"),
    like: Plan | None = None,
) -> Iterator[Plan]:
    """All plans on exactly `gpus` GPUs that divide heads, blocks and batch; memory is not asked.

    `micro_batches` are rows of one, not their number. What is not varied (overlap, order, sequence
    parallelism) is that of `like`; the schedule is 1F1B, or interleaved with several chunks. Left
    out is what only costs: ZeRO without copies of the data, and ZeRO 2 and 3 in a pipeline, where
    gradients or weights would travel for every micro-batch.
    """
    like = Plan() if like is None else like
    kept = {k: getattr(like, k) for k in ("sequence_parallel", "overlap", "order")}
    chunks, zero, recompute = tuple(chunks), tuple(zero), tuple(recompute)
    sizes = tuple(micro_batches)
    for tp in tensor:
        for pp in (k for k in range(1, cfg.n_layers + 1) if gpus % (tp * k) == 0):
            dp = gpus // (tp * pp)
            for size in sizes:
                for v in chunks if pp > 1 else {1} & set(chunks):
                    name = "interleaved" if v > 1 else "1f1b"
                    cut = Plan(dp, tp, pp, size, name, v)
                    plan = replace(cut, **kept)
                    try:
                        check(cfg, plan, batch)
                    except ValueError:
                        continue
                    for stage in zero:
                        if (stage and dp == 1) or (stage > 1 and pp > 1):
                            continue
                        for kind in recompute:
                            yield replace(plan, zero=stage, recompute=kind)


def search(
    cfg: ModelConfig,
    gpus: int,
    batch: int,
    cluster: Cluster,
    seq: int | None = None,
    reserve: float = 0.1,
    **space: Any,
) -> list[Ranked]:
    """All legal plans that fit into memory, fastest first.

    `reserve` is the share of a device's memory that is left to buffers, fragments and the driver;
    `space` narrows or widens `legal`. Times are `simulate`'s without a timeline. Raises ValueError
    if no plan fits.
    """
    room, found, least = cluster.hardware.memory * (1 - reserve), [], float("inf")
    for plan in legal(cfg, gpus, batch, **space):
        n_bytes = device_bytes(cfg, plan, batch, seq)
        least = min(least, n_bytes)
        if n_bytes <= room:
            step = simulate(cfg, plan, cluster, batch, seq, timeline=False)
            found.append(Ranked(plan, step.seconds, step.teraflops, n_bytes))
    if not found:
        raise ValueError(
            f"no plan for gpus={gpus}, batch={batch} fits into {room / 1e9:.1f} GB a device: the "
            f"smallest needs {least / 1e9:.1f} GB"
        )
    return sorted(found, key=lambda r: (r.seconds, r.bytes))


def rank(plans: Sequence[Ranked], plan: Plan) -> int:
    """How many plans are faster, and one: 1 for the fastest; ValueError if it is not among them."""
    seconds = next((r.seconds for r in plans if r.plan == plan), None)
    if seconds is None:
        raise ValueError(f"{plan} is not among the {len(plans)} plans that fit")
    return 1 + sum(r.seconds < seconds for r in plans)
