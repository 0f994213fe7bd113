"""The recorded blocks of attention against the whole matrix."""

import itertools
import random

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.teach import flash_view


def heads(t, s, d, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (t, d), (s, d), (s, d)
    return [scale * torch.randn(x, generator=rng, dtype=torch.float64) for x in shapes]


def visible(t, s, causal=True, window=None):
    """Place by place: the last query stands at the last key."""
    here = [[s - t + i - j for j in range(s)] for i in range(t)]  # how far the key lies behind
    if window is not None:
        return torch.tensor([[0 <= x < window for x in row] for row in here])
    return torch.tensor([[x >= 0 or not causal for x in row] for row in here])


def dense(q, k, v, mask=None):
    scores = q @ k.T / q.shape[1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores


@settings(max_examples=40, deadline=None)
@given(
    t=st.integers(1, 13),
    more=st.integers(0, 6),
    block_q=st.integers(1, 15),
    block_k=st.integers(1, 15),
    window=st.sampled_from([None, 1, 3, 30]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_order_of_any_blocks_ends_at_attention(t, more, block_q, block_k, window, causal, seed):
    s = t + more
    q, k, v = heads(t, s, 4, seed)
    mask = visible(t, s, causal, window)
    out, scores = dense(q, k, v, mask)
    order = list(itertools.product(range(-(-t // block_q)), range(-(-s // block_k))))
    random.Random(seed).shuffle(order)
    steps = list(flash_view.replay(q, k, v, block_q, block_k, causal, window, order))
    torch.testing.assert_close(steps[-1].out, out)
    torch.testing.assert_close(steps[-1].top, scores.amax(-1))
    torch.testing.assert_close(steps[-1].top + steps[-1].total.log(), scores.logsumexp(-1))
    seen = torch.zeros(t, s, dtype=torch.bool)
    for step in steps:  # every allowed score once, in blocks that hold one at least
        assert mask[step.rows, step.cols].any() and not seen[step.rows, step.cols].any()
        assert step.masked == bool(~mask[step.rows, step.cols].all())
        assert torch.equal(step.scores.isfinite(), mask[step.rows, step.cols])
        seen[step.rows, step.cols] = True
    assert (seen >= mask).all()


def test_each_event_is_what_is_known_then():
    q, k, v = heads(6, 8, 4)
    scores = dense(q, k, v)[1]
    for n, step in enumerate(flash_view.replay(q, k, v, 3, 2)):
        i, j = divmod(n, 4)
        assert step.block == (i, j)
        past = scores[:, : 2 * j + 2]
        torch.testing.assert_close(step.top[step.rows], past[step.rows].amax(-1))
        known = past[step.rows].softmax(-1) @ v[: 2 * j + 2]
        torch.testing.assert_close(step.out[step.rows], known)
        assert (step.out[step.rows.stop :] == 0).all() and (step.total[step.rows.stop :] == 0).all()
        assert (step.top[step.rows.stop :] == -torch.inf).all()


def test_events_are_not_changed_later():
    q, k, v = heads(4, 4, 2)
    steps = list(flash_view.replay(q, k, v, 2, 2))
    assert not torch.equal(steps[0].out, steps[1].out)
    assert (steps[0].out[2:] == 0).all()


def test_large_scores_stay_finite():
    q, k, v = heads(9, 9, 4, scale=100.0)
    last = list(flash_view.replay(q, k, v, 4, 4))[-1]
    torch.testing.assert_close(last.out, dense(q, k, v)[0])


def test_rows_that_see_nothing_are_zero():
    q, k, v = heads(5, 3, 4)  # the first two queries stand before the first key
    last = list(flash_view.replay(q, k, v, 2, 2, causal=True))[-1]
    assert (last.out[:2] == 0).all() and (last.top[:2] == -torch.inf).all()
    torch.testing.assert_close(last.out[2:], dense(q[2:], k, v, visible(3, 3))[0])


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_causal_skips_all_above_the_diagonal(n):
    q, k, v = heads(4 * n, 4 * n, 2)
    steps = list(flash_view.replay(q, k, v, 4, 4, causal=True))
    assert [x.block for x in steps] == [(i, j) for i in range(n) for j in range(i + 1)]
    assert [x.block for x in steps if x.masked] == [(i, i) for i in range(n)]


def test_bad_input_is_refused():
    q, k, v = heads(4, 4, 2)
    for bad in ((q[None], k, v), (q, k[:3], v), (q, k[:, :1], v[:, :1])):
        with pytest.raises(ValueError, match="one head needs"):
            next(flash_view.replay(*bad, 2, 2))
    for blocks in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match="at least 1 each"):
            next(flash_view.replay(q, k, v, *blocks))
    with pytest.raises(ValueError, match="window=0"):
        next(flash_view.replay(q, k, v, 2, 2, window=0))
    for order in ([(0, 0)], [(0, 0), (0, 1), (1, 0), (1, 0)]):
        with pytest.raises(ValueError, match="each block"):
            next(flash_view.replay(q, k, v, 2, 2, order=order))


def test_the_picture_shows_the_step():
    q, k, v = heads(8, 8, 2)
    steps = list(flash_view.replay(q, k, v, 4, 2, causal=True))
    fig = flash_view.picture(steps, 2, row=5)
    left, middle, right = fig.axes
    title = left.get_title() or left.get_title("left")  # where the course's style puts it
    assert title == f"step 3 of {len(steps)}"
    shown = left.images[0].get_array()
    assert shown.mask[:, 4:].all() and not shown.mask[0, 0] and shown.mask[0, 1]
    assert (
        not shown.mask[4:, :2].any() and shown.mask[4:, 2:].all()
    )  # rows 4 to 7: one block so far
    fig, again = plt.close(fig), flash_view.picture(steps, 3, row=5)
    now = (q[4:] @ k[:4].T / 2**0.5 - steps[3].top[4:, None]).exp()  # under the maximum of today
    assert again.axes[0].images[0].get_array()[4:, :4].data == pytest.approx(now.numpy(), abs=1e-6)
    fig = again
    heights = middle.lines[0].get_ydata()
    assert len(heights) == 4 and torch.tensor(heights[:1]).isfinite().all()
    assert torch.tensor(heights[1:]).isnan().all()
    widths = [bar.get_width() for bar in right.patches]
    expected = (steps[2].out - steps[-1].out).norm(dim=-1).tolist()
    assert widths == pytest.approx(expected)
    plt.close(fig)
    for at, row in ((len(steps), None), (-1, None), (0, 8), (0, -1)):
        with pytest.raises(ValueError, match="there is no step"):
            flash_view.picture(steps, at, row)
    with pytest.raises(ValueError, match="there is no step"):
        flash_view.picture([], 0)
