"""Schedules against brute force and against the formulas of the papers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.parallel.schedules import (
    NAMES,
    Action,
    Timed,
    _unflushed,
    check,
    idle_share,
    in_flight,
    one_chunk,
    placement,
    replay,
    schedule,
    timeline,
    versions,
)

SYNCHRONOUS = NAMES[:5]
many = settings(max_examples=60, deadline=None)


@st.composite
def settings_of(draw, names=NAMES):
    """(name, K, M, v, batches) that fit each other."""
    name = draw(st.sampled_from(names))
    k, m = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    if name == "interleaved":
        m = k * draw(st.integers(1, 3))
    if name == "2bw":
        m = max(m, k)
    v = draw(st.integers(1, 3)) if name == "interleaved" else 1
    return name, k, m, v, draw(st.integers(1, 3))


def is_stuck(lists):
    """By definition: sweep over all devices until nothing moves any more."""
    last = max(a.stage for device in lists for a in device)
    done, rest = set(), [list(device) for device in lists]
    moved = True
    while moved:
        moved = False
        for device in rest:
            while device:
                what, m, s, _ = device[0]
                back = what in ("backward", "backward_input")
                wants = {("f", s - 1, m)} if what == "forward" and s else set()
                wants |= {("f", s, m)} if back else set()
                wants |= {("b", s + 1, m)} if back and s < last else set()
                wants |= {("b", s, m)} if what == "backward_weight" else set()
                if not wants <= done:
                    break
                device.pop(0)
                done |= {("f", s, m)} if what == "forward" else {("b", s, m)} if back else set()
                moved = True
    return any(rest)


@many
@given(settings_of())
def test_every_schedule_is_complete_and_ends(given):
    name, k, m, v, batches = given
    lists = schedule(name, k, m, v, batches)
    assert len(lists) == k and not is_stuck(lists)
    check(lists)
    for device, actions in enumerate(lists):
        own = [c * k + device for c in range(v)]
        once = sorted(itertools.product(range(m * batches), own))
        for kinds in ([["forward"], ["backward_input"], ["backward_weight"]], [["backward"]]):
            for kind in kinds:
                found = sorted((a.micro_batch, a.stage) for a in actions if a.what in kind)
                split = name == "zb-h1" and kind != ["backward"]
                assert found == (
                    once
                    if split or kind == ["forward"] or (kind == ["backward"] and name != "zb-h1")
                    else []
                )
        updates = [(a.version, a.stage) for a in actions if a.what == "update"]
        count = m * batches if name == "pipedream" else batches
        assert updates == sorted(itertools.product(range(1, count + 1), own))


@many
@given(settings_of(), st.randoms(use_true_random=False))
def test_check_finds_a_deadlock_where_brute_force_does(given, rng):
    lists = [[a._replace(version=0) for a in d if a.what != "update"] for d in schedule(*given)]
    for actions in lists:
        for _ in range(rng.randrange(3)):
            i, j = rng.randrange(len(actions)), rng.randrange(len(actions))
            actions[i], actions[j] = actions[j], actions[i]
    if is_stuck(lists):
        with pytest.raises(ValueError, match=r"deadlock: device \d+ waits for \w+ of micro-batch"):
            check(lists)
        with pytest.raises(ValueError, match="deadlock"):
            timeline(lists)
    else:
        check(lists)


def test_a_deadlock_says_who_waits_for_what():
    first, second = schedule("1f1b", 2, 2)
    first = [first[2], first[0], first[1], *first[3:]]  # its first backward comes too early
    with pytest.raises(ValueError) as caught:
        check([first, second])
    assert str(caught.value) == (
        "deadlock: device 0 waits for forward of micro-batch 0 at stage 0 "
        "before backward of micro-batch 0 at stage 0; "
        "device 1 waits for forward of micro-batch 0 at stage 0 "
        "before forward of micro-batch 0 at stage 1"
    )


# -- time ----------------------------------------------------------------------------------------


@many
@given(settings_of(SYNCHRONOUS), st.floats(0.1, 5), st.floats(0.1, 5))
def test_idle_shares_of_one_batch(given, forward, backward):
    name, k, m, v, _ = given
    if name == "zb-h1":
        m, backward = max(m, k), 2 * forward
    want = {
        "naive": (k - 1) / k,
        "gpipe": (k - 1) / (m + k - 1),
        "1f1b": (k - 1) / (m + k - 1),
        "interleaved": (k - 1) / (v * m + k - 1),
        "zb-h1": (k - 1) / (3 * m + k - 1),
    }[name]
    events = timeline(schedule(name, k, m, v), forward, backward)
    assert idle_share(events) == pytest.approx(want, abs=1e-9)


@many
@given(settings_of(SYNCHRONOUS))
def test_a_flush_costs_every_batch_its_bubble(given):
    name, k, m, v, batches = given
    one, several = (timeline(schedule(name, k, m, v, n)) for n in (1, batches))
    ends = [max(e.end for e in events) for events in (one, several)]
    assert ends[1] == pytest.approx(batches * ends[0])
    assert idle_share(several) == pytest.approx(idle_share(one), abs=1e-9)


@many
@given(st.integers(2, 6), st.integers(1, 14), *(st.sampled_from([0.5, 0.8, 1.0, 1.2, 3.0]),) * 3)
def test_zero_bubble_is_below_1f1b_and_as_published(k, m, f, b, w):
    seconds = {"forward": f, "backward_input": b, "backward_weight": w, "backward": b + w}
    found = {}
    for name in ("1f1b", "zb-h1"):
        events = replay(schedule(name, k, m), lambda a: seconds.get(a.what, 0.0))
        found[name] = max(e.end for e in events) - m * (f + b + w)
    assert found["1f1b"] == pytest.approx((k - 1) * (f + b + w))
    assert found["zb-h1"] < found["1f1b"]
    if m >= k:
        # published: (K-1)(F+B-W), where W is not the longest
        assert found["zb-h1"] == pytest.approx((k - 1) * max(f + b - w, f, b))


@many
@given(st.sampled_from(["pipedream", "2bw"]), st.integers(1, 6), st.integers(6, 12))
def test_asynchronous_schedules_are_full_in_between(name, k, m):
    events = timeline(schedule(name, k, m, batches=3))
    for device in range(k):
        mine = [e for e in events if e.device == device and e.action.what != "update"]
        first = next(i for i, e in enumerate(mine) if e.action.what == "backward")
        last = max(i for i, e in enumerate(mine) if e.action.what == "forward")
        between = mine[first : last + 1]
        assert idle_share(between) == pytest.approx(0, abs=1e-12)
    # flushing the same work costs more
    assert max(e.end for e in events) <= max(
        e.end for e in timeline(schedule("1f1b", k, m, batches=3))
    )


def test_a_timeline_by_hand():
    events = timeline(schedule("gpipe", 2, 2), forward=1, backward=2, communication=0.5)
    found = [(d, a.what, a.micro_batch, start, end) for d, a, start, end in events]
    assert [f for f in found if f[1] != "update"] == [
        (0, "forward", 0, 0.0, 1.0),
        (0, "forward", 1, 1.0, 2.0),
        (1, "forward", 0, 1.5, 2.5),
        (1, "forward", 1, 2.5, 3.5),
        (1, "backward", 0, 3.5, 5.5),
        (1, "backward", 1, 5.5, 7.5),
        (0, "backward", 0, 6.0, 8.0),
        (0, "backward", 1, 8.0, 10.0),
    ]
    assert idle_share(events) == pytest.approx(1 - 12 / 20)


@many
@given(settings_of(), st.floats(0, 3))
def test_a_timeline_respects_devices_and_messages(given, communication):
    lists = schedule(*given)
    events, where = timeline(lists, 1, 2, communication), placement(lists)
    end = {(e.action.what.removesuffix("_input"), *e.action[1:3]): e.end for e in events}
    for device, actions in enumerate(lists):
        mine = [e for e in events if e.device == device]
        assert sorted(e.action for e in mine) == sorted(actions)
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
    for device, (what, m, stage, _), start, _ in events:
        if what == "forward" and stage:
            wait = communication * (where[stage - 1] != device)
            assert start >= end["forward", m, stage - 1] + wait
        if what in ("backward", "backward_input") and stage + 1 < len(where):
            wait = communication * (where[stage + 1] != device)
            assert start >= end["backward", m, stage + 1] + wait


# -- memory --------------------------------------------------------------------------------------


@many
@given(settings_of())
def test_micro_batches_in_flight(given):
    name, k, m, v, batches = given
    found = in_flight(schedule(*given))
    n = m * batches if name in ("pipedream", "2bw") else m
    for device in range(k):
        warmup = 2 * (k - 1 - device) + (v - 1) * k
        want = {
            "naive": 1,
            "gpipe": m,
            "zb-h1": min(k, m),
            "interleaved": min(warmup + 1, v * m) if v > 1 else min(k - device, m),
        }.get(name, min(k - device, n))
        assert found[device] == want


@many
@given(settings_of())
def test_versions_of_the_weights(given):
    name, k, m, _, batches = given
    lists = schedule(*given)
    n, found = m * batches, versions(lists)
    if name in SYNCHRONOUS:
        assert found == [1] * k
    elif name == "pipedream":
        most = [k - device for device in range(k)]
        assert (
            found == most if n >= 2 * k else all(a <= b for a, b in zip(found, most, strict=True))
        )
    else:
        assert found == [1 if batches == 1 else 2] * k
    for device, actions in enumerate(lists):
        for what, micro_batch, _, version in actions:
            late = max(0, micro_batch - (k - device) + 1)
            want = {"pipedream": late, "2bw": max(micro_batch // m - 1, 0)}
            assert what == "update" or version == want.get(name, micro_batch // m)


@pytest.mark.parametrize("k", [4, 6])
def test_two_versions_do_not_do_for_few_micro_batches(k):
    """The version of the batch before is not there yet when a batch enters."""

    def two(m):
        actions = (one_chunk(d, 4 * m, k - 1 - d) for d in range(k))
        late = lambda micro_batch, _: max(micro_batch // m - 1, 0)  # noqa: E731
        return [list(_unflushed(a, m, late)) for a in actions]

    assert two(k) == schedule("2bw", k, k, batches=4)
    with pytest.raises(ValueError, match="says version 1 after 0 updates"):
        check(two(k - 2))


# -- what is wrong is named ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("2f2b", 2, 2), "schedule '2f2b' must be one of naive, gpipe"),
        (("gpipe", 0, 2), "stages=0, micro_batches=2"),
        (("gpipe", 2, 0), "micro_batches=0"),
        (("gpipe", 2, 2, 1, 0), "batches=0"),
        (("1f1b", 2, 2, 2), "chunks=2: only 'interleaved' has several, not '1f1b'"),
        (("interleaved", 2, 3, 2), "groups of stages=2, got 3"),
        (("2bw", 3, 2), "2bw needs micro_batches >= stages, got 2 < 3"),
    ],
)
def test_settings_that_do_not_fit(arguments, match):
    with pytest.raises(ValueError, match=match):
        schedule(*arguments)


def without(lists, device, i):
    lists[device].pop(i)


def twice(lists, device, i):
    lists[device].insert(i, lists[device][i])


def change(**changes):
    def plant(lists, device, i):
        lists[device][i] = lists[device][i]._replace(**changes)

    return plant


@pytest.mark.parametrize(
    ("plant", "place", "match"),
    [
        (without, 0, "micro-batch 0 has 0 forward, 1 backward, .* at stage 0"),
        (twice, 0, "micro-batch 0 has 2 forward"),
        (without, 2, "micro-batch 0 has 1 forward, 0 backward"),
        (change(what="backward_input"), 2, "1 backward_input, 0 backward_weight"),
        (change(what="think"), 0, r"unknown actions \['think'\]"),
        (change(stage=1), 0, r"these on several: \{1: \[0, 1\]\}"),
        (change(stage=7), 0, r"stages must be 0, 1, 2, ..., got \[0, 1, 7\]"),
        (change(version=1), 0, "forward of micro-batch 0 at stage 0 says version 1 after 0"),
        (change(version=1), 2, "says version 1 after 0 updates, and its forward used version 0"),
        (change(version=2), -1, "update of micro-batch 1 at stage 0 says version 2 after 0"),
    ],
)
def test_planted_faults_are_found(plant, place, match):
    lists = schedule("1f1b", 2, 2)
    check(lists)
    plant(lists, 0, place)
    with pytest.raises(ValueError, match=match):
        check(lists)


def test_weights_of_forward_and_backward_must_be_the_same():
    lists = schedule("pipedream", 2, 3)
    check(lists)
    later = next(i for i, a in enumerate(lists[0]) if a[:2] == ("backward", 1))
    lists[0][later] = lists[0][later]._replace(version=1)
    with pytest.raises(
        ValueError, match=r"version 1 after 1 updates, and its forward used vers.* 0"
    ):
        check(lists)


def test_nothing_at_all():
    with pytest.raises(ValueError, match="stages must be 0, 1, 2"):
        check([[], []])
    with pytest.raises(ValueError, match="no events"):
        idle_share([])
    nothing = [Timed(0, Action("update", 0, 0, 1), 2.0, 2.0)]
    assert idle_share(nothing) != idle_share(nothing)  # not a number


def test_a_large_schedule():
    """As long as that of a trillion parameters on 64 stages."""
    lists = schedule("1f1b", 64, 512)
    events = timeline(lists)
    assert idle_share(events) == pytest.approx(63 / 575)
    assert len(events) == 64 * (2 * 512 + 1)
