"""The language model, its losses, its training loop, generation and the zoo."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from minillm import zoo
from minillm.config import ModelConfig
from minillm.infer import generate
from minillm.infer.generate import choose
from minillm.model import LM, KVCache, attention_maps, causal_mask, prefix_mask
from minillm.model.load import load, save
from minillm.tokenizers import COURSE_TOKENIZER
from minillm.train import Step, cross_entropy, evaluate, masked_mean, train

CFG = ModelConfig(vocab_size=31, d_model=24, n_layers=2, n_heads=4, max_len=20, impl="reference")


def tokens(b=2, t=9, seed=0, vocab=31):
    return torch.randint(vocab, (b, t), generator=torch.Generator().manual_seed(seed))


def model(seed=0, scale=8.0, **changes):
    """A model in fp64 whose weights are large enough for attention to matter."""
    lm = LM(dataclasses.replace(CFG, **changes), seed=seed).double().eval()
    for p in lm.parameters():
        if p.ndim == 2:
            p.data *= scale
    return lm


CONFIGS = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "impl": "auto"},
    {"window": 3},
    {"window": 1, "n_layers": 1},
    {"n_heads": 1, "d_ff": 7, "tie_embeddings": False},
    {"impl": "auto", "window": 4, "n_kv_heads": 2},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("t", [1, 2, 9, 20])
def test_cached_logits_equal_recomputed(changes, t):
    lm, x = model(**changes), tokens(t=t)
    cache = KVCache.for_config(lm.cfg, batch=2, dtype=torch.float64)
    with torch.no_grad():
        want = lm(x)
        split = (t + 1) // 2
        got = [lm(x[:, :split], cache=cache)]
        got += [lm(x[:, i : i + 1], cache=cache) for i in range(split, t)]
    assert want.shape == (2, t, 31) and cache.length == t
    torch.testing.assert_close(torch.cat(got, dim=1), want)


@pytest.mark.parametrize("changes", CONFIGS)
def test_no_logit_depends_on_a_later_token(changes):
    lm, x = model(**changes), tokens()
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 31
    with torch.no_grad():
        difference = (lm(changed) - lm(x)).abs().amax(dim=(0, 2))
    assert (difference[:5] == 0).all() and difference[5] > 1e-3
    if lm.cfg.window is None:
        assert (difference[5:] > 1e-6).all()
    else:  # each layer carries information window - 1 places further
        reach = lm.cfg.n_layers * (lm.cfg.window - 1)
        assert (difference[6 + reach :] == 0).all()


def by_hand(lm, x, mask):
    """The model written a second time, with PyTorch's functions and one loop over heads."""
    w = dict(lm.named_parameters())
    h = w["tokens.weight"][x] + w["position.table"][: x.shape[1]]
    for i in range(lm.cfg.n_layers):
        p, d = f"blocks.{i}.", lm.cfg.d_head
        n = F.layer_norm(h, h.shape[-1:], w[p + "norm1.weight"])
        q, k, v = (n @ w[f"{p}attn.{name}.weight"].T for name in "qkv")
        heads = []
        for a in range(lm.cfg.n_heads):
            g = a * lm.cfg.kv_heads // lm.cfg.n_heads
            s = q[..., a * d : a * d + d] @ k[..., g * d : g * d + d].mT / math.sqrt(d)
            p_ = s.masked_fill(~mask, -math.inf).softmax(-1)
            heads.append(p_ @ v[..., g * d : g * d + d])
        h = h + torch.cat(heads, -1) @ w[p + "attn.out.weight"].T
        n = F.layer_norm(h, h.shape[-1:], w[p + "norm2.weight"])
        h = h + F.gelu(n @ w[p + "mlp.up.weight"].T) @ w[p + "mlp.down.weight"].T
    h = F.layer_norm(h, h.shape[-1:], w["norm.weight"])
    return h @ w["tokens.weight" if lm.cfg.tie_embeddings else "head.weight"].T


@pytest.mark.parametrize("changes", [c for c in CONFIGS if "window" not in c])
def test_model_equals_a_second_writing(changes):
    lm, x = model(**changes), tokens()
    torch.testing.assert_close(lm(x), by_hand(lm, x, causal_mask(9)))
    torch.testing.assert_close(lm(x, mask=prefix_mask(9, 4)), by_hand(lm, x, prefix_mask(9, 4)))


