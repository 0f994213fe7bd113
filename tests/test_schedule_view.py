"""The schedule explorer against the schedules it shows, and pictures against their events."""

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from minillm.parallel.actions import Action, Timed
from minillm.parallel.schedules import NAMES, schedule
from minillm.teach import schedule_view
from minillm.teach.schedule_view import COLORS, bars, explore


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    k=st.integers(1, 5),
    groups=st.integers(1, 3),
    v=st.integers(1, 3),
    batches=st.integers(1, 2),
    forward=st.floats(0.1, 3),
    backward=st.floats(0.1, 3),
    communication=st.sampled_from([0.0, 0.3]),
)
def test_work_is_conserved(name, k, groups, v, batches, forward, backward, communication):
    """Whatever the order: each device works M (F + B) a batch, whole or in v pieces."""
    m, v = k * groups, v if name == "interleaved" else 1
    found = explore(name, k, m, v, batches, forward, backward, communication)
    work = batches * m * (forward + backward)
    for device in range(k):
        drawn = sorted((b.left, b.width) for b in bars(found.events) if b.device == device)
        assert sum(width for _, width in drawn) == pytest.approx(work)
        ends = [left + width for left, width in drawn]
        assert all(e <= left + 1e-9 for e, (left, _) in zip(ends, drawn[1:], strict=False))
    assert found.idle == pytest.approx(1 - work / found.span, abs=1e-9)
    assert found.bubble == pytest.approx((found.span - work) / work, abs=1e-9)
    assert all(0 < kept <= m * batches for kept in found.in_flight)


def test_what_it_says_of_known_schedules():
    idle = {name: explore(name, 4, 8).idle for name in ("naive", "gpipe", "1f1b")}
    assert idle == pytest.approx({"naive": 3 / 4, "gpipe": 3 / 11, "1f1b": 3 / 11})
    assert explore("interleaved", 4, 8, chunks=2).bubble == pytest.approx(3 / 16)
    assert explore("interleaved", 4, 8, chunks=2).in_flight[0] == 4 + 3 / 2
    assert explore("1f1b", 4, 8).in_flight == [4, 3, 2, 1]
    assert explore("pipedream", 4, 8, batches=2).versions == [4, 3, 2, 1]
    slow = explore("gpipe", 4, 8, communication=0.5)
    assert slow.span == pytest.approx(11 * 3 + 6 * 0.5)


def test_bars_are_the_actions():
    events = explore("zb-h1", 3, 4).events
    work = [e for e in events if e.action.what != "update"]
    drawn = bars(events)
    assert len(drawn) == len(work) == 3 * 4 * 3 < len(events)
    for bar, event in zip(drawn, work, strict=True):
        assert (bar.device, bar.left, bar.what) == (event.device, event.start, event.action.what)
        assert bar.left + bar.width == pytest.approx(event.end)
        assert bar.text == str(event.action.micro_batch)
        assert bar.color == pytest.approx(to_rgb(COLORS[event.action.what]))


def test_chunks_of_a_device_have_their_own_shade():
    drawn = bars(explore("interleaved", 2, 2, chunks=3).events)
    shades = {(bar.device, bar.what): set() for bar in drawn}
    for bar in drawn:
        shades[bar.device, bar.what].add(bar.color)
    assert {len(found) for found in shades.values()} == {3} and len(shades) == 4


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="groups of stages=3, got 4"):
        explore("interleaved", 3, 4, chunks=2)
    with pytest.raises(ValueError, match="forward=0 and backward=2"):
        explore("gpipe", 2, 2, forward=0)
    with pytest.raises(ValueError, match="communication=-1"):
        explore("gpipe", 2, 2, communication=-1)
    with pytest.raises(ValueError, match=r"no color for \['think'\]"):
        bars([Timed(0, Action("think", 0, 0), 0.0, 1.0)])


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 2), ("2bw", 1)])
def test_the_picture_shows_lanes_and_what_is_kept(name, chunks):
    found = explore(name, 3, 6, chunks, batches=2)
    fig = schedule_view.picture(found, name)
    left, right = fig.axes
    drawn = [bar for container in left.containers for bar in container]
    want = bars(found.events)
    assert [b.get_x() for b in drawn] == pytest.approx([b.left for b in want])
    assert [b.get_width() for b in drawn] == pytest.approx([b.width for b in want])
    assert [b.get_facecolor()[:3] for b in drawn] == [pytest.approx(b.color) for b in want]
    assert [round(b.get_y() + b.get_height() / 2) for b in drawn] == [b.device for b in want]
    assert {text.get_text() for text in left.texts} <= {str(m) for m in range(12)}
    assert f"{found.idle:.1%} idle" in (left.get_title() or left.get_title("left"))
    assert [b.get_width() for b in right.containers[0]] == found.in_flight
    assert ("versions" in right.texts[0].get_text()) == (name == "2bw")
    assert left.get_ylim()[0] > left.get_ylim()[1]  # device 0 on top
    plt.close(fig)


def test_bars_are_named_where_there_is_room():
    fig, ax = plt.subplots(figsize=(20, 3))
    events = explore("gpipe", 2, 12).events
    schedule_view.lanes(ax, events)
    assert [text.get_text() for text in ax.texts] == [bar.text for bar in bars(events)]
    plt.close(fig)
    fig, ax = plt.subplots(figsize=(4, 2))
    events = explore("gpipe", 2, 60).events
    schedule_view.lanes(ax, events, until=400)
    assert not ax.texts and ax.get_xlim() == (0, 400)
    assert len(bars(events)) == sum(
        a.what != "update" for actions in schedule("gpipe", 2, 60) for a in actions
    )
    plt.close(fig)
