"""SUMMA and two-dimensional tensor parallelism on real ranks, against one process."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minillm.config import CHOICES, ModelConfig
from minillm.model import LM, KVCache
from minillm.parallel import collectives as C
from minillm.parallel import launch, layers2d, summa
from minillm.parallel import tensor2d as T
from minillm.parallel.dropout import Places, place_dropout
from minillm.parallel.group import Tracer, world
from minillm.parallel.mesh import Mesh
from minillm.parallel.slices import g
from minillm.parallel.tensor import parallelize
from minillm.recompute import recompute

B, S, V = 4, 5, 36
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def grid_of(q, **settings):
    return T.Grid.of(Mesh({"row": q, "column": q}, **settings))


# -- products ------------------------------------------------------------------------------------

SHAPES = {"ab": ("mk", "kn"), "abt": ("mk", "nk"), "atb": ("km", "kn")}
SIZES = [{"m": 8, "k": 4, "n": 6}, {"m": 2, "k": 10, "n": 2}, {"m": 4, "k": 2, "n": 12}]


def factors(form, sizes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(*(sizes[x] for x in names), dtype=torch.float64, generator=rng)
        for names in SHAPES[form]
    )
    return a, b


def product(a, b, form):
    return (a.T if form == "atb" else a) @ (b.T if form == "abt" else b)


def products(q):
    """C and both gradients of each form, whole; what this rank sent forward and backward."""
    tracer = Tracer()
    grid = grid_of(q, tracer=tracer)
    found = []
    for form in SHAPES:
        for sizes in SIZES if q == 2 else SIZES[:1]:
            a, b = factors(form, sizes)
            a, b = (T.tile(x, grid.block).clone().requires_grad_() for x in (a, b))
            tracer.clear()
            c = T.matmul(a, b, grid, form)
            forward = tracer.sent()
            weight = torch.arange(c.numel(), dtype=c.dtype).reshape(c.shape) + grid.all.index
            (c * weight).sum().backward()
            sent = forward, tracer.sent() - forward
            whole = [T.untile(x, grid.block) for x in (c, a.grad, b.grad, weight)]
            found.append((form, sizes, whole, sent))
    return found


def check_products(q, found):
    for form, sizes, (c, d_a, d_b, weight), (forward, backward) in found:
        a, b = (x.requires_grad_() for x in factors(form, sizes))
        want = product(a, b, form)
        torch.testing.assert_close(c, want.detach(), **CLOSE)
        for x, y in zip(
            (d_a, d_b), torch.autograd.grad((want * weight).sum(), (a, b)), strict=True
        ):
            torch.testing.assert_close(x, y, **CLOSE)
        expected = T.summa_bytes(**sizes, q=q, form=form, itemsize=8)
        assert (forward, backward) == (expected, 2 * expected), (form, sizes)


def test_one_rank_is_a_grid_and_sends_nothing():
    found = launch(products, 1, world_size=1, timeout=120)[0]
    assert len(found) == 3
    check_products(1, found)
    assert {sent for *_, sent in found} == {(0, 0)}


def small_model():
    """A fast check of the whole on 2 × 2 ranks, and of the products on the way."""
    return products(2), step_2d(CASES["modern"], 2)


@pytest.mark.slow
def test_products_and_a_model_on_four_ranks():
    want = one_process(CASES["modern"])
    for found, model in launch(small_model, world_size=4, timeout=120):
        assert len(found) == 9
        check_products(2, found)
        assert errors(model, want) == {}


@pytest.mark.slow
def test_products_on_nine_ranks():
    sizes = {"m": 6, "k": 9, "n": 3}

    def nine():
        tracer = Tracer()
        grid = grid_of(3, tracer=tracer)
        found = []
        for form in SHAPES:
            tracer.clear()
            c = T.matmul(*(T.tile(x, grid.block) for x in factors(form, sizes)), grid, form)
            sent = tracer.sent()
            found.append((form, sent, T.untile(c, grid.block)))
        return found

    for rank in launch(nine, world_size=9, timeout=120):
        for form, sent, c in rank:
            torch.testing.assert_close(c, product(*factors(form, sizes), form), **CLOSE)
            # nobody sends more than others, though a tree's root does in each broadcast
            assert sent == pytest.approx(T.summa_bytes(**sizes, q=3, form=form, itemsize=8))


# -- the model -----------------------------------------------------------------------------------


def config(**changes):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_len": 16} | changes
    )


CASES = {
    "modern": config(
        tie_embeddings=False, n_kv_heads=2, norm="rms", position="rope", mlp="swiglu", window=3
    ),
    "tied": config(),
    "biases": config(bias=True, qk_norm=True, embedding_norm=True, d_ff=34, logit_scale=0.5),
    "alibi": config(position="alibi", bias=True, placement="sandwich", tie_embeddings=False),
    "t5": config(position="t5", placement="post", n_kv_heads=4, mlp="geglu", bias=True),
    "deepnorm": config(position="sinusoidal", placement="deepnorm", init="xavier"),
    "hierarchical": config(position="hierarchical", norm="rms", n_layers=1),
    "dropout": config(dropout=0.2, bias=True, norm="rms"),
    "dropout after a norm": config(dropout=0.2, embedding_norm=True, position="sinusoidal"),
}
MLPS = {mlp: config(n_layers=1, mlp=mlp, bias=True) for mlp in CHOICES["mlp"]}


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
    tokens = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(5))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, tokens, loss_of, norm_of, places, steps=3):
    """Logits, loss, gradients and their norm in the first step; weights after some of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        places.seed = step
        optimizer.zero_grad()
        logits = model(tokens)
        loss = loss_of(logits)
        loss.backward()
        if not step:
            named = model.named_parameters(remove_duplicate=False)
            gradients = {name: p.grad.clone() for name, p in named}
            found = logits.detach(), loss.detach(), gradients, norm_of(model)
        optimizer.step()
    return dict(zip(NAMES, (*found, model.state_dict()), strict=True))


