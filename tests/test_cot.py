"""Chains of thought against callables that are known through and through."""

import itertools
import math
import random
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.prompting.bootstrap import auto_cot, by_cluster, star
from minillm.prompting.cot import (
    ASK,
    DIRECT,
    TRIGGER,
    Worked,
    canonical,
    few_shot,
    find_answer,
    most_complex,
    self_consistency,
    steps,
    vote,
    vote_accuracy,
    zero_shot,
)
from minillm.prompting.parts import decompose, least_to_most, listed

SHOWN = [Worked("1 + 2?", "1 + 2 = 3.", "3"), Worked("a {b} c?", "{}", "0")]


class Recorder:
    """A generate function that notes its prompts and answers with `reply(prompt)`."""

    def __init__(self, reply):
        self.reply, self.calls = reply, []

    def __call__(self, prompts):
        self.calls.append(list(prompts))
        return [self.reply(prompt) for prompt in prompts]


def test_demonstrations_stand_before_the_question():
    got = few_shot(SHOWN, "4 + 4?")
    assert got == (
        "Q: 1 + 2?\nA: 1 + 2 = 3. The answer is 3.\n\nQ: a {b} c?\nA: {} The answer is 0.\n\n"
        "Q: 4 + 4?\nA:"
    )
    assert few_shot(SHOWN[:1], "{x}?", DIRECT) == (
        "Q: 1 + 2?\nA: The answer is 3.\n\nQ: {x}?\nA: The answer is"
    )
    tight = few_shot(SHOWN[:1], "9", "Q:{question}\nA:{chain}\nSo:{answer}", separator="|")
    assert tight == "Q:1 + 2?\nA:1 + 2 = 3.\nSo:3|Q:9\nA:"


@pytest.mark.parametrize("template", ["Q: {question}", "{chain} {question} {answer}", "{answer}"])
def test_a_template_needs_its_places(template):
    with pytest.raises(ValueError, match="needs"):
        few_shot((), "?", template)


def test_a_demonstration_needs_an_answer():
    with pytest.raises(ValueError, match="without an answer"):
        few_shot([Worked("open", "hm", None)], "?")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5.", "5"),
        ("the ANSWER is: $1,234.50 in all, not 9", "1234.5"),
        ("The answer is 5. No: the answer is 6, since 7 > 6.", "6"),
        ("3 + 4 = 7 and 7 - 2 = 5", "5"),
        ("so 8-3", "3"),  # a minus between numbers is no sign
        ("it is -3.", "-3"),
        ("list: 10,20,30", "30"),
        ("The answer is\n\nQ: 7?", None),
        (" The answer is 4.\n\nQ: next? A: The answer is 9.", "4"),
        ("The answer is unclear", None),
        ("no digits", None),
        ("", None),
        (
            "The answer is 12345678901234567890123456789012345.",
            "12345678901234567890123456789012345",
        ),
    ],
)
def test_find_answer(text, answer):
    assert find_answer(text) == answer


def test_find_answer_with_other_patterns():
    read = partial(find_answer, pattern=r"\b(even|odd)\b", marker="So:")
    assert read("odd, even, So: ODD even") == "odd"
    assert read("first even, then odd") == "odd"
    assert read("oddly") is None
    assert find_answer("a=3 b=4", pattern=r"a=(\d)") == "3"
    assert find_answer("one\n\ntwo 2", stop=None) == "2"


numbers = st.builds(
    lambda sign, zeros, digits, rest: f"{sign}{zeros}{digits}{rest}",
    st.sampled_from(["", "-"]),
    st.sampled_from(["", "0", "00"]),
    st.from_regex(r"\A[0-9]{1,40}\Z"),
    st.one_of(st.just(""), st.from_regex(r"\A\.[0-9]{1,5}\Z")),
)


@settings(deadline=None)
@given(numbers, numbers)
def test_one_spelling_for_equal_numbers(a, b):
    assert (canonical(a) == canonical(b)) == (Decimal(a) == Decimal(b))
    assert Decimal(canonical(a)) == Decimal(a)
    again = "0" + a.removeprefix("-") + ("0" if "." in a else ".0")
    assert canonical("-" + again if a.startswith("-") else again) == canonical(a)


def test_canonical_leaves_words_their_digits():
    assert (
        canonical(" Nan. ") == "nan" and canonical("1e5") == "1e5" and canonical("v007") == "v007"
    )


