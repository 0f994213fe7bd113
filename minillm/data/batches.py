"""From documents to rows of equal length: packing, padding, truncation, and a loader that resumes.

A model eats rectangles [b, t]; documents are not rectangles. Padding fills up, truncation cuts
off, packing writes the documents one after the other and cuts the stream wherever a row is full.
"""
# b batch, t tokens in a row

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One row of a packed stream, or a batch of them: every field [t], or [b, t].

    `documents` numbers the document each token belongs to (-1 in the filling of the last row),
    `positions` counts from 0 where a document, or its rest in a new row, begins, and `loss_mask`
    is True where `targets` is the next token of the same document.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    positions: Tensor
    loss_mask: Tensor


def pack(documents: Iterable[Sequence[int]], seq_len: int, eos: int) -> Iterator[Packed]:
    """Rows of `seq_len` tokens cut from the stream `document, eos, document, eos, ...`.

    Every token of every document is an input exactly once; only the last row is filled up, with
    `eos`. The end marker closes its document: the model learns to end, and is not asked to guess
    how an unrelated document begins. Memory: one row and one document.

    >>> for row in pack([[5, 6, 7], [8]], seq_len=4, eos=0):
    ...     print(row.tokens.tolist(), row.documents.tolist(), row.loss_mask.tolist())
    [5, 6, 7, 0] [0, 0, 0, 0] [True, True, True, False]
    [8, 0, 0, 0] [1, 1, -1, -1] [True, False, False, False]
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    tokens, ids = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for number, document in enumerate(documents):
        stream = np.append(np.asarray(document, dtype=np.int64), eos)
        tokens = np.concatenate([tokens, stream])
        ids = np.concatenate([ids, np.full(len(stream), number)])
        start = 0
        while len(tokens) - start > seq_len:  # one more than a row: its last target
            yield _row(tokens[start : start + seq_len + 1], ids[start : start + seq_len + 1])
            start += seq_len
        tokens, ids = tokens[start:], ids[start:]
    if len(tokens):
        fill = seq_len + 1 - len(tokens)
        yield _row(np.append(tokens, np.full(fill, eos)), np.append(ids, np.full(fill, -1)))


def _row(tokens: np.ndarray, ids: np.ndarray) -> Packed:
    """Shift by one: [t + 1] tokens and document numbers to a row of t."""
    same = (ids[:-1] == ids[1:]) & (ids[:-1] >= 0)
    place = np.arange(len(ids) - 1)
    starts = np.where(np.append(True, ids[1:-1] != ids[:-2]), place, 0)
    parts = (tokens[:-1], tokens[1:], ids[:-1], place - np.maximum.accumulate(starts), same)
    return Packed(*(torch.from_numpy(part.copy()) for part in parts))


def stack(rows: Sequence[Packed]) -> Packed:
    """Rows [t] to one batch [b, t]."""
    if not rows:
        raise ValueError("there are no rows to stack")
    return Packed(*(torch.stack([getattr(r, f) for r in rows]) for f in Packed.__annotations__))


def document_mask(documents: Tensor) -> Tensor:
    """[..., t] document numbers to a boolean mask [..., t, t], True = may attend.

    A token sees the earlier tokens of its own document and itself, so packing does not let
    unrelated documents leak into each other.
    """
    t = documents.shape[-1]
    causal = torch.ones(t, t, dtype=torch.bool, device=documents.device).tril()
    return (documents[..., :, None] == documents[..., None, :]) & causal


def pad(
    documents: Sequence[Sequence[int]], pad_id: int, seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """One document per row: tokens int64 [b, t] and a mask [b, t], True where a token is real.

    Without `seq_len` rows are as long as the longest document; with it, longer documents are cut.
    """
    if seq_len is not None and seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1, or None")
    width = max((len(d) for d in documents), default=0) if seq_len is None else seq_len
    tokens = torch.full((len(documents), width), pad_id)
    mask = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        kept = torch.as_tensor(np.asarray(document[:width], dtype=np.int64))
        tokens[row, : len(kept)] = kept
        mask[row, : len(kept)] = True
    return tokens, mask


@dataclass(frozen=True)
class Waste:
    """What a layout costs: `empty` is the share of slots that hold no token, `lost` the share of
    tokens that are cut away."""

    empty: float
    lost: float


def padding_waste(lengths: Sequence[int], seq_len: int) -> Waste:
    """One document per row of `seq_len`: short ones leave slots empty, long ones lose their end.

    >>> padding_waste([2, 6], seq_len=4)
    Waste(empty=0.25, lost=0.25)
    """
    kept = sum(min(n, seq_len) for n in lengths)
    return Waste(empty=1 - kept / (len(lengths) * seq_len), lost=1 - kept / sum(lengths))


def packing_waste(lengths: Sequence[int], seq_len: int) -> Waste:
    """Packed rows, end markers counted as tokens: only the last row can have empty slots.

    >>> packing_waste([2, 6], seq_len=4)
    Waste(empty=0.16666666666666663, lost=0.0)
    """
    total = sum(lengths) + len(lengths)
    return Waste(empty=1 - total / (-(-total // seq_len) * seq_len), lost=0.0)


class RandomBatches:
    """Endless random batches; see `random_batches`."""

    def __init__(self, tokens: Sequence[int] | np.ndarray, batch: int, seq_len: int, seed: int):
        if batch < 1 or seq_len < 1:
            raise ValueError(f"batch={batch} and seq_len={seq_len} must be at least 1")
        if len(tokens) <= seq_len:
            raise ValueError(f"{len(tokens)} tokens are too few for a row of {seq_len} and targets")
        self.tokens = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
        self.batch, self.seq_len, self.seed, self.step = batch, seq_len, seed, 0

    def __iter__(self) -> RandomBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        # a fresh generator for each step: the place in the sequence is one integer
        rng = np.random.default_rng([self.seed, self.step])
        starts = rng.integers(0, len(self.tokens) - self.seq_len, self.batch)
        rows = np.stack([self.tokens[at : at + self.seq_len + 1] for at in starts])
        rows = torch.from_numpy(rows.astype(np.int64))
        self.step += 1
        return rows[:, :-1], rows[:, 1:]

    def _identity(self) -> dict[str, int]:
        sizes = {"batch": self.batch, "seq_len": self.seq_len, "n_tokens": len(self.tokens)}
        return {"seed": self.seed, **sizes}

    def state_dict(self) -> dict[str, int]:
        """What it takes to go on: the step, and what the sequence of batches depends on."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; ValueError if it belongs to another sequence."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"{name}={value} here, {state.get(name)} in the saved state")
        if state["step"] < 0:
            raise ValueError(f"step={state['step']} must not be negative")
        self.step = state["step"]


def random_batches(
    tokens: Sequence[int] | np.ndarray, batch: int, seq_len: int, seed: int
) -> RandomBatches:
    """Inputs and targets, int64 [b, t] each, cut at random places (with replacement) of `tokens`.

    Batch i depends on the seed and i alone, so a run that was killed continues exactly from the
    `state_dict()` saved with its last checkpoint. `tokens` may be a memory map: only the rows of
    a batch are read.

    >>> inputs, targets = next(random_batches(range(100), batch=2, seq_len=8, seed=0))
    >>> inputs.shape, bool((targets == inputs + 1).all())
    (torch.Size([2, 8]), True)
    """
    return RandomBatches(tokens, batch, seq_len, seed)
