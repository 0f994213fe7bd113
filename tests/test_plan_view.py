"""The planner's widget: what it shows is what was simulated."""

import matplotlib.pyplot as plt
import pytest

from minillm.parallel.simulate import SELENE, published, simulate
from minillm.teach import plan_view

RUN = published()[5]  # 76.1 billion parameters


def test_the_published_choice_gives_the_published_plan():
    p = RUN.plan
    assert plan_view.plan(RUN, p.tp, p.pp, p.micro_batch, p.chunks) == p


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_and_lanes_hold_the_whole_step(chunks):
    step = simulate(RUN.cfg, plan_view.plan(RUN, 8, 4, 2, chunks), SELENE, RUN.batch)
    assert sum(plan_view.seconds(step).values()) == pytest.approx(step.seconds, rel=1e-3)
    drawn = plan_view.spans(step.timeline)
    assert sum(map(len, drawn.values())) == len(step.timeline)
    assert {d for d, _ in drawn} == set(range(4))
    for device in range(4):
        pieces = sorted(p for (d, _), ps in drawn.items() if d == device for p in ps)
        ends = [start + length for start, length in pieces]
        assert all(end <= start + 1e-9 for end, (start, _) in zip(ends, pieces[1:], strict=False))
    assert max(e.end for e in step.timeline) == pytest.approx(step.seconds)


def test_pictures_say_what_they_show():
    good = plan_view.picture(RUN, SELENE, tp=8, pp=4, micro_batch=2, chunks=3)
    expected = simulate(RUN.cfg, RUN.plan, SELENE, RUN.batch)
    assert f"{expected.teraflops:.0f} TFLOP/s" in good.axes[0].get_title() + good.axes[0].get_title(
        loc="left"
    )
    assert "fits into 80" in good.axes[1].get_xlabel()
    full = plan_view.picture(RUN, SELENE, tp=4, pp=4, micro_batch=2)
    assert "does not fit into 80" in full.axes[1].get_xlabel()
    for wrong, words in (({"pp": 7}, "1024 GPUs"), ({"tp": 8, "pp": 4, "chunks": 2}, "4 \\* 2")):
        said = plan_view.picture(RUN, SELENE, **wrong).axes[0].texts[0].get_text()
        assert words.replace("\\", "") in said
    plt.close("all")
