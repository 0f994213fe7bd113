"""Sequence parallelism and placed dropout on real ranks, against one process."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel import launch
from minillm.parallel import sequence as S
from minillm.parallel.dropout import Places, drop, keep, place_dropout
from minillm.parallel.group import Tracer, world
from minillm.parallel.slices import f
from minillm.parallel.tensor import PLAN, RowLinear, gather_parameters, parallelize
from minillm.parallel.vocabulary import gather_logits, vocabulary_cross_entropy
from minillm.recompute import recompute

pytestmark = pytest.mark.slow  # many ranks, many times

B, T, V = 2, 8, 37


def config(**changes):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_len": 12} | changes
    )


CASES = {
    "modern": config(
        tie_embeddings=False, n_kv_heads=2, norm="rms", position="rope", mlp="swiglu", qk_norm=True
    ),
    "sandwich": config(placement="sandwich", position="hierarchical", embedding_norm=True),
    "t5": config(position="t5", placement="post", bias=True, mlp="geglu", d_ff=33),
    "dropout": config(dropout=0.2, bias=True, norm="rms"),
    "dropout after a norm": config(dropout=0.2, embedding_norm=True, position="sinusoidal"),
}


def build(cfg):
    """In float64, with biases and norms that matter."""
    model = LM(cfg, seed=3).double()
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim == 1 or p.shape[1] == cfg.n_heads else 0.05
            p += scale * torch.randn(p.shape, dtype=p.dtype, generator=rng)
    return model


def batch():
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, loss_of, places, steps=3):
    """Logits, loss and gradients of the first step; then three steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, targets = batch()
    for step in range(steps):
        places.seed = step
        optimizer.zero_grad()
        logits = model(tokens)
        loss = loss_of(logits, targets)
        loss.backward()
        if not step:
            named = model.named_parameters(remove_duplicate=False)
            found = logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in named}
        optimizer.step()
    return found


def one_process(cfg):
    model, places = build(cfg), Places(0, torch.arange(B), torch.arange(T))
    if cfg.dropout:
        place_dropout(model, places)

    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return *train(model, loss_of, places), model.state_dict()


def on_ranks(cfg, cut=S.sequence_parallel, plan=S.SEQUENCE_PLAN, again=None):
    group = world(algorithm="native")
    model, positions = cut(build(cfg), group, plan), torch.arange(T)
    if cut is S.sequence_parallel:
        positions = S.own_tokens(positions, group)
    places = Places(0, torch.arange(B), positions)
    if cfg.dropout:
        place_dropout(model, places)
    if again:
        recompute(model, again)

    def loss_of(logits, targets):
        return vocabulary_cross_entropy(logits, targets, V, group).mean()

    logits, loss, gradients = train(model, loss_of, places)
    logits = gather_logits(logits, V, group)
    return logits, loss, gather_parameters(model, gradients), gather_parameters(model)