def test_zero_shot_asks_twice():
    model = Recorder(lambda p: " 12." if p.endswith(ASK) else " 5 + 7 = 12, I think. \n")
    got = zero_shot(model, ["5 + 7?", "3?"])
    assert model.calls[0] == [f"Q: 5 + 7?\nA: {TRIGGER}", f"Q: 3?\nA: {TRIGGER}"]
    assert model.calls[1][0] == f"Q: 5 + 7?\nA: {TRIGGER} 5 + 7 = 12, I think.\n{ASK}"
    assert len(model.calls) == 2
    assert got[0] == Worked("5 + 7?", "5 + 7 = 12, I think.", "12")


def test_zero_shot_takes_the_first_number_behind_the_question_for_it():
    model = Recorder(lambda p: " 12, and 9 is not" if p.endswith(ASK) else " 1 2 3")
    assert zero_shot(model, ["?"])[0].answer == "12"
    silent = Recorder(lambda p: " nothing" if p.endswith(ASK) else " 1 2 3")
    assert zero_shot(silent, ["?"])[0].answer is None  # a number in the chain is no answer
    tight = Recorder(lambda p: "1" if p.endswith("So:") else "11,01")
    read = partial(find_answer, marker="So:")
    form = "Q:{question}\nA:{chain}\nSo:{answer}"
    assert zero_shot(tight, ["p(10)"], "Steps:", "So:", read, form)[0].answer == "1"
    assert tight.calls == [["Q:p(10)\nA:Steps:"], ["Q:p(10)\nA:Steps:11,01\nSo:"]]


def test_votes_and_ties():
    assert vote(["a", "b", "b", None, None, None]) == ("b", {"a": 1.0, "b": 2.0})
    assert vote(["b", "a", "a", "b"])[0] == "b"  # a tie goes to the answer seen first
    assert vote(["a", "b", "b"], [0.5, 0.1, 0.2])[0] == "a"
    assert vote([None, None]) == (None, {}) == vote([])
    with pytest.raises(ValueError):
        vote(["a"], [1.0, 2.0])


def by_enumeration(probabilities, samples):
    """The chance of winning, over every sequence of answers one by one."""
    answers = [*range(len(probabilities)), None]
    chances = [*probabilities, 1 - sum(probabilities)]
    total = 0.0
    for drawn in itertools.product(range(len(answers)), repeat=samples):
        spoken = [str(answers[i]) if answers[i] is not None else None for i in drawn]
        if vote(spoken)[0] == "0":
            total += math.prod(chances[i] for i in drawn)
    return total


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "probabilities", [[0.6, 0.4], [0.3, 0.5], [0.4, 0.3, 0.3], [0.25, 0.35, 0.1, 0.1], [1.0], [0.0]]
)
def test_vote_accuracy_against_enumeration(probabilities, samples):
    want = by_enumeration(probabilities, samples)
    assert vote_accuracy(probabilities, samples) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.55, 0.9])
def test_vote_accuracy_is_the_binomial_sum(p):
    for n in (1, 3, 11, 41):
        binomial = sum(
            math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1)
        )
        assert vote_accuracy([p, 1 - p], n) == pytest.approx(binomial, abs=1e-9)
        assert vote_accuracy([p, 1 - p], n + 1) == pytest.approx(binomial, abs=1e-9)


@pytest.mark.parametrize(
    ("probabilities", "n"), [([0.6, 0.5], 3), ([-0.1, 1.0], 3), ([], 3), ([1.0], 0)]
)
def test_vote_accuracy_refuses(probabilities, n):
    with pytest.raises(ValueError, match="no distribution"):
        vote_accuracy(probabilities, n)


def sampler(probabilities, seed):
    """A generator that says answer i with probability p_i, at random."""
    rng = random.Random(seed)
    return lambda prompts: [
        f"hm. The answer is {i}."
        for i in rng.choices(range(len(probabilities)), probabilities, k=len(prompts))
    ]


@pytest.mark.parametrize(
    "probabilities", [[0.6, 0.4], [0.4, 0.2, 0.2, 0.2], [0.3, 0.4, 0.3]], ids=str
)
def test_self_consistency_is_as_good_as_the_formula_says(probabilities):
    trials = 1500
    for samples in (1, 5, 15):
        generate = sampler(probabilities, seed=samples)
        got = self_consistency(generate, ["?"] * trials, samples)
        share = np.mean([v.answer == "0" for v in got])
        want = vote_accuracy(probabilities, samples)
        assert abs(share - want) < 4.5 * math.sqrt(want * (1 - want) / trials), samples
    # more samples help where the right answer is the likeliest one, and hurt where it is not
    assert (vote_accuracy(probabilities, 15) > probabilities[0]) == (
        probabilities[0] == max(probabilities)
    )


