"""The arithmetic behind chapter 18's widget against the formula, brute force and the figure."""

import csv
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.accounting import memory
from minillm.teach.zero_view import STAGES, fewest, picture, shares

DATA = Path(__file__).resolve().parents[1] / "assets/data/zero_7_5b_64_gpus.csv"


@given(
    parameters=st.integers(1, 10**12),
    ranks=st.integers(1, 4096),
    stage=st.integers(0, 3),
    optimizer=st.sampled_from([8, 12, 4]),
)
def test_shares_add_up_to_the_formula(parameters, ranks, stage, optimizer):
    found = shares(parameters, ranks, stage, (2, 2, optimizer))
    assert sum(found) == pytest.approx(memory.zero(parameters, ranks, stage, optimizer))
    whole = shares(parameters, 1, stage, (2, 2, optimizer))
    ratios = [b / a for a, b in zip(found, whole, strict=True)]
    assert ratios == pytest.approx([ranks if stage > 2 - i else 1 for i in range(3)])


def test_published_example():
    with DATA.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        total = sum(shares(7.5e9, 64, int(row["stage"])))
        assert round(total / 1e9, 1) == float(row["gigabytes_per_gpu"])


@given(
    parameters=st.integers(1, 50),
    capacity=st.integers(1, 900),
    stage=st.integers(0, 3),
    sizes=st.sampled_from([(2, 2, 12), (4, 4, 8), (2, 4, 12)]),
)
def test_fewest_is_found_by_counting_up(parameters, capacity, stage, sizes):
    fit = (n for n in range(1, 3000) if sum(shares(parameters, n, stage, sizes)) <= capacity)
    assert fewest(parameters, capacity, stage, sizes) == next(fit, None)


def test_picture_draws_what_shares_says():
    fig = picture(7.5, 64, 24)
    left, right = fig.axes
    heights = [[bar.get_height() for bar in bars] for bars in left.containers]
    for stage, column in enumerate(zip(*heights, strict=True)):
        assert column == pytest.approx([x / 1e9 for x in shares(7.5e9, 64, stage)])
    said = " ".join(text.get_text() for text in left.texts)
    assert said.count("never fits") == 2 and "N = 12" in said and "N = 5" in said
    curves = {line.get_label(): line for line in right.get_lines()}
    for stage, name in enumerate(STAGES):
        assert curves[name].get_ydata()[6] == pytest.approx(memory.zero(7.5, 64, stage))
        assert curves[name].get_color() != curves[STAGES[stage - 1]].get_color()
    plt.close(fig)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shares(1e9, 4, 4), "stage=4 must be 0, 1, 2 or 3"),
        (lambda: shares(1e9, 0, 1), "ranks=0 at least 1"),
        (lambda: shares(0, 4, 1), "parameters=0 positive"),
        (lambda: fewest(1e9, 0, 1), "capacity=0 bytes must be positive"),
    ],
)
def test_bad_use_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
