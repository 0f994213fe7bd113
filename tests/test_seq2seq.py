"""Encoder and encoder-decoder against PyTorch's own layers, the decoder, and their masks."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from minillm.accounting import parameters
from minillm.config import CHOICES, ModelConfig
from minillm.model.cache import KVCache
from minillm.model.lm import LM, attention_maps
from minillm.model.mask import causal_mask, prefix_mask
from minillm.model.seq2seq import Encoder, Seq2Seq

V = 19


def config(kind, **changes):
    shape = {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_len": 12}
    return ModelConfig(**shape | {"kind": kind} | changes)


def build(kind, seed=0, loud=True, **changes):
    """A model in fp64; `loud`: with weights so large that attention is far from uniform."""
    model = {"decoder": LM, "encoder": Encoder, "encoder-decoder": Seq2Seq}[kind]
    model = model(config(kind, **changes), seed).double()
    if loud:
        rng = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            noise = 0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
            p.data = noise + 1 if p.ndim == 1 else noise
    return model


def tokens(b=2, t=7, seed=0, vocab=V):
    return torch.randint(vocab, (b, t), generator=torch.Generator().manual_seed(seed))


def depends(f, x):
    """Which outputs depend on which inputs, by experiment: f [1, t] -> [1, n, v] gives [n, t]."""
    before, found = f(x), []
    for j in range(x.shape[1]):
        moved = []
        for other in (1, 2, 3):  # a relu may hide one change
            changed = x.clone()
            changed[:, j] = (changed[:, j] + other) % V
            moved.append((f(changed) - before).abs().amax(-1)[0] > 1e-12)
        found.append(torch.stack(moved).any(0))
    return torch.stack(found, dim=1)


# --- every combination


def variants(kind):
    """All of position x placement x norm; the other options take turns, at their own paces."""
    turns = {
        "mlp": CHOICES["mlp"],
        "bias": (False, True, True),
        "n_kv_heads": (None, 2, None, 1, None, 4, 2),
        "qk_norm": (False, False, True, False, True),
        "tie_embeddings": (True, True, False, True),
        "embedding_norm": (False, True),
        "dropout": (0.0, 0.0, 0.1, 0.0, 0.0),
        "head_dim": (None, None, 8),
        "init": ("scaled", "normal", "xavier"),
        "logit_scale": (1.0, 1.0, 1.0, 0.25),
        "attention_scale": (None, None, 1.0),
    }
    if kind == "encoder":
        turns |= {"n_segments": (0, 0, 2), "mlm_head": (False, True, False, False, True)}
    else:
        turns |= {"window": (None, None, None, 3)}
    if kind == "encoder-decoder":
        turns |= {"n_encoder_layers": (None, 1, 3)}
    wheels = {name: itertools.cycle(values) for name, values in turns.items()}
    shapes = itertools.product(CHOICES["position"], CHOICES["placement"], CHOICES["norm"])
    for position, placement, norm in shapes:
        options = {name: next(wheel) for name, wheel in wheels.items()}
        options |= {"position": position, "placement": placement, "norm": norm}
        if placement == "deepnorm":
            options["init"] = "xavier"
        if position == "rope":
            options |= {"rope_scaling": "ntk", "rope_factor": 2.0}
        yield options


@pytest.mark.parametrize("kind", CHOICES["kind"])
def test_every_combination_runs_trains_and_has_the_parameters_that_accounting_counts(kind):
    torch.manual_seed(0)
    seen = set()
    for options in variants(kind):
        model = build(kind, loud=False, **options)
        source, target = tokens(t=7), tokens(t=5, seed=1)
        logits = model(source, target) if kind == "encoder-decoder" else model(source)
        assert logits.shape == (2, 5 if kind == "encoder-decoder" else 7, V)
        logits.square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), (options, name)
        assert sum(p.numel() for p in model.parameters()) == parameters.count(model.cfg).total
        seen |= {(name, str(value)) for name, value in options.items()}
    for name in ("position", "placement", "norm", "mlp", "init"):
        assert {(name, choice) for choice in CHOICES[name]} <= seen


# --- against PyTorch's own layers


def copy_attention(theirs, ours):
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias])
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def pytorch_layer(block, cfg, cross):
    kind = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    layer = kind(
        cfg.d_model,
        cfg.n_heads,
        cfg.mlp_width,
        dropout=0.0,
        activation=cfg.mlp,
        layer_norm_eps=cfg.norm_eps,
        batch_first=True,
        norm_first=cfg.placement == "pre",
        dtype=torch.float64,
    )
    copy_attention(layer.self_attn, block.attn)
    layer.linear1.load_state_dict(block.mlp.up.state_dict())
    layer.linear2.load_state_dict(block.mlp.down.state_dict())
    norms = [block.norm1, block.norm2]
    if cross:
        copy_attention(layer.multihead_attn, block.cross)
        norms.insert(1, block.norm_cross)
    for i, norm in enumerate(norms, start=1):
        getattr(layer, f"norm{i}").load_state_dict(norm.state_dict())
    return layer.train()  # in eval mode a fused kernel would answer instead of the layer


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post"])
@pytest.mark.parametrize("mlp", ["relu", "gelu"])
def test_equals_pytorchs_encoder_and_decoder_layers(placement, mlp, padded):
    changes = {"placement": placement, "mlp": mlp, "bias": True, "n_encoder_layers": 3}
    model = build("encoder-decoder", **changes)
    cfg, source, target = model.cfg, tokens(t=7), tokens(t=5, seed=1)
    real = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        real[1, 4:] = False
    with torch.no_grad():
        h = model.tokens(source) + model.encoder.position.table[:7]
        for block in model.encoder.blocks:
            h = pytorch_layer(block, cfg, False)(h, src_key_padding_mask=~real)
        h = h if placement == "post" else model.encoder.norm(h)
        memory = model.encode(source, real[:, None, None] if padded else None)
        torch.testing.assert_close(memory, h)
        y = model.tokens(target) + model.decoder.position.table[:5]
        for block in model.decoder.blocks:
            layer = pytorch_layer(block, cfg, True)
            y = layer(y, h, tgt_mask=~causal_mask(5), memory_key_padding_mask=~real)
        y = y if placement == "post" else model.decoder.norm(y)
        got = model(source, target, real[:, None, None] if padded else None)
        torch.testing.assert_close(got, y @ model.tokens.weight.T)


# --- one set of blocks, different masks


@pytest.mark.parametrize("position", [p for p in CHOICES["position"] if p != "t5"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_encoder_and_decoder_differ_by_the_mask_alone(position, placement):
    changes = {"position": position, "placement": placement, "embedding_norm": True}
    encoder, decoder = build("encoder", **changes), build("decoder", seed=1, **changes)
    decoder.load_state_dict(encoder.state_dict())
    x, everything = tokens(), torch.ones(7, 7, dtype=torch.bool)
    torch.testing.assert_close(encoder(x), decoder(x, mask=everything))
    torch.testing.assert_close(encoder(x, mask=causal_mask(7)), decoder(x))
    assert (encoder(x) - decoder(x)).abs().max() > 0.01


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_a_decoder_that_ignores_its_source_is_the_language_model(placement):
    model, target = build("encoder-decoder", placement=placement), tokens(t=5, seed=1)
    for block in model.decoder.blocks:
        (block.norm_cross_out if placement == "sandwich" else block.cross.out).weight.data.zero_()
    lm = build("decoder", seed=3, placement=placement)
    weights = {k.removeprefix("decoder."): x for k, x in model.decoder.state_dict().items()}
    weights = {k: x for k, x in weights.items() if "cross" not in k}
    lm.load_state_dict(weights | {"tokens.weight": model.tokens.weight,
                                  "head.weight": model.head.weight})  # fmt: skip
    torch.testing.assert_close(model(tokens(), target), lm(target))


def test_who_sees_whom():
    x = tokens(b=1)
    assert depends(build("encoder"), x).all()
    assert torch.equal(depends(build("decoder"), x), causal_mask(7))
    prefix = build("decoder", n_layers=1)
    assert torch.equal(depends(lambda x: prefix(x, mask=prefix_mask(7, 3)), x), prefix_mask(7, 3))
    model = build("encoder-decoder")
    source, target = tokens(b=1, t=6, seed=2), tokens(b=1, t=5, seed=1)
    assert torch.equal(depends(lambda y: model(source, y), target), causal_mask(5))
    assert depends(lambda s: model(s, target), source).all()


@pytest.mark.parametrize("position", CHOICES["position"])
def test_padding_is_not_seen(position):
    real = torch.tensor([[True] * 4 + [False] * 3])
    mask, x = real[:, None, None], tokens(b=1)
    encoder = build("encoder", position=position)
    seen = depends(lambda x: encoder(x, mask=mask), x)
    assert seen[:4, :4].all() and not seen[:4, 4:].any()
    model, target = build("encoder-decoder", position=position), tokens(b=1, t=5, seed=1)
    seen = depends(lambda s: model(s, target, mask), x)
    assert seen[:, :4].all() and not seen[:, 4:].any()
    torch.testing.assert_close(model(x, target, mask), model(x[:, :4], target))
    # the decoder must be told, too: the encoder's outputs at the padding are not nothing
    memory = model.encode(x, mask)
    assert (model.decode(target, memory) - model.decode(target, memory, mask)).abs().max() > 1e-3


def test_a_window_narrows_the_decoder_only():
    model = build("encoder-decoder", window=2, n_layers=1)
    source, target = tokens(b=1, t=6, seed=2), tokens(b=1, t=5, seed=1)
    distance = torch.arange(5)[:, None] - torch.arange(5)
    seen = depends(lambda y: model(source, y), target)
    assert torch.equal(seen, (distance >= 0) & (distance < 2))
    assert depends(lambda s: model(s, target), source).all()


def test_attention_maps_of_an_encoder():
    maps = attention_maps(build("encoder", position="alibi"), tokens())
    assert maps.shape == (2, 2, 4, 7, 7) and (maps > 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 7, dtype=torch.float64))


# --- relative biases


def test_each_stack_has_its_own_t5_biases_and_only_the_encoders_tell_ahead_from_behind():
    model = build("encoder-decoder", position="t5")
    x = tokens(t=12)
    used = {}
    for name, loss in (
        ("encoder", model.encode(x).square().sum()),
        ("decoder", model.decode(x, torch.zeros(2, 7, 16).double()).square().sum()),
    ):
        table = getattr(model, name).position.buckets
        (grad,) = torch.autograd.grad(loss, table)
        used[name] = (grad != 0).any(1).nonzero()[:, 0].tolist()
    # 16 buckets for keys behind (exact below 8), as many again for keys ahead; 32 for behind alone
    assert used["encoder"] == [*range(9), *range(17, 25)]
    assert used["decoder"] == [*range(12)]
    before = model(x, x)
    model.decoder.position.buckets.data += 1.0  # the same for every key: softmax does not see it
    torch.testing.assert_close(model(x, x), before)
    model.decoder.position.buckets.data[0] += 1.0
    assert (model(x, x) - before).abs().max() > 1e-3


# --- decoding with a cache


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("sizes", [(1,) * 6, (3, 1, 2), (6,)])
def test_cached_decoding_equals_recomputing(position, sizes):
    model = build("encoder-decoder", position=position, n_kv_heads=2)
    source, target = tokens(), tokens(t=6, seed=1)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., 5:] = False
    with torch.no_grad():
        memory = model.encode(source, mask)
        cache = KVCache.for_config(model.cfg, batch=2, dtype=torch.float64)
        parts = [model.decode(y, memory, mask, cache) for y in target.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(source, target, mask))
    assert cache.length == 6


# --- embeddings and heads


def test_tied_embeddings_collect_the_gradients_of_all_three_places():
    tied = build("encoder-decoder")
    source, target = tokens(), tokens(t=5, seed=1)
    assert tied.head.weight is tied.tokens.weight
    assert [k for k, p in tied.named_parameters() if p is tied.tokens.weight] == ["tokens.weight"]
    loose = build("encoder-decoder", tie_embeddings=False)
    loose.load_state_dict(tied.state_dict())
    torch.testing.assert_close(tied(source, target), loose(source, target))
    tied(source, target).square().sum().backward()
    loose(source, target).square().sum().backward()
    torch.testing.assert_close(
        tied.tokens.weight.grad, loose.tokens.weight.grad + loose.head.weight.grad
    )
    frozen = tied.encode(source).detach()
    (decoder_only,) = torch.autograd.grad(
        tied.decode(target, frozen).square().sum(), tied.tokens.weight
    )
    assert (tied.tokens.weight.grad - decoder_only).abs().max() > 1e-6  # the encoder's part


def test_berts_head_is_dense_gelu_norm_and_a_bias():
    model = build("encoder", mlm_head=True, bias=True, placement="post", logit_scale=2.0)
    x, head = tokens(), model.mlm
    h = model.hidden(x) @ head.dense.weight.T + head.dense.bias
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h * head.norm.weight + head.norm.bias
    torch.testing.assert_close(model(x), 2 * h @ model.tokens.weight.T + head.bias)
    plain = build("encoder", bias=True, placement="post", tie_embeddings=False)
    torch.testing.assert_close(plain(x), plain.hidden(x) @ plain.head.weight.T)


def test_segments_are_added_and_default_to_the_first():
    model, x = build("encoder", n_segments=3), tokens()
    zeros = torch.zeros_like(x)
    torch.testing.assert_close(model(x), model(x, segments=zeros))
    assert (model(x) - model(x, segments=zeros + 2)).abs().max() > 0.01
    model.segments.weight.data[2] = model.segments.weight[0]
    torch.testing.assert_close(model(x), model(x, segments=zeros + 2))


def test_explicit_positions_and_mask_pack_two_documents_into_one_row():
    model, x = build("encoder"), tokens(b=1)
    document = torch.tensor([0] * 4 + [1] * 3)
    packed = model(x, torch.tensor([0, 1, 2, 3, 0, 1, 2]), document[:, None] == document)
    torch.testing.assert_close(packed, torch.cat([model(x[:, :4]), model(x[:, 4:])], dim=1))


def test_seeds_fix_the_weights():
    for kind in ("encoder", "encoder-decoder"):
        a, b, c = (build(kind, seed, loud=False) for seed in (1, 1, 2))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert not torch.equal(a.tokens.weight, c.tokens.weight)


def test_dropout_only_in_training():
    for kind in ("encoder", "encoder-decoder"):
        model, x = build(kind, dropout=0.5), tokens()
        args = (x, x) if kind == "encoder-decoder" else (x,)
        assert not torch.equal(model(*args), model(*args))
        model.eval()
        assert torch.equal(model(*args), model(*args))
        plain = build(kind).eval()
        torch.testing.assert_close(model(*args), plain(*args))


# --- bad input


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("encoder", lambda m: Seq2Seq(m.cfg), "needs kind='encoder-decoder', got 'encoder'"),
        ("encoder-decoder", lambda m: Encoder(m.cfg), "needs kind='encoder', got 'encoder-dec"),
        ("encoder-decoder", lambda m: LM(m.cfg), "LM is a decoder; kind='encoder-decoder' is in"),
        ("encoder", lambda m: m(tokens() + 5), "tokens run from .* the model knows 0 to 18"),
        ("encoder", lambda m: m(tokens(t=13)), "positions run from 0 to 12, .* 0 to 11"),
        ("encoder", lambda m: m(tokens()[0]), r"tokens must be .*\(7,\)"),
        ("encoder", lambda m: m(tokens(), segments=tokens(vocab=2)), "n_segments=0"),
        ("encoder", lambda m: m(tokens(), mask=causal_mask(6)), r"\(6, 6\) does not fit"),
        ("encoder-decoder", lambda m: m(tokens(), tokens() - 1), "target run from -1"),
        ("encoder-decoder", lambda m: m(tokens() + 9, tokens()), "source run from"),
        (
            "encoder-decoder",
            lambda m: m(tokens(), tokens(), torch.ones(2, 7, dtype=torch.bool)),
            r"source_mask \(2, 7\) must be \[batch, 1, 1, source tokens\]",
        ),
        (
            "encoder-decoder",
            lambda m: m.decode(tokens(), m.encode(tokens()), cache=KVCache(3, 2, 4, 9, 4)),
            "a cache of 3 layers, 2 blocks",
        ),
        ("encoder-decoder", lambda m: m.decode(tokens(), m.encode(tokens(b=3))), "batch"),
    ],
)
def test_bad_input_is_named(kind, call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(build(kind))


def test_segments_out_of_range_are_named():
    model = build("encoder", n_segments=2)
    with pytest.raises(ValueError, match="segments run from 0 to 2, the model knows 0 to 1"):
        model(tokens(), segments=torch.tensor([[0, 1, 2, 0, 0, 0, 0]] * 2))


def test_kinds_need_their_configs():
    cfg = config("decoder")
    for change, message in (
        ({"n_segments": 2}, "need kind='encoder'"),
        ({"mlm_head": True}, "need kind='encoder'"),
        ({"n_encoder_layers": 2}, "needs kind='encoder-decoder'"),
        ({"kind": "encoder", "window": 3}, "an encoder looks both ways"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **change)
