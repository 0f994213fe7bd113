"""The training loop: accumulation, scaling, autocast, clipping, and where it stops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import ModelConfig
from minillm.data.batches import random_batches
from minillm.model import LM
from minillm.train import Step, cross_entropy, evaluate, train
from minillm.train.checkpoint import Checkpoints
from minillm.train.loop import NotFiniteError, next_token_loss
from minillm.train.precision import LossScaler

V = 11


class Toy(nn.Module):
    """tokens [b, t] -> logits [b, t, V]; float64, so that sums agree to the last digits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(V, 6, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table)
        self.out = nn.Parameter(torch.randn(V, 6, generator=generator, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(6, dtype=torch.float64), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        return self.dropout(self.table[tokens].tanh() * self.frozen) @ self.out.T


def batch(b=2, t=5, seed=0, share=None):
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(V, (b, t), generator=rng) for _ in range(2))
    return (x, y) if share is None else (x, y, torch.rand(b, t, generator=rng) < share)


def sgd(model, lr=0.5):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def agree(a, b, **tolerance):
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


# --- the loss


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 0), (5,)])
@pytest.mark.parametrize("masked", [False, True])
def test_next_token_loss_is_the_sum_by_hand(shape, masked):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(*shape, V, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, shape, generator=rng)
    mask = torch.rand(shape, generator=rng) < 0.5 if masked else None
    total, n = next_token_loss(lambda _: logits, None, targets, mask)
    kept = [
        math.log(sum(math.exp(z) for z in row)) - row[target]
        for row, target, keep in zip(
            logits.detach().reshape(-1, V).tolist(),
            targets.flatten().tolist(),
            [True] * targets.numel() if mask is None else mask.flatten().tolist(),
            strict=True,
        )
        if keep
    ]
    assert int(n) == len(kept) and total.item() == pytest.approx(sum(kept), abs=1e-12)
    if kept:
        (gradient,) = torch.autograd.grad(total / n, logits)
        (expected,) = torch.autograd.grad(cross_entropy(logits, targets, mask), logits)
        torch.testing.assert_close(gradient, expected)


def test_next_token_loss_is_in_float32_and_names_wrong_shapes():
    big = torch.zeros(1, 1, 70000, dtype=torch.bfloat16)  # in bfloat16 the sum would be rounded
    total, _ = next_token_loss(lambda _: big, None, torch.zeros(1, 1, dtype=torch.long))
    assert total.dtype == torch.float32 and total.item() == pytest.approx(math.log(70000), rel=1e-6)
    x, y = batch()
    with pytest.raises(ValueError, match=r"logits \(2, 5, 11\).*got \(2, 4\) and None"):
        next_token_loss(Toy(), x, y[:, 1:])
    with pytest.raises(ValueError, match=r"got \(2, 5\) and \(5,\)"):
        next_token_loss(Toy(), x, y, torch.ones(5, dtype=torch.bool))


# --- accumulation


def one_large_step(parts, lr=0.5):
    """A step of gradient descent on Σ losses / Σ tokens, and on the mean of the means."""
    out = []
    for weighted in (True, False):
        model = Toy()
        losses = [cross_entropy(model(x), y, *mask) for x, y, *mask in parts]
        sizes = [int(mask[0].sum()) if mask else y.numel() for _, y, *mask in parts]
        sizes = sizes if weighted else [1] * len(parts)
        loss = sum(a * n for a, n in zip(losses, sizes, strict=True)) / sum(sizes)
        trainable = [model.table, model.out]
        grads = torch.autograd.grad(loss, trainable)
        norm = sum(g.square().sum() for g in grads).sqrt().item()
        for p, g in zip(trainable, grads, strict=True):
            p.data -= lr * g
        out.append((model, loss.item(), norm))
    return out


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("kind", ["equal", "lengths", "masks"])
def test_accumulation_is_one_large_batch(k, kind):
    if kind == "masks":
        parts = [batch(seed=i, share=0.1 + 0.2 * i) for i in range(k)]
    else:
        parts = [batch(t=5 if kind == "equal" else 2 + 4 * i, seed=i) for i in range(k)]
    model = Toy()
    (step,) = train(model, parts, sgd(model), clip=math.inf, accumulate=k)
    (large, loss, norm), (wrong, _, _) = one_large_step(parts)
    assert agree(weights(model), weights(large), atol=1e-12)
    assert step.loss == pytest.approx(loss) and step.grad_norm == pytest.approx(norm)
    assert step.tokens == sum(int(m[0].sum()) if m else y.numel() for _, y, *m in parts)
    if k > 1 and kind != "equal":  # the mean of the means is something else
        assert not agree(weights(model), weights(wrong), atol=1e-4)


