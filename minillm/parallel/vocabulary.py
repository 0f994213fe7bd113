"""A vocabulary divided among ranks: token vectors, logits, and a loss that never joins them.

Source: Shoeybi et al., Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism, 2019.
"""

# b batch, t tokens, d model width, v vocabulary, N ranks

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel import collectives as C
from minillm.parallel.group import Group
from minillm.parallel.slices import Sharded, bounds, g, join, shard


class VocabularyEmbedding(Sharded):
    """Rows for those tokens whose entries lie here, zeros for others, and the sum over ranks."""

    kind: ClassVar = nn.Embedding
    axes: ClassVar = {"weight": 0}

    @property
    def num_embeddings(self) -> int:
        """Entries of the whole vocabulary."""
        return self.cuts["weight"].size

    def partial(self, tokens: Tensor) -> Tensor:
        """tokens [b, t] -> [b, t, d], before the sum; IndexError outside the whole (CPU only)."""
        size = self.num_embeddings
        if tokens.is_cpu and tokens.numel() and not 0 <= tokens.min() <= tokens.max() < size:
            raise IndexError(f"tokens run from {tokens.min()} to {tokens.max()} of {size}")
        here, index = _locate(tokens, size, self.group)
        return F.embedding(index, self.weight).masked_fill(~here[..., None], 0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, t] -> [b, t, d]: O(b t d) numbers sent, whatever the vocabulary."""
        return g(self.partial(tokens), self.group)


def _locate(ids: Tensor, size: int, group: Group) -> tuple[Tensor, Tensor]:
    """Which ids lie in this rank's share, and where in it (0 for the others)."""
    start, stop = bounds(size, group)
    here = (ids >= start) & (ids < stop)
    return here, (ids - start).where(here, 0)


# -- logits and their loss -----------------------------------------------------------------------


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: Group) -> Tensor:
        ctx.group = group
        return join(x, -1, size, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return shard(grad, -1, ctx.group), None, None


def gather_logits(logits: Tensor, vocab_size: int, group: Group) -> Tensor:
    """This rank's logits [..., v / N] -> all, [..., v], on every rank: to sample, or to look at.

    Sends (N-1)/N · v numbers a token. Backward: each rank's slice of the gradient, which is that
    of a loss that all ranks repeat.
    """
    _check(logits, logits.shape[:-1], vocab_size, group)
    return _Join.apply(logits, vocab_size, group)


def _check(logits: Tensor, tokens: torch.Size, vocab_size: int, group: Group) -> None:
    start, stop = bounds(vocab_size, group)
    if logits.shape != (*tokens, stop - start):
        raise ValueError(
            f"logits {tuple(logits.shape)} must be {(*tokens, stop - start)}: entries {start} to "
            f"{stop - 1} of {vocab_size}, the share of place {group.index} of {group.size}"
        )


def _combine(lse: Tensor, picked: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """log Σ exp(lse) and Σ picked over ranks, [n] each: an all-reduce with a sum of its own.

    Each rank combines the numbers of n / N tokens, then all get all: 4(N-1)/N numbers a token.
    """
    n = lse.shape[0]
    both = F.pad(torch.stack([lse, picked], 1), (0, 0, 0, -n % group.size))
    parts = C.all_to_all(both, group).unflatten(0, (group.size, -1))
    mine = torch.stack([parts[..., 0].logsumexp(0), parts[..., 1].sum(0)], 1)
    return C.all_gather(mine, group)[:n].unbind(1)


class _Softmax(torch.autograd.Function):
    """log Σ exp(logits) and logits[target] of logits of which each rank holds a slice."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, group: Group
    ) -> tuple[Tensor, Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        here, index = _locate(targets, vocab_size, group)
        picked = wide.gather(-1, index[:, None])[:, 0].where(here, 0.0)
        total, picked = _combine(wide.logsumexp(-1), picked, group)
        ctx.save_for_backward(logits, total, here, index)
        return total, picked

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_picked: Tensor) -> tuple:
        logits, total, here, index = ctx.saved_tensors
        grad = (logits.to(total.dtype) - total[:, None]).exp() * d_total[:, None]
        grad.scatter_add_(1, index[:, None], d_picked.where(here, 0.0)[:, None])
        return grad.to(logits.dtype), None, None, None


def vocabulary_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, group: Group, z_loss: float = 0.0
) -> Tensor:
    """log Σ exp(logits) - logits[target] of each token, in nats, the same on every rank: [...].

    logits [..., v / N] are this rank's, targets [...] all ranks'. `z_loss` adds so much times the
    square of the first term. Less than 4 numbers a token are sent, whatever the vocabulary:
    two for each rank's partial sum, two for the result. Backward sends nothing, since softmax's
    slope at an entry needs only its own logit and the common sum.

    Raises ValueError when shapes do not fit or targets lie outside 0 .. v - 1 (CPU only).
    """
    _check(logits, targets.shape, vocab_size, group)
    if targets.is_cpu and targets.numel() and not 0 <= targets.min() <= targets.max() < vocab_size:
        raise ValueError(
            f"targets run from {targets.min()} to {targets.max()}, of a vocabulary of {vocab_size}"
        )
    total, picked = _Softmax.apply(logits.flatten(0, -2), targets.flatten(), vocab_size, group)
    return (total - picked + z_loss * total.square()).unflatten(0, targets.shape)
