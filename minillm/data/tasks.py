"""Tasks and mixtures by name: where data comes from, how it becomes tokens, how answers are judged.

The idea of SeqIO (Roberts et al., Scaling Up Models and Data with t5x and seqio, 2022): a task
owns everything between a raw source and a number in a table, so that two experiments that name
the same task cannot differ in it. The registry is an object that you create and pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from minillm.data.mixture import MixtureSampler

Example = Mapping[str, Any]
Preprocessor = Callable[[Iterable[Example]], Iterable[Example]]
Metric = Callable[[Sequence[Any], Sequence[Any]], float]


class Tokenizer(Protocol):
    """What a task needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def each(function: Callable[[Example], Example]) -> Preprocessor:
    """A preprocessor that maps one example to one example."""
    return lambda examples: (function(example) for example in examples)


@dataclass(frozen=True)
class Task:
    """`source` -> `preprocessors` in order -> examples with text under "inputs" and "targets".

    `source` takes a split name. A preprocessor maps a stream to a stream, so it may also drop or
    multiply examples. `postprocessor` turns an output text, and the same function a target text,
    into what the metrics compare; each metric gets (targets, predictions).
    """

    name: str
    source: Callable[[str], Iterable[Example]]
    tokenizer: Tokenizer
    preprocessors: tuple[Preprocessor, ...] = ()
    postprocessor: Callable[[str], Any] = str.strip
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def examples(self, split: str = "train") -> Iterator[Example]:
        """Preprocessed examples as text; ValueError if one lacks "inputs" or "targets"."""
        stream: Iterable[Example] = self.source(split)
        for preprocessor in self.preprocessors:
            stream = preprocessor(stream)
        for example in stream:
            if missing := [key for key in ("inputs", "targets") if key not in example]:
                raise ValueError(f"task {self.name!r}: example without {missing}: {dict(example)}")
            yield example

    def tokens(self, split: str = "train") -> Iterator[dict[str, list[int]]]:
        """Examples as token ids under "inputs" and "targets"."""
        for example in self.examples(split):
            yield {key: self.tokenizer.encode(example[key]) for key in ("inputs", "targets")}

    def evaluate(
        self, predict: Callable[[list[int]], Sequence[int]], split: str = "test"
    ) -> dict[str, float]:
        """Every metric of `predict`, which maps input ids to output ids, on a split."""
        targets, predictions = [], []
        for example in self.examples(split):
            output = self.tokenizer.decode(predict(self.tokenizer.encode(example["inputs"])))
            predictions.append(self.postprocessor(output))
            targets.append(self.postprocessor(example["targets"]))
        if not targets:
            raise ValueError(f"task {self.name!r} has no examples in split {split!r}")
        return {name: metric(targets, predictions) for name, metric in self.metrics.items()}


@dataclass(frozen=True)
class Mixture:
    """Tasks by name and how often each is drawn; rates as `minillm.data.mixture` computes them."""

    name: str
    rates: Mapping[str, float]


class Registry:
    """Tasks and mixtures under names that are given once.

    >>> registry = Registry()
    >>> registry.add(Mixture("all", {"copy": 1.0}))
    Traceback (most recent call last):
        ...
    ValueError: mixture 'all' names unknown tasks ['copy'], known are []
    """

    def __init__(self) -> None:
        self._entries: dict[str, Task | Mixture] = {}

    def add(self, entry: Task | Mixture) -> None:
        """Register; ValueError for a name in use, or a mixture of tasks not registered yet."""
        if entry.name in self._entries:
            raise ValueError(f"the name {entry.name!r} is taken")
        if isinstance(entry, Mixture):
            known = [name for name, e in self._entries.items() if isinstance(e, Task)]
            if unknown := [name for name in entry.rates if name not in known]:
                raise ValueError(
                    f"mixture {entry.name!r} names unknown tasks {unknown}, known are {known}"
                )
        self._entries[entry.name] = entry

    def names(self) -> list[str]:
        """Everything registered, in order."""
        return list(self._entries)

    def get(self, name: str) -> Task | Mixture:
        """The entry of this name; ValueError lists the names there are."""
        if name not in self._entries:
            raise ValueError(f"no task or mixture {name!r}, there are {self.names()}")
        return self._entries[name]

    def sampler(self, name: str, seed: int, split: str = "train") -> MixtureSampler:
        """Endless (task name, tokenized example) pairs of a mixture, or of one task."""
        entry = self.get(name)
        rates = {name: 1.0} if isinstance(entry, Task) else entry.rates
        sources = {task: list(self._entries[task].tokens(split)) for task in rates}
        return MixtureSampler(sources, rates, seed)
