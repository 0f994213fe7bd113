"""Task families: right answers by another route, splits that do not leak, verifiers that refuse."""

import calendar
import itertools
import random
import re
from collections import Counter

import pytest

from minillm.data import families, stories
from minillm.data import families_makers as makers
from minillm.data import families_text as texts
from minillm.data.families import FAMILIES, SPLITS, family
from minillm.data.instructions import Instruction, conversation, leaked
from minillm.tokenizers import load_course_tokenizer
from minillm.tokenizers.chat import render

EACH = [(one, split) for one in FAMILIES for split in one.splits()]
IDS = [f"{one.name}-{split}" for one, split in EACH]


def drawn(name, n=60):
    """Examples of every split of a family."""
    return [
        x for split in family(name).splits() for x in families.examples(family(name), split, n, 0)
    ]


def last_word(text):
    return re.findall(r"\w+", text)[-1]


def named(example):
    """The one word of the instruction that is a word of some material."""
    known = {w for words in makers.WORDS.values() for w in words}
    (word,) = [w for w in re.findall(r"\w+", example.instruction) if w in known]
    return word


@pytest.mark.parametrize(("one", "split"), EACH, ids=IDS)
def test_the_known_answer_is_right_and_another_is_not(one, split):
    some = families.examples(one, split, 25, seed=3)
    assert some == families.examples(one, split, 25, seed=3) != families.examples(one, split, 25, 4)
    for example in some:
        assert one.verify(example, example.output) and one.verify(example, f" {example.output}\n")
        for wrong in ("", example.output + " more", example.output[:-1], example.input or "no"):
            assert wrong.strip() == example.output or not one.verify(example, wrong), example


def test_there_are_enough_families_in_each_cluster_and_every_split():
    assert len({one.name for one in FAMILIES}) == len(FAMILIES) >= 20
    assert {one.cluster for one in FAMILIES} == {
        *("lists", "numbers", "dates", "language", "text", "writing")
    }
    for split in SPLITS:
        assert len(families.in_split(split)) >= 3
    held = [one for one in FAMILIES if one.held_out]
    assert [one.splits() for one in held] == [("families",)] * len(held)


@pytest.mark.parametrize("one", [o for o in FAMILIES if not o.held_out], ids=lambda one: one.name)
def test_no_split_shares_a_question_with_training(one):
    train = families.examples(one, "train", 400, seed=0)
    for split in one.splits()[1:]:
        held = families.examples(one, split, 150, seed=0)
        assert leaked(train, held) == []
        moved = [Instruction(train[0].instruction, train[0].input, "x")]
        assert leaked(train, moved) == moved  # the control: what is shared is found


def test_one_input_in_eight_is_held_out():
    rng = random.Random(0)
    new = [families.is_new("reverse", *makers.reverse(rng, "animals")[:2]) for _ in range(4000)]
    assert 0.11 < sum(new) / len(new) < 0.14


def test_wordings_are_held_out_and_all_are_used():
    for one in FAMILIES:
        if one.held_out:
            continue
        known, held = set(one.words()), set(one.words(new=True))
        assert len(known) >= 5 and len(held) == 2 and not known & held
        assert known | held == set(one.instructions)
        rng = random.Random(0)
        fields, _given, _output = one.make(rng, one.materials[0])
        filled = {w.format(**fields) for w in one.instructions}  # KeyError for an unknown field
        assert len(filled) == len(one.instructions) and not any("{" in w for w in filled)
        for split, words in (("train", known), ("inputs", known), ("wordings", held)):
            patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(w)) for w in words]
            asked = [x.instruction for x in families.examples(one, split, 60, 0)]
            assert all(any(re.fullmatch(p, text) for p in patterns) for text in asked)
            assert all(any(re.fullmatch(p, text) for text in asked) for p in patterns)
        few = {one.sample(rng, wordings=1).instruction for _ in range(30)}
        patterns = re.sub(r"\\\{\w+\\\}", ".+", re.escape(one.words()[0]))
        assert all(re.fullmatch(patterns, text) for text in few)


def test_a_new_material_is_new_to_its_operation_only():
    for one in families.in_split("materials"):
        assert not set(one.materials) & set(one.new_materials)
        words = {w for m in one.new_materials for w in makers.WORDS[m]}
        for example in families.examples(one, "train", 200, 0):
            assert not words & set(example.input.split())
        for example in families.examples(one, "materials", 50, 0):
            assert set(example.input.split()) <= words
        for material in one.new_materials:  # as words of lists they are known
            others = [o for o in families.in_split("materials") if material in o.materials]
            assert len(others) >= 5


