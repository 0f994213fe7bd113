"""Tensor parallelism on real ranks against one process: logits, loss, gradients, weights, bytes."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import CHOICES, ModelConfig
from minillm.model import LM, KVCache
from minillm.parallel import collectives as C
from minillm.parallel import launch
from minillm.parallel.group import Tracer, world
from minillm.parallel.slices import bounds, f, g, shard
from minillm.parallel.tensor import (
    PLAN,
    ColumnLinear,
    RowLinear,
    VocabularyEmbedding,
    cuts,
    gather_parameters,
    grad_norm,
    parallelize,
    shard_parameters,
)
from minillm.parallel.vocabulary import gather_logits, vocabulary_cross_entropy

pytestmark = pytest.mark.slow  # many ranks, many times

B, T, V = 2, 6, 37
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def config(**changes):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_len": 16} | changes
    )


CASES = {
    "tied": config(),
    "modern": config(
        tie_embeddings=False, n_kv_heads=2, norm="rms", position="rope", mlp="swiglu", window=4
    ),
    "biases": config(bias=True, qk_norm=True, embedding_norm=True, d_ff=33, logit_scale=0.5),
    "alibi": config(position="alibi", bias=True, placement="sandwich", tie_embeddings=False),
    "t5": config(position="t5", placement="post", n_kv_heads=4, mlp="geglu", bias=True),
    "deepnorm": config(position="sinusoidal", placement="deepnorm", init="xavier"),
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


def batch(vocab=V):
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(vocab, (B, T + 1), generator=rng)
    return tokens[:, :-1], tokens[:, 1:]


def train(model, loss_of, norm_of, steps=3):
    """Logits, loss, gradients and their norm in the first step; then three steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, targets = batch(model.cfg.vocab_size)
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(tokens)
        loss = loss_of(logits, targets)
        loss.backward()
        if not step:
            named = model.named_parameters(remove_duplicate=False)
            gradients = {name: p.grad.clone() for name, p in named}
            found = logits.detach(), loss.detach(), gradients, norm_of(model)
        optimizer.step()
    return found


def one_process(cfg):
    """The same model, whole."""
    model = build(cfg)

    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def norm_of(model):
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    return *train(model, loss_of, norm_of), model.state_dict()


def cut(cfg, group, plan=PLAN):
    """The model in slices, how its loss is computed, and its gradient's length."""
    model = parallelize(build(cfg), group, plan)

    def loss_of(logits, targets):
        return vocabulary_cross_entropy(logits, targets, cfg.vocab_size, group).mean()

    return model, loss_of, lambda model: grad_norm(model, group)


def on_ranks(cfg, plan=PLAN):
    """What `one_process` gives, put together again."""
    group = world(algorithm="native")
    model, *how = cut(cfg, group, plan)
    logits, loss, gradients, norm = train(model, *how)
    logits = gather_logits(logits, cfg.vocab_size, group)
    return logits, loss, gather_parameters(model, gradients), norm, gather_parameters(model)


def errors(found, want):
    """The largest deviation of each of: logits, loss, gradients, norm, weights."""
    assert found[2].keys() == want[2].keys() and found[4].keys() == want[4].keys()

    def largest(a, b):
        if isinstance(a, dict):
            return max(largest(a[name], b[name]) for name in b)
        return float((a - b).abs().max()) if a.shape == b.shape else float("inf")

    names = ("logits", "loss", "gradients", "norm", "weights")
    return {name: largest(a, b) for name, a, b in zip(names, found, want, strict=True)}


# -- equal to one process ------------------------------------------------------------------------


def some(cases):
    return {name: on_ranks(cfg) for name, cfg in cases.items()}


THREE = {"three heads": config(n_heads=6, n_kv_heads=3, d_model=24, bias=True)}
MLPS = {mlp: config(n_layers=1, mlp=mlp, bias=True) for mlp in CHOICES["mlp"]}


@pytest.mark.parametrize(
    ("n", "cases"),
    [(1, {"tied": CASES["tied"]}), (2, CASES | MLPS), (3, THREE), (4, CASES)],
    ids=["1", "2", "3", "4"],
)
def test_every_kind_of_model_equals_one_process(n, cases):
    cases = {name: c for name, c in cases.items() if c.n_heads % n == c.kv_heads % n == 0}
    found = launch(some, cases, world_size=n)
    assert len(cases) == {1: 1, 2: 16, 3: 1, 4: 5}[n]
    for name, cfg in cases.items():
        want = one_process(cfg)
        for rank in found:  # each has the whole result
            assert {k: e for k, e in errors(rank[name], want).items() if not e < 1e-9} == {}, name


