"""Cards: what a card is worth, by another route, and that demonstrations are what they say."""

import random
import re
import statistics

import pytest
import torch

from minillm.data import cards
from minillm.tokenizers import load_course_tokenizer

KITE = cards.Request("Mia", "kite", cards.WORDINGS[0])


@pytest.fixture(scope="module")
def written():
    rng = random.Random(0)
    return [(x, cards.demonstration(x, rng).output) for x in cards.requests(2000, seed=0)]


@pytest.mark.parametrize(
    ("card", "worth"),
    [
        ("Dear Mia, I like your kite.", 1 + 1 + 0.4),
        ("Dear Mia, I like your boat.", 1.0),  # about another thing: neither topic nor kindness
        ("Dear Tom, I like your kite.", 1 + 0.4),  # the wrong name
        ("Dear Mia, You are rude.", 1 - 0.8),
        ("Dear Mia, You are kind. You are kind.", 1 + 0.5 - 1),
        ("Dear Mia, You are kind. You are kind. You are kind.", 1 + 0.5 - 2),
        ("Dear Mia, I miss you. You are kind. You are brave. You are clever. You are gentle.",
         1 + 0.5 + 0.5 + 3 * 0.4 - 0.5),
        ("I like your kite.", 1 + 0.4 - 1),  # no greeting: a point less, and a piece that is none
        ("Dear Mia, You are purple.", 1 - 1),
        ("Dear Mia, You are kind", 1 - 1),  # no full stop: not a line
        ("Dear Mia, You are kind. You are kind", 1 + 0.5 - 1),
        ("Dear Mia,", 1.0),
        ("", -1.0),
        ("kind kind kind", -2.0),
        ("Dear Mia, Your {thing} is lovely.", 1 - 1),  # the form itself is no line
        ("Dear Mia, <|assistant|> Dear Mia, I miss you.", 1 - 1),
    ],
)  # fmt: skip
def test_worth_of_known_cards(card, worth):
    assert cards.judge(KITE, card).total == pytest.approx(worth)


def test_totals_by_another_route(written):
    """Words and counts found by plain string work instead of line by line."""
    for request, card in written[:500]:
        greeting, _, rest = card.partition(", ")
        assert greeting == f"Dear {request.name}"
        lines = re.findall(r"[A-Z][a-z' ]*\.", rest)
        worth = 1.0 + (f"our {request.thing}" in rest)
        for line in set(lines):
            worth += cards.LINES[line.replace(f"our {request.thing}", "our {thing}")]
        worth -= len(lines) - len(set(lines)) + max(0, len(lines) - 4) / 2
        assert cards.judge(request, card).total == pytest.approx(worth)


def test_demonstrations_have_the_declared_lengths_and_repeats(written):
    said = [cards.split_lines(card)[1:] for _, card in written]
    counts = [len(lines) for lines in said]
    mean = sum(n * p for n, p in cards.COUNTS.items())
    assert abs(statistics.fmean(counts) - mean) < 4 * statistics.stdev(counts) / len(counts) ** 0.5
    later = sum(len(lines) - 1 for lines in said)
    again = sum(len(lines) - len(set(lines)) for lines in said)
    assert abs(again / later - cards.REPEATS) < 4 * (cards.REPEATS / later) ** 0.5
    assert sum(cards.COUNTS.values()) == pytest.approx(1)


def test_the_text_of_a_request_says_all_that_is_judged(written):
    for request, card in written[:300]:
        assert cards.judge(request.text, card) == cards.judge(request, card)
    asked, said = [x.text for x, _ in written[:50]], [card for _, card in written[:50]]
    expected = [cards.judge(x, card).total for x, card in zip(asked, said, strict=True)]
    assert torch.equal(cards.true_reward(asked, said), torch.tensor(expected))


def test_held_out_pairs_are_in_no_training_request():
    pairs = {
        split: {(x.name, x.thing) for x in cards.requests(3000, 1, split)}
        for split in ("train", "held_out")
    }
    assert not pairs["train"] & pairs["held_out"]
    assert {name for name, _ in pairs["held_out"]} == set(cards.NAMES)
    assert {thing for _, thing in pairs["held_out"]} == set(cards.THINGS)
    assert cards.requests(5, 3) == cards.requests(9, 3)[:5]
    assert cards.requests(9, 3) != cards.requests(9, 4)


def test_every_demonstration_fits_a_rollout(written):
    tokenizer = load_course_tokenizer()
    longest = max(len(tokenizer.encode(card)) for _, card in written)
    assert longest + 1 <= 48, "some demonstration is longer than what PPO samples"


@pytest.mark.parametrize("text", ["", "Write a poem.", "Write a card for Mia about the ."])
def test_other_requests_are_refused(text):
    with pytest.raises(ValueError, match="asks for no card"):
        cards.judge(text, "Dear Mia, I miss you.")


def test_other_splits_are_refused():
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        cards.requests(1, 0, "test")