NAMES = ("logits", "loss", "gradients", "norm", "weights")


def one_process(cfg):
    model, (tokens, targets) = build(cfg), batch()
    places = Places(0, torch.arange(B), torch.arange(S))
    if cfg.dropout:
        place_dropout(model, places)

    def loss_of(logits):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def norm_of(model):
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm()

    return train(model, tokens, loss_of, norm_of, places)


def step_2d(cfg, q, plan=T.PLAN_2D):
    """What `one_process` gives, put together from a grid."""
    grid = grid_of(q, algorithm="native")
    model = T.parallelize_2d(build(cfg), grid, plan)
    tokens, targets = (T.own_rows(x, grid) for x in batch())
    places = Places(0, T.own_rows(torch.arange(B), grid), torch.arange(S))
    if cfg.dropout:
        T.place_dropout_2d(model, places, grid)

    def loss_of(logits):
        return T.cross_entropy_2d(logits, targets, V, grid)

    found = train(model, tokens, loss_of, lambda m: T.grad_norm_2d(m, grid), places)
    return found | {
        "logits": T.gather_logits_2d(found["logits"], grid),
        "gradients": T.gather_2d(model, found["gradients"]),
        "weights": T.gather_2d(model),
    }


def errors(found, want, above=1e-9):
    """What deviates: logits, loss, gradients, norm, weights."""

    def largest(a, b):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            return max(largest(a[name], b[name]) for name in b)
        return float((a - b).abs().max()) if a.shape == b.shape else float("inf")

    off = {name: largest(found[name], want[name]) for name in want}
    return {name: e for name, e in off.items() if not e < above}


@pytest.mark.slow
def test_every_kind_of_model_equals_one_process():
    cases = CASES | MLPS
    found = launch(lambda: {n: step_2d(c, 2) for n, c in cases.items()}, world_size=4, timeout=240)
    for name, cfg in cases.items():
        want = one_process(cfg)
        for rank in found:  # each has the whole result
            assert errors(rank[name], want) == {}, name


def frozen(model):
    """Some weights do not learn."""
    for p in (model.blocks[0].mlp.up.weight, model.blocks[1].attn.q.bias, model.norm.weight):
        p.requires_grad_(False)
    return model


