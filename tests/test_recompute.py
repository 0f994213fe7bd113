"""Activation checkpointing: the same gradients to the last bit, and only inputs are kept."""

import copy
import dataclasses
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.recompute import checkpoint, recompute

CFG = ModelConfig(vocab_size=31, d_model=24, n_layers=4, n_heads=4, max_len=20, dropout=0.2)
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


def lm(**changes):
    return LM(dataclasses.replace(CFG, **changes), seed=0)


def gradients(model, tokens=TOKENS, seed=3):
    """Loss and gradients of one training step, and the next random number."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    after = torch.rand(())
    return [loss.detach(), *(p.grad for p in model.parameters()), after]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved_bytes(model, run):
    """Bytes of distinct storages kept for backward, without parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("which", ["full", "selective", 1, 2, 3, 9, r"blocks\.[12]\.mlp"])
@pytest.mark.parametrize(
    "changes", [{}, {"position": "t5", "impl": "reference"}, {"position": "rope", "norm": "rms"}]
)
def test_gradients_are_those_of_the_plain_model_to_the_last_bit(which, dropout, changes):
    plain, other = lm(dropout=dropout, **changes), lm(dropout=dropout, **changes)
    names = recompute(other, which)
    assert names and all(name in dict(other.named_modules()) for name in names)
    want, got = gradients(plain), gradients(other)
    if changes.get("position") == "t5" and isinstance(which, int) and which > 1:
        # each layer adds to the gradient of T5's bias: first those of a group, then the groups
        bias = 1 + [name for name, _ in plain.named_parameters()].index("position.buckets")
        torch.testing.assert_close(got.pop(bias), want.pop(bias))
    assert same(want, got)
    assert other.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain.eval()(TOKENS), other.eval()(TOKENS))


def test_dropout_differs_between_seeds_so_the_test_above_can_fail():
    model = lm()
    recompute(model, "full")
    assert same(gradients(model, seed=3), gradients(model, seed=3))
    assert not same(gradients(model, seed=3)[:-1], gradients(model, seed=4)[:-1])


def test_equal_to_pytorchs_own_checkpoint():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8))
    found = []
    for call in (
        checkpoint,
        partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
        partial(torch.utils.checkpoint.checkpoint, use_reentrant=True),
    ):
        x = torch.linspace(-1, 1, 40).reshape(5, 8).requires_grad_()
        part.zero_grad()
        torch.manual_seed(1)
        y = call(part, call(part, x))
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in part.parameters())])
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("which", ["full", 2, 3])
def test_what_is_kept_is_one_input_for_each_piece(which):
    model = lm(dropout=0.0, n_layers=6)
    positions = torch.arange(12)
    x = torch.randn(2, 12, 24, requires_grad=True)

    def run():
        return model.body(x, positions)

    whole = saved_bytes(model, run)
    recompute(model, which)
    pieces = 6 if which == "full" else 6 // which
    assert saved_bytes(model, run) == pieces * x.nbytes
    assert whole > 10 * 6 * x.nbytes
    recompute(model, "none")
    assert saved_bytes(model, run) == whole


@pytest.mark.parametrize("t", [8, 16])
def test_selective_recomputation_drops_what_grows_with_the_square(t):
    b, d, h = 2, 24, 4
    model = lm(dropout=0.0, n_layers=1, impl="reference", max_len=64)
    x = torch.randn(b, t, d, requires_grad=True)

    def run():
        return model.body(x, torch.arange(t))

    whole = saved_bytes(model, run)
    recompute(model, "selective")
    kept = saved_bytes(model, run)
    # gone: what the scores pass on (at least their softmax), q, k, v and what they add up to
    assert whole - kept >= (b * h * t * t + 4 * b * t * d) * 4
    # left: input and output of both norms, two numbers a token in each, twice the MLP's width
    assert kept == (4 * b * t * d + 4 * b * t + 2 * 4 * b * t * d) * 4


def test_arguments_of_every_kind():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    def fn(x, how, parts, *, shift=None, scale, ids):
        assert how == "sum" and isinstance(parts, Pair)
        y = (x * parts.a).sum() + (parts.b[ids]).sum() * scale["by"]
        return {"y": y + shift.sum(), "note": "kept", "ids": ids, "list": [x * 2, None]}

    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, generator=rng, requires_grad=True) for _ in range(3)]
    constant, ids = torch.randn(4, generator=rng), torch.tensor([0, 3, 3])
    found = []
    for call in (lambda f, *a, **k: f(*a, **k), checkpoint):
        out = call(
            *(fn, leaves[0], "sum", Pair(leaves[1], constant)),
            shift=leaves[2],
            scale={"by": 2.0},
            ids=ids,
        )
        assert out["note"] == "kept" and out["list"][1] is None and not out["ids"].requires_grad
        loss = out["y"].square() + out["list"][0].sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert same(*found)


