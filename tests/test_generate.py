"""Sampling draws from the right distribution; generation is the model applied again and again."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import ModelConfig
from minillm.infer import choose, generate, probabilities
from minillm.infer.prepare import prepare
from minillm.model import LM
from minillm.model.seq2seq import Seq2Seq

CFG = ModelConfig(31, d_model=24, n_layers=2, n_heads=4, max_len=20)
ROPE = {"position": "rope", "norm": "rms", "mlp": "swiglu", "n_kv_heads": 2}
VARIANTS = {
    "learned": {},
    "rope": ROPE,
    "rope window": ROPE | {"window": 3},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5", "t5_buckets": 8, "t5_max_distance": 16},
    "sinusoidal post": {"position": "sinusoidal", "placement": "post"},
    "hierarchical multi-query": {"position": "hierarchical", "n_kv_heads": 1},
    "none": {"position": "none"},
}


def model(**changes):
    lm = LM(dataclasses.replace(CFG, **changes), seed=1).eval().double()
    with torch.no_grad():  # fresh weights are so small that one token would win everywhere
        for p in lm.parameters():
            if p.ndim > 1:
                p.mul_(20)
    return lm


def rows(b, t, seed=0):
    return torch.randint(31, (b, t), generator=torch.Generator().manual_seed(seed))


def run(lm, x, n=9, **kwargs):
    return torch.stack(list(generate(lm, x, n, **kwargs)), dim=1)


# -- sampling ------------------------------------------------------------------------------------


def nucleus(p, top_p):
    """The smallest set with at least `top_p`, by brute force: all sets, smallest first."""
    for size in range(1, len(p) + 1):
        best = max(itertools.combinations(range(len(p)), size), key=lambda s: sum(p[i] for i in s))
        if sum(p[i] for i in best) >= top_p:
            return size
    return len(p)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=7),
    st.floats(0.01, 1.0),
    st.integers(1, 8),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_top_p_keeps_the_smallest_set(scores, top_p, top_k, temperature):
    # sixteenths are exact in binary, so ties are ties; the sums are compared with a margin
    logits = torch.tensor(scores) / 4
    p = probabilities(logits, temperature, top_k, top_p)
    exact = [math.exp(s / 4 / temperature) for s in scores]
    kth = sorted(exact, reverse=True)[min(top_k, len(exact)) - 1]
    kept = sorted(range(len(exact)), key=lambda i: -exact[i])[:top_k]
    total = sum(exact[i] for i in kept)
    left = [exact[i] / total for i in kept]
    sizes = {nucleus(left, top_p - 1e-6), nucleus(left, top_p + 1e-6)}
    assert (p > 0).sum().item() in sizes
    assert p.sum().item() == pytest.approx(1, abs=1e-6) and p.dtype == torch.float32
    chosen = [i for i in range(len(exact)) if p[i] > 0]
    assert all(exact[i] >= kth - 1e-12 for i in chosen)
    # what is kept is at least as likely as what is not, and keeps its proportions
    dropped = [exact[i] for i in range(len(exact)) if p[i] == 0]
    assert min(exact[i] for i in chosen) >= max(dropped, default=0) - 1e-12
    whole = sum(exact[i] for i in chosen)
    for i in chosen:
        assert p[i].item() == pytest.approx(exact[i] / whole, rel=1e-5)


def test_top_p_at_its_ends_and_at_ties():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 8
    torch.testing.assert_close(probabilities(logits, top_p=1.0), logits.softmax(-1))
    one = torch.nn.functional.one_hot(logits.argmax(-1), 300).float()
    assert torch.equal(probabilities(logits, top_p=1e-9), one)
    assert torch.equal(probabilities(logits, temperature=0), one)
    equal = torch.zeros(8)
    assert probabilities(equal, top_p=0.5).tolist() == [0.25] * 4 + [0.0] * 4  # the first of equals
    assert probabilities(equal, temperature=0).tolist() == [1.0] + [0.0] * 7
    assert (probabilities(equal, top_k=3) > 0).sum() == 3
    # a long tail: a sum in half precision would stop growing at 2048 terms
    flat = torch.zeros(50_000, dtype=torch.float16)
    assert (probabilities(flat, top_p=0.89999) > 0).sum() == 45_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sampling_is_float32_and_leaves_its_input(dtype):
    logits = torch.tensor([[3.0, -1.0, 0.5, 0.25]], dtype=dtype)
    before = logits.clone()
    p = probabilities(logits, 0.7, 3, 0.95)
    assert p.dtype == torch.float32 and torch.equal(logits, before)
    torch.testing.assert_close(p, probabilities(before.float(), 0.7, 3, 0.95))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.6, None, None), (2.0, 5, None), (1.0, None, 0.8), (1.3, 6, 0.9)],
)
def test_draws_follow_the_exact_probabilities(temperature, top_k, top_p):
    scores = [2.0, 1.4, 1.1, 0.3, 0.0, -0.2, -1.0, -2.5]
    weights = [math.exp(s / temperature) for s in scores][: top_k or 8]
    if top_p is not None:
        total, held, size = sum(weights), 0.0, 0
        while held < top_p * total:
            held, size = held + weights[size], size + 1
        weights = weights[:size]
    n = 40_000
    draws = choose(
        torch.tensor(scores).expand(n, 8),
        temperature,
        top_k,
        top_p,
        torch.Generator().manual_seed(3),
    )
    seen = torch.bincount(draws, minlength=8).tolist()
    assert seen[len(weights) :] == [0] * (8 - len(weights))
    expected = [n * w / sum(weights) for w in weights]
    chi2 = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=False))
    freedom = len(weights) - 1  # mean and half the variance; five standard deviations
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_meaningless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        probabilities(torch.zeros(3), **settings)
    with pytest.raises(ValueError, match=message):
        generate(model(), rows(1, 3), 2, **settings)


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_equals_the_whole_model_each_time(variant):
    lm, x = model(**VARIANTS[variant]), rows(3, 4)
    new = run(lm, x, 15, temperature=0)
    row = x
    with torch.no_grad():
        for _ in range(15):
            row = torch.cat([row, lm(row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, row[:, 4:])
    assert len(set(new.flatten().tolist())) > 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_batch_says_what_each_row_says_alone(variant):
    lm, lengths = model(**VARIANTS[variant]), (7, 1, 4)
    prompts = [rows(1, n, seed=n) for n in lengths]
    x, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        x[i, 7 - lengths[i] :], mask[i, 7 - lengths[i] :] = prompt[0], True
    together = run(lm, x, temperature=0, mask=mask)
    alone = torch.cat([run(lm, prompt, temperature=0) for prompt in prompts])
    assert torch.equal(together, alone)
    other = run(lm, x.masked_fill(~mask, 30), temperature=0, mask=mask)
    assert torch.equal(other, together)  # whatever stands in the padding
    unmasked = run(lm, x, temperature=0)
    assert not torch.equal(unmasked, together)
    full = run(lm, x, temperature=0, mask=torch.ones_like(mask))
    assert torch.equal(full, unmasked)


def test_only_tables_limit_the_length():
    for variant, changes in VARIANTS.items():
        lm = model(**changes)
        if changes.get("position", "learned") in ("learned", "hierarchical"):
            with pytest.raises(ValueError, match=r"5 and 16 new .* context of 20 by 1"):
                generate(lm, rows(1, 5), 16)
            assert run(lm, rows(1, 5), 15).shape == (1, 15)
        else:
            assert run(lm, rows(1, 5), 40).shape == (1, 40), variant


def test_an_answer_equals_decoding_it_whole_each_time():
    cfg = dataclasses.replace(
        CFG, kind="encoder-decoder", n_encoder_layers=1, **VARIANTS["t5"], norm="rms"
    )
    lm = Seq2Seq(cfg, seed=2).eval().double()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(20 if p.ndim > 1 else 1)
    source, row = rows(3, 8), rows(3, 1, 5)
    real = (torch.arange(8) < torch.tensor([[8], [3], [5]]))[:, None, None]
    new = run(lm, row, 12, temperature=0, source=source, source_mask=real)
    with torch.no_grad():
        for _ in range(12):
            row = torch.cat([row, lm(source, row, real)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, row[:, 1:]) and len(set(new.flatten().tolist())) > 4
    with pytest.raises(ValueError, match="needs a source"):
        generate(lm, row, 3)
    with pytest.raises(ValueError, match="needs a source"):
        generate(model(), row, 3, source=source)


def test_samples_of_a_batch_follow_the_models_own_probabilities():
    lm, x = model(), rows(1, 3).expand(4_000, 3)
    first = next(generate(lm, x, 1, 0.8, 5, 0.9, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        p = probabilities(lm(x[:1])[0, -1], 0.8, 5, 0.9)
    seen = torch.bincount(first, minlength=31) / 4_000
    assert ((seen > 0) == (p > 0)).all() and (seen - p).abs().max() < 0.04


def test_runs_repeat_from_a_seed_and_stop():
    lm, x = model(), rows(2, 3)
    runs = [run(lm, x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_batch_goes_on_until_every_row_has_stopped():
    lm, x = model(), rows(2, 3)

    def sample(seed, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(list(generate(lm, x, 15, generator=generator, **kwargs))).tolist()

    tried = 0
    for seed in range(2):
        whole = sample(seed)
        for stop in {token for pair in whole for token in pair}:
            first, second = ([pair[i] for pair in [*whole, [stop] * 2]].index(stop) for i in (0, 1))
            last = max(first, second)
            assert sample(seed, stop=stop) == whole[: last + 1]
            # one row stops, goes on to something else, and only then the other stops
            tried += first != second and last < 15 and whole[last] != [stop, stop]
    assert tried > 0


def test_tokens_can_be_trained_on_and_gradients_stay_on():
    lm, x = model(), rows(2, 3)
    for new in generate(lm, x, 3):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        lm(new[:, None]).sum().backward()  # an inference tensor could not be saved for this
    assert lm.tokens.weight.grad.abs().sum() > 0


def test_the_prompt_is_left_alone_and_read_once():
    lm, x = model(), rows(2, 3)
    before, calls = x.clone(), []
    hook = lm.blocks[0].register_forward_hook(lambda m, args, out: calls.append(out.shape[1]))
    run(lm, x, 5)
    hook.remove()
    assert calls == [3, 1, 1, 1, 1] and torch.equal(x, before)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(2, 3),
        torch.tensor([[True, True, False], [True, True, True]]),
        torch.tensor([[True, False, True], [True, True, True]]),
        torch.zeros(2, 3, dtype=torch.bool),
    ],
)
def test_masks_that_are_not_left_padding_are_refused(mask):
    with pytest.raises(ValueError, match="False, then True up to the end"):
        generate(model(), rows(2, 3), 2, mask=mask)


@pytest.mark.parametrize("shape", [(4,), (2, 0), (1, 2, 3)])
def test_prompts_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="a prompt is"):
        generate(model(), torch.zeros(shape, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model(), rows(1, 1), 0)


# -- prepared for generating ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [*VARIANTS.values(), ROPE | {"qk_norm": True, "bias": True}, {"tie_embeddings": False}],
    ids=[*VARIANTS, "norms and biases", "untied"],
)
def test_a_prepared_model_is_the_same_function(changes):
    lm = model(**changes)
    ready, x = prepare(lm), rows(3, 5)
    torch.testing.assert_close(ready(x), lm(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(run(ready, x, temperature=0.0), run(lm, x, temperature=0.0))
    names = [name for name, p in lm.named_parameters() if ".attn.q." not in name]
    assert all(p.requires_grad for p in lm.parameters()) and names
    assert not any(p.requires_grad for p in ready.parameters())


def test_a_prepared_model_is_a_copy_with_weights_laid_the_other_way():
    lm = model()
    before = {name: p.clone() for name, p in lm.named_parameters()}
    ready = prepare(lm)
    shapes = [m.weight.shape for m in lm.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(s.numel() for s in shapes) == sum(
        m.weight.numel() for m in ready.modules() if isinstance(m, torch.nn.Linear)
    )
    for module in ready.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.t().is_contiguous()
    for name, p in lm.named_parameters():
        assert torch.equal(p, before[name]) and p.is_contiguous()
    with pytest.raises(ValueError, match="two sequences"):
        ready.blocks[0].attn(torch.zeros(1, 2, 24).double(), memory=torch.zeros(1, 3, 24).double())


class Doubled(torch.nn.Module):
    """A layer in the place of another, as adapters are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("how", ["projection", "hook", "attention", "method"])
def test_a_prepared_model_keeps_what_was_put_around_its_attention(how):
    lm, x = model(), rows(3, 5)
    before, attn = lm(x), lm.blocks[1].attn
    if how == "projection":
        attn.v = Doubled(attn.v)
    elif how == "hook":
        attn.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "method":
        plain = attn.forward
        attn.forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
    else:

        class Louder(type(attn)):
            def forward(self, *args, **kwargs):
                return 2 * super().forward(*args, **kwargs)

        attn.__class__ = Louder
    wrapped = lm(x)
    assert not torch.allclose(before, wrapped, rtol=1e-3)
    torch.testing.assert_close(prepare(lm)(x), wrapped, rtol=1e-9, atol=1e-9)
