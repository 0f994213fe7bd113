"""Planted wrong answers for chapter 17's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


SCHEDULES = """
def gpipe(device, m):
    return [Action(what, i, device) for what in ("forward", "backward") for i in range(m)]


def one_f_one_b(device, k, m):
    warmup = min(k - 1 - device, m)
    found = [Action("forward", i, device) for i in range(warmup)]
    for i in range(m):
        if i + warmup < m:
            found.append(Action("forward", i + warmup, device))
        found.append(Action("backward", i, device))
    return found
"""

COSTS = """
def end_times(lists, forward, backward):
    ends, free, place = {}, [0.0] * len(lists), [0] * len(lists)
    while sum(place) < sum(map(len, lists)):
        for device, its in enumerate(lists):
            while place[device] < len(its):
                action = its[place[device]]
                what, i, s, _ = action
                if what == "forward":
                    needed = [Action("forward", i, s - 1)] if s > 0 else []
                else:
                    needed = [Action("forward", i, s)]
                    needed += [Action("backward", i, s + 1)] if s < len(lists) - 1 else []
                if any(n not in ends for n in needed):
                    break
                start = max([free[device], *(ends[n] for n in needed)])
                ends[action] = start + (forward if what == "forward" else backward)
                free[device] = ends[action]
                place[device] += 1
    return ends


def idle(lists, forward, backward):
    work = sum(forward if a.what == "forward" else backward for its in lists for a in its)
    return 1 - work / (len(lists) * max(end_times(lists, forward, backward).values()))


def held(device):
    now = most = 0
    for action in device:
        now += 1 if action.what == "forward" else -1
        most = max(most, now)
    return most
"""

ENGINE = """
def run_stage(own, stage, inputs, loss, group, like):
    me, last = group.index, group.index == group.size - 1
    kept, losses, sent = {}, {}, []
    for what, i, *_ in own:
        if what == "forward":
            x = inputs[i]
            if me > 0:
                x = group.receive(torch.empty_like(like), me - 1).requires_grad_()
            y = stage(x)
            if last:
                y = loss(y, i)
                losses[i] = y.detach()
            else:
                sent.append(group.send(y.detach(), me + 1))
            kept[i] = x, y
        else:
            x, y = kept.pop(i)
            y.backward(None if last else group.receive(torch.empty_like(like), me + 1))
            if me > 0:
                sent.append(group.send(x.grad, me - 1))
    for wait in sent:
        wait()
    return [losses[i] for i in sorted(losses)]
"""

INTERLEAVED = """
def interleaved(device, k, m, v):
    if m % k:
        raise ValueError(f"m={m} must be a multiple of k={k}")

    def order(what, chunks):
        return [
            Action(what, i, chunk * k + device)
            for first in range(0, m, k)
            for chunk in chunks
            for i in range(first, first + k)
        ]

    forwards, backwards = order("forward", range(v)), order("backward", range(v)[::-1])
    warmup = k - 1 - device if v == 1 else 2 * (k - 1 - device) + (v - 1) * k
    found = forwards[:warmup]
    for i, backward in enumerate(backwards):
        found += forwards[warmup + i : warmup + i + 1]
        found.append(backward)
    return found
"""

DEADLOCK = """
def stuck(lists):
    return {d: action for d, (action, _) in waiting(lists).items()}


def waiting(lists):
    done, place, moved = set(), [0] * len(lists), True
    while moved:
        moved, found = False, {}
        for device, its in enumerate(lists):
            while place[device] < len(its):
                action = its[place[device]]
                what, i, s, _ = action
                needed = [("forward", i, s - 1)] if what == "forward" and s > 0 else []
                if what == "backward":
                    needed = [("forward", i, s), ("backward", i, s + 1)][: len(lists) - s]
                missing = [n for n in needed if n not in done]
                if missing:
                    found[device] = action, missing[0][2]
                    break
                done.add((what, i, s))
                place[device] += 1
                moved = True
    return found


def cycle(lists):
    waits = waiting(lists)
    if not waits:
        return []
    path = [min(waits)]
    while (after := waits[path[-1]][1]) not in path:
        path.append(after)
    ring = path[path.index(after) :]
    first = ring.index(min(ring))
    return ring[first:] + ring[:first]
"""

WRONG = {
    "t1_schedules": [
        # a forward too many before the first backward: one more micro-batch in flight
        changed(SCHEDULES, "warmup = min(k - 1 - device, m)", "warmup = min(k - device, m)"),
        # few micro-batches are forgotten
        changed(SCHEDULES, "warmup = min(k - 1 - device, m)", "warmup = k - 1 - device"),
        # the last micro-batch goes back first
        changed(
            SCHEDULES,
            'return [Action(what, i, device) for what in ("forward", "backward") for i in range(m)]',
            'f, b = ([Action(w, i, device) for i in range(m)] for w in ("forward", "backward"))\n'
            "    return f + b[::-1]",
        ),
    ],
    "t2_costs": [
        # a backward that does not wait for the stage behind it
        changed(COSTS, "if s < len(lists) - 1 else []", "if False else []"),
        # the bubble relative to the work, not to all time
        changed(
            COSTS,
            "return 1 - work / (len(lists) * max(end_times(lists, forward, backward).values()))",
            "return len(lists) * max(end_times(lists, forward, backward).values()) / work - 1",
        ),
        # a device does two things at a time
        changed(
            COSTS,
            "max([free[device], *(ends[n] for n in needed)])",
            "max([0.0, *(ends[n] for n in needed)])",
        ),
        # the peak after all, not on the way
        changed(COSTS, "    return most\n", "    return now\n"),
    ],
    "t3_engine": [
        # only the latest micro-batch is remembered
        changed(ENGINE, "kept[i] = x, y", "kept[0] = x, y", "kept.pop(i)", "kept[0]"),
        # waits until each message is taken, before it goes on: two neighbors wait for each other
        changed(
            ENGINE,
            "sent.append(group.send(y.detach(), me + 1))",
            "group.send(y.detach(), me + 1)()",
            "sent.append(group.send(x.grad, me - 1))",
            "group.send(x.grad, me - 1)()",
        ),
        # what was received is no leaf that wants a gradient
        changed(ENGINE, "me - 1).requires_grad_()", "me - 1)"),
    ],
    "t4_interleaved": [
        # backwards through the chunks in the order of the forwards
        changed(INTERLEAVED, "range(v)[::-1]", "range(v)"),
        # neighboring stages on one device
        changed(INTERLEAVED, "chunk * k + device", "device * v + chunk"),
        # the warm-up of 1F1B
        changed(INTERLEAVED, "2 * (k - 1 - device) + (v - 1) * k", "k - 1 - device"),
        # groups that are not whole pass
        changed(INTERLEAVED, "    if m % k:\n", "    if v > m:\n"),
    ],
    "t5_deadlock": [
        # every device that is stuck counts as part of the ring
        changed(DEADLOCK, "    path = [min(waits)]\n", "    return sorted(waits)\n    path = []\n"),
        # one round over the devices, and whoever waits then is stuck
        changed(DEADLOCK, "                moved = True\n", ""),
        # the gradient from the next stage is not waited for
        changed(
            DEADLOCK,
            '[("forward", i, s), ("backward", i, s + 1)][: len(lists) - s]',
            '[("forward", i, s)]',
        ),
    ],
}
