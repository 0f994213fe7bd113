"""The small reward model behind the widget: a maximum, and a picture of what it learned."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from minillm.teach import label_view

PAIRS = [
    ("Dear Mia, I miss you.", "Dear Mia, You are loud."),
    ("Dear Mia, You are loud.", "Dear Mia, I saw a frog."),
    ("Dear Mia, I miss you. I saw a frog.", "Dear Mia, I saw a frog. You are loud."),
    ("Dear Mia, I saw a frog. I miss you.", "Dear Mia, I saw a frog."),
]
LINES = ["I miss you.", "I saw a frog.", "You are loud."]


def test_pairs_differ_by_their_lines():
    lines, x = label_view.differences(PAIRS)
    assert lines == LINES
    assert x.tolist() == [[1, 0, -1], [0, -1, 1], [1, 0, -1], [1, 0, 0]]
    assert label_view.differences([])[1].shape == (0, 0)


def test_the_fit_is_the_maximum_and_known_worths_come_back():
    rng = np.random.default_rng(0)
    x, truth = rng.integers(-2, 3, (4000, 3)).astype(float), np.array([1.0, 0.0, -0.7])
    won = (rng.random(4000) < 1 / (1 + np.exp(-x @ truth))).astype(float)
    w = label_view.fit(x, won, doubt=0.01)
    p = 1 / (1 + np.exp(-x @ w))
    np.testing.assert_allclose(x.T @ (won - p) - 0.01 * w, 0, atol=1e-7)
    np.testing.assert_allclose(w, truth, atol=0.12)
    assert (label_view.fit(x[:0], won[:0]) == 0).all()  # no label, no opinion
    with pytest.raises(ValueError, match="doubt=0 must be above 0"):
        label_view.fit(x, won, doubt=0)


def test_the_model_follows_the_labels():
    left = label_view.picture(PAIRS, ["left", "not labeled", "not labeled", "not labeled"])
    right = label_view.picture(PAIRS, ["right", "not labeled", "not labeled", "not labeled"])
    none = label_view.picture(PAIRS, ["not labeled"] * 4)
    chances = [[bar.get_width() for bar in fig.axes[1].patches] for fig in (left, right, none)]
    assert chances[2] == [0.5] * 4
    # the third pair differs by the same two lines, so the label of the first decides it
    assert chances[0][2] == chances[0][0] > 0.6 and chances[1][2] == chances[1][0] < 0.4
    assert chances[0][1] < 0.5 < chances[1][1]
    colors = [bar.get_facecolor() for bar in left.axes[1].patches]
    assert colors[0] != colors[1] == colors[2]
    with pytest.raises(ValueError, match="must be 4 of"):
        label_view.picture(PAIRS, ["left"])
    with pytest.raises(ValueError, match="must be 4 of"):
        label_view.picture(PAIRS, ["yes"] * 4)
    plt.close("all")