def test_an_empty_part_of_a_step_is_no_harm_and_the_rest_is_a_step():
    empty = (*batch()[:2], torch.zeros(2, 5, dtype=torch.bool))
    parts = [batch(seed=1), empty, batch(seed=2), batch(seed=3)]
    model = Toy()
    first, second = train(model, parts, sgd(model), accumulate=3)
    assert (first.step, first.tokens, second.step, second.tokens) == (1, 20, 2, 30)
    other = Toy()
    list(train(other, [parts[0], parts[2]], sgd(other), accumulate=2))
    list(train(other, [parts[3]], sgd(other)))
    assert agree(weights(model), weights(other))


# --- clipping, steps, autocast, scaling


def test_clipping_scales_and_keeps_the_direction():
    free, clipped = Toy(), Toy()
    before = weights(free)
    (a,) = train(free, [batch()], sgd(free), clip=math.inf)
    (b,) = train(clipped, [batch()], sgd(clipped), clip=0.01)
    assert a.grad_norm == b.grad_norm > 0.1
    moved = [[p - q for p, q in zip(weights(m), before, strict=True)] for m in (free, clipped)]
    factor = 0.01 / a.grad_norm
    assert agree([m * factor for m in moved[0]], moved[1], rtol=1e-4)  # 1e-6 beside the norm
    (c,) = train(Toy(), [batch()], sgd(free))
    assert c.grad_norm is None


def test_stops_behind_steps_and_is_lazy():
    model = Toy()
    before = weights(model)
    source = itertools.count()
    loop = train(model, (batch(seed=i) for i in source), sgd(model), steps=4, accumulate=2)
    assert next(source) == 0 and agree(weights(model), before)
    assert [s.step for s in loop] == [1, 2, 3, 4]
    assert next(source) == 9  # eight batches, none drawn in vain
    assert model.training and model.frozen.grad is None


def test_autocast_runs_matmuls_in_bfloat16_and_keeps_the_weights():
    torch.manual_seed(0)
    seen = []
    lm = LM(ModelConfig(V, d_model=8, n_layers=1, n_heads=2, max_len=8), seed=0)
    lm.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x, y = batch()
    plain, low = (
        [s.loss for s in train(lm, [(x, y)], sgd(lm, 1e-9), autocast=kind)]
        for kind in (None, torch.bfloat16)
    )
    evaluate(lm, [(x, y)], autocast=torch.bfloat16)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in lm.parameters())
    assert plain != low and plain[0] == pytest.approx(low[0], rel=0.02)


def test_a_loss_scale_changes_nothing_but_what_overflows():
    plain, scaled = Toy(), Toy()
    scaler = LossScaler(scale=2.0**10, window=2)
    parts = [batch(seed=i) for i in range(4)]
    a = list(train(plain, parts, sgd(plain), clip=0.5, accumulate=2))
    b = list(train(scaled, parts, sgd(scaled), clip=0.5, accumulate=2, scaler=scaler))
    assert [(s.loss, s.grad_norm) for s in a] == [(s.loss, s.grad_norm) for s in b]
    assert agree(weights(plain), weights(scaled), rtol=0, atol=0)  # a power of two is exact
    assert scaler.scale == 2.0**11


def test_overflowed_steps_are_skipped():
    model = Toy()

    parts = [batch(seed=i) for i in range(5)]

    def spoils(model, inputs, targets, mask):
        total, n = next_token_loss(model, inputs, targets)
        if inputs is parts[2][0]:
            total.register_hook(lambda gradient: gradient * math.inf)
        return total, n

    scaler = LossScaler(scale=128.0, window=1000)
    options = {"schedule": lambda step: 0.1 * step, "clip": 1.0, "scaler": scaler}
    history = []
    for step in train(model, parts, sgd(model), loss_fn=spoils, **options):
        history.append((step.skipped, step.grad_norm is None, scaler.scale, weights(model)))
    assert [h[0] for h in history] == [h[1] for h in history] == [False, False, True, False, False]
    assert [h[2] for h in history] == [128, 128, 64, 64, 64]
    assert agree(history[1][3], history[2][3], rtol=0, atol=0)
    assert not agree(history[2][3], history[3][3])
    other = Toy()  # the schedule goes on: the same steps, with a learning rate of zero in between
    rates = {1: 0.1, 2: 0.2, 3: 0.0, 4: 0.4, 5: 0.5}
    list(train(other, parts, sgd(other), rates.get, clip=1.0))
    assert agree(weights(model), weights(other))


