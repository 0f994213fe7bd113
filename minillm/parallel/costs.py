"""What the parts of a training step cost on a cluster: plans, links, blocks. Nothing runs.

Seconds come from a roofline (compute) and from α-β links (messages); see `simulate`.
"""

# b rows of a micro-batch, s tokens of each, d model width, f hidden width, h heads, w head width,
# V vocabulary, L blocks; t, p, n tensor-, pipeline-, data-parallel ranks, v chunks, M micro-batches

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minillm.accounting import HARDWARE, Hardware, flops, parameters, roofline
from minillm.config import ModelConfig
from minillm.parallel.group import Link

AXES = ("data", "pipeline", "tensor")
TILE = 128
FLUSHING = ("naive", "gpipe", "1f1b", "interleaved", "zb-h1")


@dataclass(frozen=True)
class Cluster:
    """Machines of `per_node` GPUs, and what share of the data sheets a program gets out of them."""

    hardware: Hardware
    per_node: int
    inside: Link
    """of one GPU to the others of its machine, one direction"""
    between: Link
    """of one GPU to other machines, one direction: each has an adapter of its own"""
    sms: int
    """processors of a GPU, each at one tile of a matrix product"""
    launch: float = 5e-6
    """seconds from one kernel's end to the next one's work"""
    matmul: float = 1.0
    """share of the peak that matrix products reach"""
    stream: float = 1.0
    """share of the memory's bandwidth that everything else reaches"""
    wire: float = 1.0
    """share of the links' bandwidth that messages and collectives reach"""

    def __post_init__(self) -> None:
        for name in ("matmul", "stream", "wire"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1]")
        if min(self.per_node, self.sms) < 1 or self.launch < 0:
            raise ValueError(
                f"per_node={self.per_node}, sms={self.sms} must be at least 1, and "
                f"launch={self.launch} not negative"
            )

    def with_(self, **changes: Any) -> Cluster:
        """The same machines with other shares or links."""
        return replace(self, **changes)

    @property
    def reached(self) -> Hardware:
        """What a program gets of a GPU's peak and bandwidth."""
        gpu = self.hardware
        return replace(gpu, flops=self.matmul * gpu.flops, bandwidth=self.stream * gpu.bandwidth)


SELENE = Cluster(
    # Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    # Megatron-LM, 2021, section 5: 8 A100 of 80 GB a machine, NVLink and NVSwitch among them,
    # 8 InfiniBand adapters of 200 Gbit/s. NVIDIA, A100 datasheet: NVLink 600 GB/s, both directions
    # together; 108 SMs. Latencies and launch are not from there: a usual order of magnitude.
    HARDWARE["A100"],
    per_node=8,
    inside=Link(latency=2e-6, bandwidth=300e9),
    between=Link(latency=5e-6, bandwidth=25e9),
    sms=108,
)


@dataclass(frozen=True)
class Plan:
    """How a model and its batch are cut. Ranks are counted along `order`, its last axis fastest."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro_batch: int = 1
    """rows"""
    schedule: str = "1f1b"
    """one of `FLUSHING`"""
    chunks: int = 1
    """stages a device, for "interleaved" """
    zero: int = 0
    recompute: str = "full"
    """of blocks: "none", "selective" (scores only), "full" """
    sequence_parallel: bool = False
    overlap: bool = False
    """gradients travel during the last backward pass; else after it"""
    order: tuple[str, ...] = AXES

    @property
    def gpus(self) -> int:
        """dp · tp · pp."""
        return self.dp * self.tp * self.pp

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by name in this order, as `Mesh` wants them."""
        sizes = dict(zip(AXES, (self.dp, self.pp, self.tp), strict=True))
        return {name: sizes[name] for name in self.order}

    def micro_batches(self, batch: int) -> int:
        """M: how many micro-batches each pipeline gets of `batch` rows."""
        return batch // (self.dp * self.micro_batch)


