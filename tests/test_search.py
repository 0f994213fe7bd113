"""APE against hand-made callables: what the best instruction is, is known beforehand."""

import math
import random

import numpy as np
import pytest
import torch

from minillm.prompting.search import ape, by_accuracy, by_log_prob, first_lines, propose, vary

PAIRS = [(str(i), str(i % 3)) for i in range(24)]
SHOWN = [(f"in{i}", f"out{i}") for i in range(8)]


class Teller:
    """Proposes "rule q", of quality q percent, from a fixed stream; varies it up or down."""

    def __init__(self, qualities, seed=0, step=8):
        self.qualities, self.rng, self.step = list(qualities), random.Random(seed), step
        self.prompts = []

    def __call__(self, prompts):
        self.prompts += prompts
        return [self.reply(prompt) for prompt in prompts]

    def reply(self, prompt):
        if "Input: rule" in prompt:
            quality = int(prompt.partition("Input: rule ")[2].partition("\n")[0])
            changed = quality + self.rng.randrange(-self.step, self.step + 1)
            return f" rule {min(99, max(0, changed))}\nInput: more"
        return f"\n rule {self.qualities.pop(0)} "


class Judge:
    """Values of (instruction, pair) with mean quality and noise that belongs to the two; counts."""

    def __init__(self, noise=0.0, seed=0):
        self.noise, self.seed, self.calls, self.asked = noise, seed, 0, []

    def value(self, instruction, pair):
        noise = random.Random(f"{self.seed} {instruction} {pair[0]}").gauss(0, self.noise)
        return int(instruction.split()[1]) + noise

    def __call__(self, instructions, pairs):
        self.calls += len(instructions) * len(pairs)
        self.asked += [(each, pair) for each in instructions for pair in pairs]
        return torch.tensor([[self.value(each, pair) for pair in pairs] for each in instructions])


QUALITIES = [12, 55, 3, 40, 71, 70, 8, 33, 90, 21, 60, 5, 47, 2, 66, 15]


def test_lines_are_cleaned():
    assert first_lines(["\n a b \nc", "a b", "  ", "d"]) == ["a b", "d"]


def test_proposals_show_random_demonstrations():
    teller = Teller(range(30))
    got = propose(teller, SHOWN, 30, seed=1, shown=3)
    assert got == [f"rule {i}" for i in range(30)]
    for prompt in teller.prompts:
        inside = [i for i in range(8) if f"Input: in{i}\nOutput: out{i}" in prompt]
        assert len(inside) == 3 and prompt.count("Input:") == 3 and prompt.endswith("It said:")
    assert len(set(teller.prompts)) > 20  # drawn anew for each prompt
    again, other = Teller(range(30)), Teller(range(30))
    propose(again, SHOWN, 30, seed=1, shown=3)
    propose(other, SHOWN, 30, seed=2, shown=3)
    assert again.prompts == teller.prompts != other.prompts


@pytest.mark.parametrize("shown", [0, 9])
def test_proposals_need_demonstrations(shown):
    with pytest.raises(ValueError, match=f"shown={shown} of 8"):
        propose(Teller([1]), SHOWN, 1, seed=0, shown=shown)


def test_variations_go_through_the_instructions_in_turn_and_are_new():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return ["a", "b b", "c", "b b", ""]

    assert vary(generate, ["a", "b"], 5) == ["b b", "c"]
    assert [p.partition("Input: ")[2].partition("\n")[0] for p in asked] == list("ababa")


def test_log_probability_of_each_pair_is_that_of_its_own_output():
    seen = []

    def score(prompts, options):
        seen.extend((prompt, option) for prompt in prompts for option in options)
        return torch.tensor([[-float(len(p) + 100 * len(o)) for o in options] for p in prompts])

    pairs = [("a", "x"), ("bb", "yy"), ("ccc", "x")]
    got = by_log_prob(score, ["do", "do it"], pairs)
    want = [
        [-float(len(f"{i}\n\nInput: {x}\nOutput:") + 100 * (1 + len(y))) for x, y in pairs]
        for i in ("do", "do it")
    ]
    assert got.tolist() == want  # the blank before the output belongs to the output
    assert len(seen) == 6 and all(option in (" x", " yy") for _, option in seen)
    tight = by_log_prob(score, ["do"], [("1", "2")], "{instruction}({input})\nA:{output}")
    assert tight.tolist() == [[-float(len("do(1)\nA:") + 100)]]
    assert by_log_prob(score, ["do"], []).shape == (1, 0)
    with pytest.raises(ValueError, match="no place"):
        by_log_prob(score, ["do"], pairs, "{instruction} {input}")


def test_accuracy_compares_what_was_extracted():
    def generate(prompts):
        return [
            " 6 \nInput: 7" if p.startswith("double") else "six" for p in prompts
        ]  # right for 3 only

    got = by_accuracy(generate, ["double", "spell"], [("3", "6"), ("4", "8")])
    assert got.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    lengths = by_accuracy(
        generate, ["double", "spell"], [("3", "6")], extract=lambda t: "6" if t == "six" else None
    )
    assert lengths.tolist() == [[0.0], [1.0]]


def test_without_budget_the_ranking_is_that_of_the_whole_table():
    teller, judge = Teller(QUALITIES), Judge(noise=60.0)
    (got,) = ape(teller, judge, SHOWN, PAIRS, seed=0)
    table = {
        f"rule {q}": np.mean([judge.value(f"rule {q}", pair) for pair in PAIRS]) for q in QUALITIES
    }
    assert [c.instruction for c in got.ranking] == sorted(table, key=table.get, reverse=True)
    for c in got.ranking:
        assert c.score == pytest.approx(table[c.instruction], abs=1e-4) and c.seen == 24
    assert got.calls == len(teller.prompts) + judge.calls == 16 + 16 * 24 and got.round == 0


