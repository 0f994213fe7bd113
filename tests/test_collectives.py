"""Every collective against its definition, on real ranks: results, gradients, bytes, time."""

import math
import time

import pytest
import torch
import torch.distributed as dist

from minillm.parallel import RankError, launch
from minillm.parallel import collectives as C
from minillm.parallel.group import Event, Group, Link, Tracer, split, world
from minillm.parallel.mesh import Mesh

SIZES = [1, 2, 3, 4]
ROOTED = ("broadcast", "reduce", "scatter", "gather")
BLOCKS = ("reduce_scatter", "scatter", "all_to_all")
OPS = ("all_reduce", "all_gather", *BLOCKS[:1], *ROOTED, "all_to_all")


def inputs(op, n, k=3, width=2):
    """All ranks' inputs, [N, rows, width], the same in every process."""
    rows = n * k if op in BLOCKS else k
    return torch.randn(
        n, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
    )


def definition(op, x, root):
    """What every rank gets, [N, ...], from the inputs of all, written with one process."""
    n = len(x)
    if op == "all_reduce":
        return x.sum(0).expand(n, *x.shape[1:])
    if op == "all_gather":
        return x.flatten(0, 1).expand(n, -1, -1)
    if op == "reduce_scatter":
        return x.sum(0).unflatten(0, (n, -1))
    if op == "broadcast":
        return x[root].expand(n, *x.shape[1:])
    at_root = torch.arange(n)[:, None, None] == root
    if op == "reduce":
        return x.sum(0).expand(n, *x.shape[1:]) * at_root
    if op == "scatter":
        return x[root].unflatten(0, (n, -1))
    if op == "gather":
        return x.flatten(0, 1).expand(n, -1, -1) * at_root
    return x.unflatten(1, (n, -1)).transpose(0, 1).flatten(1, 2)  # all_to_all


def on_a_rank(n, root):
    """Of every operation and algorithm: result, gradient, weights of the loss, events."""
    rank, found = dist.get_rank(), {}
    for op in OPS:
        for algorithm in ("ring", "native"):
            group = world(algorithm=algorithm, tracer=Tracer())
            x = inputs(op, n)[rank].requires_grad_()
            y = getattr(C, op)(x, group, *([root] if op in ROOTED else []))
            rng = torch.Generator().manual_seed(9)
            weight = torch.randn(n, *y.shape, dtype=torch.float64, generator=rng)
            (grad,) = torch.autograd.grad((y * weight[rank]).sum(), x)
            found[op, algorithm] = y.detach(), grad, weight, [e.op for e in group.tracer.events]
    return found


@pytest.mark.parametrize("n", SIZES)
def test_results_and_gradients_equal_the_definition(n):
    root = n - 1
    found = launch(on_a_rank, n, root, world_size=n)
    for op, algorithm in found[0]:
        x = inputs(op, n).requires_grad_()
        want = definition(op, x, root)
        weight = found[0][op, algorithm][2]
        (grads,) = torch.autograd.grad((want * weight).sum(), x)
        for rank in range(n):
            y, grad, _, ops = found[rank][op, algorithm]
            torch.testing.assert_close(y, want[rank].detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad, grads[rank], rtol=1e-12, atol=1e-12)
            assert len(ops) == 2 and ops[0] == op


def bytes_sent(k):
    """Bytes that each operation sends on this rank, and that the server's root sends."""
    tracer = Tracer()
    group, sent = world(tracer=tracer), {}
    x = torch.ones(k)
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "parameter_server"):
        tracer.clear()
        getattr(C, op)(x, group)
        sent[op] = tracer.sent(op)
        assert tracer.count(op) == 1
    return sent


@pytest.mark.parametrize("n", [2, 3, 4])
def test_bytes_follow_the_formulas_rank_by_rank(n):
    k = 12 * n
    found = launch(bytes_sent, k, world_size=n)
    for rank, sent in enumerate(found):
        assert sent["all_reduce"] == 2 * (n - 1) * k // n * 4
        assert sent["all_gather"] == (n - 1) * k * 4
        assert sent["reduce_scatter"] == sent["all_to_all"] == (n - 1) * k // n * 4
        # the root sends to all others; each of them sends once to the root
        assert sent["parameter_server"] == ((n - 1) * k * 4 if rank == 0 else k * 4)


def odd_sizes():
    group = world()
    for k in (0, 1, 2, 5, 7):
        x = torch.arange(k, dtype=torch.float32) + dist.get_rank()
        want = 3 * torch.arange(k, dtype=torch.float32) + 3
        assert torch.equal(C.all_reduce(x, group), want)
        assert torch.equal(x, torch.arange(k, dtype=torch.float32) + dist.get_rank())  # untouched
    x = torch.randn(3, 4, 5).transpose(0, 2) * 0 + dist.get_rank()  # not contiguous
    assert torch.equal(C.all_reduce(x, group), torch.full((5, 4, 3), 3.0))
    assert torch.equal(C.all_gather(x[:0], group), x[:0])
    server = C.parameter_server(torch.full((2, 2), 1.0 + dist.get_rank()), group, root=2)
    assert torch.equal(server, torch.full((2, 2), 6.0))


