"""Rates against formulas, the sampler against statistics and against itself, tasks end to end."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import mixture
from minillm.data.tasks import Mixture, Registry, Task, each

ROOT = Path(__file__).resolve().parents[1]
SIZES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**12), min_size=1)


@given(SIZES, st.integers(1, 10**12))
def test_proportional_with_cap(sizes, cap):
    rates = mixture.proportional_rates(sizes, cap)
    total = sum(min(size, cap) for size in sizes.values())
    assert rates == pytest.approx({name: min(size, cap) / total for name, size in sizes.items()})
    assert sum(rates.values()) == pytest.approx(1)


@given(SIZES, st.floats(0.5, 20))
def test_temperature(sizes, temperature):
    rates = mixture.temperature_rates(sizes, temperature)
    logs = {name: math.log(size) / temperature for name, size in sizes.items()}
    shift = max(logs.values())
    total = sum(math.exp(x - shift) for x in logs.values())
    assert rates == pytest.approx({n: math.exp(x - shift) / total for n, x in logs.items()})


def test_limits_of_the_temperature():
    sizes = {"big": 1e13, "small": 1e3}
    assert mixture.temperature_rates(sizes, 1) == mixture.proportional_rates(sizes)
    assert mixture.temperature_rates(sizes, 1e9)["small"] == pytest.approx(0.5)
    assert mixture.temperature_rates(sizes, 1e-2)["big"] == pytest.approx(1)  # no overflow
    assert mixture.temperature_rates({"a": 0, "b": 5}, 2) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture.temperature_rates({"a": 1}, 0), "temperature=0"),
        (lambda: mixture.temperature_rates({"a": 1}, math.nan), "temperature=nan"),
        (lambda: mixture.proportional_rates({"a": 1}, cap=0), "cap=0"),
        (lambda: mixture.proportional_rates({"a": -1, "b": 2}), "negative"),
        (lambda: mixture.proportional_rates({}), "not all 0"),
        (lambda: mixture.fixed_rates({"a": 0, "b": 0}), "not all 0"),
        (lambda: mixture.fixed_rates({"a": math.inf}), "finite"),
        (lambda: mixture.implied_bytes_per_token(1, 1, 0, 1), "proportion=0"),
        (lambda: mixture.MixtureSampler({"a": [1]}, {"b": 1}, 0), r"rates for \['b'\]"),
        (lambda: mixture.MixtureSampler({"a": [], "b": [1]}, {"a": 1, "b": 1}, 0), r"\['a'\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_epochs_and_the_bytes_behind_llama():
    rates = mixture.fixed_rates({"a": 3, "b": 1})
    assert mixture.epochs(rates, {"a": 30, "b": 50}, 100) == {"a": 2.5, "b": 0.5}
    with open(ROOT / "assets/data/llama_data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["proportion_percent"]) for row in rows) == pytest.approx(100)
    implied = [
        mixture.implied_bytes_per_token(
            float(row["disk_gb"]) * 1e9,
            float(row["epochs"]),
            float(row["proportion_percent"]) / 100,
            1.4e12,
        )
        for row in rows
    ]
    assert len(implied) == 7 and round(min(implied), 1) == 2.8 and round(max(implied), 1) == 4.0
    assert all("LLaMA" in row["source"] for row in rows)


def test_sampler_meets_its_rates_and_shuffles_without_replacement():
    sources = {"a": [f"a{i}" for i in range(7)], "b": [f"b{i}" for i in range(100)], "c": []}
    sampler = mixture.MixtureSampler(sources, {"a": 3, "b": 1, "c": 0}, seed=0)
    draws = list(itertools.islice(sampler, 4000))
    counts = Counter(name for name, _ in draws)
    assert abs(counts["a"] / 4000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    assert counts["c"] == 0
    for name in "ab":
        drawn = [example for source, example in draws if source == name]
        size = len(sources[name])
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert all(sorted(epoch) == sorted(sources[name]) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # a new order each time


def test_sampler_repeats_and_resumes_exactly():
    sources = {"x": range(5), "y": range(100, 120)}

    def new(seed=4):
        return mixture.MixtureSampler(sources, {"x": 0.3, "y": 0.7}, seed)

    want = list(itertools.islice(new(), 60))
    assert list(itertools.islice(new(), 60)) == want
    assert list(itertools.islice(new(5), 60)) != want
    for stop in (0, 1, 17, 59):
        first = new()
        got = list(itertools.islice(first, stop))
        rest = new()
        rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert got + list(itertools.islice(rest, 60 - stop)) == want
    with pytest.raises(ValueError, match="seed=5"):
        new(5).load_state_dict(new().state_dict())
    other = mixture.MixtureSampler({"x": range(6), "y": range(20)}, {"x": 0.3, "y": 0.7}, 4)
    with pytest.raises(ValueError, match="sizes="):
        other.load_state_dict(new().state_dict())


class Letters:
    """ASCII codes."""

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def _accuracy(targets, predictions):
    return sum(t == p for t, p in zip(targets, predictions, strict=True)) / len(targets)


def _reverse_task(name="reverse", metric=_accuracy):
    data = {"train": ["abc", "xy", ""], "test": ["no", "abba"]}
    return Task(
        name,
        source=lambda split: ({"word": word} for word in data[split]),
        tokenizer=Letters(),
        preprocessors=(
            lambda examples: (e for e in examples if e["word"]),  # drops
            each(lambda e: {"inputs": e["word"], "targets": e["word"][::-1] + " "}),
        ),
        metrics={"accuracy": metric},
    )


def test_a_task_runs_from_source_to_metric():
    task = _reverse_task()
    assert list(task.examples()) == [
        {"inputs": "abc", "targets": "cba "},
        {"inputs": "xy", "targets": "yx "},
    ]
    assert next(task.tokens()) == {"inputs": [97, 98, 99], "targets": [99, 98, 97, 32]}
    assert task.evaluate(lambda ids: [10, *ids[::-1]]) == {"accuracy": 1.0}  # stripped
    assert task.evaluate(lambda ids: ids) == {"accuracy": 0.5}  # "abba" is a palindrome
    order = []
    _reverse_task(metric=lambda t, p: order.append((t, p)) or 0.0).evaluate(lambda ids: ids)
    assert order == [(["on", "abba"], ["no", "abba"])]  # targets first


def test_task_errors():
    bad = Task("bad", lambda split: [{"inputs": "x"}], Letters())
    with pytest.raises(ValueError, match=r"task 'bad': example without \['targets'\]"):
        list(bad.examples())
    empty = Task("empty", lambda split: [], Letters())
    with pytest.raises(ValueError, match="no examples in split 'test'"):
        empty.evaluate(lambda ids: ids)


def test_registry_and_mixture():
    registry = Registry()
    registry.add(_reverse_task("one"))
    registry.add(_reverse_task("two"))
    registry.add(Mixture("both", mixture.fixed_rates({"one": 9, "two": 1})))
    assert registry.names() == ["one", "two", "both"]
    assert registry.get("one").name == "one"
    with pytest.raises(ValueError, match="'one' is taken"):
        registry.add(_reverse_task("one"))
    with pytest.raises(ValueError, match=r"unknown tasks \['three'\], known are \['one', 'two'\]"):
        registry.add(Mixture("more", {"one": 1, "three": 1}))
    with pytest.raises(ValueError, match=r"no task or mixture 'none', there are"):
        registry.get("none")
    draws = Counter(name for name, _ in itertools.islice(registry.sampler("both", seed=0), 1000))
    assert abs(draws["one"] / 1000 - 0.9) < 4 * math.sqrt(0.09 / 1000)
    name, example = next(registry.sampler("one", seed=0))
    assert name == "one" and set(example) == {"inputs", "targets"}
    assert Registry().names() == []  # registries share nothing