def test_equal_instructions_are_measured_once():
    judge = Judge()
    (got,) = ape(Teller([7, 7, 3, 7]), judge, SHOWN, PAIRS, candidates=4, seed=0)
    assert [c.instruction for c in got.ranking] == ["rule 7", "rule 3"] and judge.calls == 48


@pytest.mark.parametrize("budget", [80, 100, 137, 200, 399, 400, 5000])
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_budget_is_kept_and_used(budget, rounds):
    total, (teller, judge) = budget * (rounds + 1), (Teller(QUALITIES), Judge(noise=5.0))
    searches = list(ape(teller, judge, SHOWN, PAIRS, rounds=rounds, budget=total, seed=3))
    assert len(searches) == rounds + 1
    for number, each in enumerate(searches):
        assert each.calls <= budget * (number + 1)
    assert searches[-1].calls == len(teller.prompts) + judge.calls
    assert len(set(judge.asked)) == len(judge.asked), "a pair was measured twice"
    if rounds == 0:
        assert searches[0].calls > 0.75 * min(budget, 400)
        assert len(searches[0].ranking) == 16
    for each in searches:
        seen = [c.seen for c in each.ranking]
        assert seen == sorted(seen, reverse=True)
        for a, b in zip(each.ranking, each.ranking[1:], strict=False):
            assert a.seen > b.seen or a.score >= b.score


def test_halving_finds_what_equal_shares_miss():
    """80 calls to tell 16 apart: five pairs for each, or fewer for most and more for the best."""
    hits = {"halving": 0, "equal": 0}
    for seed in range(120):
        qualities = [50, 57, *random.Random(seed).sample(range(20, 48), 14)]
        teller, judge = Teller(qualities), Judge(noise=14.0, seed=seed)
        (got,) = ape(teller, judge, SHOWN, PAIRS, budget=96, seed=seed)
        hits["halving"] += got.ranking[0].instruction == "rule 57"
        pairs = random.Random(seed).sample(PAIRS, len(PAIRS))[:5]
        mean = [np.mean([judge.value(f"rule {q}", p) for p in pairs]) for q in qualities]
        hits["equal"] += qualities[int(np.argmax(mean))] == 57
    assert hits["halving"] > hits["equal"] + 5 and hits["halving"] > 80, hits


@pytest.mark.parametrize("seed", range(3))
def test_variations_climb(seed):
    searches = list(
        ape(Teller(QUALITIES, seed), Judge(noise=3.0), SHOWN, PAIRS, rounds=3, seed=seed)
    )
    best = [int(each.ranking[0].instruction.split()[1]) for each in searches]
    assert best[0] == 90 and best[-1] >= 96
    scores = [each.ranking[0].score for each in searches]
    assert scores == sorted(scores)  # the best are kept, so nothing is lost
    still = list(
        ape(Teller(QUALITIES, seed, step=0), Judge(3.0), SHOWN, PAIRS, rounds=3, seed=seed)
    )
    assert {each.ranking[0].instruction for each in still} == {"rule 90"}  # the control


def test_the_same_seed_gives_the_same_search():
    def run(seed):
        judge = Judge(noise=20.0)
        found = list(ape(Teller(QUALITIES), judge, SHOWN, PAIRS, rounds=1, budget=200, seed=seed))
        return found, judge.asked

    assert run(5) == run(5)
    assert run(5)[1] != run(6)[1]  # another seed measures other pairs first


def test_bad_settings_are_refused():
    def search(**changed):
        settings = {"candidates": 16, "seed": 0} | changed
        return next(ape(Teller(QUALITIES), Judge(), SHOWN, PAIRS, **settings))

    with pytest.raises(ValueError, match="budget=79 is too small for 16 candidates: 80"):
        search(budget=79)
    with pytest.raises(ValueError, match="keep=17"):
        search(keep=17)
    with pytest.raises(ValueError, match="0 pairs"):
        next(ape(Teller(QUALITIES), Judge(), SHOWN, [], seed=0))
    with pytest.raises(ValueError, match="none of 16"):
        next(ape(lambda ps: [" \n"] * len(ps), Judge(), SHOWN, PAIRS, seed=0))


def test_the_mean_log_probability_tells_a_rule_from_its_opposite():
    """A "model" of which all probabilities are known: obeys the rule it is given, 9 times in 10."""

    def score(prompts, options):
        def chance(prompt, option):
            wanted = int(prompt.rpartition("Input: ")[2].partition("\n")[0]) % 2
            if prompt.startswith("The opposite"):
                wanted = 1 - wanted
            sure = 0.9 if "parity" in prompt else 0.5
            return sure if option == [" even", " odd"][wanted] else 1 - sure

        return torch.tensor([[math.log(chance(p, o)) for o in options] for p in prompts])

    rules = ["Say something.", "The opposite of parity.", "Say the parity."]
    pairs = [(str(i), ["even", "odd"][i % 2]) for i in range(10)]
    said = iter(rules)
    (got,) = ape(
        lambda ps: [next(said) for _ in ps],
        lambda i, p: by_log_prob(score, i, p),
        SHOWN, pairs, candidates=3, keep=1, seed=0,
    )  # fmt: skip
    assert [c.instruction for c in got.ranking] == [rules[2], rules[0], rules[1]]
    assert [c.score for c in got.ranking] == pytest.approx([math.log(x) for x in (0.9, 0.5, 0.1)])
