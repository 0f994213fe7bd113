"""The story grammar: probabilities against enumeration, entropy against both, and plain English."""

import collections
import itertools
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import stories
from minillm.data.story_engine import Case, Choice, Grammar, Option, pick
from minillm.data.story_reader import read_script

ROOT = Path(__file__).resolve().parents[1]
NODES = stories.grammar().nodes
GIRLS = [
    "Mia",
    "Lily",
    "Rosa",
    "Nora",
    "Ida",
    "Clara",
    "Tilly",
    "Wren",
    "Poppy",
    "Greta",
    "Astrid",
    "Bea",
    "Lotte",
    "Yara",
]
BOYS = [
    "Tom",
    "Ben",
    "Finn",
    "Leo",
    "Max",
    "Hugo",
    "Oscar",
    "Jack",
    "Noah",
    "Emil",
    "Anton",
    "Paul",
    "Karl",
    "Ravi",
]

# Cuts of the real grammar, small enough to list every story.
CUTS = [
    {"": 1, "plot": 4, "trait": 4, "kind": 3, "name": 2, "result": 2, "made": 3, "cargo_state": 3},
    {"": 1, "plot": 1, "place": 3, "day": 3, "treasure": 3, "outing": 2, "cause": 3, "found": 2}
    | {"state": 2, "manner": 3, "speech": 2},
    {"": 1, "plot": 2, "trait": 10, "skill": 3, "audience": 2, "mishap": 2, "result": 2}
    | {"advice": 2, "feeling": 2, "moral": 2},
    {"": 1, "plot": 4, "kind": 7, "manner": 5, "friend_kind": 3, "gift": 3, "source": 2, "day": 2},
]