def test_a_greedy_generator_votes_with_itself():
    greedy = Recorder(lambda prompt: f"The answer is {len(prompt)}.")
    got = self_consistency(greedy, ["a", "bcd"], 7)
    assert [v.answer for v in got] == ["1", "3"] and got[1].votes == {"3": 7.0}
    assert greedy.calls == [["a"] * 7 + ["bcd"] * 7]
    assert got[0].texts == ("The answer is 1.",) * 7 and got[0].answers == ("1",) * 7


@pytest.mark.parametrize(("samples", "keep"), [(0, None), (3, 4), (3, 0)])
def test_self_consistency_refuses(samples, keep):
    with pytest.raises(ValueError, match=f"samples={samples}"):
        self_consistency(sampler([1.0], 0), ["?"], samples, keep=keep)


def test_only_complex_chains_vote():
    texts = iter(["9", "9", "a\nb\n5", "9", "a\n5", "a\nb\nc, no number", "a\nb\n7"])
    got = self_consistency(lambda prompts: [next(texts) for _ in prompts], ["?"], 7, keep=3)[0]
    assert got.votes == {"5": 2.0, "7": 1.0} and got.answer == "5"
    assert got.answers == ("9", "9", "5", "9", "5", None, "7")


def test_of_complex_chains_that_tie_the_first_to_come_wins():
    got = self_consistency(lambda prompts: ["a\n5", "a\nb\n7", "9"], ["?"], 3, keep=2)[0]
    assert got.answer == "5" and got.votes == {"5": 1.0, "7": 1.0}


def test_complexity_counts_lines_that_say_something():
    assert [steps(text) for text in ("", "one", "one\n\n two\n  \n", "a\nb\nc")] == [0, 1, 2, 3]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12), st.data())
def test_most_complex_against_brute_force(lengths, data):
    shown = [Worked(str(i), "\n".join("x" * n), str(n)) for i, n in enumerate(lengths)]
    k = data.draw(st.integers(0, len(shown)))
    got = most_complex(shown, k)
    largest = (
        max(itertools.combinations(shown, k), key=lambda some: sum(steps(w.chain) for w in some))
        if len(shown) < 8
        else None
    )
    assert [steps(w.chain) for w in got] == sorted(lengths, reverse=True)[:k]
    if largest is not None:
        assert sum(steps(w.chain) for w in got) == sum(steps(w.chain) for w in largest)
    for a, b in itertools.pairwise(got):
        assert steps(a.chain) > steps(b.chain) or int(a.question) < int(b.question)


def test_most_complex_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="k=3 of 2"):
        most_complex(SHOWN, 3)


# --- parts


def adds_two(prompt):
    """Adds two numbers, never more: what stands behind the last Q, "so far" read from above."""
    above, _, asked = prompt.rpartition("Q: ")
    terms = asked.removesuffix("\nA:").split(" + ")
    if "so far" in terms:
        terms[terms.index("so far")] = find_answer(above, stop=None)
    return f"The answer is {sum(map(int, terms))}." if len(terms) == 2 else "Too hard."


def one_by_one(questions):
    """Parts for a sum: the first two terms, then one more each time."""
    terms = [question.split(" + ") for question in questions]
    return [[" + ".join(t[:2]), *(f"so far + {x}" for x in t[2:])] for t in terms]


def test_least_to_most_reaches_beyond_what_the_model_can_do_at_once():
    rng = random.Random(0)
    questions = [" + ".join(str(rng.randrange(100)) for _ in range(n)) for n in (2, 3, 7, 12)]
    model = Recorder(adds_two)
    got = least_to_most(model, questions, one_by_one)
    assert [s.answer for s in got] == [str(sum(map(int, q.split(" + ")))) for q in questions]
    assert [len(call) for call in model.calls] == [4, 3, 2, 2, 2, 2, *[1] * 5]
    at_once = [find_answer(text) for text in model([few_shot((), q) for q in questions])]
    assert [a is not None for a in at_once] == [True, False, False, False]  # the control
    assert got[1].question == questions[1] and len(got[3].parts) == 11


