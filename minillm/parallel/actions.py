"""What devices do in a pipeline, as lists: whether they fit together, what they cost. Nothing runs.

A schedule is one list of actions for each device. The same lists are made in
`minillm.parallel.schedules`, checked and simulated here, and carried out on real ranks by
`minillm.parallel.pipeline`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Action(NamedTuple):
    """One thing that a device does."""

    what: str
    """forward; backward, or its two halves backward_input and backward_weight; update"""
    micro_batch: int
    """counted through all batches; of an update: the last whose gradient is in it"""
    stage: int
    version: int = 0
    """of the stage's weights, the number of updates in it; of an update: that which it makes"""

    def __str__(self) -> str:
        return f"{self.what} of micro-batch {self.micro_batch} at stage {self.stage}"


class Timed(NamedTuple):
    """An action with its place in time, simulated or recorded. In seconds."""

    device: int
    action: Action
    start: float
    end: float


Schedule = list[list[Action]]
Result = tuple[str, int, int]
"""what, stage, micro-batch of a "forward", or of a "backward" (its first half gives it, too)"""
KINDS = ("forward", "backward", "backward_input", "backward_weight", "update")

# -- is it right? --------------------------------------------------------------------------------


def placement(schedule: Schedule) -> dict[int, int]:
    """The device of each stage. Raises ValueError where a stage is missing, or on two devices."""
    found = defaultdict(set)
    for device, actions in enumerate(schedule):
        for action in actions:
            found[action.stage].add(device)
    if several := {s: sorted(devices) for s, devices in found.items() if len(devices) > 1}:
        raise ValueError(f"a stage lies on one device, but these on several: {several}")
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"stages must be 0, 1, 2, ..., got {sorted(found)}")
    return {stage: devices.pop() for stage, devices in found.items()}


def needs(action: Action, stages: int) -> list[Result]:
    """The results that have to be there before, from this device or another one."""
    what, m, s, _ = action
    if what == "forward":
        return [("forward", s - 1, m)] if s else []
    if what == "backward" or what == "backward_input":
        own = ("forward", s, m)
        return [own, ("backward", s + 1, m)] if s + 1 < stages else [own]
    return [("backward", s, m)] if what == "backward_weight" else []


def gives(action: Action) -> Result | None:
    """The result that others may wait for."""
    what, m, s, _ = action
    if what == "forward" or what == "backward":
        return (what, s, m)
    return ("backward", s, m) if what == "backward_input" else None


def in_order(schedule: Schedule) -> Iterator[tuple[int, Action, list[Result]]]:
    """All actions with their devices and what they need, none before what it needs.

    Raises ValueError for a deadlock, and says who waits for what.
    """
    stages, done, place = len(placement(schedule)), set(), [0] * len(schedule)
    waiting: dict[Result, list[int]] = defaultdict(list)
    ready = list(range(len(schedule)))
    while ready:
        device = ready.pop()
        while place[device] < len(schedule[device]):
            action = schedule[device][place[device]]
            needed = needs(action, stages)
            missing = [result for result in needed if result not in done]
            if missing:
                waiting[missing[0]].append(device)
                break
            yield device, action, needed
            place[device] += 1
            if (result := gives(action)) is not None:
                done.add(result)
                if result in waiting:
                    ready += waiting.pop(result)
    if waiting:
        stuck = sorted(
            f"device {d} waits for {Action(what, m, s)} before {schedule[d][place[d]]}"
            for (what, s, m), devices in waiting.items()
            for d in devices
        )
        raise ValueError("deadlock: " + "; ".join(stuck))


def check(schedule: Schedule) -> None:
    """Raise ValueError unless the schedule is complete, ends, and knows its weights' versions.

    Every micro-batch passes every stage once forward and once backward, in one piece or two; no
    action waits for ever; backward uses the version that forward used; no version is used before
    its update made it, and updates count 1, 2, 3, ...
    """
    stages, actions = placement(schedule), [a for device in schedule for a in device]
    if unknown := {a.what for a in actions} - set(KINDS):
        raise ValueError(f"unknown actions {sorted(unknown)}, known are {', '.join(KINDS)}")
    count = Counter(a[:3] for a in actions)
    for m in range(max(a.micro_batch for a in actions) + 1):
        for stage in stages:
            times = tuple(count[what, m, stage] for what in KINDS[:4])
            if times not in ((1, 1, 0, 0), (1, 0, 1, 1)):
                said = ", ".join(f"{n} {what}" for n, what in zip(times, KINDS, strict=False))
                raise ValueError(f"micro-batch {m} has {said} at stage {stage}")
    for device in schedule:
        _check_versions(device)
    for _ in in_order(schedule):
        pass


