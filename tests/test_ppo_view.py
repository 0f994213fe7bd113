"""The band over seeds and the table of a response's tokens."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from minillm.teach import plots, ppo_view


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """The share of samples whose interval holds the true mean: 95 %, for every size."""
    rng = np.random.default_rng(0)
    for n in range(2, 11):
        mean, low, high = ppo_view.interval(3 + 2 * rng.standard_normal((n, 20_000)))
        covered = ((low < 3) & (high > 3)).mean()
        assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 20_000), n
        np.testing.assert_allclose(mean, (low + high) / 2)


def test_the_interval_refuses_what_it_cannot_say():
    for values, message in (
        ([1.0], "1 runs"),
        ([0.0] * 11, "11 runs"),
        ([1.0, math.nan], "1 of 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_view.interval(values)


def test_the_band_shows_every_run():
    fig, ax = plt.subplots()
    runs = [[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]]
    ppo_view.band(ax, runs, "with control", plots.COLORS[0])
    lines = ax.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [*runs, [1.0, 1.0, 2.0]]
    assert list(lines[-1].get_xdata()) == [1, 2, 3] and lines[-1].get_label() == "with control"
    filled = ax.collections[0].get_paths()[0].vertices[:, 1]
    _, low, high = ppo_view.interval(runs)
    assert filled.min() == pytest.approx(low.min()) and filled.max() == pytest.approx(high.max())
    plt.close(fig)


def test_the_table_has_a_number_and_a_color_for_each_token():
    rows = {"log-ratio": torch.tensor([0.5, -1.0, -0.001]), "reward": [0.0, 0.0, 0.0]}
    fig = ppo_view.token_rows(["Dear", " Mia", ","], rows)
    (ax,) = fig.axes
    assert [text.get_text() for text in ax.get_xticklabels()] == ["Dear", "·Mia", ","]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(rows)
    assert [text.get_text() for text in ax.texts] == ["0.50", "-1.00", "0.00", *["0.00"] * 3]
    image = ax.get_images()[0]
    colors = image.cmap(image.norm(image.get_array()))[..., :3]
    np.testing.assert_allclose(colors[0, 1], to_rgb(plots.COLORS[0]), atol=0.01)  # the lowest
    np.testing.assert_allclose(colors[0, 2], 1, atol=0.01)  # 0 is white
    assert colors[0, 0, 0] > colors[0, 0, 2]  # above 0: orange
    np.testing.assert_allclose(colors[1], 1, atol=0.01)  # all 0, and no 0 / 0
    plt.close(fig)


def test_the_table_refuses_rows_that_do_not_fit():
    for tokens, rows, message in (
        ([], {"a": []}, "0 tokens and 1 rows"),
        (["x"], {}, "1 tokens and 0 rows"),
        (["x"], {"a": [1.0, 2.0]}, "row 'a'"),
        (["x", "y"], {"a": [1.0, math.inf]}, "must be 2 finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            ppo_view.token_rows(tokens, rows)
    plt.close("all")