@pytest.mark.parametrize("cut", CUTS)
def test_enumerated_stories_sum_to_one_without_duplicates(cut):
    small = Grammar(NODES, keep=cut)
    listed = list(small.enumerate())
    assert 100 < len(listed) < 20_000
    assert len({text for text, _ in listed}) == len(listed)
    assert math.fsum(math.exp(log_p) for _, log_p in listed) == pytest.approx(1, abs=1e-12)
    by_definition = -math.fsum(math.exp(log_p) * log_p for _, log_p in listed)
    assert small.entropy() == pytest.approx(by_definition, rel=1e-12)
    for text, log_p in listed[:: len(listed) // 100 + 1]:
        assert small.log_prob(text) == pytest.approx(log_p, abs=1e-12)
        assert stories.log_prob(text) < log_p  # the whole grammar says it too, more rarely


@st.composite
def grammars(draw):
    """Three or four dependent choices, one of them in the branches of a case."""
    factor = st.sampled_from([0.25, 1.0, 3.0])
    count = draw(st.integers(2, 3))
    nodes, names = [], []
    for index in range(count):
        keys = "abc"[: draw(st.integers(2, 3))]
        forms = {key: {"class": draw(st.sampled_from("xy"))} for key in keys}
        options = {
            key: Option(f"<{index}{key}>", draw(st.integers(1, 5)), forms[key]) for key in keys
        }
        factors = {}
        for name, earlier in names:
            how = draw(st.sampled_from(["", name, f"{name}.class"]))
            if how:
                values = sorted({o.forms["class"] if "." in how else k for k, o in earlier.items()})
                looked_at = draw(st.lists(st.sampled_from(values), unique=True))
                factors[how] = {value: {key: draw(factor) for key in keys} for value in looked_at}
        nodes.append(Choice(f"v{index}", options, factors))
        names.append((f"v{index}", options))
    branch = pick("late", "!|?", {"v0": {"a": {"!": draw(factor)}}})
    nodes += ["-", Case("v1", {"a": [branch], "b": ["{v0}"], "c": ["{v0.class}", branch]})]
    return Grammar(nodes)


@settings(max_examples=60, deadline=None)
@given(grammars())
def test_entropy_of_random_grammars_follows_its_definition(grammar):
    listed = dict(grammar.enumerate())
    assert math.fsum(map(math.exp, listed.values())) == pytest.approx(1, abs=1e-12)
    by_definition = -math.fsum(math.exp(log_p) * log_p for log_p in listed.values())
    assert grammar.entropy() == pytest.approx(by_definition, abs=1e-12)
    for text, log_p in listed.items():
        assert grammar.log_prob(text) == pytest.approx(log_p, abs=1e-12)


def test_weights_are_those_written_down():
    # By hand: x is 1/3 : 1/4; after b, the weights 1/3 and 1/4 of y become 1 and 0.
    x, y = pick("x", "a|b"), pick("y", "c|d", {"x": {"b": {"c": 3.0, "d": 0.0}}})
    got = {text: math.exp(log_p) for text, log_p in Grammar([x, y]).enumerate()}
    assert got == pytest.approx({"ac": 16 / 49, "ad": 12 / 49, "bc": 3 / 7})


def test_sampler_follows_the_probabilities():
    small = Grammar(NODES, keep={"": 1, "plot": 4, "trait": 3, "made": 2, "result": 2})
    expected = {text: math.exp(log_p) for text, log_p in small.enumerate()}
    rng, n = random.Random(5), 4000
    seen = collections.Counter(small.sample(rng).text for _ in range(n))
    assert set(seen) <= set(expected)
    chi2 = sum((seen[text] - n * p) ** 2 / (n * p) for text, p in expected.items())
    degrees = len(expected) - 1
    assert abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.slow
def test_sampled_mean_agrees_with_the_exact_entropy():
    n = 2000
    nats = [-stories.log_prob(text) for text in stories.generate(n, seed=0)]
    mean = sum(nats) / n
    standard_error = math.sqrt(sum((x - mean) ** 2 for x in nats) / (n - 1) / n)
    assert abs(mean - stories.entropy()) < 3 * standard_error
    assert standard_error < 0.12
    assert 40 < stories.entropy() < 80


def test_entropy_counts_dependence():
    # Were all choices independent, as if nobody looked back, the entropy would be another one.
    def forget(nodes):
        for node in nodes:
            if isinstance(node, Choice):
                yield Choice(node.name, node.options)
            elif isinstance(node, Case):
                yield Case(
                    node.of, {key: list(forget(branch)) for key, branch in node.then.items()}
                )
            else:
                yield node

    assert Grammar(list(forget(NODES))).entropy() - stories.entropy() > 3


def test_same_seed_same_stories_in_another_process():
    run = subprocess.run(
        [sys.executable, "-c", "from minillm.data import stories; print(stories.generate(9, 9))"],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(stories.generate(9, 9))


def test_sample_generate_and_parse_agree():
    for seed in range(20):
        story = stories.sample(seed)
        assert stories.generate(1, seed) == [story.text]
        assert stories.parse(story.text) == story
        assert stories.log_prob(story.text) == story.log_prob < 0
    assert len(set(stories.generate(500, 1))) == 500


def test_what_is_not_a_story_is_refused_where_it_goes_wrong():
    text = stories.sample(0).text
    middle = text.index("In the end")
    wrong = {
        text[:middle] + "At the end" + text[middle + 10 :]: middle - 1,
        text + " ": len(text),
        text[:-1]: text.rindex(" and ") + 5,
        "": 0,
        "It was a dark and stormy night.": 0,
    }
    for other, position in wrong.items():
        with pytest.raises(ValueError, match=rf"stopped at character {position} of {len(other)}, "):
            stories.log_prob(other)
    swapped = text.replace(" she ", " he ") if " she " in text else text.replace(" he ", " she ")
    assert swapped != text
    with pytest.raises(ValueError, match="not in the language"):
        stories.log_prob(swapped)
    with pytest.raises(ValueError, match="n=-1"):
        stories.generate(-1, 0)


@pytest.fixture(scope="module")
def many():
    return [stories.sample(seed) for seed in range(400)]


def test_stories_are_english(many):
    for story in many:
        text = story.text
        assert not re.search(r"\b[Aa] (?:[aeiou]|hou|hones)|\b[Aa]n (?!honest)[^aeiou]", text)
        assert not re.search(r"  |[{}]| [.,]|\.\.|\n", text), text
        assert text[0].isupper() and text.endswith(".") and text.isascii()
        assert text.count('"') % 2 == 0
        for sentence in re.findall(r'[.!?]"? (\S)', text):
            assert sentence.isupper() or sentence == '"', text
        assert 100 <= len(text.split()) <= 160
        hero = re.search(r"(\w+) named (\w+) lived", text)
        mine, other = ("her", "his") if hero[2] in GIRLS else ("his", "her")
        assert hero[2] in GIRLS + BOYS
        assert f"told {mine} " in text and f"told {other} " not in text
        assert (hero[1] == "girl") <= (mine == "her") and (hero[1] == "boy") <= (mine == "his")
        friend = re.findall(r"(\w+) named (\w+)", text)[1]
        assert friend[0] != hero[1]  # the friend is of another kind
        assert text.count(hero[2]) >= 3 and text.count(friend[1]) >= 2


def test_effects_follow_from_causes(many):
    for text in (story.text for story in many):
        if "drifted away" in text:
            assert re.search("to the (beach|bridge|pier)", text)
            assert re.search("in the reeds|fishing net", text)
        if "gust of wind" in text:
            assert re.search("in a tree|on the roof|on top of a chimney", text)
            assert re.search("tore the (kite|scarf|paper bird|hat) out of", text)
        if "rolled down a slope" in text:
            assert re.search("the (ball|drum|marble) slipped", text)
        if "The truth is" in text or "told the truth" in text:
            assert "But the " in text
        if "felt proud" in text:
            assert not re.search(
                "sadly|out crooked|much too small|never quite|told the truth", text
            )
    plots = collections.Counter(
        next(w for w in ("treasure:", "wish:", "friend,", "task:") if w in s.text) for s in many
    )
    assert len(plots) == 4 and min(plots.values()) > 40


def test_questions_are_answered_in_the_text(many):
    for story in many:
        assert len(story.questions) >= 8
        assert len({question for question, _ in story.questions}) == len(story.questions)
        for question, answer in story.questions:
            assert question.endswith("?") and "{" not in question + answer
            assert answer.casefold() in story.text.casefold(), (question, answer, story.text)


def test_entropy_per_token_counts_the_end_marker():
    class Words:
        def encode(self, text):
            return text.split()

    texts = stories.generate(50, seed=3)
    nats = sum(-stories.log_prob(text) for text in texts)
    tokens = sum(text.count(" ") + 2 for text in texts)
    assert stories.entropy_per_token(Words(), 50, seed=3) == pytest.approx(nats / tokens)
    with pytest.raises(ValueError, match="n=0"):
        stories.entropy_per_token(Words(), 0, seed=3)


A = pick("a", {"x": ("ax", {"f": "1"}), "y": ("ay", {"f": "2"})})
FAULTS = [
    ([pick("a", "cat|cats")], "'cat' and 'cats' could be confused"),
    ([pick("a", "cat|")], "could be confused"),
    ([A, pick("b", "{a}|ax")], "could be confused"),
    ([A, pick("b", "{a} x|{a}")], "could be confused"),
    (["{a}", A], "refers to 'a', which is not said before"),
    ([A, "{a.g}"], "has no form 'g'"),
    ([A, A], "chosen twice"),
    ([A, Case("a", {"x": ["!"]})], r"no branch for \['y'\]"),
    ([Case("a", {}), A], "looked at before"),
    ([A, Case("a", {"x": [pick("b", "1|2")], "y": []}), "{b}"], "refers to 'b'"),
    ([A, pick("b", "1|2", {"a": {"z": {"1": 2.0}}})], r"'a' never is \['z'\]"),
    ([A, pick("b", "1|2", {"a.f": {"1": {"3": 2.0}}})], r"no options \['3'\]"),
    ([A, pick("b", "1|2", {"a": {"x": {"1": 0.0, "2": 0.0}}})], "no option left"),
    ([A, pick("b", "{a}1|2")], "could be confused"),
    ([A, pick("b", "1{a}|2"), "{b}"], "refers itself"),
    ([pick("b", {"k": ("t", {"f": "{b}"})})], "the forms of 't' refer"),
]


@pytest.mark.parametrize(("nodes", "message"), FAULTS)
def test_faulty_grammars_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Grammar(nodes)


SMALL = """
# a comment
TEXT story
A [pet/black]
sleeps. <pet> <night>

TEXT night
[time].

TEXT pet=cat
It {pet.does}.

TEXT pet=white owl
[deed]

CHOICE pet
cat ; does=purrs
white owl ; does=hoots
dog = little dog ; does=barks

CHOICE pet/black

CHOICE time
It is day | It is late
given pet white owl: only It is late
given pet.does purrs: It is day*3

CHOICE deed
It hunts mice. | It dreams.

QUESTIONS
Who sleeps? the {pet}

QUESTIONS pet=cat
Does it hoot? no
"""


def test_a_grammar_is_read_from_text():
    text = SMALL.replace("dog = little dog ; does=barks\n", "")
    script = read_script(text)
    got = {said: math.exp(log_p) for said, log_p in Grammar(script.nodes).enumerate()}
    owl = "A white owl sleeps. "
    # By hand: cat 1/3, owl 1/4; for the cat day 3/3, late 1/4; hunts 1/3, dreams 1/4.
    assert got == pytest.approx(
        {
            "A cat sleeps. It purrs. It is day.": 4 / 7 * 4 / 5,
            "A cat sleeps. It purrs. It is late.": 4 / 7 * 1 / 5,
            owl + "It hunts mice. It is late.": 3 / 7 * 4 / 7,
            owl + "It dreams. It is late.": 3 / 7 * 3 / 7,
        }
    )
    assert script.questions == (
        ("", "Who sleeps?", "the {pet}"),
        ("pet=cat", "Does it hoot?", "no"),
    )


MISPRINTS = [
    ("TEXT story", "TEXT tale", "no TEXT story"),
    ("TEXT night", "TEXT evening", "TEXT evening|never used: evening|no branch"),
    ("[time]", "[tim]", r"has \[tim\], but there is no CHOICE tim"),
    ("[time].", "late.", "never used: time"),
    ("# a comment", "a comment", "'a comment' stands before the first"),
    ("CHOICE deed", "CHOICE time", "CHOICE time is there twice"),
    ("It dreams.", "It hunts mice.", "'It hunts mice.' is there twice"),
    ("only It is late", "only It is noon", r"no options \['It is noon'\]"),
    ("given pet.does purrs: It is day*3", "given pet.does", "is not 'given choice value"),
    ("Does it hoot? no", "Does it hoot", "is not 'question"),
    ("It hunts mice. | It dreams.", "# nothing", "CHOICE deed has no options"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISPRINTS)
def test_misprints_are_reported(right, wrong, message):
    text = SMALL.replace("dog = little dog ; does=barks\n", "")
    assert right in text
    with pytest.raises(ValueError, match=message):
        Grammar(read_script(text.replace(right, wrong)).nodes)
    with pytest.raises(ValueError, match=r"no branch for \['dog'\]"):
        Grammar(read_script(SMALL).nodes)


def test_no_text_of_the_grammar_begins_another():
    # Reading needs no look-ahead: of all stories of a cut, none continues another.
    texts = sorted(text for text, _ in Grammar(NODES, keep=CUTS[0]).enumerate())
    assert not any(b.startswith(a) for a, b in itertools.pairwise(texts))