def errors(found, want):
    """The largest deviation of each of: logits, loss, gradients, weights."""

    def largest(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            return max(largest(a[name], b[name]) for name in b)
        return float((a - b).abs().max()) if a.shape == b.shape else float("inf")

    names = ("logits", "loss", "gradients", "weights")
    return {name: largest(a, b) for name, a, b in zip(names, found, want, strict=True)}


# -- equal to one process ------------------------------------------------------------------------


def some(names):
    """Each case with tokens divided."""
    return {name: [on_ranks(CASES[name])] for name in names}


def all_cases():
    """Each case; one with dropout in other ways, too."""
    found, cfg = some(CASES), CASES["dropout"]
    found["dropout"].append(on_ranks(cfg, parallelize, PLAN))
    found["dropout"] += [on_ranks(cfg, again=again) for again in ("full", "selective")]
    return found


@pytest.mark.parametrize("n", [2, 4])
def test_divided_tokens_give_the_numbers_of_one_process(n):
    ranks = launch(*[all_cases] if n == 2 else [some, ["sandwich", "dropout"]], world_size=n)
    for name in ranks[0]:
        want = one_process(CASES[name])
        for found in (x for rank in ranks for x in rank[name]):
            assert {k: e for k, e in errors(found, want).items() if not e < 1e-9} == {}, name


# -- what is sent, and what is kept --------------------------------------------------------------


def step(cut, cfg):
    """Operations and bytes of forward and backward; floats that blocks keep for backward."""
    tracer = Tracer()
    group = world(tracer=tracer)
    model, (tokens, _) = cut(build(cfg), group), batch()
    shapes = {}
    for name in ("blocks.0.norm1", "blocks.0.attn.q", "blocks.0", "norm", "head"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, a, y, name=name: shapes.update({name: y.shape}))
    tracer.clear()
    logits = model(tokens)
    forward = list(tracer.events)
    tracer.clear()
    logits.square().sum().backward()
    return forward, list(tracer.events), shapes


def both_ways(cfg):
    return step(parallelize, cfg), step(S.sequence_parallel, cfg)


@pytest.mark.parametrize("n", [2, 4])
def test_as_many_bytes_as_tensor_parallelism_and_once_more_in_backward(n):
    cfg = config(position="rope", n_layers=3)
    pairs = 2 * cfg.n_layers + 1  # branches, and the vocabulary's two ends
    part = (n - 1) / n * B * T * cfg.d_model * 8
    for tensor, sequence in launch(both_ways, cfg, world_size=n):
        forward, backward, shapes = tensor
        assert [e.op for e in forward] == [e.op for e in backward] == ["all_reduce"] * pairs
        assert sum(e.sent for e in forward) == sum(e.sent for e in backward) == 2 * pairs * part
        assert shapes["blocks.0"] == shapes["norm"] == (B, T, 16)
        forward, backward, shapes = sequence
        assert sorted(e.op for e in forward) == ["all_gather"] * pairs + ["reduce_scatter"] * pairs
        assert sum(e.sent for e in forward) == 2 * pairs * part
        # norms' weights (16 numbers) apart, the same again, and each gather a second time
        norms = [e for e in backward if e.op == "all_reduce"]
        assert len(norms) == 2 * cfg.n_layers + 1
        assert {e.sent for e in norms} == {2 * (n - 1) / n * 16 * 8}
        rest = [e for e in backward if e.op != "all_reduce"]
        assert [e.op for e in rest].count("reduce_scatter") == pairs
        assert [e.op for e in rest].count("all_gather") == 2 * pairs
        assert sum(e.sent for e in rest) == 3 * pairs * part
        # tokens are divided outside the branches, heads and entries inside
        assert shapes["blocks.0"] == shapes["norm"] == shapes["blocks.0.norm1"] == (B, T // n, 16)
        assert shapes["blocks.0.attn.q"] == (B, T, 16 // n)
        assert shapes["head"][:2] == (B, T)


def one_mlp(again):
    """Whether the gathered x is still there after the forward pass; gradients."""
    group, seen = world(), []
    cfg = config(n_layers=1, mlp="swiglu", bias=True)
    mlp = (S.sequence_parallel if again else parallelize)(build(cfg), group).blocks[0].mlp
    gather = S.gather_tokens

    def gathered(x, group):
        full = gather(x, group)
        seen.append(StorageWeakRef(full.untyped_storage()))
        return full

    rng = torch.Generator().manual_seed(group.index)
    x = torch.randn(B, T // group.size, 16, dtype=torch.float64, generator=rng, requires_grad=True)
    if again:
        S.gather_tokens = gathered
        y = S.gather_tokens(mlp(x), group)
        S.gather_tokens = gather
        seen.pop()
    else:
        mlp._forward_pre_hooks.clear()  # f, which `gather_tokens` is here
        y = mlp(gathered(x, group))
    there = [not x.expired() for x in seen]
    loss = y.square().sum() / (group.size if again else 1)
    wanted = [x, *mlp.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    return there, first, torch.autograd.grad(loss, wanted)


def both_mlps():
    return one_mlp(True), one_mlp(False)


def test_only_the_ranks_own_tokens_are_kept_for_backward():
    for (ours, *grads), (plain, *want) in launch(both_mlps, world_size=2):
        assert plain == [True] and ours == [False]  # both: gathered once
        for found in grads:
            for own, other in zip(found, want[0], strict=True):
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


# -- dropout -------------------------------------------------------------------------------------


def test_masks_are_independent_coins_with_the_right_bias():
    rows, positions = torch.arange(8), torch.arange(64)
    for p in (0.0, 0.1, 0.5, 0.9):
        kept = keep(3, 0, rows, positions, 64, p).double()  # 32,768 coins
        assert abs(kept.mean() - (1 - p)) <= 5 * (p * (1 - p) / kept.numel()) ** 0.5
    masks = [keep(s, site, rows, positions, 64, 0.5) for s in range(3) for site in range(3)]
    masks += [keep(-1, 0, rows + 8, positions, 64, 0.5), keep(0, 0, rows, positions + 64, 64, 0.5)]
    coins = torch.stack(masks).flatten(1).double() * 2 - 1
    off = coins @ coins.T / coins.shape[1] - torch.eye(len(coins))
    assert off.abs().max() < 5 / coins.shape[1] ** 0.5
    signs = masks[0].double() * 2 - 1  # neighbors along each axis
    for axis in range(3):
        n = signs.shape[axis] - 1
        product = (signs.narrow(axis, 0, n) * signs.narrow(axis, 1, n)).mean()
        assert abs(product) < 5 / signs.numel() ** 0.5


def test_a_mask_is_that_of_its_tokens():
    whole = keep(9, 4, torch.arange(5), torch.arange(7), 3, 0.4)
    rows = torch.tensor([4, 0])
    each = torch.tensor([[1, 6], [2, 2]])  # positions of their own for each row
    part = keep(9, 4, rows, each, 3, 0.4)
    assert torch.equal(part, torch.stack([whole[4, [1, 6]], whole[0, [2, 2]]]))
    x = torch.ones(2, 2, 3)
    assert torch.equal(drop(x, 0.4, Places(9, rows, each), 4), part / 0.6)


def test_placed_dropout_drops_in_training_only_and_at_every_site():
    cfg = config(dropout=0.5)
    model, plain = build(cfg), build(cfg)
    places = Places(0, torch.arange(B), torch.arange(T))
    place_dropout(model, places)
    tokens, _ = batch()
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    sites = []
    for module in (model.blocks[0].attn, model.blocks[0].mlp, model.blocks[1].attn):
        module.register_forward_hook(lambda m, a, y: sites.append(y == 0))
    first = model.train()(tokens)
    assert torch.equal(first, model(tokens))  # no state
    assert all(0.3 < x.double().mean() < 0.7 for x in sites)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(sites[:3], 2))
    places.seed = 1
    assert not torch.equal(first, model(tokens))


def test_a_stage_of_a_pipeline_drops_what_the_whole_model_drops():
    cfg = config(dropout=0.5, n_layers=3)
    places = Places(0, torch.arange(B), torch.arange(T))
    whole, stage = place_dropout(build(cfg), places), build(cfg)
    stage.blocks = stage.blocks[1:]
    place_dropout(stage, places, first_layer=1)
    x = torch.randn(B, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = x
    for block in whole.blocks[1:]:
        want = block(want)
    assert torch.equal(stage.body(x, torch.arange(T)), want)


# -- what has to fail ----------------------------------------------------------------------------


class PartialBias(RowLinear):
    """Forgets that each rank sees a part of the bias's gradient."""

    def forward(self, x):
        return S.scatter_tokens(F.linear(x, self.weight), self.group) + self.bias


class BiasEverywhere(RowLinear):
    """Adds the bias before the sum."""

    def forward(self, x):
        return S.scatter_tokens(F.linear(x, self.weight, f(self.bias, self.group)), self.group)


def partial_norms(model, group, plan):
    """Cuts the model, but forgets that norms see a part of the tokens."""
    return parallelize(model, group, plan)


BROKEN = {
    "bias": (S.sequence_parallel, {"blocks.*.mlp.down": PartialBias}, {"gradients", "weights"}),
    "bias added n times": (S.sequence_parallel, {"blocks.*.mlp.down": BiasEverywhere}, {"logits"}),
    "norms": (partial_norms, {}, {"gradients", "weights"}),
}


def broken():
    cfg = config(bias=True, n_layers=1, position="rope")
    return {
        name: on_ranks(cfg, cut, S.SEQUENCE_PLAN | plan) for name, (cut, plan, _) in BROKEN.items()
    }


def test_a_broken_variant_does_not_pass():
    want = one_process(config(bias=True, n_layers=1, position="rope"))
    for found in launch(broken, world_size=2):
        for name, (_, _, wrong) in BROKEN.items():
            off = {k for k, e in errors(found[name], want).items() if e > 1e-5}
            assert wrong <= off, name
            assert "logits" in wrong or not off & {"logits", "loss"}, name


BAD = [
    (lambda g: S.sequence_parallel(LM(config()), g)(batch()[0][:, :5]), "5 tokens cannot be div"),
    (lambda g: S.own_tokens(torch.arange(3), g), "3 tokens cannot be divided"),
    (lambda g: S.sequence_parallel(LM(config(n_kv_heads=1)), g), "1 key/value heads cannot"),
    (lambda g: place_dropout(LM(config()), Places(0, *[torch.arange(2)] * 2)), "has no dropout"),
    (lambda g: keep(0, 0, torch.arange(2), torch.arange(2), 2, 1.0), "p=1.0 must be in"),
    (
        lambda g: drop(torch.ones(2, 3, 4), 0.1, Places(0, torch.arange(2), torch.arange(2)), 0),
        r"x \(2, 3, 4\) has other rows or tokens than its places, \(2, 2\)",
    ),
]


def bad_input():
    """What each call of the table says."""
    said = []
    for call, _ in BAD:
        with pytest.raises(ValueError) as error:
            call(world())
        said.append(str(error.value))
    return said


def test_bad_input_is_named():
    for said in launch(bad_input, world_size=2):
        for text, (_, match) in zip(said, BAD, strict=True):
            assert re.search(match, text), (text, match)
