"""Prompts, label probabilities, calibration, noise, induction: against formulas and brute force."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import ModelConfig
from minillm.infer.scoring import log_probs
from minillm.model.lm import LM, attention_maps
from minillm.prompting import icl
from minillm.prompting.icl import Demonstration, Template
from minillm.prompting.induction import induction_scores, previous_scores, repeated
from minillm.tokenizers import load_course_tokenizer

DEMOS = [Demonstration("a b", "+"), Demonstration("c {text}", "-")]
LABELS = ["+", "-"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def bpe():
    return load_course_tokenizer()


def test_a_prompt_by_hand():
    template = Template("In: {text}\nOut: {label}.", "\n\n", "Sort.", {"+": "yes", "-": "no"})
    want = "Sort.\n\nIn: a b\nOut: yes.\n\nIn: c {text}\nOut: no.\n\nIn: d\nOut:"
    assert template.prompt(DEMOS, "d") == want
    assert template.options(["-", "+"]) == [" no", " yes"]
    assert template.prompt([], "d") == "Sort.\n\nIn: d\nOut:"
    assert Template().prompt([], "d") == "d ->" and Template().context([]) == ""


words = st.text("ab{} ->", min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(words, words), max_size=3), words, st.sampled_from(["", "Do."]))
def test_prompt_and_option_continue_as_a_demonstration_would(pairs, label, instruction):
    template = Template("<{text}|{label}", ";", instruction)
    demos = [Demonstration(*pair) for pair in pairs]
    last = Demonstration("x y", label)
    whole = template.prompt(demos, last.text) + template.options([label])[0] + ";"
    assert whole == template.context([*demos, last])
    assert template.parse(whole.removeprefix(template.context(demos))) == "x y"


def test_parse_takes_the_first_whole_example_and_nothing_else():
    template = Template("{text} -> {label}.")
    assert template.parse("a -> b -> c.\nx -> y.\n") == "a"
    for said in ("a -> b", "a -> b.", "a.\n", " -> b.\n", "\na -> b.\n", ""):
        assert template.parse(said) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Template("{label} {text}"), "must hold {text} and then {label}"),
        (lambda: Template("{text}"), "each once"),
        (lambda: Template("{text}{text} {label}"), "each once"),
        (lambda: Template(separator=""), "glue"),
        (lambda: Template().prompt(DEMOS, "two\nlines"), "holds the separator"),
        (lambda: Template().context([Demonstration("two\nlines", "+")]), "holds the separator"),
        (lambda: Template(words={"+": "yes"}).context(DEMOS), "label '-' has no word"),
        (lambda: Template(words={"+": "yes", "-": "yes"}).options(LABELS), "share words"),
        (lambda: icl.label_probs(None, Template(), [DEMOS], ["a", "b"], LABELS), "1 lists"),
        (lambda: icl.label_probs(None, Template(), [[], []], ["a"], LABELS), "2 lists"),
        (lambda: icl.first_tokens(["yes", ""], list), "no token"),
        (lambda: icl.calibrate(torch.ones(2, 2), torch.tensor([1.0, 0.0])), "must be positive"),
        (lambda: icl.calibrate(torch.ones(2, 2), torch.ones(3)), "prior over 2 labels"),
        (lambda: icl.domain_texts(["", " "], 3, seeded(0)), "hold no word"),
        (lambda: icl.relabel(DEMOS, LABELS, 1.5, seeded(0)), "rate=1.5"),
        (lambda: icl.relabel(DEMOS, ["+"], 1.0, seeded(0), wrong=True), "no label but '\\+'"),
        (lambda: icl.place_bias(["ab", "a"], "ab"), "one number of demonstrations"),
        (lambda: icl.place_bias(["ab", "ba"], "a"), "1 answers"),
        (lambda: repeated(torch.arange(4), 5, 1, seeded(0)), "length=5"),
        (lambda: repeated(torch.arange(4), 2, 1, seeded(0), copies=1), "copies=1"),
        (lambda: induction_scores(torch.ones(1, 1, 1, 3, 3), torch.arange(3)[None]), "no token"),
        (lambda: induction_scores(torch.ones(1, 1, 3, 3), torch.zeros(1, 3)), "must be"),
    ],
)
def test_bad_use_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_prompt_that_is_too_long_says_by_how_much(bpe):
    template = Template()
    prompts = [template.prompt(DEMOS * n, "the end") for n in (1, 9)]
    lengths = [len(bpe.encode_ordinary(prompt)) for prompt in prompts]
    icl.check_length(prompts, bpe.encode_ordinary, lengths[1] + 2, room=2)
    with pytest.raises(ValueError, match=f"with 3 more it exceeds the context of {lengths[1] + 2}"):
        icl.check_length(prompts, bpe.encode_ordinary, lengths[1] + 2, room=3)
    limit = lengths[1] - 5
    with pytest.raises(ValueError, match=f"prompt 1 has {lengths[1]} tokens: .* {limit} by 7"):
        icl.check_length(prompts, bpe.encode_ordinary, limit, room=2)


def test_label_words_with_one_first_token_are_refused(bpe):
    encode = bpe.encode_ordinary
    # every digit is a token of its own, so the blank before it is one, too
    with pytest.raises(ValueError, match=r"\[' 7', ' 8'\] .* share their first token"):
        icl.first_tokens([" 7", " yes", " 8"], encode)
    assert icl.first_tokens([" cat", " dog"], encode) == [encode(" cat")[0], encode(" dog")[0]]
    score = icl.by_first_token(lambda prompts: torch.zeros(len(prompts), 4096), encode)
    with pytest.raises(ValueError, match="share their first token"):
        icl.label_probs(score, Template(), [], ["a"], ["7", "8"])


def test_label_probs_against_the_chain_rule_token_by_token(bpe):
    cfg = ModelConfig(vocab_size=4096, max_len=64, d_model=16, n_layers=1, n_heads=2)
    model, labels = LM(cfg, seed=0).eval(), ["cat", "unbelievable"]
    lists = [DEMOS, DEMOS[::-1], []]
    got = icl.label_probs(
        partial(log_probs, model, bpe), Template(), lists, ["a", "b", "c"], labels
    )
    for row, demos, text in zip(got, lists, "abc", strict=True):
        shown = "".join(f"{x} -> {y}\n" for x, y in demos)
        start = [bpe.special_ids["<|endoftext|>"], *bpe.encode_ordinary(f"{shown}{text} ->")]
        weights = []
        for label in labels:
            ids, weight = list(start), 1.0
            for token in bpe.encode_ordinary(" " + label):
                with torch.no_grad():
                    weight *= model(torch.tensor([ids]))[0, -1].double().softmax(-1)[token].item()
                ids.append(token)
            weights.append(weight)
        np.testing.assert_allclose(row, np.array(weights) / sum(weights), rtol=1e-4)


def test_first_token_scores_equal_whole_words_of_one_token(bpe):
    cfg = ModelConfig(vocab_size=4096, max_len=64, d_model=16, n_layers=1, n_heads=2)
    model, labels = LM(cfg, seed=1).eval(), ["big", "and", "the"]
    assert all(len(bpe.encode_ordinary(" " + label)) == 1 for label in labels)

    @torch.no_grad()
    def following(prompts):
        rows = [[bpe.special_ids["<|endoftext|>"], *bpe.encode_ordinary(p)] for p in prompts]
        return torch.stack([model(torch.tensor([row]))[0, -1].log_softmax(-1) for row in rows])

    first = icl.by_first_token(following, bpe.encode_ordinary)
    whole = partial(log_probs, model, bpe)
    args = (Template(), DEMOS, ["x", "y z"], labels)
    torch.testing.assert_close(
        icl.label_probs(first, *args), icl.label_probs(whole, *args), rtol=1e-4, atol=1e-7
    )


def table(rows):
    """A `Score` that looks the log-probabilities up by the last word before the arrow."""
    return lambda prompts, options: torch.tensor(
        [rows[p.removesuffix(" ->").rsplit("\n", 1)[-1]] for p in prompts]
    )


positive = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.lists(positive, min_size=1, max_size=4), positive)
def test_calibration_is_the_published_matrix_and_pmi(rows, prior):
    p = np.array(rows) / np.sum(rows, axis=1, keepdims=True)
    q = np.array(prior) / np.sum(prior)
    got = icl.calibrate(torch.tensor(p), torch.tensor(q)).numpy()
    np.testing.assert_allclose(got.sum(1), 1)
    raw = p @ np.linalg.inv(np.diag(q))  # W p with b = 0
    np.testing.assert_allclose(got / got[:, :1], raw / raw[:, :1])
    pmi = np.log(p) - np.log(q)
    shift = np.log(got) - pmi
    np.testing.assert_allclose(shift, shift[:, :1].repeat(3, 1), atol=1e-9)
    own = icl.calibrate(torch.tensor(p), torch.tensor(p)).numpy()
    np.testing.assert_allclose(own, 1 / 3)


def test_content_free_prior_removes_exactly_the_bias():
    signal = {"up": [1.0, 0.0], "down": [0.0, 1.0], "N/A": [0.0, 0.0], "": [0.3, 0.0]}
    biased = {text: [x + 2.0, y] for text, (x, y) in signal.items()}
    score, texts, truth = table(biased), ["up", "down"], LABELS
    probs = icl.label_probs(score, Template(), DEMOS, texts, LABELS)
    assert icl.accuracy(probs, LABELS, truth) == 0.5
    prior = icl.content_free_prior(score, Template(), DEMOS, LABELS, ["N/A"])
    fair = icl.calibrate(probs, prior)
    assert icl.accuracy(fair, LABELS, truth) == 1.0
    want = torch.tensor([signal[text] for text in texts]).double().softmax(-1)
    torch.testing.assert_close(fair, want, rtol=1e-6, atol=1e-9)
    two = icl.content_free_prior(score, Template(), DEMOS, LABELS, ["N/A", ""])
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2.0, 2.3)]
    assert two[0].item() == pytest.approx(sum(sigmoid) / 2, rel=1e-6)


def test_domain_texts_have_the_domain_s_words_at_its_length():
    texts = ["x x x y", "x z"]
    drawn = icl.domain_texts(texts, 2000, seeded(0))
    assert {len(text.split()) for text in drawn} == {3}
    words = " ".join(drawn).split()
    shares = [words.count(word) / len(words) for word in "xyz"]
    assert shares == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=0.02)
    assert drawn == icl.domain_texts(texts, 2000, seeded(0))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 99))
def test_noise_touches_the_share_it_says(n, rate, seed):
    demos = [Demonstration(str(i), "abc"[i % 3]) for i in range(n)]
    wrong = icl.relabel(demos, "abc", rate, seeded(seed), wrong=True)
    assert sum(a != b for a, b in zip(demos, wrong, strict=True)) == round(rate * n)
    assert [d.text for d in wrong] == [d.text for d in demos]
    foreign = icl.relabel(demos, ["u", "v"], rate, seeded(seed))
    assert sum(d.label in "uv" for d in foreign) == round(rate * n)
    assert [d.label for d in demos] == ["abc"[i % 3] for i in range(n)]  # the input is kept


def test_random_labels_are_uniform_whatever_the_old_one_was():
    demos = [Demonstration(str(i), "a") for i in range(6000)]
    noisy = [d.label for d in icl.relabel(demos, "abc", 1.0, seeded(1))]
    assert [noisy.count(x) / 6000 for x in "abc"] == pytest.approx([1 / 3] * 3, abs=0.02)
    half = icl.relabel(demos, "b", 0.5, seeded(1))
    assert sum(d.label == "b" for d in half[:3000]) == pytest.approx(1500, abs=100)


def test_place_bias_against_counting():
    rng = np.random.default_rng(0)
    shown = [list(rng.choice(list("abc"), 4, p=[0.6, 0.3, 0.1])) for _ in range(40)]
    answers = list(rng.choice(list("abcd"), 40))
    want = []
    for place in range(4):
        agree = sum(row[place] == answer for row, answer in zip(shown, answers, strict=True)) / 40
        chance = sum(
            sum(row[place] == x for row in shown) / 40 * answers.count(x) / 40 for x in "abcd"
        )
        want.append(agree - chance)
    np.testing.assert_allclose(icl.place_bias(shown, answers), want, atol=1e-12)


def test_place_bias_of_known_habits():
    shown = [list(f"{i:04b}") for i in range(16)]
    last = icl.place_bias(shown, [row[-1] for row in shown])
    assert last.tolist() == pytest.approx([0, 0, 0, 0.5])
    against = icl.place_bias(shown, ["10"[int(row[0])] for row in shown])
    assert against.tolist() == pytest.approx([-0.5, 0, 0, 0])
    stubborn = icl.place_bias(shown, ["1"] * 16)
    assert stubborn.tolist() == pytest.approx([0] * 4)


def test_repeated_rows_hold_one_block_of_different_ids():
    ids = torch.tensor([3, 5, 7, 11, 13])
    rows = repeated(ids, 4, 50, seeded(0), copies=3)
    assert rows.shape == (50, 12)
    assert torch.equal(rows[:, :4], rows[:, 4:8]) and torch.equal(rows[:, :4], rows[:, 8:])
    assert all(len(set(row[:4])) == 4 and set(row) <= set(ids.tolist()) for row in rows.tolist())
    assert len({tuple(row) for row in rows.tolist()}) > 25


def scores_by_loop(maps, tokens):
    found, queries = np.zeros(maps.shape[1:3]), 0
    for row, x in zip(maps, tokens.tolist(), strict=True):
        for i in range(len(x)):
            places = [j + 1 for j in range(i - 1) if x[j] == x[i]]  # j + 1 < i
            if places:
                found += row[:, :, i, places].sum(-1)
                queries += 1
    return found / queries


@pytest.mark.parametrize("seed", range(3))
def test_induction_against_a_loop(seed):
    rng = seeded(seed)
    tokens = torch.randint(5, (3, 14), generator=rng)
    scores = torch.randn(3, 2, 4, 14, 14, generator=rng, dtype=torch.float64)
    maps = scores.masked_fill(torch.ones(14, 14).triu(1).bool(), -math.inf).softmax(-1)
    np.testing.assert_allclose(induction_scores(maps, tokens), scores_by_loop(maps.numpy(), tokens))
    by_hand = [[maps[:, l, h, i, i - 1] for i in range(1, 14)] for l in range(2) for h in range(4)]
    want = torch.stack([torch.cat(x).mean() for x in by_hand]).view(2, 4)
    torch.testing.assert_close(previous_scores(maps), want)


def test_induction_of_heads_that_are_known():
    period, t = 6, 12
    tokens = repeated(torch.arange(9), period, 2, seeded(2))
    maps = torch.zeros(2, 1, 3, t, t)
    for i in range(t):
        maps[:, 0, 0, i, max(i - period + 1, 0)] = 1  # what stood behind this token last time
        maps[:, 0, 1, i, max(i - 1, 0)] = 1  # the previous token
        maps[:, 0, 2, i, max(i - period, 0)] = 1  # this token last time: no induction
    assert induction_scores(maps, tokens).tolist() == [[1, 0, 0]]
    assert previous_scores(maps)[0, 1] == 1
    uniform = torch.tril(torch.ones(t, t)) / torch.arange(1, t + 1)[:, None]
    chance = induction_scores(uniform.expand(2, 1, 1, t, t), tokens).item()
    assert chance == pytest.approx(sum(1 / (i + 1) for i in range(period, t)) / period)


def test_an_untrained_model_has_no_induction_head():
    cfg = ModelConfig(vocab_size=64, max_len=40, d_model=32, n_layers=2, n_heads=2)
    tokens = repeated(torch.arange(64), 20, 4, seeded(0))
    found = induction_scores(attention_maps(LM(cfg, seed=0), tokens), tokens)
    assert found.shape == (2, 2) and found.max() < 0.1