def test_each_part_sees_the_earlier_answers_and_no_later_ones():
    model = Recorder(adds_two)
    least_to_most(model, ["1 + 2 + 3"], one_by_one)
    assert model.calls == [
        ["1 + 2 + 3\n\nQ: 1 + 2\nA:"],
        ["1 + 2 + 3\n\nQ: 1 + 2\nA: The answer is 3.\n\nQ: so far + 3\nA:"],
    ]


def test_a_question_without_an_answer_on_the_way_is_given_up():
    model = Recorder(adds_two)
    got = least_to_most(
        model, ["a", "b"], lambda qs: [["1 + 2 + 3", "so far + 1"], ["4 + 4", "so far + 1"]]
    )
    assert [s.answer for s in got] == [None, "9"]
    assert [len(call) for call in model.calls] == [2, 1] and len(got[0].parts) == 1


@pytest.mark.parametrize("parts", [[["x"], []], [["x"]]])
def test_every_question_needs_parts(parts):
    with pytest.raises(ValueError, match="2 questions need"):
        least_to_most(Recorder(adds_two), ["a", "b"], lambda qs: parts)


def test_a_model_can_take_problems_apart():
    shown = [Worked("1 + 2 + 3", "1. 1 + 2\n2. so far + 3", "")]

    def reply(prompt):
        asked = prompt.rpartition("Q: ")[2].partition("\n")[0]
        return "\n" + "\n".join(f"{i}) {x}" for i, x in enumerate(one_by_one([asked])[0], 1))

    model = Recorder(reply)
    split = partial(decompose, model, demonstrations=shown)
    assert least_to_most(adds_all, ["5 + 6 + 7"], split)[0].answer == "18"
    assert model.calls[0][0].startswith(
        "Q: 1 + 2 + 3\nTo solve this, answer in turn:\n1. 1 + 2\n2."
    )
    assert decompose(Recorder(lambda p: " \n"), ["whole?"]) == [["whole?"]]


def adds_all(prompts):
    return [adds_two(prompt) for prompt in prompts]


def test_bullets_are_cut_and_numbers_stay():
    assert listed("- a\n* 3.5 + 2\n4 + 4\n12. b c\n\n- later") == ["a", "3.5 + 2", "4 + 4", "b c"]


# --- chains that nobody wrote


def spread(points, clusters):
    """Sum of squared distances to the centres."""
    return sum(((points[c] - points[c].mean(0)) ** 2).sum() for c in map(list, clusters))


