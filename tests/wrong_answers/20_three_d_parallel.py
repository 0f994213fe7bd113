"""Planted wrong answers for chapter 20's assignment: each must lose points in its task."""


def changed(source, *pairs):
    """The right answer with some places replaced, each of which must be there."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


MESH = """
def coordinates(rank, axes):
    found = {}
    for name, size in reversed(axes.items()):
        rank, found[name] = divmod(rank, size)
    return {name: found[name] for name in axes}


def groups(axes, along):
    found = {}
    for rank in range(math.prod(axes.values())):
        place = coordinates(rank, axes)
        others = tuple(place[name] for name in axes if name != along)
        found.setdefault(others, []).append(rank)
    return sorted(found.values())
"""

VOLUMES = """
def volumes(*, dp, tp, pp, layers, parameters, rows, s, d, M, width=2):
    x = rows * s * d * width
    return {
        "data": 2 * (dp - 1) / dp * parameters / (tp * pp) * width,
        "pipeline": 2 * M * x if pp > 1 else 0.0,
        "tensor": 4 * layers / pp * M * 2 * (tp - 1) / tp * x,
    }


def best_order(sizes, sent, per_node):
    def crossing(order):
        axes = {name: sizes[name] for name in order}
        return sum(sent[name] * mesh.links(axes, name, per_node) for name in order)

    return min(itertools.permutations(("data", "pipeline", "tensor")), key=crossing)
"""

MEMORY = """
def state_bytes(count, dp, zero):
    own = {0: 16, 1: 4, 2: 2, 3: 0}[zero]
    return count * (own + (16 - own) / dp)


def activation_bytes(layers, rows, s, d, heads, tp, pp, M, k):
    block = rows * s * d * (10 + 24 / tp + 5 * heads * s / (d * tp))
    return min(pp - k, M) * layers / pp * block
"""

TIME = """
def ring_seconds(n_bytes, n, latency, bandwidth):
    return 2 * (n - 1) * (latency + n_bytes / n / bandwidth)


def step_seconds(forward, backward, message, K, M, v, update):
    return (M * v + K - 1) * ((forward + backward) / v + 2 * message) + update


def enough(K, v, share):
    M = K
    while (K - 1) / (v * M + K - 1) > share + 1e-12:
        M += K
    return M
"""

RESHARD = """
def reshard(x, old, new, group):
    if old == new:
        return x
    blocks = torch.stack(x.chunk(group.size, new))
    return torch.cat(list(all_to_all(blocks, group)), old)
"""
EVERYTHING_EVERYWHERE = """
def reshard(x, old, new, group):
    from minillm.parallel.collectives import all_gather

    whole = torch.cat(list(all_gather(x[None], group)), old)
    return whole.chunk(group.size, new)[group.index]
"""
RESTART = """
def repeated(dies, every):
    return list(range((dies - 1) // every * every + 1, dies))


def supervise(start, restarts):
    for attempt in range(restarts + 1):
        try:
            return start()
        except RankError:
            if attempt == restarts:
                raise


def interval(save, between, nodes):
    return math.sqrt(2 * save * between / nodes)
"""

WRONG = {
    "t1_mesh": [
        changed(MESH, "reversed(axes.items())", "axes.items()"),  # the first axis fastest
        changed(MESH, "name != along", "name == along"),  # who shares this coordinate
        changed(MESH, "    return {name: found[name] for name in axes}", "    return found"),
    ],
    "t2_volumes": [
        changed(VOLUMES, "4 * layers / pp * M", "2 * layers / pp * M"),  # forward only
        changed(VOLUMES, "parameters / (tp * pp)", "parameters / pp"),  # the matrices are cut too
        changed(  # always Megatron's order
            VOLUMES,
            'return min(itertools.permutations(("data", "pipeline", "tensor")), key=crossing)',
            'return ("data", "pipeline", "tensor")',
        ),
        changed(VOLUMES, "sent[name] * mesh", "mesh"),  # links are counted, not what they carry
    ],
    "t3_memory": [
        changed(MEMORY, "(own + (16 - own) / dp)", "16 / dp"),
        changed(MEMORY, "{0: 16, 1: 4, 2: 2, 3: 0}", "{0: 16, 1: 12, 2: 14, 3: 0}"),
        changed(MEMORY, "min(pp - k, M)", "M"),  # GPipe
        changed(MEMORY, "min(pp - k, M)", "(pp - k)"),
        changed(MEMORY, "min(pp - k, M)", "min(k + 1, M)"),  # counted from the other end
        changed(MEMORY, "10 + 24 / tp", "34 / tp"),  # norms and dropout are not cut
    ],
    "t4_time": [
        changed(TIME, "n_bytes / n / bandwidth", "n_bytes / bandwidth"),
        changed(TIME, "2 * (n - 1)", "2 * n"),
        changed(TIME, "(M * v + K - 1)", "(M * v)"),  # no bubble
        changed(TIME, "(M * v + K - 1)", "(M + K - 1) * v"),  # a bubble of whole stages
        changed(TIME, "+ 2 * message)", "+ 2 * message / v)"),  # chunks send more often
        changed(TIME, "(K - 1) / (v * M + K - 1)", "(K - 1) / (v * M)"),  # over the ideal time
    ],
    "t5_reshard": [
        EVERYTHING_EVERYWHERE,
        changed(RESHARD, "(all_to_all(blocks, group)), old)", "(all_to_all(blocks, group)), new)"),
        changed(RESHARD, "x.chunk(group.size, new)", "x.chunk(group.size, old)"),
        changed(RESHARD, "    if old == new:\n        return x\n", ""),
    ],
    "t6_restart": [
        changed(RESTART, "every + 1, dies))", "every + 1, dies + 1))"),  # the unfinished one
        changed(RESTART, "(dies - 1) // every", "dies // every"),  # saved before it was done
        changed(RESTART, "except RankError:", "except Exception:"),
        changed(RESTART, "2 * save * between / nodes", "2 * save * between"),
    ],
}