def test_no_word_belongs_to_two_materials():
    words = [w for material in makers.WORDS.values() for w in material]
    assert len(words) == len(set(words))


OPERATIONS = {
    "copy": lambda words, x: words,
    "reverse": lambda words, x: list(reversed(words)),
    "first": lambda words, x: words[:1],
    "last": lambda words, x: [words.pop()],
    "swap": lambda words, x: [words.pop(), *words[1:], words[0]],
    "sort": lambda words, x: sorted(words, key=lambda w: (int(w) if w.isdigit() else 0, w)),
    "count": lambda words, x: [str(sum(1 for _ in words))],
    "first_and_last": lambda words, x: [words[0], words[len(words) - 1]],
    "after": lambda words, x: [dict(itertools.pairwise(words))[named(x)]],
    "before": lambda words, x: [dict(zip(words[1:], words, strict=False))[named(x)]],
    "remove": lambda words, x: " ".join(words).replace(named(x), "").split(),
    "contains": lambda words, x: ["yes" if words.count(named(x)) else "no"],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_lists(name):
    for example in drawn(name):
        assert OPERATIONS[name](example.input.split(), example) == example.output.split()


def test_nth_says_which():
    order = {"second": 1, "third": 2, "fourth": 3, "2": 1, "3": 2, "4": 3}
    for example in drawn("nth"):
        (place,) = [order[w] for w in re.findall(r"\w+", example.instruction) if w in order]
        assert example.input.split()[place] == example.output


def test_numbers():
    for name, rule in (("add", sum), ("larger", max), ("subtract", lambda p: p[0] - p[1])):
        for example in drawn(name):
            assert rule([int(n) for n in example.input.split()]) == int(example.output) >= 0
    for name in ("count_up", "count_down"):
        for example in drawn(name):
            a, b = (int(n) for n in re.findall(r"\d+", example.instruction))
            said = [int(n) for n in example.output.split()]
            assert said[0] == a and said[-1] == b
            step = 1 if name == "count_up" else -1
            assert [y - x for x, y in itertools.pairwise(said)] == [step] * (len(said) - 1)
            assert (a < b) == (name == "count_up")


def test_dates_follow_the_calendar():
    for name, cycle in (("days", list(calendar.day_name)), ("months", calendar.month_name[1:])):
        for example in drawn(name):
            steps = int(re.search(r"\d", example.instruction).group())
            (start,) = [d for d in cycle if d in example.instruction]
            sign = 1 if "after" in example.instruction else -1
            assert ("before" in example.instruction) == (sign == -1)
            moved = cycle.index(example.output) - cycle.index(start)
            assert (moved - sign * steps) % len(cycle) == 0


def test_lodo_translates_there_and_back():
    words = makers.NOUNS | makers.ADJECTIVES | makers.ACTIONS
    assert len(words) == 16 == len(set(words.values()))
    back = {lodo: english for english, lodo in words.items()}
    for name in ("to_lodo", "from_lodo"):
        for example in drawn(name):
            pair = (example.input, example.output)
            english, lodo = pair if name == "to_lodo" else pair[::-1]
            plain = [w for w in english.split() if w != "the"]
            assert Counter(words[w] for w in plain) == Counter(lodo.split())
            assert back[lodo.split()[-1]] in makers.ACTIONS  # the verb stands at the end
            order = [back[w] for w in lodo.split()]
            for place, word in enumerate(order):
                if word in makers.ADJECTIVES:  # behind its noun; in English in front of it
                    assert f"{word} {order[place - 1]}" in english
            nouns = [w for w in plain if w in makers.NOUNS]
            assert nouns == [w for w in order if w in makers.NOUNS]


FACT = re.compile(r"(\w+) (\w+) an? (\w+) (\w+) at the (\w+)\.")


def test_questions_about_a_passage():
    for name, answer in (
        ("who", lambda f, asked: f[0] if f"{f[3]}" in asked else None),
        ("where", lambda f, asked: f"at the {f[4]}" if f[0] in asked else None),
        ("what", lambda f, asked: f"{f[2]} {f[3]}" if f[0] in asked else None),
        ("color", lambda f, asked: f[2] if f[3] in asked else None),
    ):
        for example in drawn(name):
            facts = FACT.findall(example.input)
            assert 2 <= len(facts) <= 3
            asked = re.findall(r"\w+", example.instruction)
            (right,) = [a for f in facts if (a := answer(f, asked))]
            assert right == re.sub(r"^an? ", "", example.output)


def test_true_or_false_is_balanced_and_true():
    some = drawn("true_or_false", 150)
    for example in some:
        name, place = re.search(r"(\w+) was at the (\w+)\.$", example.instruction).groups()
        true = any((f[0], f[4]) == (name, place) for f in FACT.findall(example.input))
        assert example.output == ("true" if true else "false")
    share = Counter(example.output for example in some)
    assert 0.4 < share["true"] / len(some) < 0.6
    share = Counter(example.output for example in drawn("contains", 150))
    assert 0.4 < share["yes"] / share.total() < 0.6


def test_rewriting():
    for example in drawn("rename"):
        new = [w for w in re.findall(r"\w+", example.instruction) if w in example.output.split()]
        before, after = example.input.split(), example.output.split()
        assert [b for b, a in zip(before, after, strict=True) if b != a] == before[:1]
        assert after[0] in new
    for example in drawn("passive"):
        name, _verb, color, thing = re.match(
            r"(\w+) (\w+) an? (\w+) (\w+)\.", example.input
        ).groups()
        assert re.fullmatch(rf"An? {color} {thing} was \w+ by {name}\.", example.output)


def test_questions_about_a_whole_story_are_the_stories_own():
    for example in drawn("story_question", 10):
        asked = dict(stories.parse(example.input).questions)
        assert example.output in [a for q, a in asked.items() if q in example.instruction]


def test_the_verifier_of_sentences_wants_every_word_in_its_place():
    one = family("sentence")
    said = "Mia the shy fox found a red kite at the fair and felt happy."
    ask = Instruction("Write a sentence with this.", "fox, Mia, fair", said)
    assert one.verify(ask, said)
    assert one.verify(ask, "Mia the brave fox lost an orange drum at the fair and felt sad.")
    for wrong in (
        "Mia the shy owl found a red kite at the fair and felt happy.",  # another animal
        "Tom the shy fox found a red kite at the fair and felt happy.",  # another name
        "Mia the shy fox found a red kite at the mill and felt happy.",
        "Mia the shy fox found a red fair at the kite and felt happy.",  # in the wrong places
        "Mia the shy fox found a red kite at the fair.",
        "Mia the shy fox found a red kite at the fair and felt flat.",  # no feeling we know
        said + " " + said,
        "fox, Mia, fair",
    ):
        assert not one.verify(ask, wrong), wrong


def test_the_verifier_of_stories_wants_the_grammar_and_the_request():
    one = family("story")
    told = stories.grammar().sample(random.Random(5))
    name, kind, trait, plot = texts.about(told.keys)
    for words in ([name], [kind, plot], [plot, trait, name, kind]):
        assert one.verify(Instruction("Tell.", ", ".join(words), told.text), told.text)
    other = next(p for p in texts.PLOTS.values() if p != plot)
    for words in (["Zed"], [name, other]):
        assert not one.verify(Instruction("Tell.", ", ".join(words), told.text), told.text)
    ask = Instruction("Tell.", name, told.text)
    for wrong in (told.text[:-1], told.text.replace(name, "Zed"), told.text + " The end."):
        assert not one.verify(ask, wrong)


def test_a_task_fits_a_short_context_where_no_story_is_needed():
    tokenizer = load_course_tokenizer()
    for one, split in EACH:
        for example in families.examples(one, split, 30, seed=1):
            length = len(render(tokenizer, conversation(example)).ids)
            assert length <= (384 if one.name.startswith("story") else 96)
            # what is to be said fits the room that generation gives it
            assert len(tokenizer.encode_ordinary(example.output)) < one.longest


def test_sampler_draws_every_family_equally_often():
    source = families.sampler(0, "train")
    count = Counter(one.name for one, _ in (next(source) for _ in range(2800)))
    assert set(count) == {one.name for one in families.in_split("train")}
    assert min(count.values()) > 55 and max(count.values()) < 150
    again = families.sampler(0, "train")
    assert [next(again) for _ in range(5)] == [
        x for x, _ in zip(families.sampler(0, "train"), range(5), strict=False)
    ]


def test_errors_say_what_there_is():
    with pytest.raises(ValueError, match=r"'sort' has the splits .* not 'materials'"):
        family("sort").sample(random.Random(0), "materials")
    with pytest.raises(ValueError, match="no family 'sorting', there are"):
        family("sorting")
    with pytest.raises(ValueError, match="split='test' must be one of"):
        families.in_split("test")
    with pytest.raises(ValueError, match="has a split 'families'"):
        next(families.sampler(0, "families", [family("copy")]))
