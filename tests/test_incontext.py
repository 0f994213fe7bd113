"""Sequences to learn from in context, against counting and other solvers; the models of them."""

# b rows, n examples, d inputs, v token vectors

import json
import math
import random
from collections import Counter

import pytest
import torch

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import incontext
from minillm.data.incontext import CATEGORIES, FACTS, LEANINGS, LETTERS, NEUTRAL, Fact, Mapping
from minillm.model import LM
from minillm.recipes import emergence, icl
from minillm.tokenizers import load_course_tokenizer
from minillm.zoo import MODELS

LABELS = [label for pair in FACTS for label in pair]


def test_every_word_of_a_line_is_one_token_and_has_one_meaning():
    everything = [*incontext.words(), NEUTRAL, *LETTERS, *LABELS]
    assert len(set(everything)) == len(everything)
    tokenizer = load_course_tokenizer()
    for word in everything:
        assert len(tokenizer.encode(f" {word}")) == 1, word
    line = incontext.text([("fox", "A")], "owl")
    assert len(tokenizer.encode(line)) == 4  # fox, A, line's end, owl


def test_facts_lean_evenly_in_every_category_and_apart_in_every_table():
    for table in range(len(FACTS)):
        for group in CATEGORIES.values():
            leanings = sorted(Fact(table).leaning(word) for word in group)
            assert leanings == sorted([*LEANINGS, *(-x for x in LEANINGS)])
    signs = torch.tensor(
        [[Fact(i).leaning(w) > 0 for w in incontext.words()] for i in range(len(FACTS))]
    ).double()
    worst = (torch.corrcoef(signs) - torch.eye(len(FACTS))).abs().max()
    assert worst < 0.4, "a table tells what another one says"
    assert all(Fact(i).leaning(NEUTRAL) == 0 for i in range(len(FACTS)))


def test_labels_of_a_table_come_as_often_as_leaning_and_echo_say():
    fact, rng = Fact(3), random.Random(1)
    seen: Counter = Counter()
    for _ in range(6000):
        (_, first), (_, second) = fact.say(["fox", "owl"], rng)
        seen[first, second] += 1
    one, other = fact.labels
    for before in (one, other):
        odds = fact.leaning("owl") + (1.2 if before == other else -1.2)
        share = seen[before, other] / (seen[before, one] + seen[before, other])
        assert abs(share - 1 / (1 + math.exp(-odds))) < 0.03
    share = (seen[other, one] + seen[other, other]) / 6000
    assert abs(share - 1 / (1 + math.exp(-fact.leaning("fox")))) < 0.03


def test_echo_fades_line_by_line():
    fact = Fact(0)
    one, other = fact.labels
    assert fact.echo([]) == 0
    assert fact.echo([other]) == pytest.approx(1.2)
    assert fact.echo([other, one]) == pytest.approx(0.6 - 1.2)
    assert fact.echo([one, one, other]) == pytest.approx(1.2 - 0.6 - 0.3)


def test_a_rule_gives_a_category_one_letter_and_a_new_prompt_a_new_rule():
    rng = random.Random(0)
    rules = [Mapping.draw(rng, 4) for _ in range(300)]
    for rule in rules[:20]:
        for group in CATEGORIES.values():
            assert len({rule.answer(word) for word in group}) == 1
        assert set(rule.labels) == set(rule.letters) and len(rule.labels) <= 4
        assert rule.say(["fox", "Mia"]) == [("fox", rule.letters[0]), ("Mia", rule.letters[1])]
    counts = Counter(rule.answer("fox") for rule in rules)
    assert set(counts) == set(LETTERS) and max(counts.values()) < 35  # 13 expected


def test_training_lines_are_half_facts_and_reproducible():
    drawn = [incontext.draw_lines(random.Random(i), 13) for i in range(400)]
    assert drawn == [incontext.draw_lines(random.Random(i), 13) for i in range(400)]
    facts = [lines for lines in drawn if lines[0][1] in LABELS]
    assert 150 < len(facts) < 250
    for lines in drawn:
        labels = {label for _, label in lines}
        assert labels <= set(LETTERS) or any(labels <= set(pair) for pair in FACTS)
    neutral = sum(word == NEUTRAL for lines in facts for word, _ in lines)
    assert 0.01 < neutral / (13 * len(facts)) < 0.04
    only = [incontext.draw_lines(random.Random(i), 5, facts=0.0) for i in range(50)]
    assert all(label in LETTERS for lines in only for _, label in lines)


def test_wrong_words_tables_and_letters_are_refused():
    with pytest.raises(ValueError, match=r"table=8.*0 to 7"):
        Fact(8)
    with pytest.raises(ValueError, match="'dragonfly'"):
        Fact(0).answer("dragonfly")
    with pytest.raises(ValueError, match="'dragonfly'"):
        incontext.category("dragonfly")
    with pytest.raises(ValueError, match="letters=0"):
        Mapping.draw(random.Random(0), 0)


