"""The clip explorer: one token's loss and pull beside differences, and what it says in words."""

import matplotlib.pyplot as plt
import pytest

from minillm.teach import clip_view
from minillm.teach.clip_view import RATIOS, curve, picture, verdict
from minillm.teach.widgets import explore


def loss(ratio, advantage, clip):
    """Case by case, as in the paper's figure: flat where the ratio has gone far enough."""
    if advantage > 0:
        return -advantage * min(ratio, 1 + clip)
    return -advantage * max(ratio, 1 - clip)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 2.5, -0.3])
@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_loss_and_slope_case_by_case(advantage, clip):
    ratios = [0.05, 0.3, 0.75, 0.95, 1.0, 1.05, 1.25, 1.6, 3.0]
    losses, slopes = curve(advantage, clip, ratios)
    small = 1e-6
    for ratio, value, slope in zip(ratios, losses, slopes, strict=True):
        assert value == pytest.approx(loss(ratio, advantage, clip), abs=1e-9)
        up, down = (loss(ratio * (1 + x), advantage, clip) for x in (small, -small))
        assert slope == pytest.approx((up - down) / (2 * small), abs=1e-4)  # to log ratio


def test_it_is_held_where_the_advantage_has_led_and_free_on_the_way_back():
    assert curve(1.0, 0.2, [1.21, 5.0])[1] == [0, 0] == curve(-1.0, 0.2, [0.79, 0.1])[1]
    assert all(slope < 0 for slope in curve(1.0, 0.2, [0.1, 0.79, 1.19])[1])
    assert all(slope > 0 for slope in curve(-1.0, 0.2, [0.81, 1.21, 5.0])[1])
    words = [verdict(r, a) for a in (1.0, -1.0) for r in (0.5, 1.0, 1.5)]
    assert words == [
        *("pushed up", "pushed up", "held: no pull"),
        *("held: no pull", "pushed down", "pushed down"),
    ]
    assert verdict(1.5, 1.0, clip=0.6) == "pushed up"  # the same ratio, a wider clip
    assert verdict(1.0, 0.0).startswith("nothing to learn")


def test_what_is_no_ratio_is_refused():
    with pytest.raises(ValueError, match=r"ratios \[0.0, -1\] must be above 0"):
        curve(1.0, 0.2, [1.0, 0.0, -1])
    with pytest.raises(ValueError, match="clip=0"):
        verdict(1.0, 1.0, 0.0)


def test_the_picture_shows_both_signs_and_the_token():
    fig = picture(ratio=1.4, advantage=-2.0, clip=0.25)
    both = zip(curve(2.0, 0.25), curve(-2.0, 0.25), strict=True)  # losses, then slopes
    for ax, values in zip(fig.axes, both, strict=True):
        plus, minus, dot = ax.get_lines()
        assert list(plus.get_ydata()) == values[0] and list(minus.get_ydata()) == values[1]
        assert list(plus.get_xdata()) == list(RATIOS)
        assert plus.get_alpha() < minus.get_alpha() == 1.0  # the token's own curve stands out
        assert dot.get_xdata()[0] == 1.4
    assert fig.axes[0].get_lines()[2].get_ydata()[0] == pytest.approx(2.8)
    assert "ρ = 1.40: pushed down" in fig.axes[1].get_title()
    plt.close("all")


def test_it_can_be_explored(monkeypatch):
    drawn = []
    monkeypatch.setattr(clip_view, "curve", lambda *a: drawn.append(a) or curve(*a))
    view = explore(picture, ratio=(0.2, 2.0, 0.05), advantage=(-2.0, 2.0, 0.5), clip=(0.05, 0.5))
    assert view.values() == {"ratio": 1.3, "advantage": 1.0, "clip": 0.2}
    before, count = view.image.value, len(drawn)
    view.controls["ratio"].value = 0.6
    assert view.image.value != before and len(drawn) > count and not view.message.value
