"""Operation name + implementation -> function: the only module that imports `kernels`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.attention
import kernels.linear_cross_entropy
from kernels.attention import cost as attention_cost

__all__ = ["attention_cost", "op"]


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """PyTorch's own fused attention, which picks a kernel for the tensors' device."""
    t, s = q.shape[2], k.shape[2]
    if causal and (t == 1 or (t == s and bias is None)):
        causal = t > 1  # a single query at the end sees everything
    elif causal:
        # PyTorch's own causal mask puts the first query at the first key
        mask, causal = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t), False
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, is_causal=causal, enable_gqa=grouped
    )


def op(name: str, impl: str = "auto") -> Callable[..., Tensor]:
    """The function that carries out operation `name`.

    `impl="reference"` is the plain PyTorch definition that everything else is tested against;
    `impl="auto"` is the fastest one that gives the same numbers.

    Raises ValueError for an unknown name or implementation, listing the known ones.

    >>> op("attention", "reference").__module__
    'kernels.attention'
    >>> op("attention", "magic")
    Traceback (most recent call last):
        ...
    ValueError: impl='magic' of 'attention' is unknown; choose one of ['auto', 'reference']
    """
    table: dict[str, dict[str, Callable[..., Tensor]]] = {
        "attention": {"auto": _sdpa, "reference": kernels.attention.reference},
        "attention_weights": {
            "auto": kernels.attention.weights,
            "reference": kernels.attention.weights,
        },
        "linear_cross_entropy": {
            "auto": kernels.linear_cross_entropy.chunked,
            "reference": kernels.linear_cross_entropy.reference,
        },
    }
    if name not in table:
        raise ValueError(f"operation {name!r} is unknown; choose one of {sorted(table)}")
    if impl not in table[name]:
        raise ValueError(
            f"impl={impl!r} of {name!r} is unknown; choose one of {sorted(table[name])}"
        )
    return table[name][impl]
