"""Int8 weights against NumPy, against the kernel's own rounding, and against unpacked models."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels import quantize as kernel
from minillm import zoo
from minillm.accounting.parameters import count
from minillm.config import ModelConfig
from minillm.data import stories
from minillm.infer import generate, prepare
from minillm.infer.batching import complete
from minillm.infer.quantize import (
    Int8Embedding,
    Int8Linear,
    load_int8,
    quantize_int8,
    quantize_rows,
    save_int8,
    stored_bytes,
)
from minillm.infer.scoring import log_probs
from minillm.model import LM, files
from minillm.tokenizers import COURSE_TOKENIZER, load_course_tokenizer

PLAIN = ModelConfig(97, d_model=24, n_layers=2, n_heads=4, max_len=32, position="rope", norm="rms")
SHAPES = {
    "tied, swiglu": dataclasses.replace(PLAIN, mlp="swiglu"),
    "untied": dataclasses.replace(PLAIN, tie_embeddings=False),
    "bias, learned": dataclasses.replace(PLAIN, position="learned", norm="layer", bias=True),
    "grouped, alibi": dataclasses.replace(PLAIN, n_kv_heads=2, position="alibi", qk_norm=True),
}


def drawn(cfg, seed=0):
    """A model whose biases and norms are not at rest either."""
    model = LM(cfg, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn(x.shape, generator=generator)
    return model.eval()


def unpacked(quantized):
    """A plain model with the weights that the codes stand for, written into it by hand."""
    model = LM(quantized.cfg).eval()
    state = quantized.state_dict()
    for name in [key.removesuffix(".codes") for key in state if key.endswith(".codes")]:
        codes, scale = state.pop(f"{name}.codes"), state.pop(f"{name}.scale")
        state[f"{name}.weight"] = (codes.double() * scale.double()[:, None]).float()
    model.load_state_dict(state)
    return model


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 17), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_rows_are_rounded_to_the_nearest_of_255_steps(seed, n, k, size):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = quantize_rows(weight)
    w = weight.numpy().astype(np.float64)
    steps = np.abs(w).max(1) / 127
    np.testing.assert_allclose(scale, steps, rtol=1e-6)
    off = np.abs(codes.numpy() * scale.numpy().astype(np.float64)[:, None] - w)
    assert (off <= steps[:, None] * (0.5 + 1e-4)).all()
    assert (np.abs(codes.numpy().astype(int)).max(1) == 127).all()  # no step is wasted
    for ours, theirs in zip((codes, scale), kernel.quantize_int8(weight), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_of_zeros_and_what_has_no_scale():
    codes, scale = quantize_rows(torch.tensor([[0.0, 0.0], [3.0, -1.0]]))
    assert codes.tolist() == [[0, 0], [127, -42]]
    assert scale[0] == 1
    for wrong in (torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]])):
        with pytest.raises(ValueError, match="finite numbers"):
            quantize_rows(wrong)
    with pytest.raises(ValueError, match=r"\(3,\) must be a matrix"):
        quantize_rows(torch.ones(3))


def test_the_error_stays_below_the_bound_and_reaches_it():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 30).requires_grad_(False).double()
    linear.weight.copy_(torch.randn(30, 40, generator=generator))
    small = Int8Linear(linear)
    assert torch.equal(small.bias, linear.bias)
    x = torch.randn(500, 40, generator=generator, dtype=torch.double)
    off, bound = (small(x) - linear(x)).abs(), small.bound(x)
    assert (off <= bound * (1 + 1e-5)).all()
    # inputs with the signs of a row's errors are the worst case: all of them add up
    error = small.weight - linear.weight
    worst = error.sign()
    row = torch.arange(30)
    reached = (small(worst) - linear(worst)).abs()[row, row] / small.bound(worst)[row, row]
    assert reached.max() <= 1 + 1e-5
    assert 0.4 < reached.mean() < 0.6  # errors spread evenly over the step: half of it on average
    assert (off / bound).mean() < 0.2  # of an input that knows nothing, much cancels
    # one scale for the whole matrix instead of one a row breaks it
    spread = linear.weight * torch.logspace(-3, 0, 30).double()[:, None]
    scale = spread.abs().max() / 127
    coarse = (spread / scale).round() * scale
    rows = spread.abs().amax(1) / 127 / 2
    assert ((x @ (coarse - spread).T).abs() > rows * x.abs().sum(-1, keepdim=True)).any()


@pytest.mark.parametrize("name", SHAPES)
def test_a_quantized_model_is_the_model_with_unpacked_weights(name):
    model = drawn(SHAPES[name])
    before = {key: x.clone() for key, x in model.state_dict().items()}
    small = quantize_int8(model)
    tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(tokens), unpacked(small)(tokens), rtol=1e-4, atol=1e-5)
        off = (small(tokens) - model(tokens)).abs().max()
    assert 0 < off < 0.2 * model(tokens).std()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert not any(type(part) in (nn.Linear, nn.Embedding) for part in small.modules())
    assert not any(x.requires_grad for x in small.parameters())
    assert isinstance(small.tokens, Int8Embedding)
    assert (small.head.codes is small.tokens.codes) == model.cfg.tie_embeddings


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_what_the_config_says(name):
    cfg = SHAPES[name]
    model, parts = drawn(cfg), count(cfg)
    slopes = 4 * cfg.n_heads * (cfg.position == "alibi")  # a buffer, no parameter
    assert stored_bytes(model) == 4 * parts.total + slopes
    heads = (cfg.n_heads + 2 * cfg.kv_heads) * cfg.d_head
    rows = cfg.n_layers * (heads + 2 * cfg.d_model + (1 + cfg.gated) * cfg.mlp_width)
    biases = rows * cfg.bias
    rows += cfg.vocab_size * (1 if cfg.tie_embeddings else 2)
    matrices = parts.matrices - biases + parts.tokens + parts.head
    expected = matrices + 4 * rows + 4 * (parts.total - matrices) + slopes
    assert stored_bytes(quantize_int8(model)) == expected
    assert stored_bytes(prepare(quantize_int8(model))) == expected


def alone(model, ids, new):
    """Greedy, the whole text again for each token."""
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-new:]


@pytest.mark.parametrize("name", SHAPES)
def test_generation_takes_it_in_every_order(name):
    small, first = quantize_int8(drawn(SHAPES[name])), prepare(drawn(SHAPES[name]))
    expected = alone(unpacked(small), [1, 2, 3], 12)
    for ready in (small, prepare(small), quantize_int8(first), prepare(quantize_int8(first))):
        found = [int(new) for new in generate(ready, torch.tensor([[1, 2, 3]]), 12, 0.0)]
        assert found == expected
    # rows keep their scales when matrices are stacked: the fused one has the same codes
    fused = quantize_int8(first).blocks[0].attn.qkv
    parts = [getattr(small.blocks[0].attn, part) for part in "qkv"]
    assert torch.equal(fused.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(fused.scale, torch.cat([part.scale for part in parts]))


def test_answers_and_scores_come_through_the_usual_functions():
    tokenizer = load_course_tokenizer()
    cfg = ModelConfig(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2, position="rope")
    small = quantize_int8(drawn(cfg))
    prompts = ["a bee", "one two three"]
    assert complete(small, tokenizer, prompts, 5) == complete(
        unpacked(small), tokenizer, prompts, 5
    )
    found, expected = (log_probs(m, tokenizer, prompts, [" x"]) for m in (small, unpacked(small)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the model knows 0 to 4095"):
        small(torch.tensor([[4096]]))
    with pytest.raises(ValueError, match="tokens run from -1"):
        small(torch.tensor([[-1]]))


def test_the_loss_of_a_trained_model_hardly_moves():
    model, tokenizer = zoo.load("storyteller")
    texts = [stories.sample(10**8 + i).text[:300] for i in range(12)]

    def loss(model):
        found = log_probs(model, tokenizer, [""] * len(texts), [[text] for text in texts])
        return -found.sum().item() / sum(map(len, texts))

    small = quantize_int8(model)
    exact, rounded = loss(model), loss(small)
    assert abs(rounded - exact) < 0.005 * exact
    # the measure can see rounding: with three values a weight the model is lost
    for part in small.modules():
        if hasattr(part, "codes"):
            part.codes.copy_((part.codes / 127).round() * 127)
    assert loss(small) > 3 * exact
    assert stored_bytes(small) < 0.26 * stored_bytes(model)


@pytest.mark.parametrize("name", SHAPES)
def test_a_saved_model_comes_back_to_the_last_bit(name, tmp_path):
    small = quantize_int8(drawn(SHAPES[name]))
    save_int8(small, tmp_path, "tiny", COURSE_TOKENIZER)
    back = load_int8(tmp_path, "tiny", COURSE_TOKENIZER)
    assert back.cfg == small.cfg
    assert back.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(x, small.state_dict()[key]) for key, x in back.state_dict().items())
    assert stored_bytes(back) == stored_bytes(small)
    tokens = torch.arange(20)[None]
    assert torch.equal(back(tokens), small(tokens))
    file = (tmp_path / "tiny.safetensors").stat().st_size
    assert stored_bytes(small) - 100 < file < stored_bytes(small) + 8000  # names take the rest


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    model = drawn(PLAIN)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_int8(quantize_int8(model))
    with pytest.raises(ValueError, match="only what quantize_int8 makes"):
        save_int8(model, tmp_path, "plain", None)
    with pytest.raises(ValueError, match="only what quantize_int8 makes"):
        save_int8(quantize_int8(prepare(model)), tmp_path, "fused", None)
    assert list(tmp_path.iterdir()) == []
    files.save(model, tmp_path, "plain", None)
    with pytest.raises(ValueError, match=r"plain\.safetensors holds no int8 model"):
        load_int8(tmp_path, "plain", None)
    save_int8(quantize_int8(model), tmp_path, "small", COURSE_TOKENIZER)
    other = tmp_path / "other.json"
    other.write_bytes(COURSE_TOKENIZER.read_bytes() + b" ")
    for wrong in (other, None):
        with pytest.raises(ValueError, match="small was trained with a tokenizer of SHA-256"):
            load_int8(tmp_path, "small", wrong)
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"\(24, 96\) must be a matrix of finite numbers"):
        quantize_int8(model)