def test_tied_frozen_and_unused_tensors():
    torch.manual_seed(0)
    table = nn.Embedding(7, 5)
    head, frozen = nn.Linear(5, 7, bias=False), nn.Linear(5, 5)
    head.weight = table.weight
    frozen.requires_grad_(False)
    ids = torch.tensor([[1, 2, 2], [0, 6, 1]])

    def whole(ids):
        return head(torch.tanh(frozen(table(ids))))

    found = []
    for call in (whole, partial(checkpoint, whole)):
        table.zero_grad()
        call(ids).square().sum().backward()  # no argument needs a gradient, a parameter does
        found.append([table.weight.grad])
    assert same(*found) and frozen.weight.grad is None
    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    twice = checkpoint(lambda a, b, c: a * b, x, x, unused)
    assert torch.equal(torch.autograd.grad(twice.sum(), x, retain_graph=True)[0], 2 * torch.ones(3))
    assert torch.autograd.grad(twice.sum(), unused, allow_unused=True) == (None,)


def test_nested_checkpoints_and_what_is_kept():
    model = lm()
    plain = gradients(model)
    recompute(model, "selective")
    recompute(model, r"blocks\.\d+")
    assert same(plain, gradients(model))
    outer, body = copy.deepcopy(model), LM.body
    outer.body = partial(checkpoint, partial(body, outer))
    assert same(plain, gradients(outer))


def test_a_copy_recomputes_with_its_own_weights():
    model = lm()
    recompute(model, 2)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.mul_(1.5)
    want = lm()
    want.load_state_dict(other.state_dict())
    assert same(gradients(other), gradients(want))
    assert all(p.grad is None for p in model.parameters())


def test_autocast_is_the_same_the_second_time():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    seen, found = [], []

    def fn(x):
        y = layer(x)
        seen.append(y.dtype)
        return y.float()

    for call in (fn, partial(checkpoint, fn)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        y.square().sum().backward()
        found.append([y.detach(), layer.weight.grad])
    assert seen == [torch.bfloat16] * 3 and same(*found)


def test_without_gradients_the_function_is_simply_called():
    calls = []
    frozen = nn.Linear(2, 2).requires_grad_(False)

    def fn(x):
        calls.append(torch.is_grad_enabled())
        return frozen(x)

    assert not checkpoint(fn, torch.ones(2)).requires_grad
    with torch.no_grad():
        checkpoint(fn, torch.ones(2, requires_grad=True))
    assert calls == [True, False]


def hidden_in_an_object():
    weight = torch.ones(2, requires_grad=True)

    class Hides:
        __slots__ = ()

        def __call__(self, x):
            return x * globals()["_HIDDEN"]

    globals()["_HIDDEN"] = weight
    checkpoint(Hides(), torch.ones(2, requires_grad=True)).sum().backward()


def in_place():
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda y: y.mul_(2), x * 1).sum().backward()


def changes_its_mind():
    sizes = iter((2, 3))
    x = torch.ones(5, requires_grad=True)
    checkpoint(lambda x: x[: next(sizes)], x).sum().backward()


def changed_between():
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    out = checkpoint(lambda y: y * 2, y)
    y.add_(1)
    out.sum().backward()


def twice_differentiated():
    x = torch.ones(2, requires_grad=True)
    out = checkpoint(lambda x: x**3, x).sum()
    torch.autograd.grad(out, x, create_graph=True)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (hidden_in_an_object, ValueError, r"shape \(2,\) that needs a gradient but cannot be seen"),
        (in_place, ValueError, r"changed its tensors \[0\] in place"),
        (changes_its_mind, ValueError, r"returned \[\(2,\)\], the second time \[\(3,\)\]"),
        (changed_between, RuntimeError, "modified by an inplace operation"),
        (twice_differentiated, ValueError, "no second derivative"),
        (lambda: recompute(lm(), "experts"), ValueError, "'experts'.* matches none of the modules"),
        (lambda: recompute(lm(), 0), ValueError, r"recompute\(0\)"),
        (lambda: recompute(nn.Linear(2, 2), "full"), ValueError, "matches none"),
        (lambda: [recompute(m, "full") for m in [lm()] * 2], ValueError, "recomputed already"),
    ],
)
def test_faults_are_named(fault, error, message):
    with pytest.raises(error, match=message):
        fault()
