"""A mesh puts every rank into one group along each axis."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from minillm.parallel import RankError, launch
from minillm.parallel.collectives import all_reduce
from minillm.parallel.group import Link, Tracer
from minillm.parallel.mesh import Mesh, coordinates, links, partition

AXES = st.dictionaries(
    st.sampled_from(["data", "pipeline", "tensor", "context"]), st.integers(1, 4), min_size=1
)


@given(AXES, st.data())
def test_groups_partition_the_ranks_and_differ_along_their_axes_only(axes, data):
    n = math.prod(axes.values())
    along = data.draw(st.lists(st.sampled_from(list(axes)), min_size=1, unique=True))
    groups = partition(axes, along)
    assert sorted(itertools.chain(*groups)) == list(range(n))
    assert {len(g) for g in groups} == {math.prod(axes[a] for a in along)}
    places = [coordinates(rank, axes) for rank in range(n)]
    assert len({tuple(p.values()) for p in places}) == n
    for ranks in groups:
        for a, b in itertools.combinations(ranks, 2):
            differ = {name for name in axes if places[a][name] != places[b][name]}
            assert differ and differ <= set(along)


@given(AXES, st.integers(1, 8))
def test_the_last_axis_stays_in_a_machine_that_it_fits(axes, times):
    last = list(axes)[-1]
    assert links(axes, last, per_node=axes[last] * times) == 0.0


def sums():
    mesh = Mesh({"data": 2, "pipeline": 2, "tensor": 2}, settings={"data": {"link": Link(0, 1e9)}},
                tracer=Tracer())  # fmt: skip
    x = torch.tensor([2.0 ** dist.get_rank()])
    found = {}
    for along in (("tensor",), ("pipeline",), ("data",), ("tensor", "data")):
        group = mesh.group(*along)
        assert group is mesh.group(*reversed(along))
        found[along] = all_reduce(x, group).item(), group.ranks, group.link is not None
    return mesh.place, found


@pytest.mark.slow
def test_every_rank_talks_to_its_own_groups():
    """Each rank adds 2^rank, so that the sum tells who took part."""
    axes = {"data": 2, "pipeline": 2, "tensor": 2}
    for rank, (place, found) in enumerate(launch(sums, world_size=8)):
        assert place == coordinates(rank, axes)
        for along, (total, ranks, slow) in found.items():
            (mine,) = (g for g in partition(axes, along) if rank in g)
            assert total == sum(2.0**r for r in mine) and list(ranks) == mine
            assert slow == (along == ("data",))


@pytest.mark.slow
def test_bad_meshes_are_named():
    with pytest.raises(RankError, match="data=2 x tensor=2 must multiply to the 2 ranks"):
        launch(lambda: Mesh({"data": 2, "tensor": 2}), world_size=2)
    with pytest.raises(ValueError, match=r"\['expert'\] must be different ones of"):
        partition({"data": 2}, "expert")
    with pytest.raises(RankError, match=r"settings for \['expert'\]"):
        launch(lambda: Mesh({"data": 1}, settings={"expert": {}}), world_size=1)