def _check_versions(actions: list[Action]) -> None:
    updates: Counter[int] = Counter()
    used: dict[tuple[int, int], int] = {}
    for action in actions:
        latest, here = updates[action.stage], (action.stage, action.micro_batch)
        if action.what == "update":
            updates[action.stage] += 1
            right = action.version == latest + 1
        else:
            right = action.version == used.setdefault(here, action.version) <= latest
        if not right:
            forward = f", and its forward used version {used[here]}" if here in used else ""
            raise ValueError(
                f"{action} says version {action.version} after {latest} updates{forward}"
            )


# -- what does it cost? --------------------------------------------------------------------------


def replay(
    schedule: Schedule,
    seconds: Callable[[Action], float],
    message: Callable[[int, int], float] = lambda source, to: 0.0,
) -> list[Timed]:
    """When everything happens if an action takes `seconds(action)`, in order of time.

    Each device works through its list, as early as what it needs is there; what comes from
    another device takes `message(source, to)` more, and keeps neither of them from working.
    """
    where, free, ends, found = placement(schedule), [0.0] * len(schedule), {}, []
    for device, action, needed in in_order(schedule):
        start = free[device]
        for result in needed:
            source = where[result[1]]
            there = ends[result] if source == device else ends[result] + message(source, device)
            start = max(start, there)
        free[device] = end = start + seconds(action)
        if (result := gives(action)) is not None:
            ends[result] = end
        found.append(Timed(device, action, start, end))
    return sorted(found, key=lambda e: (e.start, e.end, e.device))


def timeline(
    schedule: Schedule, forward: float = 1.0, backward: float = 2.0, communication: float = 0.0
) -> list[Timed]:
    """`replay` with the same times for all stages; each half of a backward takes half its time.

    With v chunks a stage is 1/v of a device's layers: give 1/v of the times to compare.

    >>> one = [Action("forward", 0, 0), Action("backward", 0, 0)]
    >>> two = [Action("forward", 0, 1), Action("backward", 0, 1)]
    >>> [(e.device, e.action.what, e.end) for e in timeline([one, two])]
    [(0, 'forward', 1.0), (1, 'forward', 2.0), (1, 'backward', 4.0), (0, 'backward', 6.0)]
    """
    times = {"forward": forward, "backward": backward, "update": 0.0}
    times |= dict.fromkeys(("backward_input", "backward_weight"), backward / 2)
    return replay(schedule, lambda action: times[action.what], lambda source, to: communication)


def idle_share(events: Iterable[Timed]) -> float:
    """The share of all devices' time, from the first start to the last end, without an action.

    NaN if no time passes. Raises ValueError without events.
    """
    events = list(events)
    if not events:
        raise ValueError("no events: no device, no time")
    span = max(e.end for e in events) - min(e.start for e in events)
    busy = sum(e.end - e.start for e in events)
    return 1 - busy / (span * len({e.device for e in events})) if span else math.nan


def in_flight(schedule: Schedule) -> list[int]:
    """For each device the most forwards at one time whose backward is not complete.

    With v chunks each counts for itself, and holds about 1/v of a device's activations.
    """
    change = {"forward": 1, "backward": -1, "backward_weight": -1}
    found = []
    for actions in schedule:
        now = peak = 0
        for action in actions:
            now += change.get(action.what, 0)
            peak = max(peak, now)
        found.append(peak)
    return found


def last_use(actions: Iterable[Action]) -> dict[tuple[int, int], int]:
    """Where in a device's list a (stage, version) of the weights is needed for the last time."""
    return {(a.stage, a.version): i for i, a in enumerate(actions) if a.what != "update"}


def versions(schedule: Schedule) -> list[int]:
    """For each device the most versions of one stage's weights at one time.

    The latest, and those before it that an action still to come uses.
    """
    found = []
    for actions in schedule:
        last, peak = last_use(actions), 1
        kept: dict[int, set[int]] = defaultdict(lambda: {0})
        for i, action in enumerate(actions):
            if action.what == "update":
                stage, new = action.stage, action.version
                old = {v for v in kept[stage] if last.get((stage, v), -1) > i}
                kept[stage] = old | {new}
                peak = max(peak, len(kept[stage]))
        found.append(peak)
    return found
