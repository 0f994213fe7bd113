"""A training step on many devices in discrete events: no device is needed, only what one can do.

    step = simulate(cfg, Plan(dp=6, tp=8, pp=64), SELENE, batch=3072, seq=2048)
    step.seconds, step.teraflops, step.timeline

The schedules are those of `minillm.parallel.schedules`, the same objects that `Pipeline` carries
out. What an action takes comes from a roofline (compute), from α-β links (messages inside of a
machine and between machines), and from three shares of what the data sheets promise (`Cluster`).
Ranks of one tensor group and copies of one stage do the same at the same time, so that one of them
stands for all: 3,072 GPUs are 64 lists of actions.
"""

# K devices of one pipeline, v chunks a device, M micro-batches

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minillm.accounting import flops
from minillm.config import ModelConfig
from minillm.parallel.actions import Action, Timed, replay
from minillm.parallel.costs import (
    SELENE,
    Cluster,
    Pass,
    Plan,
    block,
    check,
    collective,
    head,
    message,
    stage_parameters,
)
from minillm.parallel.schedules import schedule
from minillm.paths import ASSETS

__all__ = ["SELENE", "Cluster", "Plan", "Run", "Step", "check", "fit", "published", "simulate"]


@dataclass(frozen=True)
class Step:
    """One step, simulated."""

    seconds: float
    teraflops: float
    """10¹² FLOP/s a GPU, repeated forward passes included, as Narayanan et al. count"""
    compute: float
    """seconds of one device (the busiest) in matrix products and the passes over memory"""
    tensor: float
    """the same device's seconds in collectives inside of blocks"""
    pipeline: float
    """its seconds in messages to other stages"""
    data: float
    """its seconds in gradients and weights that nothing hides"""
    optimizer: float
    timeline: list[Timed]
    """all devices of one pipeline, by `replay`; empty if it was not asked for"""

    @property
    def idle(self) -> float:
        """The share of the time in which the busiest device waits."""
        busy = self.compute + self.tensor + self.pipeline + self.data + self.optimizer
        return 1 - busy / self.seconds


SHARES = ("matmul", "stream", "wire")


class Run(NamedTuple):
    """A published measurement."""

    name: str
    cfg: ModelConfig
    plan: Plan
    batch: int
    seq: int
    teraflops: float


# -- one step ------------------------------------------------------------------------------------


def gradients(
    cfg: ModelConfig, plan: Plan, cluster: Cluster, stage: float, last_backward: float, M: int
) -> float:
    """Seconds after the last backward for a stage's gradients and weights between copies.

    All-reduce, or reduce-scatter and all-gather (ZeRO 1), of 2 bytes a parameter; ZeRO 2 and 3
    scatter gradients for every micro-batch, and ZeRO 3 gathers weights twice for each. With
    `overlap` they go block by block as the last backward proceeds: what is left is what it does not
    cover, at least the last block's.
    """
    rounds = {0: 2, 1: 2, 2: 1 + M, 3: 3 * M}[plan.zero]
    travel = collective(plan, "data", cluster, 2 * stage, rounds)
    if not plan.overlap:
        return travel
    n, passes = cfg.n_layers / (plan.pp * plan.chunks), 1 if plan.zero < 2 else M
    covered = passes * last_backward * (1 - 1 / n)
    return max(travel / n / passes, travel - covered)


