"""Objectives: what is read, what is asked, who sees whom; losses with their options."""

import collections
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minillm.train.losses import cross_entropy
from minillm.train.objectives import (
    blank_infilling,
    causal,
    masked,
    prefix,
    span_corruption,
)

MASK, START, END = 900, 901, 902
SENTINELS = list(range(1000, 1100))
FIXED = settings(max_examples=60, deadline=None)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(b, t, seed=0, vocab=800):
    return torch.randint(vocab, (b, t), generator=rng(seed))


shapes = {
    "b": st.integers(1, 4),
    "t": st.integers(2, 70),
    "seed": st.integers(0, 2**31),
}
noise = {**shapes, "rate": st.floats(0.01, 0.99), "mean_span": st.floats(1, 12)}


def expected_counts(t, rate, mean_span):
    """Tokens and spans cut from a row, once more in words: as many as asked, at least one each."""
    cut = sorted((1, round(rate * t), t - 1))[1]
    return cut, max(1, min(round(cut / mean_span), cut, t - cut))


# --- causal and prefix


@FIXED
@given(**shapes)
def test_causal_asks_for_every_next_token(b, t, seed):
    tokens = rows(b, t, seed)
    p = causal(tokens)
    assert p.predicted == b * (t - 1) and p.mask.all()
    for i in range(t - 1):
        assert torch.equal(p.targets[:, i], tokens[:, i + 1])
        # a position may see exactly the tokens before the one it is asked for
        seen = p.inputs[:, p.attention[i]]
        assert torch.equal(seen, tokens[:, : i + 1])


@FIXED
@given(**shapes, data=st.data())
def test_prefix_sees_the_prefix_whole_and_asks_for_the_rest(b, t, seed, data):
    tokens = rows(b, t, seed)
    lengths = data.draw(st.lists(st.integers(1, t - 1), min_size=b, max_size=b))
    p = prefix(tokens, torch.tensor(lengths))
    assert p.predicted == sum(t - n for n in lengths)
    assert p.attention.shape == (b, 1, t - 1, t - 1)
    for row, n in enumerate(lengths):
        for i in range(t - 1):
            assert bool(p.mask[row, i]) == (i + 1 >= n)
            seen = p.attention[row, 0, i].nonzero().flatten().tolist()
            assert seen == list(range(max(n, i + 1)))
        asked = p.targets[row][p.mask[row]]
        assert torch.equal(asked, tokens[row, n:]), "every token after the prefix, once"
    alone = prefix(tokens[:1], lengths[0])
    assert torch.equal(alone.attention, p.attention[0, 0])
    assert torch.equal(alone.mask, p.mask[:1])


def test_no_asked_position_of_a_prefix_model_sees_its_answer():
    p = prefix(rows(1, 12), 5)
    for i in p.mask[0].nonzero().flatten().tolist():
        assert not p.attention[i, i + 1 :].any()


# --- masked


def test_masked_follows_15_80_10_10():
    tokens = rows(200, 100)
    p = masked(tokens, MASK, 1000, rng())
    assert torch.equal(p.targets, tokens) and p.attention is None and p.decoder_inputs is None
    assert (p.mask.sum(1) == 15).all() and p.predicted == 3000
    assert torch.equal(p.inputs[~p.mask], tokens[~p.mask]), "what is not asked is not touched"
    inputs, targets = p.inputs[p.mask], p.targets[p.mask]
    shares = [(inputs == MASK).float().mean(), (inputs == targets).float().mean()]
    other = 1 - sum(shares)
    # three standard errors of 3,000 draws: 0.022 and 0.016
    assert abs(shares[0] - 0.8) < 0.022
    assert abs(shares[1] - 0.1) < 0.017 and abs(other - 0.1) < 0.017
    random = inputs[(inputs != MASK) & (inputs != targets)]
    assert random.unique().numel() > 200 and random.max() > 900, "any id of the vocabulary"
    places = p.mask.float().mean(0)
    assert places.min() > 0.04 and places.max() < 0.27, "every position alike"  # 4.5 of them


@FIXED
@given(**shapes, rate=st.floats(0.01, 0.99))
def test_masked_counts_and_spares_the_special(b, t, seed, rate):
    tokens = rows(b, t, seed, vocab=6)
    special = [0, 3]
    free = ~torch.isin(tokens, torch.tensor(special))
    if not free.any():
        with pytest.raises(ValueError, match="nothing is left to predict"):
            masked(tokens, 7, 8, rng(seed), rate, special)
        return
    before = tokens.clone()
    p = masked(tokens, 7, 8, rng(seed), rate, special)
    want = free.sum(1).clamp(max=max(1, round(rate * t)))
    assert torch.equal(p.mask.sum(1), want) and not (p.mask & ~free).any()
    assert torch.equal(tokens, before), "the rows given are left as they are"
    again = masked(tokens, 7, 8, rng(seed), rate, special)
    assert torch.equal(p.inputs, again.inputs) and torch.equal(p.mask, again.mask)


# --- span corruption


