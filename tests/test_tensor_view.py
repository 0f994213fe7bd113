"""The messages that belong to two cuts: carried out on real ranks, against one process."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from minillm.parallel import launch
from minillm.parallel.group import Tracer, world
from minillm.parallel.slices import shard
from minillm.teach import tensor_view as view

TOKENS, D, HIDDEN = 3, 8, 24
PAIRS = list(itertools.product(view.CUTS, repeat=2))


def inputs():
    rng = torch.Generator().manual_seed(0)
    shapes = (TOKENS, D), (D, HIDDEN), (HIDDEN, D), (TOKENS, D)
    return [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]


def run(first, second, group, tracer, moves=None):
    """The largest deviation of y and all gradients from one process; bytes forward and backward."""
    x, a, b, grad = inputs()
    whole = [p.clone().requires_grad_() for p in (x, a, b)]
    want = F.gelu(whole[0] @ whole[1]) @ whole[2]
    wanted = torch.autograd.grad(want, whole, grad)
    parts = [x, view.cut_weight(a, first, group), view.cut_weight(b, second, group)]
    parts = [p.clone().requires_grad_() for p in parts]
    tracer.clear()
    y = view.carry_out(*parts, first, second, group, moves)
    forward = tracer.sent()
    found = torch.autograd.grad(y, parts, grad)
    pairs = [(y.detach(), want), (found[0], wanted[0])]
    for i, cut in ((1, first), (2, second)):
        axis = {"columns": 1, "rows": 0}.get(cut)
        pairs.append((found[i], wanted[i] if axis is None else shard(wanted[i], axis, group)))
    return max((p - q).abs().max().item() for p, q in pairs), forward, tracer.sent() - forward


def all_pairs():
    tracer = Tracer()
    group = world(tracer=tracer)
    found = {pair: run(*pair, group, tracer) for pair in PAIRS}
    broken = {}  # one direction of one move left out
    for pair in PAIRS:
        moves = view.journey(*pair, D, HIDDEN)
        for i, move in enumerate(moves):
            for way in ("forth", "back"):
                if getattr(move, way) in ("all_reduce", "reduce_scatter"):
                    less = {"all_reduce": "nothing", "reduce_scatter": "slice"}
                    other = move._replace(**{way: less[getattr(move, way)]})
                    changed = (*moves[:i], other, *moves[i + 1 :])
                    broken[*pair, i, way] = run(*pair, group, tracer, changed)[0]
    return found, broken


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
def test_each_pair_of_cuts_gives_one_process_and_sends_what_the_view_says(n):
    for found, broken in launch(all_pairs, world_size=n, timeout=120):
        for pair, (error, forward, backward) in found.items():
            assert error < 1e-12, pair
            moves = [m.numbers(TOKENS, n) for m in view.journey(*pair, D, HIDDEN)]
            assert forward == 8 * sum(m[0] for m in moves), pair
            assert backward == 8 * sum(m[1] for m in moves), pair
        assert len(broken) == 12
        assert n == 1 or all(error > 1e-3 for error in broken.values()), broken


def test_column_then_row_sends_least_of_all_that_divide_the_work():
    def total(pair, ranks):
        return sum(sum(move.numbers(7, ranks)) for move in view.journey(*pair, 16, 64))

    for ranks in range(2, 9):
        divided = [pair for pair in PAIRS if "whole" not in pair]
        best = min(divided, key=lambda pair: total(pair, ranks))
        assert best == ("columns", "rows")
        assert total(best, ranks) == pytest.approx(
            4 * (ranks - 1) / ranks * 7 * 16
        )  # 2 all-reduces
        assert total(("whole", "whole"), ranks) == 0
    assert all(total(pair, 1) == 0 for pair in PAIRS)


def colors(figure):
    """How many rectangles there are of each color."""
    found = [p.get_facecolor() for p in figure.axes[0].patches if isinstance(p, plt.Rectangle)]
    return {color: found.count(color) for color in set(found)}


@pytest.mark.parametrize("ranks", [1, 5])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_picture_shows_each_ranks_parts_and_each_message(pair, ranks):
    figure = view.picture(*pair, ranks)
    texts = [text.get_text() for text in figure.axes[0].texts]
    moves = view.journey(*pair)
    names = [getattr(m, w).replace("_", "-") for m in moves for w in ("forth", "back")]
    for name in set(names) - {"nothing"}:
        assert texts.count(name) == names.count(name)
    forms = [view.NEEDS[pair[0]], pair[0], view.GIVES[pair[0]], view.NEEDS[pair[1]]]
    forms += [pair[1], view.GIVES[pair[1]], "whole"]
    cut = sum(form != "whole" for form in forms)
    shown = colors(figure)
    assert sum(shown.values()) == (7 if ranks == 1 else 7 - cut + cut * ranks)
    if ranks > 1 and cut:
        assert sorted(shown.values()) == sorted([cut] * ranks + [7 - cut])
    plt.close(figure)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: view.journey("diagonal", "rows"), "cut='diagonal' must be one of"),
        (lambda: view.journey("rows", "column"), "cut='column' must be one of"),
        (lambda: view.picture(ranks=0), "ranks=0 must be at least 1"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