def twice(model, tokens, loss_of):
    """Gradients of two passes, accumulated."""
    for _ in range(2):
        loss_of(model(tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def beside_others(cfg):
    """One grid of a mesh that has other axes too, with recomputation and accumulation."""
    grid = T.Grid.of(Mesh({"row": 2, "data": 2, "column": 2}))
    model = T.parallelize_2d(frozen(build(cfg)), grid)
    recompute(model, "full")
    tokens, targets = (T.own_rows(x, grid) for x in batch())
    grads = twice(model, tokens, lambda logits: T.cross_entropy_2d(logits, targets, V, grid))
    return T.gather_2d(model, grads)


@pytest.mark.slow
def test_a_grid_in_a_larger_mesh_with_frozen_weights_recomputation_and_accumulation():
    cfg, (tokens, targets) = CASES["biases"], batch()
    want = twice(
        frozen(build(cfg)), tokens, lambda x: F.cross_entropy(x.flatten(0, 1), targets.flatten())
    )
    for grads in launch(beside_others, cfg, world_size=8, timeout=120):
        assert grads.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(grads[name], grad, **CLOSE)


def whole_and_cut():
    """What a rank holds; generation with a cache; a state dict cut for it again."""
    grid, cfg = grid_of(2), CASES["modern"]
    model, full = T.parallelize_2d(build(cfg), grid), build(cfg).state_dict()
    kinds = {path: type(m).__name__ for path, m in model.named_modules()}
    held = {name: x.clone() for name, x in model.state_dict().items()}
    tokens, heads = T.own_rows(batch()[0], grid), cfg.kv_heads // grid.side
    cache = KVCache(cfg.n_layers, B // 2, heads, S, cfg.d_head, torch.float64)
    with torch.no_grad():
        parts = [model(x, cache=cache) for x in tokens.split([3, 1, 1], dim=1)]
    for p in model.parameters():
        p.data.zero_()
    model.load_state_dict(T.shard_2d(model, full))
    again = all(torch.equal(x, held[name]) for name, x in model.state_dict().items())
    return kinds, held, T.gather_logits_2d(torch.cat(parts, 1), grid), again


@pytest.mark.slow
def test_each_rank_holds_its_blocks_and_generates_with_its_heads_and_rows():
    model = build(CASES["modern"])
    want, full = model(batch()[0]).detach(), model.state_dict()
    for rank, (kinds, held, logits, again) in enumerate(launch(whole_and_cut, timeout=120)):
        i, j = divmod(rank, 2)
        assert again and held.keys() == full.keys()
        torch.testing.assert_close(logits, want, **CLOSE)
        assert not {"Linear", "Embedding", "RMSNorm"} & set(kinds.values())
        assert kinds["norm"] == kinds["blocks.1.norm2"] == "Norm2d"
        for name, x in full.items():
            places = (j,) if x.ndim == 1 else (i, j) if name in FLAT else (j, i)
            for axis, place in enumerate(places):  # halves, by hand
                half = x.shape[axis] // 2
                x = x[place * half :][:half] if axis == 0 else x[:, place * half :][:, :half]
            assert torch.equal(held[name], x), name


FLAT = ("tokens.weight", "head.weight")
"""block i, j as stored; that of a Linear's [out, in] lies the other way round"""


# -- bytes ---------------------------------------------------------------------------------------


def layer_traffic(both):
    """What a layer sends, by operation, forward and backward: cut in one and in two directions."""
    cfg, b, t = both
    found = []
    for cut in ("1d", "2d"):
        tracer = Tracer()
        model = LM(cfg, seed=0)
        if cut == "1d":
            block, rows, width = parallelize(model, world(tracer=tracer)).blocks[0], b, cfg.d_model
        else:
            block = T.parallelize_2d(model, grid_of(2, tracer=tracer)).blocks[0]
            rows, width = b // 2, cfg.d_model // 2
        x = torch.randn(rows, t, width, requires_grad=True)
        tracer.clear()
        y = block(x)
        forward = {op: tracer.sent(op) for op in ("broadcast", "reduce", "all_reduce")}
        tracer.clear()
        y.sum().backward()
        backward = {op: tracer.sent(op) for op in forward}
        found.append((forward, backward, sum(p.numel() for p in block.parameters())))
    return found


@pytest.mark.slow
def test_a_layer_sends_what_the_formulas_say():
    """Counted at each send; norms come on top: 1 number a token and norm (LayerNorm: 2)."""
    b, t, d = 2, 6, 16
    cfg = config(d_model=d, norm="rms", position="rope", d_ff=4 * d)
    for one, two in launch(layer_traffic, (cfg, b, t), timeout=120):
        cost = T.bytes_1d(b, t, d, 4)
        assert [sum(x.values()) for x in one[:2]] == [cost.forward, cost.backward]
        assert one[0]["all_reduce"] == cost.forward == 2 * 2 * 3 / 4 * b * t * d * 4
        cost = T.bytes_2d(b, t, d, 4)
        assert cost.forward == 1 / 4 * (7 * b * t * d + 12 * d * d) * 4  # as published
        sent = [x["broadcast"] + x["reduce"] for x in two[:2]]
        assert sent == [cost.forward, cost.backward]
        norms = 2 * (b // 2 * t) * 4  # two norms, 2 (q-1)/q numbers for each of own tokens
        weights = 2 * (d // 2) * 4  # the gradient of what a column shares
        assert two[0]["all_reduce"] == norms and two[1]["all_reduce"] == norms + weights
        assert two[0]["reduce"] == 0 < two[1]["reduce"]
        # all but the norms in four parts
        assert two[2] == 12 * d * d // 4 + d and one[2] == 12 * d * d // 4 + 2 * d


def test_cost_formulas_meet_where_they_should():
    b, t, d = 2, 128, 64
    for n in (1, 4, 16, 64):
        assert T.bytes_25d(b, t, d, n, 1) == T.bytes_2d(b, t, d, n)
        flat = T.bytes_25d(b, t, d, n, depth=n)  # q = 1: data parallel
        assert flat.forward == 0
        assert flat.backward == pytest.approx(2 * (n - 1) / n * 12 * d * d * 4)
        assert T.bytes_2d(b, t, d, n).memory <= T.bytes_1d(b, t, d, n).memory
    alone = [cost(b, t, d, 1) for cost in (T.bytes_1d, T.bytes_2d, T.bytes_3d)]
    assert all(c.forward == c.backward == 0 and c == alone[0] for c in alone)
    assert alone[0].memory == (12 * d * d + (7 + 9) * b * t * d) * 4
    # a weight in 64 parts (2-D, 3-D), but in 64 / 4 with a depth of 4, where fewer tokens travel
    two, deep, cube = T.bytes_2d(b, t, d, 64), T.bytes_25d(b, t, d, 64, 4), T.bytes_3d(b, t, d, 64)
    assert two.memory == cube.memory == pytest.approx(alone[0].memory / 64)
    assert deep.memory - two.memory == pytest.approx(12 * d * d * 4 * (4 - 1) / 64)
    long = (T.bytes_2d(1, 10**6, d, 64), T.bytes_25d(1, 10**6, d, 64, 4))
    assert long[1].forward < long[0].forward


# -- what has to fail ----------------------------------------------------------------------------


class OwnStatistics(layers2d.Norm2d):
    """The mean over own columns only: forgets the sum along the row."""

    def _mean(self, x):
        return x.mean(-1, keepdim=True)


class StatisticsForward(layers2d.Norm2d):
    """Takes the sum whose backward pass does not sum."""

    def _mean(self, x):
        return g(x.sum(-1, keepdim=True), self.grid.row) / self.width


class OwnRowsBias(layers2d.SummaLinear):
    """Forgets that other rows of the batch use the same bias."""

    def forward(self, x):
        return self.readers.read(self, x) + self.bias


class OwnTable(layers2d.Embedding2d):
    """Looks into its own block of the vocabulary only."""

    def forward(self, tokens):
        half = self.num_embeddings // 2
        here = tokens // half == self.grid.column.index
        return F.embedding(tokens % half, self.weight).masked_fill(~here[..., None], 0.0)


def with_collective(name, broken, cfg):
    """A step in which SUMMA's broadcasts or reductions are others."""
    kept = getattr(C, name)
    summa.C = SimpleNamespace(**{**vars(C), name: partial(broken, kept)})
    try:
        return step_2d(cfg, 2)
    finally:
        summa.C = C


def next_root(collective, x, group, root):
    return collective(x, group, (root + 1) % group.size)


def own_part(collective, x, group, root):
    return x


GRADIENTS = {"gradients", "weights"}
BROKEN = {
    "statistics of own columns": ({"norm": OwnStatistics}, set(NAMES)),
    "statistics not summed backward": ({"norm": StatisticsForward}, GRADIENTS),
    "bias of own rows": ({"blocks.*.attn.q": OwnRowsBias}, GRADIENTS),
    "own vocabulary only": ({"tokens": OwnTable}, set(NAMES)),
    "norm of heads not summed": ({"blocks.*.attn.k_norm": lambda m, grid: hidden(m)}, GRADIENTS),
}
WIRES = {"broadcast": (next_root, set(NAMES)), "reduce": (own_part, set(NAMES))}
SMALL = config(bias=True, qk_norm=True, n_layers=1)


def hidden(module):
    """As it is, and not seen as whole."""
    module.tiles = {}
    return module


def broken():
    found = {n: step_2d(SMALL, 2, {**T.PLAN_2D, **change}) for n, (change, _) in BROKEN.items()}
    for name, (change, _) in WIRES.items():
        found[name] = with_collective(name, change, SMALL)
    return found | {"nothing": step_2d(SMALL, 2)}


@pytest.mark.slow
def test_a_broken_variant_does_not_pass():
    want, found = one_process(SMALL), launch(broken, timeout=120)
    for name, (_, wrong) in (BROKEN | WIRES).items():
        off = set().union(*(errors(rank[name], want, above=1e-6) for rank in found))
        assert wrong <= off, name
        if "logits" not in wrong:
            assert not off & {"logits", "loss"}, name
    assert all(errors(rank["nothing"], want) == {} for rank in found)


def cut(**changes):
    return lambda grid: T.parallelize_2d(LM(config(**changes)), grid)


BAD = [
    (cut(n_kv_heads=1), "4 query and 1 key/value heads cannot be divided among 2 ranks"),
    (cut(vocab_size=37), r"axis 0 of \(37, 16\) must be a multiple of 2, the side of the grid"),
    (cut(d_ff=33), r"axis 0 of \(33, 16\) must be a multiple of 2"),
    (lambda g: T.parallelize_2d(T.parallelize_2d(LM(config()), g), g), "not for a SummaLinear"),
    (lambda g: T.parallelize_2d(LM(config()), g, {"head": T.Head2d}), "are tied"),
    (
        lambda g: T.parallelize_2d(LM(config(n_layers=1)), g, {"blocks.*.attn.q": T.SummaLinear}),
        r"leaves \['tokens.weight', 'position.table', 'blocks.0.attn.k.weight'",
    ),
    (lambda g: T.parallelize_2d(LM(config()), Mesh({"data": 4})), "a grid needs axes row and col"),
    (lambda g: T.Grid.of(Mesh({"row": 4, "column": 1})), r"not Mesh\(row=4, column=1\)"),
    (lambda g: T.own_rows(torch.ones(3, 5), g), r"axis 0 of \(3, 5\) must be a multiple of 2"),
    (lambda g: T.matmul(torch.ones(2, 3), torch.ones(4, 2), g), r"\(2, 3\) and \(4, 2\) do not"),
    (lambda g: T.matmul(torch.ones(2), torch.ones(2, 2), g), r"blocks \(2,\) and \(2, 2\)"),
    (lambda g: T.matmul(torch.ones(2, 2), torch.ones(2, 2), g, "ba"), "form='ba' must be one of"),
    (lambda g: T.gather_2d(LM(config())), "no parameter of this LM is cut in two directions"),
    (lambda g: cut()(g)(torch.tensor([[0, V]])), "tokens run from 0 to 36, the model knows 0 to"),
    (lambda g: T.summa_bytes(2, 2, 2, 2, form="ba"), "form='ba' must be one of"),
    (lambda g: T.bytes_2d(1, 1, 1, 8), "n=8 ranks are no square of a number"),
    (lambda g: T.bytes_3d(1, 1, 1, 9), "n=9 ranks are no cube of a number"),
    (lambda g: T.bytes_25d(1, 1, 1, 8, 3), "n=8 ranks are not depth=3 grids"),
]


def bad_input():
    """What each call of the table says."""
    grid, said = grid_of(2), []
    for call, _ in BAD:
        with pytest.raises(ValueError) as error:
            call(grid)
        said.append(str(error.value))
    return said


@pytest.mark.slow
def test_bad_input_is_named():
    for said in launch(bad_input, timeout=120):
        for text, (_, match) in zip(said, BAD, strict=True):
            assert re.search(match, text), (text, match)
