"""Cross-entropy over a large vocabulary: -log softmax(logits)[target] for each row.

The matrix of logits is read in a loop of blocks, without a second matrix for the probabilities. In
place it is overwritten with its own gradient at once, and nothing is left to compute backward.
"""

# n rows (tokens), v vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from kernels.cost import Cost
from kernels.runtime import check, jit, tl, triton
from kernels.softmax import online, tile
from kernels.spec import Spec

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 16_384
"""Few and large programs: what they read is still in the cache when they read it again."""


def _check(
    logits: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int, smooth: float, z: float
) -> Tensor:
    """The targets, with `ignore_index` where the mask leaves out."""
    if logits.ndim != 2 or logits.shape[1] == 0 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [n, v] with v > 0 need targets [n]: got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are numbers of entries, int64 or int32, not {targets.dtype}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and targets {tuple(targets.shape)} must agree")
    if not 0 <= smooth < 1 or not z >= 0:
        raise ValueError(f"label_smoothing={smooth} must be in [0, 1), z_loss={z} >= 0")
    if mask is not None:
        targets = targets.where(mask.bool(), ignore_index)
    if targets.device.type == "cpu":
        known = targets[targets != ignore_index]
        if len(known) and not 0 <= known.min() <= known.max() < logits.shape[1]:
            raise ValueError(
                f"targets run from {known.min()} to {known.max()}, of a vocabulary of "
                f"{logits.shape[1]}; left out are ignore_index={ignore_index} and what is masked"
            )
    return targets


