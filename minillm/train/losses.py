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


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean of -log p(target) = log Σ exp(logits) - logits[target], in nats a token.

    logits [..., v], targets [...], `mask` [...] (true or 1 = counts). Computed in float32 at least.
    `label_smoothing` gives that share of the target's probability to all v ids alike, so that no
    logit is driven to infinity. `z_loss` adds so much times (log Σ exp(logits))², which keeps the
    logits near where 16 bits are exact; softmax alone does not care about a common shift.

    Raises ValueError when the shapes do not fit. The mean over an empty mask is NaN.
    Sources: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016
    (smoothing); Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022 (z-loss,
    with 1e-4).

    >>> cross_entropy(torch.zeros(2, 8), torch.tensor([3, 5])).exp().round().item()
    8.0
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if not 0 <= label_smoothing < 1 or not z_loss >= 0:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in [0, 1), z_loss={z_loss} >= 0"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(-1)
    picked = logits.gather(-1, targets[..., None]).squeeze(-1)
    if label_smoothing:
        picked = picked.lerp(logits.mean(-1), label_smoothing)
    loss = total - picked
    return masked_mean(loss + z_loss * total.square() if z_loss else loss, mask)