def check(cfg: ModelConfig, plan: Plan, batch: int) -> None:
    """Raise ValueError, with the values and the rule, if the plan does not divide the model."""
    p = plan
    if sorted(p.order) != sorted(AXES):
        raise ValueError(f"order={p.order} must be {AXES} in some order")
    if min(p.dp, p.tp, p.pp, p.micro_batch, p.chunks, batch) < 1 or p.zero not in range(4):
        raise ValueError(f"sizes must be at least 1 and zero 0, 1, 2 or 3: batch={batch}, {p}")
    if p.recompute not in flops.RECOMPUTE:
        raise ValueError(f"recompute={p.recompute!r} must be one of {list(flops.RECOMPUTE)}")
    if p.schedule not in FLUSHING:
        raise ValueError(f"schedule={p.schedule!r} must flush, as {', '.join(FLUSHING)} do")
    if p.chunks > 1 and p.schedule != "interleaved":
        raise ValueError(f"chunks={p.chunks} need schedule='interleaved', not {p.schedule!r}")
    if cfg.kind != "decoder":
        raise ValueError(f"kind={cfg.kind!r}: a decoder's blocks are simulated")
    if cfg.n_heads % p.tp or cfg.kv_heads % p.tp or cfg.mlp_width % p.tp:
        raise ValueError(
            f"n_heads={cfg.n_heads}, n_kv_heads={cfg.kv_heads} and the MLP's width {cfg.mlp_width} "
            f"must be multiples of tp={p.tp}"
        )
    if cfg.n_layers % (p.pp * p.chunks):
        raise ValueError(
            f"n_layers={cfg.n_layers} must be a multiple of pp * chunks = {p.pp} * {p.chunks}"
        )
    if batch % (p.dp * p.micro_batch):
        raise ValueError(
            f"batch={batch} must be a multiple of dp * micro_batch = {p.dp} * {p.micro_batch}"
        )
    if p.schedule == "interleaved" and p.micro_batches(batch) % p.pp:
        raise ValueError(
            f"interleaved micro-batches come in groups of pp={p.pp}, got {p.micro_batches(batch)}"
        )


# -- links ---------------------------------------------------------------------------------------


