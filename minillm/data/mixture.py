"""Mixtures: how often each source is drawn, how many epochs that is, a sampler that resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def _normalized(weights: Mapping[str, float], what: str) -> dict[str, float]:
    wrong = {k: w for k, w in weights.items() if not (w >= 0 and math.isfinite(w))}
    total = sum(weights.values())
    if wrong or not total > 0:
        raise ValueError(f"{what} must be finite, not negative and not all 0, got {dict(weights)}")
    return {name: weight / total for name, weight in weights.items()}


def fixed_rates(weights: Mapping[str, float]) -> dict[str, float]:
    """Proportions by hand, scaled to sum to 1.

    >>> fixed_rates({"web": 3, "books": 1})
    {'web': 0.75, 'books': 0.25}
    """
    return _normalized(weights, "weights")


def proportional_rates(sizes: Mapping[str, float], cap: float | None = None) -> dict[str, float]:
    """r_i = min(e_i, K) / sum_j min(e_j, K) for sizes e and cap K (None: no cap).

    Without the cap a giant drowns everything else. (Raffel et al., Exploring the Limits of
    Transfer Learning with a Unified Text-to-Text Transformer, 2020, section 3.5.2.)

    >>> proportional_rates({"web": 900, "books": 100}, cap=300)
    {'web': 0.75, 'books': 0.25}
    """
    return temperature_rates(sizes, 1.0, cap)


def temperature_rates(
    sizes: Mapping[str, float], temperature: float, cap: float | None = None
) -> dict[str, float]:
    """r_i proportional to min(e_i, K)^(1/T): T = 1 is proportional, T to infinity is equal shares.

    >>> temperature_rates({"web": 900, "books": 100}, temperature=2)
    {'web': 0.75, 'books': 0.25}
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap={cap} must be positive, or None")
    largest = max(sizes.values(), default=1) or 1  # divide first: large sizes must not overflow
    limited = {name: min(size, cap or math.inf) / largest for name, size in sizes.items()}
    if any(size < 0 for size in limited.values()):
        raise ValueError(f"sizes must not be negative, got {dict(sizes)}")
    return _normalized({n: size ** (1 / temperature) for n, size in limited.items()}, "sizes")


def epochs(
    rates: Mapping[str, float], sizes: Mapping[str, float], budget: float
) -> dict[str, float]:
    """How often each source is seen when `budget` is drawn: budget x rate / size (same unit)."""
    return {name: budget * rate / sizes[name] for name, rate in rates.items()}


def implied_bytes_per_token(
    disk_bytes: float | np.ndarray,
    n_epochs: float | np.ndarray,
    proportion: float | np.ndarray,
    total_tokens: float,
) -> float | np.ndarray:
    """Bytes read (size on disk x epochs) over tokens seen (proportion x total); arrays too.

    >>> round(implied_bytes_per_token(783e9, 1.06, 0.15, 1.4e12), 2)     # C4 in LLaMA's table 1
    3.95
    """
    if not (np.all(np.asarray(proportion) > 0) and total_tokens > 0):
        raise ValueError(f"proportion={proportion}, total_tokens={total_tokens} must be positive")
    return disk_bytes * n_epochs / (proportion * total_tokens)


class MixtureSampler:
    """Endless (source name, example) pairs: sources at `rates`, each source in shuffled epochs.

    Within a source nothing repeats before everything was seen. The n-th choice of a source depends
    on the seed and n alone, the order of an epoch on the seed, the source and the epoch: two runs
    are identical, and a state is a handful of integers.

    >>> sampler = MixtureSampler({"a": ["a0", "a1"], "b": ["b0"]}, {"a": 2, "b": 1}, seed=0)
    >>> name, example = next(sampler)
    >>> example.startswith(name)
    True
    """

    def __init__(
        self, sources: Mapping[str, Sequence[Any]], rates: Mapping[str, float], seed: int
    ) -> None:
        if set(sources) != set(rates):
            raise ValueError(f"rates for {sorted(rates)}, but sources are {sorted(sources)}")
        self.rates = _normalized(rates, "rates")
        if empty := [n for n, source in sources.items() if self.rates[n] > 0 and not len(source)]:
            raise ValueError(f"sources {empty} are empty but have a rate above 0")
        self.sources, self.names, self.seed = dict(sources), sorted(sources), seed
        self._edges = np.cumsum([self.rates[name] for name in self.names])
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self.drawn = dict.fromkeys(self.names, 0)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """The shuffled order of one epoch; the current one is kept."""
        if self._orders.get(name, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed, 1, self.names.index(name), epoch])
            self._orders[name] = (epoch, rng.permutation(len(self.sources[name])))
        return self._orders[name][1]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self

    def __next__(self) -> tuple[str, Any]:
        u = np.random.default_rng([self.seed, 0, sum(self.drawn.values())]).random()
        # scaled by the last edge: rounding must not leave a gap below 1
        index = int(np.searchsorted(self._edges, u * self._edges[-1], side="right"))
        name = self.names[min(index, len(self.names) - 1)]
        epoch, place = divmod(self.drawn[name], len(self.sources[name]))
        self.drawn[name] += 1
        return name, self.sources[name][int(self._order(name, epoch)[place])]

    def state_dict(self) -> dict[str, Any]:
        """Seed, sizes and how many examples each source has given."""
        sizes = {name: len(source) for name, source in self.sources.items()}
        return {"seed": self.seed, "sizes": sizes, "rates": self.rates, "drawn": dict(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; ValueError if it belongs to another mixture."""
        mine = self.state_dict()
        for part in ("seed", "sizes", "rates"):
            if state.get(part) != mine[part]:
                raise ValueError(f"{part}={mine[part]} here, {state.get(part)} in the saved state")
        self.drawn = {name: int(state["drawn"][name]) for name in self.names}
