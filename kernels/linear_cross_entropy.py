"""The output matrix and the loss in one: Σ log Σ exp(s x Wᵀ) - s x Wᵀ[target], over tokens.

Every token has a logit for every entry of the vocabulary, the largest matrix of a language model.
It is only needed on the way from x to one number and back, so it need never be there as a whole.
"""

# n tokens, d model width, v vocabulary, c tokens of a chunk

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.cost import Cost
from kernels.cross_entropy import FLOATS, launch
from kernels.cross_entropy import specs as cross_entropy_specs
from kernels.runtime import check
from kernels.spec import Spec

NO_TARGET = -(2**31)
"""No row's target: what is left out is not among the rows at all."""


def _check(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x [n, d] and weight [v, d] must agree: {shapes}")
    if targets.shape != x.shape[:1] or (mask is not None and mask.shape != targets.shape):
        known = "no mask" if mask is None else f"mask {tuple(mask.shape)}"
        raise ValueError(f"one target (and mask) for each row of x: {shapes}, {known}")


def _counted(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows that count, and their targets, which are looked at where that costs no waiting."""
    _check(x, weight, targets, mask)
    if mask is not None:
        x, targets = x[mask.bool()], targets[mask.bool()]
    if len(targets) and targets.device.type == "cpu":
        low, high = targets.min().item(), targets.max().item()
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets run from {low} to {high}, weight has {len(weight)} rows")
    return x, targets


def reference(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Sum of -log softmax(scale · x Wᵀ)[target] in nats, 0-dim, float32 at least.

    x [n, d], weight [v, d], targets [n], `mask` [n] (true or 1 = counts). Over an empty mask 0.

    Raises ValueError when shapes do not fit or a target that counts lies outside 0 .. v - 1.
    """
    x, targets = _counted(x, weight, targets, mask)
    logits = x @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return (logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]).sum()


# The @jit kernel of this file is the one of `kernels.cross_entropy`, in place; the matrix products
# around it are PyTorch's.


def _by_pytorch(logits: Tensor, targets: Tensor, learn: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses, and d sum / d logits = p - onehot(target), for a chunk's logits [c, v]."""
    wide, targets = torch.promote_types(logits.dtype, torch.float32), targets[:, None]
    log_p = logits.log_softmax(-1, dtype=wide)
    loss = -log_p.gather(-1, targets).sum()
    if not learn:
        return loss, None
    p = log_p.exp_().scatter_add_(-1, targets, -torch.ones_like(targets, dtype=wide))
    return loss, p.to(logits.dtype)


def _by_kernel(logits: Tensor, targets: Tensor, learn: bool) -> tuple[Tensor, Tensor | None]:
    """The same; the logits themselves become the gradient."""
    losses, _ = launch(logits, targets, NO_TARGET, in_place=learn)
    return losses.sum(), logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total += a @ b
    else:  # without a second matrix, and without rounding the product first
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class _Chunked(torch.autograd.Function):
    """Both gradients are found on the way forward, where a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, *how: Any) -> Tensor:
        scale, chunk, low, form = how  # the type of the products; `_by_pytorch` or `_by_kernel`
        wide = torch.promote_types(low, torch.float32)
        need_x, need_w = ctx.needs_input_grad[:2]
        w = weight.to(low)
        total = torch.zeros((), dtype=wide, device=x.device)
        grad_x = torch.empty_like(x, dtype=low) if need_x else None
        grad_w = torch.zeros_like(weight, dtype=wide) if need_w else None
        logits = w.new_empty(min(chunk, len(x)), len(w))  # one for all chunks
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            part = (x[rows] * scale if scale != 1 else x[rows]).to(low)
            mine = torch.mm(part, w.T, out=logits[: len(part)])
            loss, slope = form(mine, targets[rows], need_x or need_w)
            total += loss
            if need_x:
                torch.mm(slope, w, out=grad_x[rows])
            if need_w:
                _add_product(grad_w, slope.T, part)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtypes, ctx.scale = (x.dtype, weight.dtype), scale
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise ValueError("the chunked loss has no second derivative: take the reference")
        grad_x, grad_w = ctx.saved_tensors
        if grad_x is not None:
            grad_x = (grad_x * (grad * ctx.scale)).to(ctx.dtypes[0])
        if grad_w is not None:
            grad_w = (grad_w * grad).to(ctx.dtypes[1])
        return grad_x, grad_w, *[None] * 5


def _apply(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int, form: Callable
) -> Tensor:
    device = x.device.type
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if low == x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}: they must be of one type")
    if not torch.is_grad_enabled():
        x, weight = x.detach(), weight.detach()
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(x, weight, targets, scale, chunk, low, form)


def chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`reference` with `chunk` rows of logits at a time, [c, v] instead of [n, v].

    Products are in the type of x and weight, or in autocast's, everything else in float32 at
    least. Rows that the mask leaves out cost nothing. What is kept for backward are the gradients
    themselves, [n, d] and [v, d]. `chunk` defaults to what fits the cache.

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024 (the idea of
    gradients in forward: Hsu et al., Liger Kernel, 2024).
    """
    x, targets = _counted(x, weight, targets, mask)
    if chunk is None:
        logits = 2**19 if x.device.type == "cpu" else 2**24  # on a CPU, what one core's cache holds
        chunk = max(16, logits // len(weight))
    return _apply(x, weight, targets, scale, chunk, _by_pytorch)


def rows_of_a_chunk(tokens: int) -> int:
    """A 24th of all rows, 256 at least.

    Each chunk reads the weight twice and adds to its gradient, which costs less the fewer chunks
    there are; a 24th keeps the logits under 5 % of the matrix of all of them.

    >>> rows_of_a_chunk(tokens=16_384) / 16_384 < 0.05
    True
    """
    return max(256, -(-tokens // 24))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`chunked`, where one kernel turns a chunk's logits into their gradient, in place.

    So a chunk [c, v] in the type of x and weight (or autocast's) is all there is of the logits:
    nothing of them in float32, no probabilities. x and weight are float32, float16 or bfloat16;
    the weight's gradient is added up in float32. `chunk` defaults to `rows_of_a_chunk`.

    Raises ValueError as `reference` does, and as `kernels.runtime.check` does. On a GPU targets
    are not looked at before: one outside 0 .. v - 1 makes loss and gradients NaN.
    """
    check(x, weight, targets, mask)
    check(x, weight, dtypes=FLOATS)
    x, targets = _counted(x, weight, targets, mask)
    chunk = rows_of_a_chunk(len(x)) if chunk is None else chunk
    return _apply(x, weight, targets.contiguous(), scale, chunk, _by_kernel)


def cost(
    tokens: int, vocab: int, d_model: int, itemsize: int = 4, chunk: int | None = None
) -> Cost:
    """FLOPs of forward and backward, 6·n·v·d, and the bytes moved; the softmax itself left out.

    Read or written once: x, its gradient, and for each chunk the weight twice (for the logits and
    for x's gradient) and its gradient twice (added to). Without `chunk` all rows at once, and then
    the logits, [n, v], also pass through memory: written and read by each product, and twice
    by the softmax in between. In chunks that fit the cache they do not.

    >>> cost(tokens=8, vocab=16, d_model=4).flops
    3072
    """
    chunks = 1 if chunk is None else -(-tokens // chunk)
    numbers = 2 * tokens * d_model + chunks * 4 * vocab * d_model
    if chunk is None:
        numbers += 5 * tokens * vocab
    return Cost(flops=6 * tokens * vocab * d_model, bytes=numbers * itemsize)


def specs() -> list[Spec]:
    """The one kernel, as it is called here."""
    (kernel,) = (spec for spec in cross_entropy_specs() if "in place" in spec.name)
    constants = {**kernel.constants, "SMOOTH": False}
    return [kernel._replace(name="linear_cross_entropy bf16", constants=constants)]