def test_regressions_have_the_noise_that_was_asked_for():
    g = torch.Generator().manual_seed(0)
    x, y, w = incontext.draw_regressions(2000, 6, 3, 0.5, g)
    left = y - (x * w[:, None]).sum(-1)
    assert abs(left.std().item() - 0.5) < 0.01
    assert abs(w.var().item() - 1) < 0.05 and abs(x.var().item() - 1) < 0.05


def test_number_rows_put_everything_where_it_belongs():
    x, y = torch.randn(2, 3, 2), torch.randn(2, 3)
    rows = incontext.number_rows(x, y, torch.tensor([False, True]), 6)
    expected = torch.zeros(2, 7, 6)
    expected[0, 0, 3] = expected[1, 0, 4] = 1
    for i in range(3):
        expected[:, 1 + 2 * i, :2] = x[:, i]
        expected[:, 2 + 2 * i, 2] = y[:, i]
    assert torch.equal(rows, expected)
    with pytest.raises(ValueError, match="at least 5 vectors"):
        incontext.number_rows(x, y, torch.tensor([False, True]), 4)


@pytest.mark.parametrize("strength", [0.0, 0.25])
def test_ridge_agrees_with_solving_every_prefix_by_itself(strength):
    g = torch.Generator().manual_seed(1)
    x, y, _ = incontext.draw_regressions(4, 7, 3, 0.5, g)
    found = incontext.ridge(x, y, strength)
    for b in range(4):
        for n in range(7):
            # ridge is least squares with √strength · I below x, and zeros below y
            more = strength**0.5 * torch.eye(3).double()
            a = torch.cat([x[b, :n].double(), more])
            rhs = torch.cat([y[b, :n].double(), torch.zeros(3).double()])
            w = torch.linalg.lstsq(a, rhs[:, None], driver="gelsd").solution.squeeze(-1)
            assert found[b, n] == pytest.approx(float(x[b, n].double() @ w), abs=1e-7)


def test_least_squares_is_exact_once_there_are_as_many_examples_as_inputs():
    x, y, _ = incontext.draw_regressions(50, 6, 3, 0.0, torch.Generator().manual_seed(2))
    gap = (incontext.ridge(x, y) - y).abs()
    assert gap[:, 3:].max() < 1e-4 and gap[:, 2].mean() > 0.1


def test_gradient_step_is_what_autograd_takes():
    x, y, _ = incontext.draw_regressions(3, 5, 2, 0.3, torch.Generator().manual_seed(3))
    found = incontext.gradient_step(x, y, 0.1)
    for b in range(3):
        for n in range(1, 5):
            w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            past, told = x[b, :n].double(), y[b, :n].double()
            (0.5 * (told - past @ w).square().sum()).backward()
            expected = float(x[b, n].double() @ (-0.1 * w.grad))
            assert found[b, n] == pytest.approx(expected, abs=1e-10)
    assert found[:, 0].abs().max() == 0


def test_bursts_show_the_query_three_times_and_plain_rows_do_not():
    g = torch.Generator().manual_seed(4)
    ids = incontext.draw_bursts(500, 1000, True, g)
    assert ids.shape == (500, 9)
    times = (ids[:, :8] == ids[:, 8:]).sum(1)
    assert (times >= 3).all() and times.float().mean() < 3.1
    counts = [sorted(Counter(row).values())[-2:] for row in ids[:, :8].tolist()]
    assert sum(pair == [3, 3] for pair in counts) > 480  # but for two bursts of one class
    first = (ids[:, 0] == ids[:, 8]).float().mean()
    assert abs(first - 3 / 8) < 0.08, "the order is not random"
    plain = incontext.draw_bursts(500, 1000, False, g)
    assert (plain[:, :8] == plain[:, 8:]).sum(1).float().mean() < 0.1


def test_skew_follows_zipfs_law():
    g = torch.Generator().manual_seed(5)
    queries = incontext.draw_bursts(20000, 50, True, g, skew=1.0)[:, 8]
    share = torch.bincount(queries, minlength=50) / 20000
    law = 1 / torch.arange(1, 51)
    assert (share - law / law.sum()).abs().max() < 0.012


def test_item_rows_hold_items_and_labels_but_not_the_last():
    items, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [1, 0, 0]])
    rows = incontext.item_rows(items, labels, 6)
    assert rows.shape == (2, 5, 6)
    assert torch.equal(rows[:, 0::2, :4], items) and rows[:, 0::2, 4:].abs().max() == 0
    assert rows[:, 1::2, 4:].argmax(-1).tolist() == [[0, 1], [1, 0]]
    assert rows[:, 1::2].sum(-1).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(ValueError, match="below 1"):
        incontext.item_rows(items, labels, 5)


