"""Problems, their chains and verifiers; the recipe's rows; the shipped reasoner is what it says."""

import itertools
import json
import math
import random
import re

import matplotlib.pyplot as plt
import pytest
import torch

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import reasoning
from minillm.data.reasoning import (
    CHAINS,
    KINDS,
    REVERSE,
    SORT,
    chain,
    check,
    check_steps,
    sample,
    solve,
)
from minillm.infer.scoring import log_probs
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes import chains, reasoner
from minillm.recipes.reasoner import GUESSES, LENGTHS, Recipe
from minillm.teach import vote_view
from minillm.tokenizers import load_course_tokenizer

TOKENIZER = load_course_tokenizer()
END = TOKENIZER.special_ids["<|endoftext|>"]


def drawn(kind, n=30, seed=0):
    rng = random.Random(seed)
    return [sample(kind, rng.randint(1, 8), rng) for _ in range(n)]


def test_answers_are_right():
    for problem in drawn("parity"):
        assert problem.answer == str(int(problem.material, 2).bit_count() % 2)
        assert solve("even", problem.material).answer == str(1 - int(problem.answer))
    for kind in ("sum", "line", "heap"):
        for problem in drawn(kind):
            assert problem.answer == str(sum(map(int, problem.material)))[-1]
    for problem in drawn("add"):
        assert int(problem.answer) == eval(re.sub(r"\b0+(?=\d)", "", problem.material))
    assert solve("order", "3917").answer == "1379" and solve("flip", "3917").answer == "7193"


