"""Norms, MLPs and blocks against their formulas in fp64, PyTorch's modules and published tables."""

import csv
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import CHOICES, ModelConfig
from minillm.model.block import Block, initialize
from minillm.model.lm import LM
from minillm.model.mlp import MLP
from minillm.model.norm import LayerNorm, RMSNorm, deepnorm_constants, make_norm

PUBLISHED = Path(__file__).resolve().parents[1] / "assets/data/deepnorm.csv"


def normal(*shape, seed=0, size=1.0):
    rng = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=rng, dtype=torch.float64)


def config(**changes):
    shape = {"vocab_size": 31, "d_model": 24, "n_layers": 2, "n_heads": 4, "max_len": 20}
    return ModelConfig(**shape | changes)


def randomize(module, seed=0):
    """Every parameter away from its special starting value (ones, zeros, tiny)."""
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=rng, dtype=torch.float64) + (p.ndim == 1)
    return module.double()


def layer_norm(x, weight, bias, eps):
    """One vector at a time, in plain Python."""
    rows = []
    for row in x.flatten(0, -2).tolist():
        mean = sum(row) / len(row)
        scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + eps)
        rows.append([(v - mean) * scale for v in row])
    y = torch.tensor(rows, dtype=torch.float64).view(x.shape) * weight
    return y if bias is None else y + bias


def rms_norm(x, weight, eps):
    rows = []
    for row in x.flatten(0, -2).tolist():
        scale = 1 / math.sqrt(sum(v * v for v in row) / len(row) + eps)
        rows.append([v * scale for v in row])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape) * weight


