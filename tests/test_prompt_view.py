"""The prompt builder behind chapter 24's widget, with a model whose habits are known."""

import matplotlib.pyplot as plt
import pytest
import torch

from minillm.prompting import icl
from minillm.prompting.icl import Demonstration, Template
from minillm.teach.prompt_view import MARKS, ORDERS, build, picture

POOL = [Demonstration(f"text {i}", "ab"[i % 2]) for i in range(8)]
TEMPLATE = Template("{text} = {label}", words={"a": "yes", "b": "no"})


def heard(prompts, options):
    """log p of an option: how often its word stands in the prompt, plus a lean to the first."""
    lean = [0.5, 0.0]
    return torch.tensor(
        [[p.count(o) + x for o, x in zip(options, lean, strict=True)] for p in prompts]
    )


def test_the_same_demonstrations_in_every_order():
    made = {order: build(heard, TEMPLATE, POOL, "ab", "new", 6, order) for order in ORDERS}
    drawn = [line for line, _ in made["as drawn"].lines]
    for order, built in made.items():
        assert sorted(line for line, _ in built.lines) == sorted(drawn), order
        shown = built.prompt.split("\n")
        assert [line + word for line, word in built.lines[:-1]] == shown[:-1]
        assert shown[-1] == "new =" and built.lines[-1] == ("new = ", "?")
    assert made["reversed"].lines[:-1] == made["as drawn"].lines[-2::-1]
    words = [word for _, word in made["label by label"].lines[:-1]]
    assert words == sorted(words, reverse=True) and made["labels reversed"].lines[0][1] == "no"
    assert build(heard, TEMPLATE, POOL, "ab", "new", 6, seed=1).lines != made["as drawn"].lines


def test_probabilities_are_those_of_the_prompt_that_is_shown():
    for count in (0, 1, 5):
        built = build(heard, TEMPLATE, POOL, "ab", "new", count)
        scores = heard([built.prompt], [" yes", " no"]).double()
        assert list(built.probs) == pytest.approx(scores.softmax(-1)[0].tolist())
        # the questions say nothing, so what calibration takes away is everything
        assert list(built.fair) == pytest.approx([0.5, 0.5])


def test_marks_change_labels_and_nothing_else():
    made = {
        marks: build(heard, TEMPLATE, POOL, "ab", "new", 8, marks=marks, foreign=["zip", "zap"])
        for marks in MARKS
    }
    truth = made["true"].lines
    for marks, built in made.items():
        assert [line for line, _ in built.lines] == [line for line, _ in truth], marks
    by_text = {f"{d.text} = ": TEMPLATE.word(d.label) for d in POOL}
    assert all(by_text[line] == word for line, word in truth[:-1])
    assert all(by_text[line] != word for line, word in made["wrong"].lines[:-1])
    assert {word for _, word in made["foreign"].lines[:-1]} == {"zip", "zap"}
    assert {word for _, word in made["random"].lines[:-1]} == {"yes", "no"}
    assert made["foreign"].words == ("yes", "no")


def test_picture_shows_prompt_and_probabilities():
    pool = [Demonstration(f"a long text that goes on and on, number {i}", "a") for i in range(3)]
    built = build(heard, TEMPLATE, pool, "ab", "the question", 3, blanks=["x"])
    fig = picture(built)
    left, right = fig.axes
    said = [text.get_text() for text in left.texts]
    assert len(said) == 8 and all(len(text) <= 40 + 4 for text in said)
    assert sum(text.strip() == "yes" for text in said) == 3
    assert [bar.get_width() for bar in right.patches] == pytest.approx(
        [value for pair in zip(built.probs, built.fair, strict=True) for value in pair]
    )
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["yes", "no"]
    plt.close(fig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "sorted"}, "order='sorted' must be one of"),
        ({"marks": "none"}, "marks='none' one of"),
        ({"count": 9}, r"count=9 in \[0, 8\]"),
        ({"marks": "foreign"}, "there is no label"),
    ],
)
def test_bad_use_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(heard, TEMPLATE, POOL, "ab", "new", **settings)


def test_it_is_what_the_functions_say():
    built = build(heard, TEMPLATE, POOL, "ab", "new", 8)
    shown = [next(d for d in POOL if line == f"{d.text} = ") for line, _ in built.lines[:-1]]
    probs = icl.label_probs(heard, TEMPLATE, shown, ["new"], "ab")
    prior = icl.content_free_prior(heard, TEMPLATE, shown, "ab")
    assert list(built.fair) == pytest.approx(icl.calibrate(probs, prior)[0].tolist())
