"""Preferences: which of some responses to a request is better, drawn from a reward that is known.

People say which response they like, not what it is worth. Here the worth is known, and the sayings
are drawn from it, so that what a model learns from them can be held against the truth.
"""

# n requests, k responses to each

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Responses to one request, the best first. ValueError for fewer than two."""

    request: str
    responses: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise ValueError(f"{self.responses!r}: a comparison needs at least two responses")


def compare(
    requests: Sequence[str],
    responses: Sequence[Sequence[str]],
    rewards: Tensor,
    *,
    generator: torch.Generator,
    noise: float = 0.0,
    temperature: float = 1.0,
) -> list[Comparison]:
    """Rankings of the k responses to each of n requests, drawn from their rewards [n, k].

        P(i is ranked first) = exp(r_i / temperature) / Σ_j exp(r_j / temperature)

    and so on among the others (Plackett-Luce); of two, i wins with σ((r_i - r_j) / temperature)
    (Bradley-Terry). Equal rewards are a coin's toss. At temperature 0 the order is that of the
    rewards: there, of responses with equal rewards only the first is kept, and a request whose
    responses are all equal gives no comparison, since nothing was preferred; such a list may be
    empty. Then each ranking is turned round with probability `noise`.

    Raises ValueError for rewards that are not finite or not [n, k], k < 2, noise outside [0, 1] and
    a negative temperature. Sources: Bradley and Terry, Rank Analysis of Incomplete Block Designs,
    1952; Plackett, The Analysis of Permutations, 1975.

    >>> rng = torch.Generator().manual_seed(0)
    >>> best = compare(["Hi!"], [["ho", "hello", "ho ho"]], torch.tensor([[1.0, 2.0, 1.0]]),
    ...                generator=rng, temperature=0)
    >>> best[0].responses
    ('hello', 'ho')
    """
    k = rewards.shape[-1]
    lengths = sorted({len(some) for some in responses})
    shapes = (len(requests), k), (len(responses), *(lengths or [k]))
    if any(shape != tuple(rewards.shape) for shape in shapes):
        raise ValueError(
            f"{len(requests)} requests and {len(responses)} lists of {lengths} responses need "
            f"rewards [n, k], not {list(rewards.shape)}"
        )
    if k < 2 or not 0 <= noise <= 1 or not temperature >= 0:
        raise ValueError(
            f"k={k} must be at least 2, noise={noise} in [0, 1], temperature={temperature} >= 0"
        )
    if bad := (~rewards.isfinite()).any(-1).nonzero().flatten().tolist():
        raise ValueError(f"the rewards of requests {bad} are not finite: they rank nothing")
    value = rewards.double()
    if temperature > 0:
        # the order of r / T + Gumbel noise is a draw from Plackett-Luce; scaled by T there is no
        # overflow at small T
        uniform = torch.rand(value.shape, generator=generator, dtype=value.dtype)
        value = value - temperature * (-uniform.log()).log()
    order = value.argsort(dim=-1, descending=True, stable=True).tolist()
    turned = (torch.rand(len(value), generator=generator) < noise).tolist()
    found = []
    for request, some, places, known, wrong in zip(
        requests, responses, order, rewards.tolist(), turned, strict=True
    ):
        if temperature == 0:
            places = [i for i in places if known.index(known[i]) == i]
        if len(places) > 1:
            kept = reversed(places) if wrong else places
            found.append(Comparison(request, tuple(some[i] for i in kept)))
    return found