# --- norms


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 24), (2, 7), (1, 2, 2, 33)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_norms_equal_their_formulas(shape, eps, size):
    x = normal(*shape, size=size) + size
    for bias in (True, False):
        ours = randomize(LayerNorm(shape[-1], eps, bias))
        want = layer_norm(x, ours.weight, ours.bias, eps)
        torch.testing.assert_close(ours(x), want, rtol=1e-10, atol=1e-10)
    ours = randomize(RMSNorm(shape[-1], eps))
    torch.testing.assert_close(ours(x), rms_norm(x, ours.weight, eps), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_equal_pytorch_in_every_dtype(dtype):
    x = normal(3, 5, 24).to(dtype)
    pairs = [
        (LayerNorm(24, 1e-6, True), nn.LayerNorm(24, 1e-6)),
        (LayerNorm(24, 1e-6, False), nn.LayerNorm(24, 1e-6, bias=False)),
        (RMSNorm(24, 1e-6), nn.RMSNorm(24, 1e-6)),
    ]
    for ours, theirs in pairs:
        randomize(ours)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        theirs.load_state_dict(ours.state_dict())  # the names agree, too
        assert ours(x).dtype == dtype
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("norm", [LayerNorm(7), RMSNorm(7)])
def test_gradients_of_norms(norm):
    x = normal(2, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(randomize(norm), (x,))


def test_what_each_norm_ignores():
    x = normal(4, 24)
    layer, rms = LayerNorm(24, 1e-12).double(), RMSNorm(24, 1e-12).double()
    torch.testing.assert_close(layer(3 * x + 5), layer(x))
    torch.testing.assert_close(rms(3 * x), rms(x))
    assert (rms(x + 5) - rms(x)).abs().max() > 0.1  # a shift is seen
    torch.testing.assert_close(rms(x - x.mean(-1, keepdim=True)), layer(x))


def test_make_norm_reads_the_config():
    for norm, bias in itertools.product(CHOICES["norm"], (True, False)):
        made = make_norm(config(norm=norm, bias=bias, norm_eps=3e-4))
        names = ["weight", "bias"] if norm == "layer" and bias else ["weight"]
        assert [n for n, _ in made.named_parameters()] == names and made.eps == 3e-4
        assert isinstance(made, RMSNorm if norm == "rms" else LayerNorm)
        assert make_norm(config(norm=norm), 6).weight.shape == (6,)


# --- DeepNorm


def evaluate(formula, n, m):
    """The value of a published formula such as 0.81(N^4 M)^(1/16)."""
    python = re.sub(r"(?<=[\dNM)])\s*(?=[NM(])", "*", formula).replace("^", "**")
    assert re.fullmatch(r"[\dNM.()*/ -]+", python)
    return eval(python, {"__builtins__": {}}, {"N": n, "M": m})


@pytest.mark.parametrize("m", [1, 6, 18, 100])
@pytest.mark.parametrize("n", [1, 6, 24])
def test_deepnorm_constants_are_the_published_ones(n, m):
    rows = list(csv.DictReader(PUBLISHED.open(encoding="utf-8")))
    assert {row["architecture"] for row in rows} == set(CHOICES["kind"])
    checked = 0
    for row, stack in itertools.product(rows, ("encoder", "decoder")):
        if not row[f"{stack}_alpha"]:
            continue
        kind = row["architecture"]
        layers = n if kind == "encoder" else m
        encoders = n if kind == "encoder-decoder" else None
        cfg = config(kind=kind, n_layers=layers, n_encoder_layers=encoders)
        want = [evaluate(row[f"{stack}_{c}"], n, m) for c in ("alpha", "beta")]
        assert deepnorm_constants(cfg, stack) == pytest.approx(want, rel=1e-12)
        checked += 1
    assert checked == 4


def test_deepnorm_of_two_stacks_needs_to_know_which():
    cfg = config(kind="encoder-decoder")
    for stack in (None, "both"):
        with pytest.raises(ValueError, match=r"stack=.* must be 'encoder' or 'decoder'"):
            deepnorm_constants(cfg, stack)
    with pytest.raises(ValueError, match="needs init='xavier', not 'scaled'"):
        config(placement="deepnorm")


def spread(cfg, seed=0):
    """{name: measured standard deviation of a block's matrices, times sqrt((in + out) / 2)}."""
    block = nn.ModuleDict({"blocks": nn.ModuleList([Block(cfg, cross=False)])})
    initialize(block, cfg, seed)
    return {
        name.removeprefix("blocks.0.").removesuffix(".weight"): p.std().item()
        * math.sqrt(sum(p.shape) / 2)
        for name, p in block.named_parameters()
        if p.ndim == 2
    }


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_xavier_and_deepnorm_gains(mlp):
    changes = {"d_model": 96, "n_kv_heads": 2, "mlp": mlp, "init": "xavier", "n_layers": 8}
    plain = spread(config(**changes))
    assert list(plain.values()) == pytest.approx([1.0] * len(plain), rel=0.05)
    deep = spread(config(**changes, placement="deepnorm"))
    beta = 64**-0.25
    for name, value in deep.items():
        gain = 1.0 if name in ("attn.q", "attn.k") else beta
        assert value == pytest.approx(gain, rel=0.05), name
    assert len(deep) == (6 if mlp == "gelu" else 7)


def test_scaled_init_shrinks_only_the_last_maps_and_all_vectors_start_neutral():
    cfg = config(d_model=96, d_ff=200, n_layers=8, bias=True, mlp="swiglu", tie_embeddings=False)
    lm = LM(cfg, seed=0)
    for name, p in lm.named_parameters():
        if p.ndim == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            last = name.endswith(("attn.out.weight", "mlp.down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if last else 0.02, rel=0.06), name
    same = LM(config(**{"d_model": 96, "init": "normal"}), seed=0)
    assert same.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02, rel=0.06)


# --- the MLP family

FORMULAS = {
    "relu": lambda g: g.clamp(min=0),
    "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / math.sqrt(2))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + (math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).tanh()),
    "swish": lambda g: g / (1 + (-g).exp()),
    "glu": lambda g: 1 / (1 + (-g).exp()),
    "bilinear": lambda g: g,
}
FORMULAS["reglu"] = FORMULAS["relu"]
FORMULAS["geglu"], FORMULAS["geglu_tanh"] = FORMULAS["gelu"], FORMULAS["gelu_tanh"]
FORMULAS["swiglu"] = FORMULAS["swish"]
GATED = {"glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CHOICES["mlp"])
def test_mlp_equals_its_formula(name, bias):
    cfg = config(mlp=name, bias=bias)
    mlp, x = randomize(MLP(cfg)), normal(2, 5, 24, seed=1)
    w = dict(mlp.named_parameters())

    def linear(part, y):
        y = torch.einsum("oi,bti->bto", w[f"{part}.weight"], y)
        return y + w[f"{part}.bias"] if bias else y

    act = FORMULAS[name]
    assert cfg.gated == (name in GATED)
    hidden = act(linear("gate", x)) * linear("up", x) if name in GATED else act(linear("up", x))
    torch.testing.assert_close(mlp(x), linear("down", hidden))
    assert set(w) == {
        f"{part}.{kind}"
        for part in ("up", "down", *(["gate"] if name in GATED else []))
        for kind in ("weight", *(["bias"] if bias else []))
    }


@pytest.mark.parametrize("d", [24, 96, 768, 100, 4096])
def test_gated_width_has_the_parameters_of_a_plain_mlp(d):
    plain = 2 * d * config(d_model=d).mlp_width
    gated = config(d_model=d, mlp="swiglu").mlp_width
    assert plain == 8 * d * d and gated % 8 == 0
    assert 8 * d * d <= 3 * d * gated < 8 * d * d + 3 * d * 8
    assert config(mlp="swiglu", d_ff=10).mlp_width == config(d_ff=10).mlp_width == 10


# --- joining branches


def by_hand(block, x, cfg):
    """The block as its placement's formula, from its own attention, MLP and norms."""

    def norm(name, y):
        weight, bias = getattr(block, name).weight, getattr(getattr(block, name), "bias", None)
        if cfg.norm == "rms":
            return rms_norm(y, weight, cfg.norm_eps)
        return layer_norm(y, weight, bias, cfg.norm_eps)

    alpha = (2 * cfg.n_layers) ** 0.25 if cfg.placement == "deepnorm" else 1.0
    for name, branch in (("norm1", block.attn), ("norm2", block.mlp)):
        if cfg.placement == "pre":
            x = x + branch(norm(name, x))
        elif cfg.placement == "sandwich":
            x = x + norm(f"{name}_out", branch(norm(name, x)))
        else:
            x = norm(name, alpha * x + branch(x))
    return x


@pytest.mark.parametrize("norm", CHOICES["norm"])
@pytest.mark.parametrize("placement", CHOICES["placement"])
def test_placements_equal_their_formulas(placement, norm):
    cfg = config(placement=placement, norm=norm, bias=True, init="xavier", n_layers=5)
    block, x = randomize(Block(cfg)), normal(2, 6, 24, seed=2)
    torch.testing.assert_close(block(x), by_hand(block, x, cfg))
    others = {p: by_hand(block, x, config(placement=p, norm=norm, bias=True, init="xavier"))
              for p in CHOICES["placement"] if p != placement and not (
                  p == "sandwich" and placement != "sandwich")}  # fmt: skip
    assert all((block(x) - y).abs().max() > 0.01 for y in others.values())


@pytest.mark.parametrize("placement", CHOICES["placement"])
def test_the_final_norm_stands_where_the_stream_was_not_normalized(placement):
    cfg = config(placement=placement, init="xavier")
    lm = LM(cfg, seed=0)
    assert (lm.norm is None) == (placement in ("post", "deepnorm"))
    x = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    size = lm.hidden(x).square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=1e-3)


def test_memory_and_cross_attention_belong_together():
    cfg, x = config(kind="encoder-decoder"), torch.zeros(1, 3, 24)
    with pytest.raises(ValueError, match="no memory for a block with cross-attention"):
        Block(cfg, cross=True)(x)
    with pytest.raises(ValueError, match="memory for a block without cross-attention"):
        Block(cfg)(x, memory=x)


@pytest.mark.parametrize("placement", CHOICES["placement"])
def test_dropout_hits_each_branch_at_its_rate_and_only_in_training(placement):
    cfg = config(placement=placement, init="xavier", dropout=0.25, d_model=64, n_layers=1)
    block = Block(cfg)
    seen = []
    drop = block._drop
    block._drop = lambda y: seen.append((y, drop(y))) or seen[-1][1]
    x = torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    block(x)
    assert len(seen) == 2
    for before, after in seen:
        dropped = after == 0
        assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(after[~dropped], before[~dropped] / 0.75)
    block.eval()
    assert torch.equal(block(x), block(x))
    assert all(before is after or torch.equal(before, after) for before, after in seen[2:])


def test_dropout_of_the_embedding():
    lm = LM(config(dropout=0.5, position="none", d_model=64), seed=0)
    x = torch.randint(31, (8, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    zeros = (lm.embed(x, torch.arange(20)) == 0).float().mean().item()
    assert zeros == pytest.approx(0.5, abs=0.03)
    assert (lm.eval().embed(x, torch.arange(20)) != 0).all()
    assert torch.equal(lm.embed(x, torch.arange(20)), F.embedding(x, lm.tokens.weight))
