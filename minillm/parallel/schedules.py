"""Pipeline schedules: in which order each device works on the micro-batches. Nothing runs here."""

# K devices, v chunks a device, vK stages (stage s lies on device s mod K), M micro-batches

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from minillm.parallel.actions import (
    Action,
    Schedule,
    Timed,
    check,
    idle_share,
    in_flight,
    placement,
    replay,
    timeline,
    versions,
)

__all__ = [
    "NAMES",
    "Action",
    "Schedule",
    "Timed",
    "alternate",
    "check",
    "idle_share",
    "in_flight",
    "interleaved",
    "one_chunk",
    "placement",
    "replay",
    "schedule",
    "timeline",
    "versions",
    "zero_bubble",
]

NAMES = ("naive", "gpipe", "1f1b", "interleaved", "zb-h1", "pipedream", "2bw")


def schedule(
    name: str, stages: int, micro_batches: int, chunks: int = 1, batches: int = 1
) -> Schedule:
    """What each of K = `stages` devices does with `batches` batches of M = `micro_batches`.

        name         idle share         in flight at k   versions of the weights at k
        naive        (K-1)/K            1                1
        gpipe        (K-1)/(M+K-1)      M                1
        1f1b         (K-1)/(M+K-1)      K-k              1
        interleaved  (K-1)/(vM+K-1)     K+(K-1)/v at 0   1
        zb-h1        (K-1)/(3M+K-1)     K                1
        pipedream    0 once it is full  K-k              K-k
        2bw          0 once it is full  K-k              2

    for one batch of M >= K, stages counted from k = 0, equal times at all stages and, for zb-h1,
    of a forward and both halves of a backward. (With times F, B, W for these its bubble is
    (K-1)(F+B-W) as long as W is the shortest, else (K-1) times the longer of F and B.)

    All but the last two flush: an update waits until nothing is on its way, and the gradient is
    that of one process. PipeDream updates after every micro-batch and 2BW after every M while
    others are on their way, so that gradients belong to older weights: in PipeDream the latest
    that the stage had at the forward, in 2BW those of the batch before. A micro-batch's backward
    at a stage uses what its forward used.

    Raises ValueError for unknown names, numbers below 1, `chunks` above 1 where nothing is
    interleaved, M that K does not divide where it is, and M < K in 2BW (Narayanan et al.'s rule).

    Source: Huang et al., GPipe, 2019; Narayanan et al., PipeDream, 2019; Fan et al., DAPPLE, 2021
    (1F1B with flush); Narayanan et al., Memory-Efficient Pipeline-Parallel DNN Training, 2021
    (2BW); Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, 2021 (interleaved); Qi et al., Zero Bubble Pipeline Parallelism, 2023 (ZB-H1).

    >>> for device in schedule("1f1b", stages=2, micro_batches=3):
    ...     print(*(f"{a.what[0]}{a.micro_batch}" for a in device))
    f0 f1 b0 f2 b1 b2 u2
    f0 b0 f1 b1 f2 b2 u2
    >>> round(idle_share(timeline(schedule("1f1b", stages=2, micro_batches=3))), 3)
    0.25
    """
    K, M = stages, micro_batches
    if name not in NAMES:
        raise ValueError(f"schedule {name!r} must be one of {', '.join(NAMES)}")
    if min(K, M, chunks, batches) < 1:
        raise ValueError(
            f"stages={K}, micro_batches={M}, chunks={chunks}, batches={batches}: all at least 1"
        )
    if chunks > 1 and name != "interleaved":
        raise ValueError(f"chunks={chunks}: only 'interleaved' has several, not {name!r}")
    if name == "interleaved" and M % K:
        raise ValueError(f"interleaved micro-batches come in groups of stages={K}, got {M} of them")
    if name == "2bw" and M < K:
        raise ValueError(f"2bw needs micro_batches >= stages, got {M} < {K}")
    if name == "pipedream":
        return [
            list(_unflushed(one_chunk(k, M * batches, K - 1 - k), 1, lambda m, latest: latest))
            for k in range(K)
        ]
    if name == "2bw":
        return [
            list(
                _unflushed(one_chunk(k, M * batches, K - 1 - k), M, lambda m, _: max(m // M, 1) - 1)
            )
            for k in range(K)
        ]
    if name == "interleaved":
        one_batch = [interleaved(k, K, M, chunks) for k in range(K)]
    elif name == "zb-h1":
        one_batch = [zero_bubble(k, K, M) for k in range(K)]
    else:
        warmup = {"naive": lambda k: 0, "gpipe": lambda k: M, "1f1b": lambda k: K - 1 - k}[name]
        one_batch = [one_chunk(k, M, warmup(k)) for k in range(K)]
    return [list(_flushed(list(actions), M, batches)) for actions in one_batch]


def alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], warmup: int
) -> Iterator[Action]:
    """`warmup` forwards; then a forward and a backward in turn; then the backwards that are left.

    >>> f, b = ([Action(what, m, 0) for m in range(3)] for what in ("forward", "backward"))
    >>> [a.what[0] + str(a.micro_batch) for a in alternate(f, b, warmup=1)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    yield from forwards[:warmup]
    for forward, backward in zip_longest(forwards[warmup:], backwards):
        if forward is not None:
            yield forward
        yield backward


def one_chunk(device: int, micro_batches: int, warmup: int) -> Iterator[Action]:
    """A device with one stage: `warmup` 0 is naive, M is GPipe, K - 1 - device is 1F1B."""
    forwards = [Action("forward", m, device) for m in range(micro_batches)]
    backwards = [Action("backward", m, device) for m in range(micro_batches)]
    return alternate(forwards, backwards, warmup)


def interleaved(device: int, devices: int, micro_batches: int, chunks: int) -> Iterator[Action]:
    """Micro-batches in groups of K; a group passes all chunks of the device before the next does.

    What enters the next chunk has been around all devices, so the warm-up is longer by a group
    for every further chunk, and twice as steep along the devices.
    """

    def order(what: str, chunk_order: Iterable[int]) -> list[Action]:
        return [
            Action(what, group + m, chunk * devices + device)
            for group in range(0, micro_batches, devices)
            for chunk in chunk_order
            for m in range(devices)
        ]

    ahead = devices - 1 - device
    warmup = ahead if chunks == 1 else 2 * ahead + (chunks - 1) * devices
    forwards = order("forward", range(chunks))
    return alternate(forwards, order("backward", range(chunks)[::-1]), warmup)


def zero_bubble(device: int, devices: int, micro_batches: int) -> Iterator[Action]:
    """1F1B whose backward passes hand on the gradient of the input before that of the weights.

    The latter follows `device` micro-batches later: every device then holds K of them, as the
    first one does anyway, and has something to do while it would wait at the end.
    """
    waiting = []
    for action in one_chunk(device, micro_batches, devices - 1 - device):
        if action.what == "forward":
            yield action
            continue
        yield action._replace(what="backward_input")
        waiting.append(action._replace(what="backward_weight"))
        if len(waiting) > device:
            yield waiting.pop(0)
    yield from waiting


def _flushed(one_batch: list[Action], micro_batches: int, batches: int) -> Iterator[Action]:
    """Batch after batch, an update of each stage between them: one version at a time."""
    stages = sorted({a.stage for a in one_batch})
    for batch in range(batches):
        first = batch * micro_batches
        for what, m, stage, _ in one_batch:
            yield Action(what, first + m, stage, batch)
        for stage in stages:
            yield Action("update", first + micro_batches - 1, stage, batch + 1)


def _unflushed(
    actions: Iterable[Action], every: int, version: Callable[[int, int], int]
) -> Iterator[Action]:
    """An update after `every` backwards, without waiting for the micro-batches on their way.

    `version(micro_batch, latest)` is what a micro-batch uses, forward and backward.
    """
    latest, used = 0, {}
    for what, m, stage, _ in actions:
        if what == "forward":
            used[m] = version(m, latest)
        yield Action(what, m, stage, used[m])
        if what == "backward" and (m + 1) % every == 0:
            latest += 1
            yield Action("update", m, stage, latest)
