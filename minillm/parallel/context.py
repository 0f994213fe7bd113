"""Context parallelism: a long sequence divided among ranks, attention by a ring of keys and values.

Each rank holds the queries, keys and values of its tokens. Keys and values travel around the ring;
each rank merges what its queries find in one block after another, by the logarithms of the
softmax's denominators. Backward sends them around again, their gradients with them: nobody ever
holds all keys, or the matrix of all scores.

Source: Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers for Near-Infinite
Context, 2023; balanced chunks: Brandon et al., Striped Attention, 2023, and the two-ended variant
of Llama 3 (Grattafiori et al., The Llama 3 Herd of Models, 2024).
"""

# b batch, h query heads, g key/value heads, t queries and s keys of one rank, d head width, N ranks

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.ops import op
from minillm.parallel.group import Group


def zigzag(length: int, n: int) -> list[Tensor]:
    """The positions of each of n ranks: chunk i from the front and chunk i from the back, of 2n.

    Under a causal mask early tokens see few keys, late ones many: so all have equal work. Chunks
    differ by one token at most. Raises ValueError for fewer than 2n tokens.

    >>> [x.tolist() for x in zigzag(8, 2)]
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """
    if n < 1 or length < 2 * n:
        raise ValueError(f"{length} tokens are too few for two chunks on each of {n} ranks")
    ends = [length * i // (2 * n) for i in range(2 * n + 1)]
    chunks = [torch.arange(a, b) for a, b in pairwise(ends)]
    return [torch.cat([chunks[i], chunks[-1 - i]]) for i in range(n)]


class Sight(NamedTuple):
    """Who sees whom: positions of each rank's tokens, ascending, on the CPU; and the rule."""

    places: tuple[Tensor, ...]
    causal: bool = True
    window: int | None = None
    scale: float | None = None

    def block(
        self, i: int, j: int, device: Any = None
    ) -> tuple[slice, slice, Tensor | None] | None:
        """The queries of rank i that see any key of rank j, those keys, and the mask inside.

        `None` where nobody sees anything; a mask of `None` where all see all.
        """
        queries, keys = self.places[i], self.places[j]
        distance = queries[:, None] - keys
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if not seen.any():
            return None
        rows, columns = _span(seen.any(1)), _span(seen.any(0))
        mask = seen[rows, columns]
        return rows, columns, None if mask.all() else mask.to(device)


def _span(x: Tensor) -> slice:
    """From the first true entry to the last."""
    at = x.nonzero()[:, 0]
    return slice(int(at[0]), int(at[-1]) + 1)


def _pass_on(x: Tensor, like: Tensor, group: Group) -> Any:
    """Start to send x to the next rank, and to receive from the one before something as `like`."""
    n, i = group.size, group.index

    def work() -> Tensor:
        return group.exchange(x, (i + 1) % n, torch.empty_like(like), (i - 1) % n)

    return group.later(lambda: group.run("ring", work))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sight: Sight, group: Group) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        attend, n, i = op("attention", "reference"), group.size, group.index
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        lse = torch.full_like(out[..., 0], torch.finfo(wide).min)
        block = torch.stack([k, v])
        for step in range(n):
            j = (i - step) % n
            last = step == n - 1
            following = None if last else _pass_on(block, _like(block, sight, j - 1), group)
            part = sight.block(i, j, q.device)
            if part is not None:  # meanwhile the next block travels
                rows, keys, mask = part
                k_j, v_j = block[:, :, :, keys]
                found = attend(q[:, :, rows], k_j, v_j, mask, sight.scale, return_lse=True)
                out[:, :, rows], lse[:, :, rows] = _merge(out[:, :, rows], lse[:, :, rows], *found)
            block = block if last else following.result()
        ctx.sight, ctx.group = sight, group
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        sight, group, wide = ctx.sight, ctx.group, lse.dtype
        n, i = group.size, group.index
        delta = (grad.to(wide) * out.to(wide)).sum(-1)
        dq = torch.zeros_like(q, dtype=wide)
        block = torch.stack([k, v])
        coming = None  # the gradient of a block follows it; each rank adds its own to what comes
        for step in range(n):
            j = (i - step) % n
            last = step == n - 1
            following = None if last else _pass_on(block, _like(block, sight, j - 1), group)
            own = torch.zeros_like(block, dtype=wide)
            part = sight.block(i, j, q.device)
            if part is not None:
                rows, keys, mask = part
                dq_j, own[:, :, :, keys] = _slopes(
                    *(x[:, :, rows].to(wide) for x in (q, grad)),
                    *block[:, :, :, keys].to(wide),
                    *(lse[:, :, rows], delta[:, :, rows], mask, sight.scale),
                )
                dq[:, :, rows] += dq_j
            total = own if coming is None else own + coming.result()
            if n > 1:  # after the last step it comes home
                coming = _pass_on(total, _like(total, sight, j - 1), group)
            block = block if last else following.result()
        dk, dv = total if coming is None else coming.result()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _like(block: Tensor, sight: Sight, j: int) -> Tensor:
    """An empty block of the size that rank j's keys and values have."""
    shape = list(block.shape)
    shape[3] = len(sight.places[j])
    return block.new_empty(shape)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: weights are shares of the denominator.

    Rows that saw nothing yet have the lowest finite `lse`, and a share of zero.
    """
    both = torch.logaddexp(lse, part_lse)
    share, other = (lse - both).exp(), (part_lse - both).exp()
    return out * share[..., None] + part * other[..., None], both


def _slopes(
    q: Tensor,
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """dq [b, h, t, d], and dk and dv stacked [2, b, g, s, d], of one block.

    The weights come back from the whole row's lse: p = exp(q kᵀ · scale - lse), and then
    dv = pᵀ do, ds = p · (do vᵀ - delta), dq = ds k · scale, dk = dsᵀ q · scale, where
    delta = Σ do · o is the same for all blocks of a row.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = k.shape[1]
    # query heads that share a key/value head become one more axis: [b, g, r, t, d]
    q, grad, lse, delta = (x.unflatten(1, (heads, -1)) for x in (q, grad, lse, delta))
    k, v = k[:, :, None], v[:, :, None]
    p = (q @ k.mT * scale - lse[..., None]).exp()
    p = p if mask is None else p.masked_fill(~mask, 0.0)
    ds = p * (grad @ v.mT - delta[..., None])
    dq = (ds @ k * scale).flatten(1, 2)
    return dq, torch.stack([(ds.mT @ q * scale).sum(2), (p.mT @ grad).sum(2)])