# --- where it stops


class Source:
    """Batches that know their place, as RandomBatches does; the masks of some mark them."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        return *batch(seed=self.step), torch.full((2, 5), self.step - 1 not in self.spoil)


def nan_where_marked(model, inputs, targets, mask):
    total, n = next_token_loss(model, inputs, targets, mask)
    return (total if mask.all() else total + model.out.sum() * math.nan), n


@pytest.mark.parametrize(
    ("source", "accumulate", "said"),
    [
        (Source(0, {2}), 1, r"loss of step 3 is nan \(batch 2, counted from 0\)"),
        (Source(100, {107}), 3, r"loss of step 3 is nan \(batch 107,"),
        (Source(100, {106, 108}), 3, r"loss of step 3 is nan \(batches 106, 108,"),
        (itertools.islice(Source(50, {55}), 9), 2, r"loss of step 3 is nan \(batch 5,"),
    ],
)
def test_nan_names_step_and_batches(source, accumulate, said):
    model, good = Toy(), []
    loop = train(model, source, sgd(model), accumulate=accumulate, loss_fn=nan_where_marked)
    with pytest.raises(ValueError, match=said):
        for _ in loop:
            good.append(weights(model))
    assert len(good) == 2 and agree(weights(model), good[-1], rtol=0, atol=0)


def test_gradients_that_are_not_finite_stop_as_well():
    model = Toy()
    before = weights(model)

    def steep(model, inputs, targets, mask):
        return (model.table * 0).abs().sqrt().sum(), targets.numel()  # 0, of infinite slope

    with pytest.raises(NotFiniteError, match=r"gradient norm of step 1 is nan \(batch 0,") as error:
        list(train(model, [batch()], sgd(model), clip=1.0, loss_fn=steep))
    assert error.value.step == 1 and agree(weights(model), before, rtol=0, atol=0)


def test_no_token_and_wrong_options_are_refused(tmp_path):
    model = Toy()
    x, y = batch()
    none = torch.zeros_like(y, dtype=torch.bool)
    checkpoints = Checkpoints(tmp_path)
    source = random_batches(range(99), 2, 5, seed=0)
    with pytest.raises(NotFiniteError, match=r"loss of step 1 is nan \(batches 0, 1"):
        list(train(model, [(x, y, none)] * 2, sgd(model), accumulate=2))
    with pytest.raises(ValueError, match=r"summed over 7 targets where 10 count"):
        list(train(model, [(x, y)], sgd(model), loss_fn=lambda m, *a: (m(x).sum(), 7)))
    for bad in ({"accumulate": 0}, {"clip": 0.0}, {"clip": -1.0}, {"clip": math.nan}):
        with pytest.raises(ValueError, match="accumulate="):
            next(train(model, [(x, y)], sgd(model), **bad))
    for bad in (-1e-3, math.nan, math.inf):
        loop = train(model, [(x, y)] * 2, sgd(model), {1: 0.0, 2: bad}.get)
        assert next(loop).lr == 0.0
        with pytest.raises(ValueError, match=rf"lr={bad} for step 2"):
            next(loop)
    nan = {"loss_fn": lambda m, x, y, k: (m(x % V).sum() * math.nan, y.numel())}
    with pytest.raises(ValueError, match="last good checkpoint: None"):
        next(train(model, source, sgd(model), checkpoints=checkpoints, **nan))


def test_evaluate_restores_the_mode_and_weighs_tokens():
    model = Toy(dropout=0.5)
    parts = [batch(seed=i, share=0.2 * i) for i in range(4)]  # the first has no token at all
    assert evaluate(model, parts) == evaluate(model, parts), "dropout was on"
    expected = [F.cross_entropy(model.eval()(x)[m], y[m], reduction="none") for x, y, m in parts]
    assert evaluate(model, parts) == pytest.approx(torch.cat(expected).mean().item())
    model.train()
    with pytest.raises(ValueError, match="no batch holds a token"):
        evaluate(model, parts[:1])
    with pytest.raises(ValueError, match="need targets and mask"):
        evaluate(model, [(parts[0][0], parts[1][1][:, :-1])])
    assert model.training


def test_a_step_has_what_it_says():
    model = Toy()
    steps = list(train(model, [batch()] * 3, sgd(model), lambda n: 1 / n, clip=1.0))
    assert all(isinstance(s, Step) and not s.skipped for s in steps)
    assert [s.lr for s in steps] == [1, 1 / 2, 1 / 3] and [s.tokens for s in steps] == [10, 20, 30]