def test_odd_sizes_strides_and_empty_tensors():
    launch(odd_sizes, world_size=3)


def four_ranks_in_a_grid():
    rows, columns = split([[0, 1], [2, 3]]), split([[0, 2], [1, 3]], algorithm="native")
    x = torch.tensor([float(10 ** dist.get_rank())])
    return C.all_reduce(x, rows).item(), C.all_reduce(x, columns).item(), rows.index, columns.ranks


def test_groups_that_split_the_ranks():
    found = launch(four_ranks_in_a_grid)
    assert [f[0] for f in found] == [11.0, 11.0, 1100.0, 1100.0]
    assert [f[1] for f in found] == [101.0, 1010.0, 101.0, 1010.0]
    assert [f[2] for f in found] == [0, 1, 0, 1]
    assert [f[3] for f in found] == [(0, 2), (1, 3)] * 2


def slow_link(latency, bandwidth, k):
    tracer = Tracer()
    group = world(tracer=tracer, link=Link(latency, bandwidth))
    C.barrier(group)
    tracer.clear()
    C.all_reduce(torch.ones(k), group)
    (event,) = tracer.events
    return event.end - event.start


def test_an_emulated_link_takes_its_time():
    """2(N-1) messages of K/N numbers each: never less than the formula."""
    n, k, latency, bandwidth = 3, 30_000, 0.01, 2e6
    want = 2 * (n - 1) * (latency + k / n * 4 / bandwidth)
    found = launch(slow_link, latency, bandwidth, k, world_size=n)
    for seconds in found:
        assert want <= seconds


def from_one_to_all(latency):
    group = world(link=Link(latency, math.inf))
    start = time.monotonic()
    C.scatter(torch.ones(group.size), group)
    return time.monotonic() - start


def test_a_wire_carries_one_message_after_the_other():
    assert launch(from_one_to_all, 0.2, world_size=3)[0] >= 0.4


def overlapped():
    """A message travels while this thread does something else."""
    group = world(tracer=Tracer(), link=Link(0.2, math.inf))
    future = group.later(lambda: C.all_reduce(torch.ones(4), group))
    here = not future.done()
    return here, future.result().tolist(), [e.op for e in group.tracer.events]


def test_a_collective_may_travel_while_others_work():
    for here, result, ops in launch(overlapped, world_size=2):
        assert here and result == [2.0] * 4 and ops == ["all_reduce"]


def test_the_tracer_refuses_to_guess():
    tracer = Tracer()
    tracer.add(Event("all_reduce", 0, (0, 1), -1, 0.0, 1.0))
    with pytest.raises(ValueError, match="does not say what it sends"):
        tracer.sent()


def alone_in_a_mesh():
    group = Mesh({"data": 2, "tensor": 1}, algorithm="native").group("tensor")
    x = torch.full((2,), float(dist.get_rank()))
    return [f(x, group).tolist() for f in (C.all_reduce, C.all_gather, C.reduce_scatter)]


def test_who_is_alone_in_a_group_sums_nothing_of_others():
    """Also where the library would take no process group for that of all ranks."""
    assert launch(alone_in_a_mesh, world_size=2) == [[[r, r]] * 3 for r in (0.0, 1.0)]


def native_bytes_are_unknown():
    group = world(tracer=Tracer(), algorithm="native")
    C.all_reduce(torch.ones(3), group)
    C.all_to_all(torch.ones(2), group)  # always by send and recv
    return [e.sent for e in group.tracer.events]


def test_a_librarys_collective_is_not_counted():
    assert launch(native_bytes_are_unknown, world_size=2) == [[-1, 4]] * 2


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda g: C.reduce_scatter(torch.ones(3), g), "3 rows cannot be scattered evenly over 2"),
        (lambda g: C.scatter(torch.ones(3), g), "3 rows cannot be scattered"),
        (lambda g: C.all_to_all(torch.ones(3), g), "3 rows are not one block"),
        (lambda g: C.broadcast(torch.ones(3), g, 2), "root=2 is not a place in a group of 2"),
        (lambda g: g.with_(algorithm="magic"), "'magic' must be 'ring' or 'native'"),
        (lambda g: split([[0]]), "each of 2 ranks must be in one group"),
        (lambda g: Group((0, 0)), "must differ"),
        (lambda g: Group((5,)).index, r"not in the group \(5,\)"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(RankError, match=match):
        launch(lambda: call(world()), world_size=2)