def partitions(items, k):
    """All ways to put items into k groups, none empty."""
    for labels in itertools.product(range(k), repeat=len(items)):
        if len(set(labels)) == k:
            yield [[i for i in items if labels[i] == c] for c in range(k)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_clusters_against_all_partitions(seed, k):
    points = torch.randn(7, 2, generator=torch.Generator().manual_seed(seed)).double()
    got = by_cluster(points, k, seed=seed)
    best = min(spread(points.numpy(), each) for each in partitions(range(7), k))
    assert spread(points.numpy(), got) == pytest.approx(best)
    assert sorted(itertools.chain(*got)) == list(range(7))
    assert [min(c) for c in got] == sorted(min(c) for c in got)
    for members in got:
        away = (points[members] - points[members].mean(0)).norm(dim=1)
        assert (away.diff() >= -1e-9).all()


def test_clusters_do_not_depend_on_the_seed_where_they_are_plain():
    points = torch.tensor([[0.0], [9.0], [0.1], [9.2], [50.0], [9.3]])
    assert {str(by_cluster(points, 3, seed=seed)) for seed in range(5)} == {
        str([[0, 2], [3, 5, 1], [4]])
    }


def test_more_clusters_than_distinct_vectors():
    with pytest.raises(ValueError, match="there are 2"):
        by_cluster(torch.tensor([[1.0], [1.0], [2.0]]), 3, seed=0)


TOPICS = ("sum", "max", "sort", "count")


def by_topic(questions):
    """A vector that shows the topic plainly, and the length of the question a little."""
    rows = [[5.0 * q.startswith(t) for t in TOPICS] + [len(q) / 100] for q in questions]
    return torch.tensor(rows)


def work_out(questions):
    return [Worked(q, f"{q}\nso", "1") for q in questions]


def test_auto_cot_covers_every_topic_where_chance_does_not():
    counts = dict(zip(TOPICS, (30, 4, 3, 3), strict=True))
    questions = [f"{topic} {'x' * (i % 7)}" for topic, n in counts.items() for i in range(n)]
    missed = 0
    for seed in range(20):
        shown = auto_cot(work_out, by_topic, questions, 4, seed=seed)
        assert [w.question.split()[0] for w in shown] == list(TOPICS)
        drawn = random.Random(seed).sample(questions, 4)
        missed += len({q.split()[0] for q in drawn}) < 4
    assert missed >= 15  # the control: four random questions


def test_auto_cot_takes_the_simple_one_nearest_to_the_centre():
    long = ["max " + "word " * n for n in (60, 120)]  # the first is nearest to the centre
    questions = ["sum a", "sum bb", "sum ccc", "max long", "max none", *long]

    def solve(asked):
        chains = {"sum bb": "1\n2\n3\n4\n5\n6"}
        return [Worked(q, chains.get(q, "1\n2"), None if "none" in q else "1") for q in asked]

    calls = []
    got = auto_cot(lambda qs: calls.append(list(qs)) or solve(qs), by_topic, questions, 2, seed=0)
    # "sum bb" is nearest but takes six steps; the question of 61 words is never asked
    assert [w.question for w in got] == ["sum a", "max long"]
    assert calls[0][0] == "sum bb" and not any(len(q.split()) > 60 for c in calls for q in c)
    none = auto_cot(solve, by_topic, [*questions[:3], questions[4], *long], 2, seed=0)
    assert [w.question for w in none] == ["sum a"]  # a cluster without a simple question


class Learner:
    """Solves problems up to its level, says so in a chain; copies a hint if it sees one."""

    def __init__(self, level):
        self.level = level

    def __call__(self, prompts):
        return [self.solve(prompt) for prompt in prompts]

    def solve(self, prompt):
        if "hint" in prompt:
            return f"since {find_answer(prompt)}. The answer is {find_answer(prompt)}."
        hardness = int(find_answer(prompt.rpartition("Q: ")[2]))
        return f"easy. The answer is {hardness if hardness <= self.level else 99}."


def trained(kept):
    """Learns what it is shown and, from that, what is one step harder."""
    return Learner(1 + max(int(w.answer) for w in kept))


PROBLEMS = [(f"how hard is {i}?", str(i)) for i in range(8)]


def test_star_climbs_one_step_a_round_and_keeps_right_answers_only():
    rounds = list(star(Learner(2), PROBLEMS, trained, rounds=4))
    assert [r.solved for r in rounds] == [3 / 8, 4 / 8, 5 / 8, 6 / 8]
    assert [r.generate.level for r in rounds] == [3, 4, 5, 6]
    for r in rounds:
        assert [w.question for w in r.kept] == [q for q, _ in PROBLEMS[: round(8 * r.solved)]]
        assert all(find_answer(w.chain) == w.answer for w in r.kept) and r.rationalized == ()


def test_star_rationalizes_what_it_could_not_solve():
    def hint(question, answer):
        return f"hint: {answer}"

    rounds = list(star(Learner(2), PROBLEMS, trained, rounds=2, hint=hint))
    assert len(rounds[0].kept) == 3 and len(rounds[0].rationalized) == 5
    assert rounds[0].rationalized[0] == Worked(*PROBLEMS[3][:1], "since 3. The answer is 3.", "3")
    assert [r.solved for r in rounds] == [3 / 8, 1.0]  # all of it, after one round
    assert rounds[1].rationalized == ()


def test_star_cannot_begin_from_nothing():
    rounds = list(star(Learner(-1), PROBLEMS, trained, rounds=5))
    assert len(rounds) == 1 and rounds[0].solved == 0 and rounds[0].generate.level == -1


def test_star_with_several_samples_keeps_each_right_chain_once():
    said = itertools.cycle(["a: 0", "b: 0", "a: 0", "c: 1"])
    first = next(
        iter(
            star(
                lambda ps: [next(said) for _ in ps], [("?", "0"), ("!", "1,0")], list, 1, samples=4
            )
        )
    )
    assert [w.chain for w in first.kept] == ["a: 0", "b: 0"] and first.solved == 3 / 8
    assert first.generate == list(first.kept)


def test_star_refuses():
    with pytest.raises(ValueError, match="samples=0"):
        next(star(Learner(0), PROBLEMS, trained, 1, samples=0))
    with pytest.raises(ValueError, match="0 problems"):
        next(star(Learner(0), [], trained, 1))