def test_forward_is_unembed_of_body_of_embed_and_slices_compose():
    lm, x = model(n_layers=3), tokens()
    positions, mask = torch.arange(9), causal_mask(9)
    h = lm.embed(x, positions)
    for block in lm.blocks:
        h = block(h, mask)
    assert torch.equal(lm.unembed(h), lm(x))
    assert torch.equal(lm.body(lm.embed(x, positions), mask), h)


def test_explicit_positions_and_mask_place_two_documents_in_one_row():
    lm, x = model(), tokens(b=1, t=9)
    document = torch.tensor([0] * 4 + [1] * 5)
    mask = causal_mask(9) & (document[:, None] == document)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = lm(x, positions=positions, mask=mask)
    torch.testing.assert_close(packed, torch.cat([lm(x[:, :4]), lm(x[:, 4:])], dim=1))


def test_parameter_count_and_tying():
    d, v, n, layers = 24, 31, 20, 2
    blocks = layers * (12 * d * d + 2 * d) + d
    tied, untied = LM(CFG), LM(dataclasses.replace(CFG, tie_embeddings=False))
    assert sum(p.numel() for p in tied.parameters()) == blocks + (v + n) * d
    assert sum(p.numel() for p in untied.parameters()) == blocks + (2 * v + n) * d


def test_seed_fixes_the_weights_and_the_first_loss_is_log_v():
    a, b, c = LM(CFG, seed=1), LM(CFG, seed=1), LM(CFG, seed=2)
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.tokens.weight, c.tokens.weight)
    x = tokens(b=8, t=20)
    assert cross_entropy(a(x), tokens(b=8, t=20, seed=1)).item() == pytest.approx(
        math.log(31), abs=0.05
    )


@pytest.mark.parametrize("changes", CONFIGS)
def test_attention_maps_are_what_the_model_used(changes):
    lm, x = model(**changes), tokens()
    maps = attention_maps(lm, x)
    assert maps.shape == (2, lm.cfg.n_layers, lm.cfg.n_heads, 9, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
    assert (maps.masked_fill(causal_mask(9), 0) == 0).all()
    first = lm.blocks[0]
    n = first.norm1(lm.embed(x, torch.arange(9)))
    _, _, v = first.attn.project(n)
    v = v.repeat_interleave(lm.cfg.n_heads // lm.cfg.kv_heads, dim=1)
    out = (maps[:, 0] @ v).transpose(1, 2).reshape(2, 9, -1)
    torch.testing.assert_close(first.attn.out(out), first.attn(n))
    assert not any(m._forward_pre_hooks for m in lm.modules())
    everywhere = attention_maps(lm, x, mask=torch.ones(9, 9, dtype=torch.bool))
    assert (everywhere > 0).all()


def test_cross_entropy_against_pytorch_with_and_without_mask():
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 11, generator=rng, dtype=torch.float64) * 4).requires_grad_()
    target = torch.randint(11, (3, 5), generator=rng)
    mask = torch.rand(3, 5, generator=rng) > 0.5
    flat = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(cross_entropy(logits, target), flat)
    hidden = target.masked_fill(~mask, -100)
    want = F.cross_entropy(logits.flatten(0, 1), hidden.flatten())
    torch.testing.assert_close(cross_entropy(logits, target, mask), want)
    torch.testing.assert_close(cross_entropy(logits, target, mask.long()), want)
    got_grad = torch.autograd.grad(cross_entropy(logits, target, mask), logits)
    torch.testing.assert_close(got_grad, torch.autograd.grad(want, logits))
    assert cross_entropy(logits, target, torch.zeros(3, 5)).isnan()
    assert masked_mean(torch.tensor([1.0, math.inf]), torch.tensor([1, 0])).item() == 1
    assert cross_entropy(torch.tensor([[1e4, 0.0]]), torch.tensor([1])).item() == 1e4
    half = torch.full((1, 70000), 8.0, dtype=torch.float16)  # the sum of exp overflows fp16
    assert cross_entropy(half, torch.tensor([0])).item() == pytest.approx(math.log(70000), rel=1e-5)