def ring_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight, group: Group) -> Tensor:
    """Attention of this rank's queries to all ranks' keys, [b, h, t, d].

    q [b, h, t, d], k and v [b, g, t, d] of the tokens at `sight.places[index]`, h a multiple of g.
    Each rank sends its neighbor (N-1)/N of all keys and values forward; backward the same again,
    and all gradients of keys and values. The loss is the sum of the ranks' losses.

    Raises ValueError where shapes or places do not fit.
    """
    if len(sight.places) != group.size:
        raise ValueError(f"places of {len(sight.places)} ranks in a group of {group.size}")
    here = len(sight.places[group.index])
    if not q.shape[2] == k.shape[2] == v.shape[2] == here or k.shape != v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must hold the {here} "
            f"tokens of place {group.index} along axis 2"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads")
    return _Ring.apply(q, k, v, sight, group)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: tuple[Tensor, ...],
    group: Group,
    mask: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    if mask is not None or bias is not None:
        raise ValueError(
            "a mask or bias given as a matrix covers this rank's tokens only: ring attention makes "
            "its masks from positions, and knows no ALiBi or T5 bias"
        )
    return ring_attention(q, k, v, Sight(places, causal, window, scale), group)


def context_parallel(model: nn.Module, group: Group, places: list[Tensor]) -> Tensor:
    """Let every attention of `model` see all ranks' tokens; the positions of this rank's.

    `places` are the positions of all ranks, as from `zigzag`; call the model with this rank's
    tokens and the positions returned: `model(tokens[:, mine], positions=mine)`. Weights are whole
    on every rank, and as in data parallelism their gradients have to be summed over ranks. For
    sequences of another length, call it again.

    Raises ValueError for a model without attention, or places that are no division of a sequence.
    """
    every = torch.cat(list(places)).sort().values
    if len(places) != group.size or not torch.equal(every, torch.arange(len(every))):
        raise ValueError(
            f"{len(places)} places of {group.size} ranks must hold each position from 0 to "
            f"{len(every) - 1} once"
        )
    found = [m for m in model.modules() if hasattr(m, "attend")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with an `attend` to replace")
    for module in found:
        module.attend = partial(_attend, places=tuple(places), group=group)
    return places[group.index].to(next(model.parameters()).device)