def together(plan: Plan, axis: str, per_node: int) -> int:
    """How many ranks of a group along an axis share a machine, at least.

    >>> together(Plan(dp=4, tp=4), "tensor", 8), together(Plan(dp=4, tp=4), "data", 8)
    (4, 2)
    """
    sizes = list(plan.axes.items())
    place = plan.order.index(axis)
    stride, size = math.prod(n for _, n in sizes[place + 1 :]), sizes[place][1]
    return min(size, max(1, per_node // stride))


def collective(plan: Plan, axis: str, cluster: Cluster, n_bytes: float, rounds: int = 2) -> float:
    """Seconds of a ring along an axis: rounds · (N-1) · (α + bytes / N · β).

    An all-reduce takes two rounds, a reduce-scatter or an all-gather one. Between machines a ring
    uses the adapters of all its members there, as NCCL does with several rings at a time.
    """
    n = plan.axes[axis]
    here = together(plan, axis, cluster.per_node)
    alpha, bandwidth = cluster.inside
    if here < n:
        alpha = cluster.between.latency
        bandwidth = min(bandwidth, here * cluster.between.bandwidth)
    return rounds * (n - 1) * (alpha + n_bytes / n / (bandwidth * cluster.wire))


def message(plan: Plan, cluster: Cluster, device: int, n_bytes: float) -> float:
    """Seconds of activations from a pipeline's device to the next one (or back).

    Every tensor rank has all of them: each sends its t-th part, and an all-gather on the other side
    puts them together (Narayanan et al., 2021, section 4.1).
    """
    stride = math.prod(plan.axes[a] for a in plan.order[plan.order.index("pipeline") + 1 :])
    nodes = [device % plan.pp * stride // cluster.per_node for device in (device, device + 1)]
    link = cluster.inside if nodes[0] == nodes[1] else cluster.between
    sent = link.latency + n_bytes / plan.tp / (link.bandwidth * cluster.wire)
    return sent + collective(plan, "tensor", cluster, n_bytes, rounds=1)


# -- one micro-batch -----------------------------------------------------------------------------


class Pass(NamedTuple):
    """Seconds of a device for a micro-batch, computing and in collectives of its tensor group."""

    compute: float = 0.0
    tensor: float = 0.0

    def plus(self, other: Pass, times: float = 1.0) -> Pass:
        """Both, the other one so often."""
        return Pass(self.compute + times * other.compute, self.tensor + times * other.tensor)


def product(cluster: Cluster, m: int, k: int, n: int, batch: int = 1) -> float:
    """Seconds of `batch` products [m, k] times [k, n]: launch, and the roofline in whole waves.

    A GPU computes a tile of 128 × 128 on each of its processors at a time; the last wave takes as
    long as a full one, so that small products reach less of the peak. Source: NVIDIA, Matrix
    Multiplication Background User's Guide, section 3 (tile and wave quantization).

    >>> wide, narrow = (product(SELENE.with_(launch=0.0), 2048, 8192, n) for n in (6912, 1024))
    >>> round(wide / narrow, 2)  # 864 tiles in 8 waves, 128 in 2: not 6.75 times as long
    4.0
    """
    work, rate = roofline.matmul(m, k, n, batch), cluster.reached
    tiles = batch * math.ceil(m / TILE) * math.ceil(n / TILE)
    computed = math.ceil(tiles / cluster.sms) * cluster.sms * 2.0 * TILE**2 * k
    return cluster.launch + max(computed / rate.flops, work.bytes / rate.bandwidth)


def block(cfg: ModelConfig, plan: Plan, cluster: Cluster, seq: int) -> tuple[Pass, Pass]:
    """Forward and backward of one block, what is recomputed included in the latter.

    A backward has two products for each of the forward's. All else moves numbers of 16 bits: fused
    kernels of bias + GELU, bias + dropout + residual, scale + mask + softmax, and attention that
    writes its scores (2021, before FlashAttention).
    """
    d, f, t, s = cfg.d_model, cfg.mlp_width, plan.tp, seq
    tokens, inner = plan.micro_batch * seq, cfg.n_heads * cfg.d_head // t
    keys, scores = cfg.kv_heads * cfg.d_head // t, cfg.n_heads * s / t
    pairs = plan.micro_batch * cfg.n_heads // t
    attention = product(cluster, s, cfg.d_head, s, pairs)
    attention += product(cluster, s, s, cfg.d_head, pairs)
    products = (
        attention
        + product(cluster, tokens, d, inner + 2 * keys)
        + product(cluster, tokens, inner, d)
        + product(cluster, tokens, d, (2 if cfg.gated else 1) * f // t)
        + product(cluster, tokens, f // t, d)
    )
    stream = 2 * tokens / cluster.reached.bandwidth  # seconds for one number of 16 bits a token
    shared = t if plan.sequence_parallel else 1
    # read and written once each: two norms 4 d, dropout + residual 7 d, GELU 2 f, the output's
    # heads side by side 2 w h; softmax 2, dropout 2.5 numbers a score
    once = 11 * d / shared + 2 * f / t + 2 * inner + 4.5 * scores
    # norms 6 d, dropout 5 d, gradients of both branches added 6 d, of biases 2 d; GELU 3 f + f;
    # heads 2, biases 3 w h; dropout 2.5, softmax 3 numbers a score
    back = 19 * d / shared + 4 * f / t + 5 * inner + 5.5 * scores
    crossing = 2 * collective(plan, "tensor", cluster, 2 * tokens * d)
    forward = Pass(products + once * stream + 8 * cluster.launch, crossing)
    backward = Pass(2 * products + back * stream + 17 * cluster.launch, crossing)
    if plan.recompute == "full":
        backward = backward.plus(forward)
    elif plan.recompute == "selective":
        again = attention + 4.5 * scores * stream + 2 * cluster.launch
        backward = backward.plus(Pass(again))
    return forward, backward


def head(cfg: ModelConfig, plan: Plan, cluster: Cluster, seq: int) -> tuple[Pass, Pass]:
    """Forward and backward of logits and loss, cut along the vocabulary."""
    tokens, v, rate = plan.micro_batch * seq, -(-cfg.vocab_size // plan.tp), cluster.reached
    logits = product(cluster, tokens, cfg.d_model, v)
    # in 32 bits: cast, largest, difference, exponential, sum, quotient; back: scaled, cast
    number = tokens * v * 4 / rate.bandwidth
    crossing = collective(plan, "tensor", cluster, 2 * tokens * cfg.d_model)
    return Pass(logits + 9.5 * number), Pass(2 * logits + 3.5 * number, crossing)


def stage_parameters(cfg: ModelConfig, plan: Plan) -> list[float]:
    """Parameters of each of the vp stages, on one of the t ranks that share it."""
    count, stages = parameters.count(cfg), plan.pp * plan.chunks
    each = (count.matrices / plan.tp + count.norms) / stages
    found = [each] * stages
    found[0] += count.tokens / plan.tp + count.positions
    if stages > 1 or not cfg.tie_embeddings:  # a tied table lies on the last stage, too
        found[-1] += cfg.vocab_size * cfg.d_model / plan.tp
    return found
