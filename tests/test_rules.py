"""Rewards that are written down: each rule on cases worked out by hand, and what questions rank."""

import pytest
import torch

from minillm.align.rules import (
    Question,
    ask,
    beyond,
    label,
    recalls,
    repeated,
    says,
    sentences,
    weighted,
)
from minillm.data import cards
from minillm.data.preferences import Comparison

ASKED = "Write a card for Mia about the kite."


def test_each_rule_counts_what_it_says():
    assert sentences(" Dear Mia, hi.  Really? Yes") == ["Dear Mia, hi.", "Really?", "Yes"]
    assert [says(r"kites?\b")("", text) for text in ("a kite", "kiter", "")] == [1, 0, 0]
    rule = recalls(r"for (\w+) about the (\w+)")
    assert [rule(ASKED, text) for text in ("Mia", "the kite, Mia!", "Mias kites")] == [0.5, 1, 0]
    assert rule("Hello.", "Mia") == 0  # a request of another form asks for nothing
    assert [repeated("", text) for text in ("", "A. B.", "A. A. B. A.")] == [0, 0, 2]
    assert [beyond(2)("", text) for text in ("", "A. B.", "A. B. C. D.")] == [0, 0, 2]


def test_rules_are_summed_by_their_weights():
    reward = weighted({says("^Dear"): 2.0, repeated: -1.5, beyond(1): -0.25})
    said = ["Dear you. Dear you. Dear you.", "Hi.", ""]
    assert reward([ASKED] * 3, said).tolist() == [2 - 3 - 0.5, 0, 0]
    assert reward([], []).shape == (0,)
    with pytest.raises(ValueError, match="reward of no rules"):
        weighted({})
    with pytest.raises(ValueError):
        reward([ASKED], ["a", "b"])


GREETS = Question("Does it greet Mia?", 1.0, lambda q, a: "Dear Mia" in a)
LONG = Question("Is it long?", -0.5, lambda q, a: len(a) > 20)


def test_answers_are_yes_or_no():
    said = ["Dear Mia, hi.", "Hello there, my dear friend."]
    found = ask([GREETS, LONG], [ASKED] * 2, said)
    assert found.tolist() == [[True, False], [False, True]]
    assert ask([GREETS], [], []).shape == (0, 1)
    with pytest.raises(ValueError, match="'How long' was answered 12: yes or no are due"):
        ask([Question("How long", 1.0, lambda q, a: 12)], [ASKED], ["x"])


def test_questions_rank_by_what_they_ask_and_leave_out_ties():
    rng = torch.Generator().manual_seed(0)
    said = [["You are rude. You are rude.", "Dear Mia, hi.", "Hi."], ["no", "yes", "maybe"]]
    found = label([GREETS, LONG], [ASKED, ASKED], said, generator=rng)
    # the second request's responses are alike to both questions: it is no comparison
    assert found == [Comparison(ASKED, (said[0][1], said[0][2], said[0][0]))]
    turned = label([GREETS, LONG], [ASKED, ASKED], said, generator=rng, noise=1.0)
    assert turned == [Comparison(ASKED, (said[0][0], said[0][2], said[0][1]))]
    assert label([GREETS], [], [], generator=rng) == []
    with pytest.raises(ValueError, match=r"\[1, 2\] responses"):
        label([GREETS], [ASKED, ASKED], [["a"], ["a", "b"]], generator=rng)


def test_what_is_not_asked_is_not_seen():
    rng = torch.Generator().manual_seed(0)
    kind, rude = "Dear Mia, You are kind.", "Dear Mia, You are rude."
    assert cards.judge(ASKED, kind).total > cards.judge(ASKED, rude).total + 1
    assert label([GREETS, LONG], [ASKED], [[kind, rude]], generator=rng) == []