def log_of(name):
    return json.loads((MODELS / f"{name}.log.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_icl_does_what_its_log_says_and_what_bayes_allows():
    log = log_of("icl")
    model, tokenizer = zoo.load("icl")
    recipe = icl.Words(**log["recipe"])
    found = icl.judge_words(model, tokenizer, recipe, prompts=recipe.held_out)
    for key, shares in found.items():
        assert shares == pytest.approx(log[key], abs=0.02), key
    # rules of four letters: a category that was shown is known, any other guessed among four
    for k in (4, 8, 12):
        shown = 1 - math.comb(70, k) / math.comb(79, k)
        assert shown - 0.12 < found["rules_true"][k] < shown + (1 - shown) / 2 + 0.06
    assert found["rules_random"][12] < 0.4 and found["facts_random"][12] > 0.8
    assert found["facts_true"][0] < 0.25 and min(found["facts_true"][1:]) > 0.75


@pytest.mark.slow
def test_icl_regression_does_what_its_log_says():
    log = log_of("icl_regression")
    model, tokenizer = zoo.load("icl_regression")
    assert tokenizer is None
    found = icl.judge_regression(model, icl.Regression(**log["recipe"]))
    for key in ("clean_error", "clean_to_least_squares", "noisy_error", "noisy_to_ridge"):
        assert found[key] == pytest.approx(log[key], rel=0.02, abs=0.002), key
    assert max(found["clean_to_least_squares"][4:]) < 0.03
    assert min(found["clean_to_gradient_step"][4:]) > 0.3
    assert max(found["noisy_to_ridge"]) < 0.02


def test_rows_of_tokens_are_the_text_of_the_lines():
    tokenizer = load_course_tokenizer()
    lines = [("fox", "A"), ("owl", "B")]
    (row,) = icl.token_rows(tokenizer, [lines]).tolist()
    assert row[1:] == tokenizer.encode_ordinary(incontext.text(lines))
    assert [tokenizer.decode([i]) for i in row[icl.LABEL :: icl.LINE]] == [" A", " B"]
    with pytest.raises(ValueError, match="' dragonfly' is"):
        icl.token_rows(tokenizer, [[("dragonfly", "A")]])
    with pytest.raises(ValueError, match="do not align"):
        icl.token_rows(tokenizer, [lines, lines[:1]])


def test_batches_of_words_learn_labels_and_some_whole_rows():
    tokenizer = load_course_tokenizer()
    recipe = icl.Words(early_steps=1, early_batch=8, batch=8)
    batches = icl.word_batches(recipe, tokenizer)
    early, late = next(batches), next(batches)
    for (inputs, targets, learned), lines in ((early, 9), (late, 13)):
        assert inputs.shape == targets.shape == learned.shape == (8, 3 * lines)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert learned[-1].sum() == lines
        labels = {tokenizer.decode([i]).strip() for i in targets[-1][learned[-1]].tolist()}
        assert labels <= {*LETTERS, *LABELS}
    assert early[2].sum() == 8 * 9 and late[2].sum() == 7 * 13 + 39
    again = next(icl.word_batches(recipe, tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(early, again, strict=True))


def test_number_batches_predict_y_where_x_stands():
    recipe = icl.Regression(batch=4, noise=0.0)
    rows, y = next(icl.regression_batches(recipe))
    assert torch.equal(rows[:, 2::2, recipe.inputs], y)
    assert rows[:, 0, -2:].tolist() == [[1, 0], [0, 1]] * 2
    gap = (incontext.ridge(rows[:, 1::2, :2], y) - y).abs()
    assert gap[:, 2:].max() < 1e-3, "without noise two examples must settle y"
    model = LM(ModelConfig(icl.vectors(recipe), 16, 1, 2, max_len=21, tie_embeddings=False), seed=0)
    before = icl.predictions(model, rows)
    rows[:, 2 + 2 * 4, recipe.inputs] += 1  # y of the fifth example: seen from the sixth on
    moved = (icl.predictions(model, rows) - before).abs().amax(0) > 1e-7
    assert moved.tolist() == [False] * 5 + [True] * 5


def test_silent_mlps_stay_silent_and_a_burst_training_counts_shares():
    model = emergence.attention_only(layers=1, seed=0)
    list(emergence.repeats(1, 0, steps=2, model=model))
    assert all(block.mlp.down.weight.abs().max() == 0 for block in model.blocks)
    found = emergence.bursts(burst=True, skew=0.0, seed=0, steps=1)
    assert set(found) == {"new", "known", "common", "rare"}
    assert all(0 <= share < 0.2 for share in found.values())  # one of 32 by chance