def reference(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """log Σ exp(z) - (1 - s) z[target] - s mean(z) + z_loss (log Σ exp(z))², one for each row z.

    logits [n, v], targets [n], mask [n] (true or 1 = counts) -> [n], float32 at least, in nats.
    Rows that the mask leaves out, or whose target is `ignore_index`, have loss and gradient 0.
    `label_smoothing`, s, gives that share of the target's probability to all v entries alike.

    Raises ValueError when shapes do not fit or a target that counts lies outside 0 .. v - 1.
    Sources: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016
    (smoothing); Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022 (z-loss).
    """
    targets = _check(logits, targets, mask, ignore_index, label_smoothing, z_loss)
    counts = targets != ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide.where(counts[:, None], 0.0)
    total = wide.logsumexp(-1)
    picked = wide.gather(-1, targets.where(counts, 0)[:, None].long())[:, 0]
    if label_smoothing:
        picked = picked.lerp(wide.mean(-1), label_smoothing)
    loss = total - picked
    return (loss + z_loss * total.square() if z_loss else loss).where(counts, 0.0)


@jit
def _slope(z, hit, top, log_sum, v, smoothing, z_loss):
    """d loss / d z for a tile of logits; `hit` is true at the target."""
    p = tl.exp(z - top[:, None] - log_sum[:, None])
    p *= 1 + 2 * z_loss * (top + log_sum)[:, None]
    return p - tl.where(hit, 1 - smoothing, 0.0) - smoothing / v


@jit
def _forward(
    z_ptr,  # logits [n, v]
    targets_ptr,
    losses_ptr,
    stats_ptr,  # [2, n]: maximum, and log Σ exp(z - maximum)
    n,
    v,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    there = rows < n
    target = tl.load(targets_ptr + rows, mask=there, other=ignore_index).to(tl.int64)
    counts = there & (target != ignore_index)
    known = (target >= 0) & (target < v)
    z_ptr += rows * stride
    picked = tl.load(z_ptr + target, mask=counts & known, other=0.0).to(tl.float32)
    z_ptr = z_ptr[:, None] + cols

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    plain = tl.zeros([ROWS], tl.float32)
    for start in range(0, v, BLOCK):
        inside = counts[:, None] & (start + cols < v)
        z = tl.load(z_ptr + start, mask=inside, other=float("-inf")).to(tl.float32)
        top, total = online(z, top, total)
        if SMOOTH:
            plain += tl.sum(tl.where(inside, z, 0.0), axis=1)
    log_sum = tl.log(total)
    top = tl.where(counts & (known == 0), float("nan"), top)  # spoils loss and gradient
    loss = log_sum + (top - picked)  # nearer than log Σ exp(z) - z[target] where z is large
    if SMOOTH:
        loss += smoothing * (picked - plain / v)
    loss += z_loss * (top + log_sum) * (top + log_sum)
    tl.store(losses_ptr + rows, tl.where(counts, loss, 0.0), mask=there)
    tl.store(stats_ptr + rows, top, mask=there)
    tl.store(stats_ptr + n + rows, log_sum, mask=there)

    if IN_PLACE:
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        # backwards through the row: what was read last is still in the cache
        for done in range(0, v, BLOCK):
            start = (v - 1) // BLOCK * BLOCK - done
            inside = counts[:, None] & (start + cols < v)
            z = tl.load(z_ptr + start, mask=inside, other=0.0).to(tl.float32)
            hit = start + cols == target[:, None]
            slope = _slope(z, hit, top, log_sum, v, smoothing, z_loss)
            inside = there[:, None] & (start + cols < v)
            tl.store(z_ptr + start, tl.where(counts[:, None], slope, 0.0), mask=inside)


@jit
def _backward(
    z_ptr,
    targets_ptr,
    stats_ptr,
    upstream_ptr,  # d result / d losses [n]
    dz_ptr,
    n,
    v,
    stride,
    ignore_index,
    smoothing,
    z_loss,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = rows < n
    target = tl.load(targets_ptr + rows, mask=there, other=ignore_index).to(tl.int64)
    counts = there & (target != ignore_index)
    top = tl.load(stats_ptr + rows, mask=there)
    log_sum = tl.load(stats_ptr + n + rows, mask=there)
    upstream = tl.load(upstream_ptr + rows, mask=there)
    inside = counts[:, None] & (cols < v)
    z = tl.load(z_ptr + (rows * stride)[:, None] + cols, mask=inside, other=0.0).to(tl.float32)
    slope = _slope(z, cols == target[:, None], top, log_sum, v, smoothing, z_loss)
    slope = tl.where(counts[:, None], slope * upstream[:, None], 0.0)
    tl.store(dz_ptr + rows[:, None] * v + cols, slope, mask=there[:, None] & (cols < v))


def launch(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses [n] and what backward needs of each row [2, n]; in place, logits become gradients."""
    n, v = logits.shape
    fp32 = {"device": logits.device, "dtype": torch.float32}
    losses, stats = torch.empty(n, **fp32), torch.empty(2, n, **fp32)
    size = tile(n, v, logits.device, BLOCK)
    _forward[(triton.cdiv(n, size["ROWS"]),)](
        *(logits, targets, losses, stats, n, v, logits.stride(0), ignore_index, smoothing, z_loss),
        **{"SMOOTH": smoothing > 0, "IN_PLACE": in_place, **size},
    )
    return losses, stats


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, in_place: bool, *how: Any) -> Tensor:
        losses, stats = launch(logits, targets, *how, in_place=in_place)
        if in_place:
            increment_version(logits)  # whoever else keeps them for backward finds out
        ctx.save_for_backward(logits, targets, stats)
        ctx.in_place, ctx.how = in_place, how
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        logits, targets, stats = ctx.saved_tensors
        if ctx.in_place:
            return logits.detach().mul_(upstream[:, None]), *[None] * 5
        n, v = logits.shape
        size = tile(n, v, logits.device, 4096)
        grad = torch.empty((n, v), device=logits.device, dtype=logits.dtype)
        _backward[(triton.cdiv(n, size["ROWS"]), triton.cdiv(v, size["BLOCK"]))](
            *(logits, targets, stats, upstream.contiguous(), grad, n, v, logits.stride(0)),
            *ctx.how,
            **size,
        )
        return grad, *[None] * 5


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """`reference` for logits [n, v] of float32, float16 or bfloat16 -> losses [n] in float32.

    `inplace=True` overwrites the logits with their gradient, forward (d loss / d logits of each
    row) and again backward (times what comes from above), so that they can be used for nothing
    else: an operation before this one that keeps them raises when it finds them changed, and so
    does a second backward. It needs rows that lie together in memory and do not overlap.

    Rows whose width and stride are multiples of 16 are read and written in whole vectors.

    Raises ValueError as `reference` does, and as `kernels.runtime.check` does. On a GPU nobody
    waits for targets to be looked at: one outside 0 .. v - 1 reads nothing outside of the
    tensor, and loss and gradient of its row are NaN.
    """
    check(logits, targets, mask)
    check(logits, dtypes=FLOATS)
    targets = _check(logits, targets, mask, ignore_index, label_smoothing, z_loss)
    n, v = logits.shape
    together = v == 1 or logits.stride(1) == 1
    if inplace and not (together and (n < 2 or logits.stride(0) >= v)):
        raise ValueError(f"in place needs rows of neighbors, strides are {logits.stride()}")
    if not together:
        logits = logits.contiguous()
    how = (ignore_index, label_smoothing, z_loss)
    return _CrossEntropy.apply(logits, targets.contiguous(), inplace, *how)


def cost(
    rows: int, vocab: int, itemsize: int = 4, backward: bool = False, inplace: bool = False
) -> Cost:
    """FLOPs and bytes that have to move; targets, losses and statistics left out.

    Forward reads the logits; in place it also writes their gradient (and reads them again, from
    the cache). Backward reads them and writes their gradient; in place it only scales that. One
    operation after the other moves more: see `kernels.softmax.cost`.

    >>> cost(rows=2, vocab=1000).bytes, cost(rows=2, vocab=1000, inplace=True).bytes
    (8000, 16000)
    """
    passes = 2 if backward or inplace else 1
    flops = 4 + 4 * inplace if not backward else 1 if inplace else 5
    return Cost(flops * rows * vocab, passes * rows * vocab * itemsize)


def specs() -> list[Spec]:
    """bf16 logits of a large vocabulary: the losses alone, in place with all that can be asked."""
    types = dict.fromkeys(("n", "v", "stride", "ignore_index"), "i32")
    types |= {"smoothing": "fp32", "z_loss": "fp32"}
    types |= {"z_ptr": "*bf16", "targets_ptr": "*i64", "stats_ptr": "*fp32"}
    forward = types | {"losses_ptr": "*fp32"}
    backward = types | {"upstream_ptr": "*fp32", "dz_ptr": "*bf16"}
    alone, whole = ({"SMOOTH": w, "IN_PLACE": w, "ROWS": 1, "BLOCK": BLOCK} for w in (False, True))
    return [
        Spec("cross_entropy forward bf16", _forward, forward, alone, 16),
        Spec("cross_entropy in place bf16", _forward, forward, whole, 16),
        Spec("cross_entropy backward bf16", _backward, backward, {"ROWS": 1, "BLOCK": 4096}, 8),
    ]
