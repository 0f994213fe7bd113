"""The ring, followed with sets: every sum complete at the end, nothing counted twice, few bytes."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from minillm.teach import ring_view

SIZES = [1, 2, 3, 4, 7]


def with_numbers(n):
    """The same algorithm on numbers, from its messages alone: [N, N] after each step."""
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, n, dtype=torch.float64, generator=rng)
    held, moments = x.clone(), [x.clone()]
    for step in ring_view.replay(n)[1:]:
        before = held.clone()
        for source, to, chunk in step.messages:
            add = before[to, chunk] if step.phase == "reduce-scatter" else 0.0
            held[to, chunk] = before[source, chunk] + add
        moments.append(held.clone())
    return x, moments


@pytest.mark.parametrize("n", SIZES)
def test_every_sum_is_complete_after_twice_n_minus_one_steps(n):
    steps = ring_view.replay(n)
    assert len(steps) == 2 * (n - 1) + 1
    everyone = frozenset(range(n))
    assert all(ranks == everyone for row in steps[-1].held for ranks in row)
    complete = [[ranks == everyone for ranks in row] for row in steps[n - 1].held]
    # after the first half each rank has one complete sum, its own chunk
    assert complete == [[chunk == rank for chunk in range(n)] for rank in range(n)]


@pytest.mark.parametrize("n", SIZES)
def test_sets_say_what_the_numbers_are(n):
    x, moments = with_numbers(n)
    for step, numbers in zip(ring_view.replay(n), moments, strict=True):
        for rank, row in enumerate(step.held):
            for chunk, ranks in enumerate(row):
                torch.testing.assert_close(numbers[rank, chunk], x[sorted(ranks), chunk].sum())


@pytest.mark.parametrize("n", SIZES)
def test_each_rank_sends_one_chunk_a_step_to_the_next(n):
    for step in ring_view.replay(n)[1:]:
        assert [m.source for m in step.messages] == list(range(n))
        assert all(m.to == (m.source + 1) % n for m in step.messages)
        assert len({m.chunk for m in step.messages}) == n  # never two into one sum


def test_no_number_is_added_twice():
    for n in SIZES:
        steps = ring_view.replay(n)
        for before, step in itertools.pairwise(steps[:n]):
            for source, to, chunk in step.messages:
                assert not before.held[source][chunk] & before.held[to][chunk]


def test_the_picture_shows_the_step():
    steps = ring_view.replay(4)
    fig = ring_view.picture(steps, 2)
    left, right = fig.axes
    title = left.get_title() or left.get_title("left")  # where the course's style puts it
    assert title == "step 2 of 6: reduce-scatter"
    counts = right.images[0].get_array()
    assert counts.tolist() == [[len(ranks) for ranks in row] for row in steps[2].held]
    cells = [text.get_text() for text in right.texts]
    assert cells[:4] == [" ".join(map(str, sorted(ranks))) for ranks in steps[2].held[0]]
    assert sorted(t.get_text() for t in left.texts if "chunk" in t.get_text()) == [
        f"chunk {c}" for c in range(4)
    ]
    assert len(right.patches) == 4
    plt.close(fig)
    fig = ring_view.picture(steps, 6)
    assert {text.get_text() for text in fig.axes[1].texts} == {"all"}
    plt.close(fig)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        ring_view.replay(0)
    for at in (-1, 3):
        with pytest.raises(ValueError, match="there is no number"):
            ring_view.picture(ring_view.replay(2), at)