def copy_batches(n, b=16, t=10):
    for seed in range(n):
        half = tokens(b, t // 2, seed)
        row = torch.cat([half, half], dim=1)
        mask = torch.arange(t - 1).expand(b, -1) >= t // 2 - 1
        yield row[:, :-1], row[:, 1:], mask


@pytest.mark.slow
def test_training_learns_to_copy_and_reports_what_it_did():
    torch.set_flush_denormal(True)
    lm = LM(dataclasses.replace(CFG, d_model=32, impl="auto"), seed=0)
    before = evaluate(lm, copy_batches(3))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=9.0)
    steps = list(train(lm, copy_batches(500), optimizer, schedule=lambda s: 5e-3, clip=1.0))
    assert all(isinstance(s, Step) for s in steps) and steps[0].step == 1
    assert steps[-1].step == 500 and steps[-1].tokens == 500 * 16 * 5 and steps[-1].lr == 5e-3
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(steps))
    assert before > 3.3 and steps[0].loss == pytest.approx(before, abs=0.1)
    after = evaluate(lm, copy_batches(3))
    assert after < 0.5, after
    with pytest.raises(dataclasses.FrozenInstanceError):
        steps[0].loss = 0.0


def test_steps_equal_clipped_gradient_descent_by_hand():
    lm, other = model(), model()
    x = tokens(t=9)
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    steps = train(lm, [(x[:, :-1], x[:, 1:])] * 3, optimizer, lambda s: 0.1 / s, clip=0.5)
    weights = list(other.parameters())
    for number, step in enumerate(steps, start=1):
        loss = F.cross_entropy(other(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        grads = torch.autograd.grad(loss, weights)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        assert norm > 0.5 and step.loss == pytest.approx(loss.item())
        for p, q, g in zip(lm.parameters(), weights, grads, strict=True):
            q.data -= 0.1 / number * g * 0.5 / norm
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    lm = model()
    before = [p.clone() for p in lm.parameters()]
    x = tokens()
    empty = torch.zeros(2, 8, dtype=torch.bool)
    steps = train(lm, [(x[:, :-1], x[:, 1:], empty)], torch.optim.SGD(lm.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="loss of step 1 is nan"):
        next(steps)
    assert all(torch.equal(p, q) for p, q in zip(lm.parameters(), before, strict=True))


def test_evaluate_weighs_tokens_not_batches():
    lm, x = model(), tokens(b=4)
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(3)) > 0.4
    whole = evaluate(lm, [(x[:, :-1], x[:, 1:], mask)])
    parts = [(x[i : i + 1, :-1], x[i : i + 1, 1:], mask[i : i + 1]) for i in range(4)]
    none = (x[:1, :-1], x[:1, 1:], torch.zeros(1, 8, dtype=torch.bool))
    assert evaluate(lm, [*parts, none]) == pytest.approx(whole, rel=1e-6)
    with pytest.raises(ValueError, match="no batch"):
        evaluate(lm, [none])


@pytest.mark.parametrize("changes", CONFIGS)
def test_greedy_generation_equals_recomputing_each_prefix(changes):
    lm, x = model(**changes), tokens(b=3, t=4)
    new = torch.stack(list(generate(lm, x, 16, temperature=0)), dim=1)
    assert new.shape == (3, 16)
    row = x
    for _ in range(16):
        row = torch.cat([row, by_argmax(lm, row)], dim=1)
    assert torch.equal(new, row[:, 4:])
    assert torch.is_grad_enabled()


def by_argmax(lm, row):
    return lm(row)[:, -1:].argmax(-1)


def test_generation_leaves_gradients_on_between_steps():
    for _ in generate(model(), tokens(t=3), 2):
        assert torch.is_grad_enabled()


def test_sampling_frequencies_follow_temperature_and_top_k():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 1), (1.0, 9)):
        p = (logits / temperature).softmax(0)
        if top_k is not None:
            p[top_k:] = 0
            p /= p.sum()
        rng = torch.Generator().manual_seed(0)
        draws = choose(logits.expand(20000, 4), temperature, top_k, generator=rng)
        seen = torch.bincount(draws, minlength=4) / 20000
        assert (seen - p).abs().max() < 4 * 0.5 / math.sqrt(20000)
        assert (seen[p == 0] == 0).all()