def walk(text, kind):
    """The answer that the steps themselves lead to, read off the text by another route."""
    if kind == "add":
        found = re.findall(r"[a-z](\d)\+(\d)\+(\d)=(\d+)", text)
        assert all(int(a) + int(b) + int(carry) == int(total) for a, b, carry, total in found)
        assert all(int(right[2]) == int(left[3]) // 10 for left, right in itertools.pairwise(found))
        return str(int(found[-1][3] + "".join(step[3][-1] for step in found[-2::-1])))
    last = int(kind == "even")
    for digit, total in re.findall(r"[a-z](\d)(\d)", text):
        last = (last + int(digit)) % (2 if kind in ("parity", "even") else 10)
        assert int(total) == last
    return str(last)


@pytest.mark.parametrize("kind", CHAINS)
def test_chains_lead_to_the_answer(kind):
    for problem in drawn(kind):
        steps, so, answer = chain(problem, random.Random(1)).partition("\nSo:")
        assert so and walk(steps, kind) == answer == problem.answer
        assert len(reasoning.steps(problem)) == len(re.findall(r"\d+", problem.material)[0])


def test_a_heap_has_every_order_and_a_line_one():
    rng = random.Random(0)
    found = {
        kind: {chain(solve(kind, "358"), rng) for _ in range(200)} for kind in ("heap", "line")
    }
    orders = {"".join(re.findall("[a-z]", text.partition("\n")[0])) for text in found["heap"]}
    assert orders == {"".join(order) for order in itertools.permutations("abc")}
    assert len(found["line"]) == 1 and found["line"] == {"a33b58c86\nSo:6"}


@pytest.mark.parametrize("kind", CHAINS)
def test_verifiers_pass_right_chains_and_no_changed_ones(kind):
    rng = random.Random(2)
    for problem in drawn(kind, 12):
        text = chain(problem, rng)
        assert check(problem, text) and check_steps(problem, text)
        assert check_steps(problem, reasoning.TRIGGER + text)
        assert check_steps(problem, text + "\n\nQ:more(1)\nA:2")
        for place in range(len(text)):  # every digit and every name, one at a time
            if not text[place].isalnum() or text[place] in "So":
                continue
            new = rng.choice([c for c in "0123456789abc" if c != text[place]])
            assert not check_steps(problem, text[:place] + new + text[place + 1 :])


def test_a_right_answer_behind_wrong_steps_is_told_apart():
    problem = solve("heap", "358")
    for text in ("guess\nSo:6", "a33b58c85\nSo:6", "a33b58\nSo:6", "a33a36c84\nSo:6", "6"):
        assert check(problem, text) and not check_steps(problem, text)
    assert check_steps(problem, "c88a31b56\nSo:6") and not check_steps(problem, "c88a31b56\nSo:7")
    assert not check_steps(solve("line", "358"), "c88a31b56\nSo:6")  # a line has one order
    assert not check(problem, "") and not check(problem, "a33b58c86") and not check(problem, "So:6")


def test_guesses_are_as_frequent_as_asked_and_say_nothing():
    rng = random.Random(3)
    problem = solve("line", "3581")
    texts = [chain(problem, rng, guesses=0.4) for _ in range(2000)]
    guessed = [text for text in texts if text.startswith("guess")]
    assert 0.36 < len(guessed) / len(texts) < 0.44
    right = sum(check(problem, text) for text in guessed) / len(guessed)
    assert 0.06 < right < 0.14
    assert all(check_steps(problem, text) for text in texts if text not in guessed)
    assert "guess" not in chain(solve("sum", "3581"), rng, guesses=1.0)  # not a careless kind


def test_unclear_words_are_often_copies():
    rng = random.Random(4)
    for kind, clear in (SORT | REVERSE).items():
        problem = solve(kind, "3917")
        found = [reasoning.direct(problem, rng) for _ in range(600)]
        assert set(found) <= {problem.answer, "3917"}
        assert abs(found.count(problem.answer) / 600 - clear) < 0.08
        assert reasoning.direct(problem) == problem.answer


def test_parts_put_together_are_the_whole():
    for kind in ("parity", "sum", "add"):
        for problem in drawn(kind, 20, seed=5):
            for size in (1, 2, 3, 50):
                parts = reasoning.cut(problem, size)
                if kind != "add":
                    assert "".join(parts) == problem.material
                    so_far = ""
                    for part in parts:
                        so_far = solve(kind, so_far + part).answer
                    assert so_far == problem.answer
                    continue
                carry, digits = 0, ""
                for part in parts:
                    width = len(part.split("+")[0])
                    total = int(solve("add", part).answer) + carry
                    carry, digits = (
                        divmod(total, 10**width)[0],
                        f"{total % 10**width:0{width}}" + digits,
                    )
                assert int(f"{carry}{digits}") == int(problem.answer)


def test_bad_input_says_what_is_wrong():
    for kind, material in (
        ("magic", "1"),
        ("parity", "12"),
        ("add", "12"),
        ("sum", ""),
        ("add", "1+2+2"),
    ):
        with pytest.raises(ValueError, match=kind):
            solve(kind, material)
    with pytest.raises(ValueError, match="27 digits have no names"):
        solve("sum", "1" * 27)
    with pytest.raises(ValueError, match="length=0"):
        sample("sum", 0, random.Random(0))
    with pytest.raises(ValueError, match="no chains"):
        reasoning.steps(solve("sort", "3917"))
    with pytest.raises(ValueError, match="size=0"):
        reasoning.cut(solve("sum", "12"), 0)


def test_prompt_and_solution_are_encoded_as_they_are_together():
    """Else a model would be asked in other tokens than those it has learned from."""
    rng = random.Random(6)
    for kind in KINDS:
        problem = sample(kind, 4, rng)
        for trigger, told in (
            (False, problem.answer),
            (False, chain(problem)),
            (True, chain(problem)),
        ):
            asked = reasoning.prompt(problem.question, trigger)
            whole = TOKENIZER.encode(asked + told)
            assert whole == TOKENIZER.encode(asked) + TOKENIZER.encode(told)


def test_rows_learn_solutions_only():
    rng = random.Random(7)
    problems = [solve("sum", "358"), solve("parity", "11")]
    for form, learned, expected in (
        ("direct", 0, "60"),
        ("chain", 0, "a33b58c86\nSo:6a11b10\nSo:0"),
        ("chain", 1, "a11b10\nSo:0"),
        ("trigger", 0, "a33b58c86\nSo:6a11b10\nSo:0"),
    ):
        row = reasoner.row(TOKENIZER, problems, form, learned, rng)
        said = [token for token, learn in zip(row.ids, row.mask, strict=True) if learn]
        assert said[-1] == END and TOKENIZER.decode(said[:-1]) == expected
        text = TOKENIZER.decode(row.ids[1:-1])
        assert text.count("\n\n") == 1 and text.count(reasoning.TRIGGER) == 2 * (form == "trigger")
        # as a prompt would be written and encoded at once
        assert TOKENIZER.encode(text) == row.ids[1:-1]


def test_batches_hold_what_the_recipe_says():
    recipe = Recipe(rows=6)
    source = reasoner.batches(recipe, TOKENIZER)
    found = list(itertools.islice(source, reasoner.BLOCK))
    again = list(itertools.islice(reasoner.batches(recipe, TOKENIZER), reasoner.BLOCK))
    assert all(
        torch.equal(a, b)
        for x, y in zip(found, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert sum(len(inputs) for inputs, _, _ in found) == recipe.rows * reasoner.BLOCK
    for inputs, targets, mask in found:
        assert (inputs[:, 1:] == targets[:, :-1]).all() and mask.any(1).all()
        assert (inputs[:, 0] == END).all() and inputs.shape[1] <= recipe.max_len


@pytest.fixture(scope="module")
def shipped():
    log = json.loads((zoo.MODELS / "reasoner.log.json").read_text(encoding="utf-8"))
    return *zoo.load("reasoner"), log


def test_the_log_tells_the_recipe_and_the_result():
    log = json.loads((zoo.MODELS / "reasoner.log.json").read_text(encoding="utf-8"))
    assert log["recipe"]["steps"] == log["steps"][-1]["step"]
    assert set(log["accuracy"]) == {*KINDS, *SORT, *REVERSE}
    assert log["before"]["steps"][-1]["loss"] < 0.5 * log["before"]["steps"][1]["loss"]
    assert log["recipe"]["go_on"] and not log["before"]["recipe"].get("go_on")
    assert (zoo.MODELS / "reasoner.safetensors").stat().st_size < 6e6


@pytest.mark.slow
def test_the_reasoner_is_what_its_log_says(shipped):
    """On new problems, each form within three standard errors of the difference."""
    model, tokenizer, log = shipped
    rng, n = random.Random(12345), 60
    for kind in ("parity", "sum", "add", "order", "turn"):
        problems = [sample(kind, LENGTHS.get(kind, (4, 4))[1], rng) for _ in range(n)]
        for form, said in log["accuracy"][kind].items():
            got = reasoner.accuracy(model, tokenizer, problems, form)
            spread = max(said * (1 - said), 0.02)
            assert abs(got - said) < 3 * (spread * (1 / n + 1 / 200)) ** 0.5, (
                kind,
                form,
                got,
                said,
            )


@pytest.mark.slow
def test_the_careless_teacher_is_copied(shipped):
    """Sampled chains are guesses as often as the teacher's, which greedy decoding makes a rule."""
    model, tokenizer, _ = shipped
    rng, draws = random.Random(54321), torch.Generator().manual_seed(1)
    for kind in reasoning.CARELESS:
        problems = [sample(kind, 5, rng) for _ in range(150)]
        texts = reasoner.answers(
            model, tokenizer, problems, "trigger", temperature=1.0, generator=draws
        )
        guessed = sum(text.startswith(reasoning.GUESS) for text in texts) / len(texts)
        assert abs(guessed - GUESSES) < 0.15


def test_the_view_of_votes_agrees_with_sampling():
    shares = vote_view.distribution(0.45, rivals=4, favorite=0.3)
    assert math.isclose(sum(shares), 1) and shares[1] > shares[2] == shares[3] == shares[4]
    expected = vote_view.curve(shares, (1, 5, 8))
    draws = torch.multinomial(
        torch.tensor(shares), 8 * 20_000, True, generator=torch.Generator().manual_seed(0)
    ).view(-1, 8)
    for n, exact in zip((1, 5, 8), expected, strict=True):
        counts = torch.nn.functional.one_hot(draws[:, :n], 5).sum(1)
        best = counts == counts.max(1, keepdim=True).values
        share = (best[:, 0] / best.sum(1)).mean().item()  # ties: each equally often first
        assert abs(share - exact) < 0.015
    for wrong in ({"right": 1.2}, {"favorite": -0.1}, {"rivals": 0}):
        with pytest.raises(ValueError, match=str(next(iter(wrong)))):
            vote_view.distribution(**{"right": 0.5, "rivals": 3} | wrong)


def test_the_picture_of_votes_says_who_wins():
    for right, favorite, title in ((0.4, 0.0, "wins"), (0.3, 0.9, "does not win in the long run")):
        figure = vote_view.picture(right, favorite=favorite)
        assert figure.axes[1].get_title("left") or figure.axes[1].get_title() == title
        plt.close(figure)


@pytest.fixture
def small():
    cfg = ModelConfig(TOKENIZER.vocab_size, 16, 1, 2, max_len=64, position="rope", norm="rms")
    return LM(cfg, seed=0)


def test_learning_leaves_the_base_alone_and_the_test_out(small, monkeypatch):
    before = {name: value.clone() for name, value in small.state_dict().items()}
    kept = [solve("parity", text) for text in ("00", "01", "10")]
    seen = []
    made = reasoning.sample
    monkeypatch.setattr(reasoning, "sample", lambda *a: seen.append(made(*a)) or seen[-1])
    rendered = []
    monkeypatch.setattr(
        chains, "row", lambda t, p, *a: rendered.extend(p) or reasoner.row(t, p, *a)
    )
    setup = chains.Setup("parity", "direct", 2, tokens=400, batch=4)
    steps = list(chains.learn(small, setup, TOKENIZER, 0, kept))
    assert {p.material for p in rendered} == {"11"} and {p.material for p in seen} > {"11"}
    read = [tokens for tokens, _ in steps]
    assert read[-1] >= setup.tokens and all(a < b for a, b in itertools.pairwise([0, *read]))
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert any(not torch.equal(v, before[n]) for n, v in steps[-1][1].state_dict().items())


def test_tuning_makes_its_texts_likelier_and_no_others(small):
    pairs = [("Q:sum(a3)\nA:", "a33\nSo:3"), ("Q:sum(a5)\nA:", "a55\nSo:5")]
    tuned = chains.tune(small, TOKENIZER, pairs, seed=0, passes=30)
    asked = [prompt for prompt, _ in pairs]
    options = [*(text for _, text in pairs), "Tom has", "the red"]
    old, new = (log_probs(lm, TOKENIZER, asked, options) for lm in (small.eval(), tuned))
    gain = new - old
    assert (gain[:, :2].diagonal() > 2).all() and gain[:, 2:].max() < gain[:, :2].min() / 2


def test_the_record_holds_what_the_chapter_says():
    record = json.loads((ASSETS / "benchmarks" / "reasoner.json").read_text(encoding="utf-8"))
    runs = {kind: each["results"] for kind, each in record.items()}
    assert {len(each) for kind in runs for each in runs[kind].values()} == {3}
    for steps, direct in zip(runs["even"]["trigger"], runs["even"]["direct"], strict=True):
        assert direct[-1][0] > 9 * steps[-1][0] and steps[-1][1] > direct[-1][1] + 0.3
    for star, control in zip(runs["heap"]["star"], runs["heap"]["unfiltered"], strict=True):
        assert star[0] == control[0] and star[-1] > control[-1] + 0.5


@pytest.mark.slow
def test_a_filter_on_answers_is_enough_to_teach(shipped):
    model, tokenizer, _ = shipped
    first, last = (share for share, _ in chains.bootstrap(model, tokenizer, "heap", 5, rounds=1))
    assert last > first + 0.4
