"""What to predict: five ways to make a training problem from rows of tokens.

Every function takes rows [b, t] and returns a `Problem`. Random ones take a generator, and give
every row of a batch the same lengths, so that rows stay rectangular and `predicted` is known.
"""

# b rows, t tokens in a row, n tokens the model reads, m tokens it answers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.model.mask import causal_mask, prefix_mask


@dataclass(frozen=True)
class Problem:
    """One batch as a model sees it: what it reads, what it shall answer, where that counts."""

    inputs: Tensor
    """[b, n]: what the model reads; the encoder, where there are `decoder_inputs`"""
    targets: Tensor
    """[b, m]: the answer at every position; m = n without `decoder_inputs`"""
    mask: Tensor
    """[b, m] boolean: the targets that count"""
    attention: Tensor | None = None
    """[n, n] or [b, 1, n, n] boolean, True = may attend; None: all see all"""
    positions: Tensor | None = None
    """[2, b, n]: place in the text and place in the span; None: 0, 1, 2, ..."""
    decoder_inputs: Tensor | None = None
    """[b, m]: what a decoder reads, causally; None: there is no decoder"""

    @property
    def predicted(self) -> int:
        """Number of tokens that this batch asks for."""
        return int(self.mask.sum())


def causal(tokens: Tensor) -> Problem:
    """Each token from all before it: t - 1 predictions a row.

    >>> p = causal(torch.tensor([[5, 6, 7]]))
    >>> p.inputs.tolist(), p.targets.tolist(), p.predicted
    ([[5, 6]], [[6, 7]], 2)
    """
    _check(tokens, 2, "causal")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    everywhere = torch.ones_like(targets, dtype=torch.bool)
    return Problem(inputs, targets, everywhere, causal_mask(inputs.shape[1], device=tokens.device))


def prefix(tokens: Tensor, length: int | Tensor) -> Problem:
    """The first `length` tokens are given and see each other; each later one is predicted.

    `length` is one number or one for each row, [b], from 1 to t - 1; a row has t - length
    predictions.

    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer, 2020.

    >>> p = prefix(torch.tensor([[5, 6, 7, 8]]), length=2)
    >>> p.targets.tolist(), p.mask.int().tolist(), p.predicted
    ([[6, 7, 8]], [[0, 1, 1]], 2)
    """
    whole = causal(tokens)
    n = whole.inputs.shape[1]
    lengths = torch.as_tensor(length, device=tokens.device)
    if lengths.ndim > 1 or (lengths.ndim == 1 and len(lengths) != len(tokens)):
        raise ValueError(f"length {tuple(lengths.shape)} must be one number, or one a row")
    if lengths.min() < 1 or lengths.max() > n:
        raise ValueError(f"length={length} must be from 1 to {n}: something given, something asked")
    mask = torch.arange(n, device=tokens.device) >= lengths.view(-1, 1) - 1
    mask = mask.expand_as(whole.targets)
    if lengths.ndim == 0:
        attention = prefix_mask(n, int(lengths), device=tokens.device)
    else:
        rows = [prefix_mask(n, k, device=tokens.device) for k in lengths.tolist()]
        attention = torch.stack(rows)[:, None]
    return Problem(whole.inputs, whole.targets, mask, attention)


def masked(
    tokens: Tensor,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    rate: float = 0.15,
    special: Sequence[int] = (),
) -> Problem:
    """BERT's cloze: `rate` of a row's tokens are chosen, and predicted from both sides.

    A chosen token becomes `mask_id` with probability 0.8, a random id with 0.1, and stays with
    0.1: the model never knows which of the words it reads are true. round(rate · t) tokens of a
    row, at least 1, are chosen; ids in `special` never are, so a row may have fewer.

    Source: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2019.

    >>> p = masked(torch.arange(20)[None], 99, 100, torch.Generator().manual_seed(0))
    >>> p.predicted, int((p.inputs != p.targets).sum()) <= 3
    (3, True)
    """
    _check(tokens, 1, "masked")
    _check_rate(rate)
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"mask_id={mask_id} must be an id below vocab_size={vocab_size}")
    ids = torch.tensor([*special, mask_id], device=tokens.device)
    free = ~torch.isin(tokens, ids)
    if not free.any():
        raise ValueError(f"every token is one of {ids.tolist()}: nothing is left to predict")
    # drawn where the generator lives, and the same there and elsewhere
    on = {"generator": generator, "device": generator.device}
    order, kind = (torch.rand(tokens.shape, **on).to(tokens.device) for _ in range(2))
    words = torch.randint(vocab_size, tokens.shape, **on).to(tokens)
    rank = order.masked_fill(~free, 2.0).argsort(-1).argsort(-1)
    chosen = (rank < max(1, round(rate * tokens.shape[1]))) & free
    inputs = tokens.masked_fill(chosen & (kind < 0.8), mask_id)
    return Problem(inputs.where(~(chosen & (kind >= 0.9)), words), tokens, chosen)


