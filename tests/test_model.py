"""Every combination that a config allows is a working decoder; contradictions are named."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import CHOICES, ModelConfig
from minillm.model import LM, MLP, Attention, KVCache, attend, causal_mask, prefix_mask

BASE = ModelConfig(31, 24, 2, 4, max_len=20, impl="reference")


def tokens(b=2, t=9, seed=0):
    return torch.randint(31, (b, t), generator=torch.Generator().manual_seed(seed))


def build(seed=0, **changes):
    """In fp64, with weights large enough for every part to matter."""
    lm = LM(dataclasses.replace(BASE, **changes), seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    return lm


decoders = st.fixed_dictionaries(
    {
        "position": st.sampled_from(CHOICES["position"]),
        "norm": st.sampled_from(CHOICES["norm"]),
        "placement": st.sampled_from(CHOICES["placement"]),
        "mlp": st.sampled_from(CHOICES["mlp"]),
        "n_kv_heads": st.sampled_from([None, 1, 2, 4]),
        "head_dim": st.sampled_from([None, 4, 10]),
        "window": st.sampled_from([None, 1, 3, 50]),
        "bias": st.booleans(),
        "qk_norm": st.booleans(),
        "embedding_norm": st.booleans(),
        "tie_embeddings": st.booleans(),
        "attention_scale": st.sampled_from([None, 1.0]),
        "logit_scale": st.sampled_from([1.0, 0.3]),
        "rope_layout": st.sampled_from(CHOICES["rope_layout"]),
    }
).map(lambda d: d | {"init": "xavier"})


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(decoders, st.integers(1, 3), st.integers(1, 12), st.integers(0, 100))
def test_every_combination_is_a_decoder(changes, b, t, seed):
    """Causal; the fast path equals the explicit one; a cache changes nothing; all weights count."""
    lm, x = build(seed=seed, **changes), tokens(b, t, seed)
    want = lm(x)
    assert want.shape == (b, t, 31)
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % 31
    assert torch.equal(lm(changed)[:, :-1], want[:, :-1])
    fast = LM(dataclasses.replace(lm.cfg, impl="auto")).double().eval()
    fast.load_state_dict(lm.state_dict())
    torch.testing.assert_close(fast(x), want)
    for model in (lm, fast):
        cache = KVCache.for_config(lm.cfg, b, dtype=torch.float64)
        with torch.no_grad():
            parts = [model(part, cache=cache) for part in x.split(5, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), want)
    torch.testing.assert_close(
        lm.unembed(lm.body(lm.embed(x, torch.arange(t)), torch.arange(t))), want
    )
    torch.testing.assert_close(lm.hidden(x) @ lm.head.weight.T * lm.cfg.logit_scale, want)
    want.square().sum().backward()
    unused = {n for n, p in lm.named_parameters() if p.grad is None}
    assert not unused


def by_hand(lm, x):
    """Llama written a second time, head by head, straight from the weights."""
    w, cfg = dict(lm.named_parameters()), lm.cfg
    h, t = w["tokens.weight"][x], x.shape[1]
    rms = lambda y, g: y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * g  # noqa: E731
    half = cfg.d_head // 2
    angle = torch.arange(t)[:, None] * cfg.rope_theta ** (-2 * torch.arange(half) / cfg.d_head)
    turn = torch.polar(torch.ones_like(angle.double()), angle.double())

    def rope(y):
        z = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    for l in range(cfg.n_layers):
        p = f"blocks.{l}."
        n, out = rms(h, w[p + "norm1.weight"]), []
        for i in range(cfg.n_heads):
            g = i * cfg.kv_heads // cfg.n_heads
            rows, kv = (
                slice(i * cfg.d_head, (i + 1) * cfg.d_head),
                slice(g * cfg.d_head, (g + 1) * cfg.d_head),
            )
            q, k = rope(n @ w[p + "attn.q.weight"][rows].T), rope(n @ w[p + "attn.k.weight"][kv].T)
            scores = (q @ k.mT / cfg.d_head**0.5).masked_fill(~causal_mask(t), float("-inf"))
            out.append(scores.softmax(-1) @ (n @ w[p + "attn.v.weight"][kv].T))
        h = h + torch.cat(out, -1) @ w[p + "attn.out.weight"].T
        n = rms(h, w[p + "norm2.weight"])
        gate = F.silu(n @ w[p + "mlp.gate.weight"].T) * (n @ w[p + "mlp.up.weight"].T)
        h = h + gate @ w[p + "mlp.down.weight"].T
    return rms(h, w["norm.weight"]) @ w["head.weight"].T


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_llama_equals_one_written_by_hand(impl):
    lm = build(
        position="rope", norm="rms", mlp="swiglu", n_kv_heads=2, tie_embeddings=False, impl=impl
    )
    torch.testing.assert_close(lm(tokens()), by_hand(lm, tokens()))


def test_a_prefix_decoder_is_the_same_model_with_another_mask():
    lm, x = build(position="rope"), tokens(1, 9)
    changed = x.clone()
    changed[0, 3] = (x[0, 3] + 1) % 31
    mask = prefix_mask(9, prefix=5)
    moved = (lm(changed, mask=mask) - lm(x, mask=mask)).abs().amax(-1)[0]
    assert (moved[:5] > 1e-6).all()
    torch.testing.assert_close(lm(x, mask=causal_mask(9)), lm(x))
    far = x.clone()
    far[0, 7] = (x[0, 7] + 1) % 31
    assert torch.equal(lm(far, mask=mask)[:, :7], lm(x, mask=mask)[:, :7])


@pytest.mark.parametrize("position", CHOICES["position"])
def test_explicit_positions_are_what_counts(position):
    """Packed or left-padded rows bring their own positions; relative ones ignore a common shift."""
    lm, x = build(position=position, max_len=40), tokens()
    torch.testing.assert_close(lm(x, positions=torch.arange(9)), lm(x))
    torch.testing.assert_close(lm(x, positions=torch.arange(9).expand(2, 9)), lm(x))
    shifted = lm(x, positions=torch.arange(9) + 7)
    same = torch.allclose(shifted, lm(x))
    assert same == (position in ("rope", "alibi", "t5", "none"))
    # a left-padded row, its padding masked, gives what the row alone gives
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x[:1, :6]], 1)
    where = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    mask = causal_mask(9)[None, None] & (torch.arange(9) >= 3)
    alone = lm(x[:1, :6])
    torch.testing.assert_close(lm(padded, where, mask)[:, 3:], alone)
    cache = KVCache.for_config(lm.cfg, 1, dtype=torch.float64)
    with torch.no_grad():
        lm(padded[:, :8], where[:, :8], mask[..., :8, :8], cache=cache)
        last = lm(padded[:, 8:], where[:, 8:], mask[..., 8:, :], cache=cache)
    torch.testing.assert_close(last, alone[:, -1:])


def test_positions_beyond_the_context_only_matter_to_tables():
    for position in CHOICES["position"]:
        lm = build(position=position)
        if position in ("learned", "hierarchical"):
            with pytest.raises(
                ValueError, match="positions run from 0 to 20, the model knows 0 to 19"
            ):
                lm(tokens(1, 21))
        else:
            assert lm(tokens(1, 60)).isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 7), (5, 5), (5, 9)])
def test_causal_is_the_mask_that_ends_at_the_last_key(impl, t, s):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=g, dtype=torch.float64) for n in (t, s, s))
    bias = torch.randn(1, 4, t, s, generator=g, dtype=torch.float64)
    for b in (None, bias):
        want = attend(q, k, v, causal_mask(t, s - t), bias=b)
        torch.testing.assert_close(attend(q, k, v, causal=True, impl=impl, bias=b), want)
    with pytest.raises(ValueError, match="a mask of its own"):
        attend(q, k, v, causal_mask(t, s - t), causal=True)
    with pytest.raises(ValueError, match=f"{s + 1} queries, {s} keys"):
        attend(torch.randn(2, 4, s + 1, 8), k.float(), v.float(), causal=True)


def test_dropout_only_in_training_and_from_the_global_generator():
    lm, x = build(dropout=0.5), tokens()
    torch.testing.assert_close(lm(x), build()(x))
    lm.train()
    torch.manual_seed(0)
    first = lm(x)
    assert not torch.allclose(first, lm(x))
    torch.manual_seed(0)
    assert torch.equal(first, lm(x))


@pytest.mark.parametrize("init", CHOICES["init"])
def test_initialization_has_the_variance_it_says(init):
    cfg = ModelConfig(64, 128, 8, 4, mlp="swiglu", bias=True, init=init)
    lm, again = LM(cfg, seed=1), LM(cfg, seed=1)
    block = lm.blocks[3]
    small = 0.02 / 4 if init == "scaled" else 0.02
    fan = 2 / (block.mlp.up.weight.shape[0] + 128)
    want = {
        block.attn.q.weight: (2 / 256) ** 0.5 if init == "xavier" else 0.02,
        block.mlp.up.weight: fan**0.5 if init == "xavier" else 0.02,
        block.mlp.down.weight: fan**0.5 if init == "xavier" else small,
        lm.tokens.weight: 0.02,
    }
    for p, std in want.items():
        assert abs(p.std().item() / std - 1) < 0.05
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))
    for name, p in lm.named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_deepnorm_shrinks_values_but_not_scores():
    cfg = ModelConfig(64, 128, 8, 4, placement="deepnorm", init="xavier")
    attn, beta = LM(cfg, seed=0).blocks[0].attn, 64**-0.25
    assert abs(attn.q.weight.std() / (2 / 256) ** 0.5 - 1) < 0.05
    for p in (attn.v.weight, attn.out.weight):
        assert abs(p.std() / ((2 / 256) ** 0.5 * beta) - 1) < 0.05


def test_narrower_projections_mean_fewer_heads():
    """What tensor parallelism relies on: half the rows of q, k, v and columns of out."""
    cfg = dataclasses.replace(BASE, impl="auto")
    whole, x = Attention(cfg).double(), torch.randn(2, 5, 24, dtype=torch.float64)
    total = 0
    for half in (slice(0, 12), slice(12, 24)):
        part = Attention(cfg).double()
        for name in ("q", "k", "v"):
            getattr(part, name).weight.data = getattr(whole, name).weight.data[half]
        part.out.weight.data = whole.out.weight.data[:, half]
        total = total + part(x)
    torch.testing.assert_close(total, whole(x))


@pytest.mark.parametrize("mlp", CHOICES["mlp"])
def test_width_of_the_mlp(mlp):
    cfg = dataclasses.replace(BASE, d_model=96, mlp=mlp)
    count = sum(p.numel() for p in MLP(cfg).parameters())
    assert count == 8 * 96 * 96  # the same with and without a gate


BAD = [
    ({"d_model": 25}, r"d_model=25 must be a multiple of n_heads=4"),
    ({"n_kv_heads": 3}, r"n_heads=4 must be a multiple of n_kv_heads=3"),
    ({"position": "rotary"}, r"position='rotary' must be one of \['learned'"),
    ({"position": "rope", "head_dim": 5}, r"d_head=5 must be even"),
    ({"rope_factor": 2.0}, r"rope_factor=2.0 have no meaning with position='learned'"),
    ({"position": "rope", "rope_factor": 2.0}, r"1 without rope_scaling"),
    ({"position": "hierarchical", "hierarchical_alpha": 0.5}, r"hierarchical_alpha=0.5"),
    ({"position": "t5", "t5_buckets": 6}, r"t5_buckets=6 must be a multiple of 4"),
    ({"position": "t5", "t5_max_distance": 9}, r"t5_max_distance=9 must exceed t5_buckets=32"),
    ({"position": "sinusoidal", "d_model": 3, "n_heads": 1}, r"d_model=3 must be even"),
    ({"placement": "deepnorm"}, r"needs init='xavier', not 'scaled'"),
    ({"dropout": 1.0}, r"dropout=1.0 must be in"),
    ({"norm_eps": 0.0}, r"norm_eps=0.0 must be positive"),
    ({"kind": "encoder", "window": 3}, r"window=3 looks back only"),
    ({"n_encoder_layers": 3}, r"n_encoder_layers=3 needs kind='encoder-decoder'"),
    ({"mlm_head": True}, r"mlm_head=True need kind='encoder'"),
    ({"d_ff": 0}, r"d_ff=0 must be at least 1"),
    ({"vocab_size": 0}, r"vocab_size=0 must be at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_a_decoder_is_no_encoder():
    with pytest.raises(ValueError, match=r"LM is a decoder; kind='encoder'"):
        LM(dataclasses.replace(BASE, kind="encoder"))


@pytest.mark.parametrize(
    ("name", "choice"), [(n, c) for n, cs in CHOICES.items() if n != "kind" for c in cs]
)
def test_each_choice_builds(name, choice):
    changes = {"init": "xavier", name: choice}
    if name == "rope_layout" or name == "rope_scaling":
        changes["position"] = "rope"
    assert LM(dataclasses.replace(BASE, **changes), seed=0)(tokens()).isfinite().all()
