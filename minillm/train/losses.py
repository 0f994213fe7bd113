"""Losses: pure functions of tensors."""

# ... any leading axes, usually b batch and t tokens; v vocabulary

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of x where the mask is true; over an empty mask NaN, since there is no such mean.

    >>> masked_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True])).item()
    3.5
    """
    if mask is None:
        return x.mean()
    if mask.shape != x.shape:
        raise ValueError(f"mask {tuple(mask.shape)} and values {tuple(x.shape)} must agree")
    return x.where(mask.bool(), 0.0).sum() / mask.bool().sum()


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of -log p(target) = log Σ exp(logits) - logits[target], in nats a token.

    logits [..., v], targets [...], `mask` [...] (true or 1 = counts). Computed in float32 at least.

    Raises ValueError when the shapes do not fit. The mean over an empty mask is NaN.

    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, 5])).exp().round().item()
    8.0
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = logits.gather(-1, targets[..., None]).squeeze(-1)
    return masked_mean(logits.logsumexp(-1) - picked, mask)