def span_corruption(
    tokens: Tensor,
    sentinels: Sequence[int],
    start: int,
    generator: torch.Generator,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> Problem:
    """T5's: spans are cut out of the text, a sentinel in each gap; the decoder writes the spans.

        text     a b c d e f g     inputs   a <0> d e <1>     targets   <0> b c <1> f g <2>

    Of a row's t tokens round(rate · t) lie in round(rate · t / mean_span) spans of random lengths;
    the first token is always kept and the last always cut, as in T5's code. One more sentinel ends
    the targets, as in the paper (the code writes an end of text instead). Together the two hold
    the whole text. The decoder starts from id `start`, and predicts its sentinels too.

    Raises ValueError when there are fewer sentinels than spans + 1, or one stands in the text.
    Source: Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer, 2020.

    >>> p = span_corruption(torch.arange(20)[None], [99, 98], 0, torch.Generator().manual_seed(0))
    >>> p.inputs.tolist()[0][-2:], p.targets.tolist(), p.predicted
    ([16, 99], [[99, 17, 18, 19, 98]], 5)
    """
    spans = _spans(tokens, rate, mean_span, generator, "span corruption")
    count = len(spans[0][1])
    if len(set(sentinels)) < count + 1:
        raise ValueError(f"{count} spans need {count + 1} sentinels, got {list(sentinels)}")
    marks = torch.as_tensor(sentinels, device=tokens.device).to(tokens)[:, None]
    if (found := tokens[torch.isin(tokens, marks)]).numel():
        raise ValueError(
            f"the text holds the sentinel {found[0].item()}: the gaps would be unclear"
        )
    inputs, targets = [], []
    for kept, cut in spans:
        inputs.append(torch.cat([x for pair in zip(kept, marks, strict=False) for x in pair]))
        pieces = [x for pair in zip(marks, cut, strict=False) for x in pair]
        targets.append(torch.cat([*pieces, marks[count]]))
    target = torch.stack(targets)
    shifted = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)
    everywhere = torch.ones_like(target, dtype=torch.bool)
    return Problem(torch.stack(inputs), target, everywhere, decoder_inputs=shifted)


def blank_infilling(
    tokens: Tensor,
    mask_id: int,
    start: int,
    end: int,
    generator: torch.Generator,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> Problem:
    """GLM's: the text with blanks, then what belongs into them, in random order, in one row.

        text     a b c d e f g       inputs   a [M] d e [M] | [S] f g [S] b c
        place in the text            0 1 2 3 4 | 4 4 4 1 1 1
        place in the span            0 0 0 0 0 | 1 2 3 1 2 3
        targets                      (none)    | f g [E] b c [E]

    Part A, before the bar, is read in both directions and never sees part B; part B sees all of A
    and what stands before it in B. A span's tokens stand where its blank [M] does, so that the
    model cannot tell how long the answer shall be. Spans are drawn as in `span_corruption` (GLM
    draws Poisson lengths until the share is reached, which makes rows unequal).

    Source: Du et al., GLM: General Language Model Pretraining with Autoregressive Blank Infilling,
    2022.

    >>> p = blank_infilling(torch.arange(20)[None], 99, 98, 97, torch.Generator().manual_seed(0))
    >>> p.inputs[0, -5:].tolist(), p.targets[0, -4:].tolist(), p.positions[:, 0, -4:].tolist()
    ([99, 98, 17, 18, 19], [17, 18, 19, 97], [[17, 17, 17, 17], [1, 2, 3, 4]])
    """
    spans = _spans(tokens, rate, mean_span, generator, "blank infilling")
    mask, first, last = (tokens.new_tensor([x]) for x in (mask_id, start, end))
    rows = []
    for kept, cut in spans:
        a = torch.cat([x for piece in kept for x in (piece, mask)])
        blanks = torch.tensor([len(piece) + 1 for piece in kept]).cumsum(0) - 1
        parts = [[a, a, torch.arange(len(a)), torch.zeros(len(a), dtype=torch.long)]]
        on = {"generator": generator, "device": generator.device}
        for i in torch.randperm(len(cut), **on).tolist():
            n = len(cut[i]) + 1
            place = torch.full((n,), int(blanks[i])), torch.arange(1, n + 1)
            parts.append([torch.cat([first, cut[i]]), torch.cat([cut[i], last]), *place])
        rows.append([torch.cat([x.to(tokens.device) for x in c]) for c in zip(*parts, strict=True)])
    inputs, targets, text, span = (torch.stack(c) for c in zip(*rows, strict=True))
    attention = prefix_mask(inputs.shape[1], len(a), device=tokens.device)
    return Problem(inputs, targets, span > 0, attention, torch.stack([text, span]))


def _spans(
    tokens: Tensor, rate: float, mean_span: float, generator: torch.Generator, name: str
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Each row as (kept pieces, cut pieces), in turn and equally many, kept first; none empty."""
    _check(tokens, 2, name)
    _check_rate(rate)
    if not mean_span >= 1:
        raise ValueError(f"mean_span={mean_span} must be at least 1 token")
    t = tokens.shape[1]
    cut = min(max(round(rate * t), 1), t - 1)
    count = min(max(round(cut / mean_span), 1), cut, t - cut)
    rows = []
    for row in tokens:
        sizes = torch.stack([_parts(n, count, generator) for n in (t - cut, cut)], dim=1)
        pieces = row.split(sizes.flatten().tolist())
        rows.append((list(pieces[::2]), list(pieces[1::2])))
    return rows


def _parts(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`total` as a sum of `count` positive numbers, each such sum equally likely."""
    cuts = torch.randperm(total - 1, generator=generator, device=generator.device)[: count - 1]
    ends = torch.cat([cuts.cpu().sort().values + 1, torch.tensor([total])])
    return ends.diff(prepend=torch.tensor([0]))


def _check(tokens: Tensor, least: int, name: str) -> None:
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens {tuple(tokens.shape)} of {tokens.dtype}: need integers [b, t]")
    if not len(tokens) or tokens.shape[1] < least:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} are shorter than one sequence: "
            f"{name} needs at least one row of {least}"
        )


def _check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} is a share of the tokens: it must be between 0 and 1")