def joined(inputs, targets, sentinels):
    """The text again: each sentinel of the inputs replaced by what follows it in the targets."""
    answers, current = {}, None
    for token in targets:
        if token in sentinels:
            current = answers.setdefault(token, [])
        else:
            current.append(token)
    return list(itertools.chain(*(answers.get(token, [token]) for token in inputs)))


@FIXED
@given(**noise)
def test_span_corruption_can_be_joined_again(b, t, seed, rate, mean_span):
    tokens = rows(b, t, seed)
    p = span_corruption(tokens, SENTINELS, 7, rng(seed), rate, mean_span)
    cut, count = expected_counts(t, rate, mean_span)
    assert p.inputs.shape == (b, t - cut + count) and p.targets.shape == (b, cut + count + 1)
    assert p.mask.all() and p.predicted == b * (cut + count + 1)
    for row in range(b):
        inputs, targets = p.inputs[row].tolist(), p.targets[row].tolist()
        assert joined(inputs, targets, SENTINELS) == tokens[row].tolist()
        used = SENTINELS[: count + 1]
        assert [x for x in inputs if x in SENTINELS] == used[:-1], "in order, each once"
        assert [x for x in targets if x in SENTINELS] == used and targets[-1] == used[-1]
        places = [i for i, x in enumerate(targets) if x in SENTINELS]
        assert all(b - a > 1 for a, b in itertools.pairwise(places)), "no span is empty"
        places = [-1, *(i for i, x in enumerate(inputs) if x in SENTINELS)]
        assert all(b - a > 1 for a, b in itertools.pairwise(places)), "no spans touch"
        assert p.decoder_inputs[row].tolist() == [7, *targets[:-1]]