def checkpoints(saved):
    group = world()
    model = parallelize(build(CASES["modern"]), group)
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(shard_parameters(model, saved))
    tokens, _ = batch()
    return gather_logits(model(tokens), V, group).detach(), gather_parameters(model)


def test_a_checkpoint_of_any_layout_loads_into_any_other():
    whole = build(CASES["modern"])
    want = whole(batch()[0]).detach()
    saved = whole.state_dict()
    for n in (2, 1, 2):  # what one layout has saved, the next one loads
        logits, saved = launch(checkpoints, saved, world_size=n)[n - 1]
        torch.testing.assert_close(logits, want, **CLOSE)
        assert saved.keys() == whole.state_dict().keys()
        assert all(torch.equal(saved[k], x) for k, x in whole.state_dict().items())


def generate():
    group = world()
    cfg = CASES["modern"]
    model, (tokens, _) = parallelize(build(cfg), group), batch()
    cache = KVCache(cfg.n_layers, B, cfg.kv_heads // group.size, T, cfg.d_head, torch.float64)
    with torch.no_grad():
        parts = [model(x, cache=cache) for x in tokens.split([4, 1, 1], dim=1)]
        return gather_logits(torch.cat(parts, 1), V, group)


def test_generation_keeps_only_the_ranks_own_heads_in_its_cache():
    want = build(CASES["modern"])(batch()[0]).detach()
    for found in launch(generate, world_size=2):
        torch.testing.assert_close(found, want, **CLOSE)


# -- what each rank holds, and what is sent ------------------------------------------------------


def holdings(cfg):
    group = world()
    model = parallelize(build(cfg), group)
    kinds = {path: type(m).__name__ for path, m in model.named_modules()}
    return (
        kinds,
        {k: v.clone() for k, v in model.state_dict().items()},
        cuts(model),
        str(model.head),
    )


def test_modules_are_replaced_and_each_rank_holds_its_slice():
    cfg = config(qk_norm=True, bias=True, d_ff=33, mlp="geglu")
    whole = build(cfg).state_dict()
    linear = {"q": 0, "k": 0, "v": 0, "up": 0, "gate": 0, "out": 1, "down": 1}
    for rank, (kinds, held, cut_as, shown) in enumerate(launch(holdings, cfg, world_size=4)):
        assert kinds["tokens"] == "VocabularyEmbedding" and kinds["head"] == "ColumnLinear"
        assert kinds["blocks.1.attn.q_norm"] == "Shared" and kinds["norm"] == "LayerNorm"
        assert "Linear" not in kinds.values() and "Embedding" not in kinds.values()
        assert "37 along axis 0 over 4 ranks" in shown
        assert held.keys() == whole.keys()
        for name, full in whole.items():
            part = name.split(".")[-2] if "." in name else ""
            axis = linear.get(part, 0 if part in ("tokens", "head") else None)
            if name.endswith("bias") and axis == 1:
                axis = None
            size = 0 if axis is None else full.shape[axis]
            want = full
            if axis is not None:  # by hand: what lies between two multiples of size / 4
                a, b = (int(size * i / 4) for i in (rank, rank + 1))
                want = full[a:b] if axis == 0 else full[:, a:b]
            assert torch.equal(held[name], want), name
            assert (name in cut_as) == (axis is not None)


def traffics(cfgs):
    return [traffic(cfg) for cfg in cfgs]


def traffic(cfg):
    """What one training step sends: in the model, in the loss, in joining the logits instead."""
    tracer = Tracer()
    group = world(tracer=tracer)
    model, loss_of, _ = cut(cfg, group)
    tokens, targets = batch(cfg.vocab_size)
    tracer.clear()
    model.tokens(tokens)
    embedding = tracer.sent("all_reduce")
    tracer.clear()
    logits = model(tokens)
    forward = tracer.count("all_reduce")
    tracer.clear()
    loss = loss_of(logits, targets)
    ops = [e.op for e in tracer.events]
    sent = tracer.sent()
    tracer.clear()
    loss.backward()
    backward = [e.op for e in tracer.events]
    tracer.clear()
    gather_logits(logits.detach(), cfg.vocab_size, group)
    return embedding, forward, ops, sent, backward, tracer.sent()


@pytest.mark.parametrize("n", [2, 4])
def test_four_sums_a_layer_and_the_loss_sends_less_than_four_numbers_a_token(n):
    cfgs = [config(vocab_size=v, n_layers=layers) for layers, v in ((1, 64), (3, 64), (1, 640))]
    for rank in launch(traffics, cfgs, world_size=n):
        for cfg, (embedding, forward, ops, sent, backward, joined) in zip(cfgs, rank, strict=True):
            # one more each: g of the embedding, f of the head
            assert forward == 2 * cfg.n_layers + 1
            assert backward == ["all_reduce"] * (2 * cfg.n_layers + 1)
            assert embedding == 2 * (n - 1) / n * B * T * cfg.d_model * 8
            assert ops == ["all_to_all", "all_gather"]
            assert sent == 4 * (n - 1) / n * B * T * 8
            assert joined == (n - 1) / n * B * T * cfg.vocab_size * 8  # grows with the vocabulary


# -- the pieces ----------------------------------------------------------------------------------


def conjugate():
    """<f(x), y> with its gradient, and <g(x), y> with its own, for the adjoint of each."""
    group = world()
    rng = torch.Generator().manual_seed(group.index)
    x, y = (torch.randn(3, dtype=torch.float64, generator=rng) for _ in range(2))
    found = []
    for forward in (f, g):
        x = x.detach().requires_grad_()
        z = forward(x, group)
        found.append((z.detach(), torch.autograd.grad(z, x, y)[0]))
    return x.detach(), y, found


def test_f_and_g_are_conjugate():
    ranks = launch(conjugate, world_size=3)
    x_sum, y_sum = (sum(r[i] for r in ranks) for i in (0, 1))
    for x, y, ((fx, f_back), (gx, g_back)) in ranks:
        assert torch.equal(fx, x) and torch.equal(g_back, y)
        torch.testing.assert_close(gx, x_sum, **CLOSE)
        torch.testing.assert_close(f_back, y_sum, **CLOSE)


def both_losses(vocab):
    return losses(vocab, torch.float64), losses(vocab, torch.bfloat16)


def losses(vocab, dtype):
    """Loss and gradient for all this rank's logits, some far apart, with z-loss and weights."""
    group = world()
    rng = torch.Generator().manual_seed(vocab)
    full = (torch.randn(3, 5, vocab, generator=rng) * 40).to(dtype)
    targets = torch.randint(vocab, (3, 5), generator=rng)
    weight = torch.rand(3, 5, generator=rng, dtype=torch.float64)
    mine = shard(full, -1, group).clone().requires_grad_()
    loss = vocabulary_cross_entropy(mine, targets, vocab, group, z_loss=1e-3)
    (grad,) = torch.autograd.grad((loss * weight).sum(), mine)
    joined = mine.detach().requires_grad_()
    plain = F.cross_entropy(gather_logits(joined, vocab, group).flatten(0, 1), targets.flatten())
    (through,) = torch.autograd.grad(plain, joined)
    return full, targets, weight, loss.detach(), grad, through


@pytest.mark.parametrize(("n", "vocab"), [(1, 5), (2, 2), (4, 11), (3, 64)])
def test_the_loss_over_a_divided_vocabulary(n, vocab):
    double, half = zip(*launch(both_losses, vocab, world_size=n), strict=True)
    for ranks, close in ((double, CLOSE), (half, {"rtol": 2e-2, "atol": 2e-3})):
        dtype = ranks[0][0].dtype
        full, targets, weight = ranks[0][:3]
        wide = full.double().requires_grad_()
        want = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
        want = want + 1e-3 * wide.logsumexp(-1).square()
        (grad,) = torch.autograd.grad((want * weight).sum(), wide)
        plain = F.cross_entropy(wide.flatten(0, 1), targets.flatten())
        (through,) = torch.autograd.grad(plain, wide)
        found = torch.cat([r[4] for r in ranks], -1).double()
        torch.testing.assert_close(found, grad, **close)
        torch.testing.assert_close(torch.cat([r[5] for r in ranks], -1).double(), through, **close)
        for rank in ranks:
            assert rank[4].dtype == dtype
            exact = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(rank[3].double(), want.detach(), **exact)


def test_shares_cover_everything_and_differ_by_one():
    group = world()
    assert bounds(7, group) == (0, 7)
    for n in range(1, 9):
        many = group.with_(ranks=tuple(range(n)))
        for size in range(n, 40):
            ends = [bounds(size, many, i) for i in range(n)]
            assert ends[0][0] == 0 and ends[-1][1] == size
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
            assert {b - a for a, b in ends} <= {size // n, -(-size // n)}


# -- what has to fail ----------------------------------------------------------------------------


class BiasEverywhere(RowLinear):
    """Adds the bias before the sum."""

    def forward(self, x):
        return g(F.linear(x, self.weight, self.bias), self.group)


class NoSum(RowLinear):
    """Forgets g."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class SumTwice(RowLinear):
    """Takes the collective whose backward pass sums as well."""

    def forward(self, x):
        return C.all_reduce(F.linear(x, self.weight), self.group) + self.bias


def nothing(module, group):
    return module


BROKEN = {
    "bias added n times": ({"blocks.*.mlp.down": BiasEverywhere}, {"logits", "loss"}),
    "no sum forward": ({"blocks.*.attn.out": NoSum}, {"logits", "loss"}),
    "sum in both directions": ({"blocks.*.attn.out": SumTwice}, {"gradients", "weights"}),
    "no sum backward": ({"blocks.*.mlp": nothing}, {"gradients", "weights"}),
    "no sum for a norm of heads": ({"blocks.*.attn.k_norm": nothing}, {"gradients", "weights"}),
}


def broken():
    cfg = config(bias=True, qk_norm=True, n_layers=1)
    return {name: on_ranks(cfg, PLAN | changes) for name, (changes, _) in BROKEN.items()}


def test_a_broken_variant_does_not_pass():
    want = one_process(config(bias=True, qk_norm=True, n_layers=1))
    found = launch(broken, world_size=2)[1]
    for name, (_, wrong) in BROKEN.items():
        off = {k for k, e in errors(found[name], want).items() if e > 1e-5}
        assert wrong <= off, name
        if "gradients" in wrong:
            assert not off & {"logits", "loss"}, name


BAD = [
    (
        lambda g: parallelize(LM(config(n_kv_heads=1)), g),
        "4 query and 1 key/value heads cannot",
    ),
    (lambda g: parallelize(LM(config(n_heads=1)), g), "1 query and 1 key/value heads"),
    (lambda g: parallelize(LM(config(vocab_size=1)), g), "1 entries are too few for 2 ranks"),
    (
        lambda g: parallelize(LM(config()), g, {"blocks.*.mlpp.up": ColumnLinear}),
        "leads nowhere",
    ),
    (lambda g: parallelize(LM(config()), g, {"blocks.*.mlp.gate": ColumnLinear}), "no entry"),
    (lambda g: parallelize(LM(config()), g, {"tokens": VocabularyEmbedding}), "are tied"),
    (lambda g: parallelize(parallelize(LM(config()), g), g), "not for a ColumnLinear"),
    (lambda g: ColumnLinear(nn.Embedding(4, 4), g), "stands for a Linear, not for a Embedding"),
    (lambda g: cuts(LM(config())), "no parameter of this LM is cut"),
    (lambda g: parallelize(LM(config()), g)(torch.tensor([[0, V]])), "the model knows 0 to 36"),
    (
        lambda g: shard_parameters(
            parallelize(LM(config()), g), {"tokens.weight": torch.ones(9, 16)}
        ),
        r"tokens.weight \(9, 16\) must have 37 along axis 0",
    ),
    (
        lambda g: vocabulary_cross_entropy(torch.ones(2, 4), torch.tensor([0, 8]), 8, g),
        "targets run from 0 to 8, of a vocabulary of 8",
    ),
    (
        lambda g: vocabulary_cross_entropy(torch.ones(2, 8), torch.tensor([0, 1]), 8, g),
        r"logits \(2, 8\) must be \(2, 4\): entries . to . of 8",
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
