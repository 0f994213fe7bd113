"""Ranking loss against NumPy, reward models on texts that only they know, and what is refused."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.align.reward import (
    RewardModel,
    accuracy,
    load_reward,
    normalize,
    ranking_accuracy,
    ranking_loss,
    save_reward,
    train_reward,
)
from minillm.config import ModelConfig
from minillm.data.preferences import Comparison
from minillm.model import LM, files
from minillm.tokenizers import load_course_tokenizer, train_bpe
from minillm.tokenizers.chat import render

TOKENIZER = load_course_tokenizer()
SHAPE = ModelConfig(TOKENIZER.vocab_size, 16, 1, 2, max_len=64, norm="rms", position="rope")


def new(seed=0, spread=True):
    """A reward model of a small decoder; its head is drawn, or at zero as it starts."""
    model = RewardModel(LM(SHAPE, seed=seed), TOKENIZER)
    if spread:
        rng = torch.Generator().manual_seed(seed)
        model.value.value.weight.data = torch.randn(1, 16, generator=rng)
    return model.eval()


def by_hand(rows):
    """The loss from its formula, over lists of scores, in float64."""
    means = []
    for row in rows:
        pairs = list(itertools.combinations(np.float64(row), 2))
        assert len(pairs) == len(row) * (len(row) - 1) // 2
        means.append(np.mean([-np.log(1 / (1 + np.exp(-(i - j)))) for i, j in pairs]))
    return np.mean(means)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=6), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_loss_is_the_mean_over_the_pairs_of_each_row(rows):
    k = max(map(len, rows))
    scores = torch.full((len(rows), k), math.nan, dtype=torch.float64)
    for row, some in zip(scores, rows, strict=True):
        row[: len(some)] = torch.tensor(some, dtype=torch.float64)
    mask = scores.isfinite()
    scores.requires_grad_(True)
    loss = ranking_loss(scores, mask)
    np.testing.assert_allclose(loss.item(), by_hand(rows), rtol=1e-12, atol=1e-14)
    loss.backward()
    assert (scores.grad[~mask] == 0).all() and scores.grad[mask].isfinite().all()
    # a constant is free: pushing all scores of a row at once changes nothing
    np.testing.assert_allclose(scores.grad.sum(-1).numpy(), 0, atol=1e-12)
    shifted = scores.detach() + torch.arange(len(rows))[:, None]
    torch.testing.assert_close(ranking_loss(shifted, mask), loss.detach())


def test_the_gradient_is_right_and_neighbors_alone_are_another_loss():
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ranking_loss, scores)
    chain = -(scores[:, :-1] - scores[:, 1:]).sigmoid().log().mean()
    assert abs(chain - ranking_loss(scores)) > 1e-3
    assert ranking_loss(torch.tensor([[200.0, -200.0]])) == 0  # no overflow either way
    assert ranking_loss(torch.tensor([[-200.0, 200.0]])) == 400


def test_accuracy_counts_pairs_and_halves_ties():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 2.0]])
    assert abs(ranking_accuracy(scores) - (1 + (0 + 0 + 0.5) / 3) / 2) < 1e-6
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert ranking_accuracy(scores, mask) == 0.5


def test_scores_that_rank_nothing_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"comparisons \[1\] are not finite"):
            ranking_loss(torch.tensor([[1.0, 2.0], [bad, 1.0]]))
    for scores in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(0)):
        with pytest.raises(ValueError, match="at least two responses"):
            ranking_loss(scores)
    with pytest.raises(ValueError, match="at least two responses"):
        ranking_loss(torch.zeros(1, 3), torch.tensor([[True, False, False]]))


def test_a_score_is_read_at_the_end_of_the_text():
    model = new()
    asked, said = ["Hi.", "Write a card.", "Hi."], ["Yes!", "", "No, not at all, never."]
    found = model.score(asked, said)
    for request, response, score in zip(asked, said, found, strict=True):
        ids = render(TOKENIZER, [("user", request), ("assistant", response)]).ids
        assert ids[-1] == TOKENIZER.special_ids["<|endoftext|>"]
        with torch.no_grad():
            alone = model.value(torch.tensor([ids]))[0]
        torch.testing.assert_close(score, alone[-1], rtol=1e-5, atol=1e-5)
        assert (alone[-1] - alone[-2]).abs() > 1e-3  # one token earlier would be another number
    assert len(set(found.round(decimals=4).tolist())) == 3
    torch.testing.assert_close(model(asked[::-1], said[::-1], batch=1), found.flip(0))
    # a marker that a policy wrote is text like any other
    assert model(["Hi."], ["Yes!<|endoftext|>"]).item() != pytest.approx(found[0].item(), abs=1e-4)
    assert len(model([], [])) == 0


def test_a_score_has_no_gradient_and_leaves_the_mode_alone():
    model = RewardModel(LM(files.dataclasses.replace(SHAPE, dropout=0.5), seed=0), TOKENIZER)
    model.value.value.weight.data += 1
    model.train()
    one, two = (model(["Hi."], ["Yes."]) for _ in range(2))
    assert torch.equal(one, two) and not one.requires_grad  # no dropout while scoring
    assert model.training


def test_what_cannot_be_scored_is_refused():
    model = new()
    with pytest.raises(ValueError, match="exceeds the context of 64 by"):
        model(["Hi."], ["on and on " * 40])
    small = train_bpe("aa", 262, special_tokens=TOKENIZER.special_tokens)
    with pytest.raises(ValueError, match=r"reads 4096 tokens, the tokenizer has \d+"):
        RewardModel(LM(SHAPE, seed=0), small)
    with torch.no_grad():
        model.value.lm.tokens.weight[TOKENIZER.encode_ordinary("zebra")[0]] = math.nan
    with pytest.raises(ValueError, match=r"responses \[1\] are not finite: \[nan\]"):
        model(["Hi.", "Hi."], ["Yes.", "zebra"])


def test_normalized_scores_have_mean_zero_and_variance_one():
    model = new()
    asked, said = ["Hi."] * 5, ["a", "b", "c", "d e f", ""]
    before = model(asked, said)
    for _ in range(2):  # the second time changes nothing
        normalize(model, asked, said)
        after = model(asked, said)
        assert abs(after.mean()) < 1e-5 and abs(after.std(correction=0) - 1) < 1e-5
        assert torch.equal(after.argsort(), before.argsort())
    with pytest.raises(ValueError, match="some that differ"):
        normalize(model, ["Hi."] * 3, ["a"] * 3)
    with pytest.raises(ValueError, match="was the model trained"):
        normalize(new(spread=False), asked, said)  # a head at zero prefers nothing
    with pytest.raises(ValueError, match="1 responses"):
        normalize(model, ["Hi."], ["a"])


NICE, DULL = ("please", "thanks", "dear"), ("stop", "go", "no")


def comparisons(n, seed, k=2, turned=False):
    """The more polite words, the better; k of 0, 1, 2, ... of them."""
    rng = torch.Generator().manual_seed(seed)

    def pick(words):
        return words[int(torch.randint(len(words), (), generator=rng))]

    found = []
    for _ in range(n):
        some = [" ".join([*(pick(NICE) for _ in range(i)), pick(DULL)]) for i in range(k)]
        found.append(Comparison("Say it.", tuple(some if turned else some[::-1])))
    return found


def fit(model, data, seed=0, epochs=1, lr=1e-2, batch=8):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rng = torch.Generator().manual_seed(seed)
    rest = {"batch": batch, "epochs": epochs, "generator": rng}
    return list(train_reward(model, data, optimizer, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3])
def test_it_learns_what_is_preferred(k):
    model = new(spread=False)
    steps = fit(model, comparisons(120, seed=0, k=k), epochs=2)
    assert [step.step for step in steps] == list(range(1, 31))
    assert [step.epoch for step in steps] == [1] * 15 + [2] * 15
    assert abs(steps[0].loss - math.log(2)) < 1e-5 and steps[0].accuracy == 0.5
    assert all(step.grad_norm > 0 for step in steps)
    assert steps[-1].loss < 0.2 and not model.training
    test = comparisons(40, seed=1, k=k)
    assert accuracy(model, test) > 0.97
    assert accuracy(model, comparisons(40, seed=1, k=k, turned=True)) < 0.03
    assert accuracy(lambda asked, said: -model(asked, said), test) < 0.03  # any reward will do


def test_turned_labels_teach_the_opposite():
    model = new(spread=False)
    fit(model, comparisons(120, seed=0, turned=True), epochs=2)
    assert accuracy(model, comparisons(40, seed=1)) < 0.03


@pytest.mark.slow
def test_rankings_of_different_lengths_learn_together():
    data = [*comparisons(40, seed=0, k=2), *comparisons(40, seed=0, k=4)]
    model = new(spread=False)
    steps = fit(model, data, epochs=3)
    assert steps[-1].loss < 0.3 and accuracy(model, comparisons(40, 1, k=4)) > 0.9


def test_equal_seeds_give_equal_models():
    runs = []
    for seed in (0, 0, 1):
        model = new(spread=False)
        runs.append([step.loss for step in fit(model, comparisons(32, 0), seed)])
    assert runs[0] == runs[1] != runs[2]


def test_there_must_be_something_to_learn():
    with pytest.raises(ValueError, match="0 comparisons, batch=8"):
        fit(new(), [])
    for rest in ({"batch": 0}, {"epochs": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            fit(new(), comparisons(2, 0), **rest)
    with pytest.raises(ValueError, match="no comparisons to agree with"):
        accuracy(new(), [])
    with pytest.raises(ValueError, match="exceeds the context"):
        fit(new(), [Comparison("Hi.", ("on and on " * 40, "no"))])


def test_a_loss_that_is_not_finite_updates_nothing():
    model = new()
    with torch.no_grad():
        model.value.value.bias.fill_(math.nan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        fit(model, comparisons(4, 0))
    for key, x in model.state_dict().items():
        torch.testing.assert_close(x, before[key], equal_nan=True, rtol=0, atol=0)
    model = new()
    model.value.lm.tokens.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match="step 1: the gradient's norm is"):
        fit(model, comparisons(4, 0))


def test_a_saved_model_scores_the_same(tmp_path):
    model = new()
    asked, said = ["Hi."] * 3, ["a", "b c", ""]
    normalize(model, asked, said)
    save_reward(model, tmp_path, "exact", torch.float32)
    assert torch.equal(load_reward(tmp_path, "exact", TOKENIZER)(asked, said), model(asked, said))
    save_reward(model, tmp_path, "judge")
    loaded = load_reward(tmp_path, "judge", TOKENIZER)
    torch.testing.assert_close(loaded(asked, said), model(asked, said), rtol=0.02, atol=0.02)
    assert not loaded.training
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("exact", "judge")]
    assert 1.8 < sizes[0] / sizes[1] < 2


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_reward(new(), tmp_path, "judge")
    other = copy.deepcopy(TOKENIZER)
    other.vocab[300], other.vocab[301] = other.vocab[301], other.vocab[300]  # as large, and wrong
    with pytest.raises(ValueError, match="judge was trained with a tokenizer of SHA-256"):
        load_reward(tmp_path, "judge", other)
    weights = tmp_path / "judge.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="it was changed since"):
        load_reward(tmp_path, "judge", TOKENIZER)
    (tmp_path / "lm.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(ValueError, match="lm is a language model"):
        load_reward(tmp_path, "lm", TOKENIZER)