def test_span_corruption_is_random_but_repeatable():
    tokens = rows(64, 200)
    first, again = (span_corruption(tokens, SENTINELS, 0, rng(1)) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    other = span_corruption(tokens, SENTINELS, 0, rng(2))
    assert not torch.equal(first.inputs, other.inputs)
    assert len({tuple(x) for x in (first.inputs >= 1000).tolist()}) == 64, "each row its own spans"
    # 30 tokens in 10 spans; lengths are geometric-like: many ones, some long
    lengths = collections.Counter()
    for row in first.targets.tolist():
        places = [i for i, x in enumerate(row) if x in SENTINELS]
        lengths.update(b - a - 1 for a, b in itertools.pairwise(places))
    assert sum(lengths.values()) == 640
    assert sum(n * k for n, k in lengths.items()) / 640 == 3.0
    # C(28, 8) / C(29, 9): the chance that one of ten parts of thirty is a one
    assert abs(lengths[1] / 640 - 9 / 29) < 0.06 and max(lengths) > 6


def test_span_corruption_names_what_is_wrong():
    tokens = rows(2, 100)
    with pytest.raises(ValueError, match=r"5 spans need 6 sentinels, got \[1000, 1001\]"):
        span_corruption(tokens, SENTINELS[:2], 0, rng())
    with pytest.raises(ValueError, match="5 spans need 6 sentinels"):
        span_corruption(tokens, [1000] * 6, 0, rng())  # one sentinel six times
    tokens[1, 3] = 1004
    with pytest.raises(ValueError, match="holds the sentinel 1004"):
        span_corruption(tokens, SENTINELS, 0, rng())
    with pytest.raises(ValueError, match=r"mean_span=0\.5"):
        span_corruption(tokens, SENTINELS, 0, rng(), mean_span=0.5)


# --- blank infilling


@FIXED
@given(**noise)
def test_blank_infilling_can_be_joined_again(b, t, seed, rate, mean_span):
    tokens = rows(b, t, seed)
    p = blank_infilling(tokens, MASK, START, END, rng(seed), rate, mean_span)
    cut, count = expected_counts(t, rate, mean_span)
    a = t - cut + count
    assert p.inputs.shape == (b, a + cut + count) == p.targets.shape == p.positions.shape[1:]
    assert p.predicted == b * (cut + count) and not p.mask[:, :a].any() and p.mask[:, a:].all()
    for row in range(b):
        inputs, targets = p.inputs[row].tolist(), p.targets[row].tolist()
        text, span = p.positions[:, row].tolist()
        assert text[:a] == list(range(a)) and span[:a] == [0] * a
        answers, i = {}, a
        while i < len(inputs):
            assert inputs[i] == START and inputs[text[i]] == MASK, "each span belongs to a blank"
            end = targets.index(END, i)
            answers[text[i]] = targets[i:end]
            assert inputs[i + 1 : end + 1] == targets[i:end] != [], "the answer, moved by one"
            assert text[i : end + 1] == [text[i]] * (end + 1 - i)
            assert span[i : end + 1] == list(range(1, end + 2 - i))
            i = end + 1
        assert len(answers) == count
        whole = [answers.get(i, [x]) for i, x in enumerate(inputs[:a])]
        assert list(itertools.chain(*whole)) == tokens[row].tolist()
    for i, j in itertools.product(range(a + cut + count), repeat=2):
        want = j < a if i < a else j <= i
        assert bool(p.attention[i, j]) == want, (i, j)


def test_blank_infilling_shuffles_the_spans():
    p = blank_infilling(rows(400, 60), MASK, START, END, rng(), rate=0.15, mean_span=3)
    firsts = p.positions[0][p.inputs == START].view(400, 3)  # three blanks, in order of the answer
    orders = collections.Counter(tuple(row.argsort().tolist()) for row in firsts)
    assert len(orders) == 6 and min(orders.values()) > 35, orders  # 67 each, 7.5 a deviation


def test_part_a_learns_nothing_of_part_b():
    """Not the mask's word for it: attention under it, with part B changed."""
    p = blank_infilling(rows(1, 40), MASK, START, END, rng())
    a = int((p.positions[1, 0] == 0).sum())
    x = torch.randn(1, 1, p.inputs.shape[1], 8, generator=rng())
    moved = x.clone()
    moved[:, :, a + 2 :] += 1
    before, after = (
        F.scaled_dot_product_attention(y, y, y, attn_mask=p.attention) for y in (x, moved)
    )
    assert torch.equal(before[:, :, : a + 2], after[:, :, : a + 2])
    assert not torch.isclose(before[:, :, a + 2 :], after[:, :, a + 2 :]).all(-1).any()


# --- what all share

CALLS = {
    "causal": lambda x: causal(x),
    "prefix": lambda x: prefix(x, 1),
    "masked": lambda x: masked(x, MASK, 1000, rng()),
    "span corruption": lambda x: span_corruption(x, SENTINELS, 0, rng()),
    "blank infilling": lambda x: blank_infilling(x, MASK, START, END, rng()),
}


@pytest.mark.parametrize("name", CALLS)
def test_data_shorter_than_one_sequence_is_named(name):
    least = 1 if name == "masked" else 2
    for shape in ((0, 8), (3, 0), (3, least - 1)):
        with pytest.raises(ValueError, match="shorter than one sequence"):
            CALLS[name](torch.zeros(shape, dtype=torch.long))
    for bad in (torch.zeros(8, dtype=torch.long), torch.zeros(2, 8), torch.zeros(2, 8) > 0):
        with pytest.raises(ValueError, match=r"need integers \[b, t\]"):
            CALLS[name](bad)
    assert CALLS[name](rows(1, least)).predicted >= 1


@pytest.mark.parametrize("name", CALLS)
def test_a_problem_fits_together(name):
    p = CALLS[name](rows(3, 40))
    n, m = p.inputs.shape[1], p.targets.shape[1]
    assert p.mask.shape == p.targets.shape and p.mask.dtype == torch.bool
    assert p.attention is None or p.attention.shape[-2:] == (n, n)
    assert p.decoder_inputs is None or p.decoder_inputs.shape == (3, m)
    assert p.decoder_inputs is not None or n == m
    assert p.inputs.dtype == p.targets.dtype == torch.int64
    assert p.predicted == int(p.mask.sum())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_rates_are_shares(rate):
    for call in (
        lambda: masked(rows(1, 9), MASK, 1000, rng(), rate),
        lambda: span_corruption(rows(1, 9), SENTINELS, 0, rng(), rate),
        lambda: blank_infilling(rows(1, 9), MASK, START, END, rng(), rate),
    ):
        with pytest.raises(ValueError, match=f"rate={rate}"):
            call()


def test_lengths_and_ids_out_of_range():
    for length in (0, 5, torch.tensor([1, 5]), torch.tensor([0, 2])):
        with pytest.raises(ValueError, match="length="):
            prefix(rows(2, 5), length)
    for length in (torch.tensor([1, 2, 3]), torch.ones(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="one number, or one a row"):
            prefix(rows(2, 5), length)
    for mask_id in (-1, 10):
        with pytest.raises(ValueError, match=f"mask_id={mask_id}"):
            masked(rows(1, 5), mask_id, 10, rng())


# --- options of the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("z", [0.0, 1e-4, 0.5])
def test_label_smoothing_and_z_loss(smoothing, z):
    logits = (3 * torch.randn(4, 6, 11, generator=rng(), dtype=torch.float64)).requires_grad_()
    targets = rows(4, 6, vocab=11)
    mask = torch.rand(4, 6, generator=rng()) < 0.6
    got = cross_entropy(logits, targets, mask, smoothing, z)
    (ours,) = torch.autograd.grad(got, logits)
    theirs = F.cross_entropy(logits[mask], targets[mask], label_smoothing=smoothing)
    want = theirs + z * (logits[mask].exp().sum(-1).log() ** 2).mean()
    (reference,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours, reference)


def test_z_loss_pulls_a_common_shift_back_and_nothing_else_does():
    logits = torch.zeros(5, 7, dtype=torch.float64) + 20
    logits.requires_grad_()
    targets = rows(1, 5, vocab=7)[0]
    for z, pulled in ((0.0, False), (1e-4, True)):
        (gradient,) = torch.autograd.grad(cross_entropy(logits, targets, z_loss=z), logits)
        assert (gradient.sum(-1) > 1e-6).all() == pulled


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}], ids=str
)
def test_options_of_the_loss_out_of_range(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), **options)
