"""Operation name + implementation -> function: the only module that imports `kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.attention
import kernels.attention_tiles
import kernels.layer_norm
import kernels.linear_cross_entropy
import kernels.rms_norm
import kernels.rope
import kernels.swiglu
from kernels import runtime
from kernels.attention import cost as attention_cost

__all__ = ["IMPLEMENTATIONS", "attention_cost", "op"]

IMPLEMENTATIONS = ("reference", "triton", "auto")


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """PyTorch's own fused attention, which picks a kernel for the tensors' device."""
    t, s = q.shape[2], k.shape[2]
    narrow = window is not None and window < s
    if causal and not narrow and (t == 1 or (t == s and bias is None)):
        causal = t > 1  # a single query at the end sees everything
    elif causal:
        # PyTorch's own causal mask puts the first query at the first key, and knows no window
        mask, causal = kernels.attention_tiles.mask(t, s, True, window or 0, q.device), False
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, is_causal=causal, enable_gqa=grouped
    )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """The Triton kernel, which makes its masks from positions and reads no matrix."""
    if mask is not None or bias is not None:
        raise ValueError(
            "the Triton attention knows no masks but causal ones and windows, and no bias: take "
            "impl='auto', which gives such calls to PyTorch"
        )
    return kernels.attention.attention(q, k, v, causal=causal, window=window, scale=scale)


def _no_matrix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    **others: object,
) -> bool:
    return mask is None and bias is None and q.shape[-1] == v.shape[-1] <= 256


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """In the type of its inputs, which is what autocast expects and keeps for backward."""
    return kernels.swiglu.ACTIVATIONS[activation](gate) * up


def _always(*args: object, **kwargs: object) -> bool:
    return True


class _Ways(NamedTuple):
    reference: Callable[..., Tensor]
    """the plain definition, which everything else is tested against"""
    torch: Callable[..., Tensor]
    """PyTorch's own, or the course's fastest in PyTorch"""
    triton: Callable[..., Tensor]
    fits: Callable[..., bool] = _always
    """whether `auto` may hand a call to the kernel"""


def _ways() -> dict[str, _Ways]:
    attention, loss, rope = kernels.attention, kernels.linear_cross_entropy, kernels.rope
    return {
        "attention": _Ways(attention.reference, _sdpa, _flash, _no_matrix),
        "attention_weights": _Ways(attention.weights, attention.weights, attention.weights),
        "linear_cross_entropy": _Ways(loss.reference, loss.chunked, loss.linear_cross_entropy),
        # PyTorch's own norms and products keep for backward what accounting counts; that they are
        # what the kernels' references say is tested
        "rms_norm": _Ways(_rms_norm, _rms_norm, kernels.rms_norm.rms_norm),
        "layer_norm": _Ways(_layer_norm, _layer_norm, kernels.layer_norm.layer_norm),
        "glu": _Ways(_glu, _glu, kernels.swiglu.glu),
        "rope": _Ways(rope.reference, rope.reference, rope.rope),
    }


def op(name: str, impl: str = "auto") -> Callable[..., Tensor]:
    """The function that carries out operation `name`.

    `impl="reference"` is plain PyTorch, against which everything else is tested; `impl="triton"` is
    the course's kernel, on a GPU or in the interpreter. `impl="auto"` decides at each call by the
    device of the first tensor, so that a model can be moved: the kernel on a GPU (for float32,
    float16 and bfloat16, and where it can do what is asked), PyTorch's own on a CPU.

    Raises ValueError for an unknown name or implementation, listing the known ones.

    >>> op("rope", "reference").__module__
    'kernels.rope'
    >>> op("rope", "magic")
    Traceback (most recent call last):
        ...
    ValueError: impl='magic' of 'rope' is unknown; choose one of ['auto', 'reference', 'triton']
    """
    table = _ways()
    if name not in table:
        raise ValueError(f"operation {name!r} is unknown; choose one of {sorted(table)}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl={impl!r} of {name!r} is unknown; choose one of {sorted(IMPLEMENTATIONS)}"
        )
    ways = table[name]
    return _by_device(ways) if impl == "auto" else getattr(ways, impl)


def _by_device(ways: _Ways) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        kernel = x.is_cuda and x.dtype != torch.float64 and runtime.can_run(x.device)
        if kernel and ways.fits(x, *args, **kwargs):
            return ways.triton(x, *args, **kwargs)
        return ways.torch(x, *args, **kwargs)

    return call