def simulate(
    cfg: ModelConfig,
    plan: Plan,
    cluster: Cluster,
    batch: int,
    seq: int | None = None,
    timeline: bool = True,
) -> Step:
    """One training step of `batch` rows of `seq` tokens (None: `cfg.max_len`).

    With `timeline=False` no events are replayed; the end is then

        M · (forward and backward of a micro-batch on the busiest device) + 1/v · (on all others)

    and the update, which is exact for 1F1B where stages take equally long, and what a search over
    thousands of plans can afford (other schedules are replayed anyway). A device does not compute
    while it sends, as in the published system. Raises ValueError for what `check` refuses.
    """
    check(cfg, plan, batch)
    seq, v = cfg.max_len if seq is None else seq, plan.chunks
    M, stages = plan.micro_batches(batch), plan.pp * v
    share = cfg.n_layers / stages
    blocks = tuple(Pass().plus(p, share) for p in block(cfg, plan, cluster, seq))
    final = head(cfg, plan, cluster, seq)
    passes = [blocks] * stages
    passes[-1] = tuple(a.plus(b) for a, b in zip(blocks, final, strict=True))
    size = 2.0 * plan.micro_batch * seq * cfg.d_model
    sends = [message(plan, cluster, s % plan.pp, size) for s in range(stages - 1)] + [0.0]
    held = stage_parameters(cfg, plan)
    travel = [gradients(cfg, plan, cluster, held[s], sum(passes[s][1]), M) for s in range(stages)]
    # Adam reads and writes weights and moments in 32 bits, reads a gradient, writes 16-bit weights
    adam = [28 * n / (plan.dp if plan.zero else 1) / cluster.reached.bandwidth for n in held]

    def seconds(action: Action) -> float:
        what, _, s, _ = action
        if what == "update":
            return travel[s] + adam[s]
        if what == "forward":
            return sum(passes[s][0]) + sends[s]
        halves = 1.0 if what == "backward" else 0.5
        back = sends[s - 1] if s and what != "backward_weight" else 0.0
        return halves * sum(passes[s][1]) + back

    own = [range(k, stages, plan.pp) for k in range(plan.pp)]
    once = [
        sum(seconds(Action(what, 0, s)) for s in mine for what in ("forward", "backward"))
        for mine in own
    ]
    busiest = max(range(plan.pp), key=once.__getitem__)
    events = []
    if timeline or plan.schedule not in ("1f1b", "interleaved"):
        events = replay(schedule(plan.schedule, plan.pp, M, v), seconds)
        end = max(e.end for e in events)
    else:
        updates = max(sum(travel[s] + adam[s] for s in mine) for mine in own)
        end = M * once[busiest] + (sum(once) - once[busiest]) / v + updates
    mine = own[busiest]
    done = flops.training(cfg, batch, seq, recompute=plan.recompute).total
    return Step(
        seconds=end,
        teraflops=done / end / plan.gpus / 1e12,
        compute=M * sum(p.compute for s in mine for p in passes[s]),
        tensor=M * sum(p.tensor for s in mine for p in passes[s]),
        pipeline=M * sum(sends[s] + (sends[s - 1] if s else 0.0) for s in mine),
        data=sum(travel[s] for s in mine),
        optimizer=sum(adam[s] for s in mine),
        timeline=events if timeline else [],
    )


def fit(runs: Sequence[Run], cluster: Cluster) -> Cluster:
    """The cluster with the three shares that fit measured TFLOP/s best.

    Least squares of log(simulated / measured) by damped Gauss-Newton steps, in the shares' log-odds
    so that they stay between 0 and 1. Raises ValueError for fewer runs than shares.
    """
    if len(runs) < len(SHARES):
        raise ValueError(f"{len(SHARES)} shares need at least as many runs, got {len(runs)}")

    def fitted(x: np.ndarray) -> Cluster:
        return cluster.with_(**dict(zip(SHARES, (1 / (1 + np.exp(-x))).tolist(), strict=True)))

    def errors(x: np.ndarray) -> np.ndarray:
        steps = [simulate(r.cfg, r.plan, fitted(x), r.batch, r.seq, timeline=False) for r in runs]
        return np.log([step.teraflops / r.teraflops for step, r in zip(steps, runs, strict=True)])

    x, eye = np.ones(len(SHARES)), np.eye(len(SHARES))
    for _ in range(30):
        e = errors(x)
        slope = np.stack([(errors(x + 1e-3 * unit) - e) / 1e-3 for unit in eye], axis=1)
        x = x - np.linalg.solve(slope.T @ slope + 1e-4 * eye, slope.T @ e)
    return fitted(x)


def published() -> list[Run]:
    """The ten runs of the weak-scaling table (1.7 to 1008 billion parameters), as plans.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, 2021, table 1. Micro-batches, chunks and whether gradients overlap (PyTorch's
    DDP does, Megatron's own did not) are not printed there, but in the script that the authors
    published with it (NVIDIA, Megatron-LM, examples/sc21/run_table_1.sh).
    """
    tables = []
    for name in ("megatron_weak_scaling.csv", "megatron_weak_scaling_plans.csv"):
        with (ASSETS / "data" / name).open(encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    runs = []
    for row, script in zip(*tables, strict=True):
        d, layers, heads = (int(row[k]) for k in ("hidden_size", "layers", "attention_heads"))
        more = {"max_len": 2048, "bias": True, "mlp": "gelu_tanh"}
        cfg = ModelConfig(51_200, d_model=d, n_layers=layers, n_heads=heads, **more)
        tp, pp = int(row["tensor_parallel"]), int(row["pipeline_parallel"])
        chunks = int(script["chunks"])
        plan = Plan(
            dp=int(row["gpus"]) // (tp * pp),
            tp=tp,
            pp=pp,
            micro_batch=int(script["micro_batch"]),
            schedule="interleaved" if chunks > 1 else "1f1b",
            chunks=chunks,
            overlap=script["data_parallel"] == "torch",
        )
        measured = float(row["teraflops_per_gpu"])
        runs.append(
            Run(row["parameters_billion"], cfg, plan, int(row["batch_size"]), 2048, measured)
        )
    return runs