def test_generation_is_reproducible_and_stops():
    lm, x = model(), tokens(b=2, t=3)
    runs = [
        torch.stack(list(generate(lm, x, 10, generator=torch.Generator().manual_seed(s))))
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    got = list(generate(lm, x[:1], 10, temperature=0))
    stop = got[2].item()
    first = [g.item() for g in got].index(stop)
    assert len(list(generate(lm, x[:1], 10, temperature=0, stop=stop))) == first + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.tensor([[0, 31]])), "tokens run from 0 to 31, the model knows 0 to 30"),
        (lambda m: m(torch.tensor([[-1, 3]])), "tokens run from -1"),
        (lambda m: m(tokens(t=21)), "positions run from 0 to 20, the model knows 0 to 19"),
        (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), r"\(2, 0\)"),
        (lambda m: m(torch.zeros(4, dtype=torch.long)), r"\(4,\)"),
        (lambda m: m(tokens(), mask=causal_mask(8)), r"\(8, 8\) does not fit .*\(2, 4, 9, 9\)"),
        (lambda m: m(tokens(), cache=KVCache(5, 2, 4, 9, 6)), "5 layers, 2 blocks"),
        (lambda m: generate(m, tokens(t=9), 12), "9 and 12 .* context of 20 by 1"),
        (lambda m: generate(m, tokens(t=31), 1), "31 and 1 .* context of 20 by 12"),
        (lambda m: generate(m, tokens(t=3), 0), "max_new_tokens=0"),
        (lambda m: generate(m, tokens(t=3), 1, temperature=-1.0), "temperature=-1.0"),
        (lambda m: generate(m, tokens(t=3), 1, top_k=0), "top_k=0"),
        (lambda m: generate(m, tokens(t=3)[0], 1), "prompt is"),
        (lambda m: cross_entropy(m(tokens()), tokens(t=8)), r"\(2, 9\), got \(2, 8\)"),
        (lambda m: masked_mean(torch.ones(3), torch.ones(4)), r"\(4,\) and values \(3,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(model())


def test_an_overfull_cache_leaves_every_layer_as_it_was():
    lm = model()
    cache = KVCache.for_config(lm.cfg, batch=2, capacity=9, dtype=torch.float64)
    with torch.no_grad():
        lm(tokens(t=9)[:, :8], cache=cache)
        with pytest.raises(ValueError, match="holds 8 of 9 tokens, 2 more are 1 too many"):
            lm(tokens(t=2), cache=cache)
        assert [layer.length for layer in cache.layers] == [8, 8]
        torch.testing.assert_close(lm(tokens(t=9)[:, 8:], cache=cache), lm(tokens(t=9))[:, 8:])


def test_zoo_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"no model 'huge'; choose one of \[.*'storyteller'"):
        zoo.load("huge")
    lm = LM(dataclasses.replace(CFG, tie_embeddings=False), seed=3)
    save(lm, tmp_path, "mine", COURSE_TOKENIZER)
    back, _ = zoo.load("mine", tmp_path)
    assert back.cfg == lm.cfg and not back.training
    for p, q in zip(back.parameters(), lm.parameters(), strict=True):
        assert torch.equal(p, q.half().float())
    weights = bytearray((tmp_path / "mine.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "mine.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"mine\.safetensors has SHA-256 .* written down was"):
        zoo.load("mine", tmp_path)


def test_another_tokenizer_is_refused(tmp_path):
    save(LM(CFG, seed=3), tmp_path, "mine", COURSE_TOKENIZER)
    other = tmp_path / "other.json"
    other.write_bytes(COURSE_TOKENIZER.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"other\.json has SHA-256"):
        load(tmp_path, "mine", other)


def test_tied_weights_stay_tied_in_the_zoo(tmp_path):
    save(LM(CFG, seed=3), tmp_path, "tied", COURSE_TOKENIZER)
    back, _ = zoo.load("tied", tmp_path)
    assert back.head.weight is back.tokens.weight
