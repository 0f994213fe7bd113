"""The operations of the model: every implementation, and a whole model made of kernels."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kernels.layer_norm
import kernels.rms_norm
import kernels.swiglu
from kernels import runtime
from minillm import ops
from minillm.config import ModelConfig
from minillm.model import LM, causal_mask, sliding_window_mask
from minillm.ops import op
from minillm.recipes.storyteller import loss
from minillm.train import train
from minillm.train.optim import AdamW

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
LLAMA = {"position": "rope", "norm": "rms", "mlp": "swiglu", "n_kv_heads": 1}
MODELS = {
    "llama": LLAMA,
    "gpt": {"position": "learned", "bias": True, "mlp": "gelu_tanh"},
    "every kernel once more": LLAMA
    | {"mlp": "geglu", "qk_norm": True, "window": 5, "rope_layout": "interleaved", "norm": "layer"},
}


def pair(changes, seed=0):
    """Two models with the same weights: made of kernels, and made of references."""
    cfg = ModelConfig(37, 32, 2, 2, max_len=16, tie_embeddings=True, init="xavier", **changes)
    fused, plain = (LM(replace(cfg, impl=i), seed=seed) for i in ("triton", "reference"))
    return fused.to(DEVICE), plain.to(DEVICE)


def rows(b=2, t=13, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(37, (2, b, t), generator=rng).to(DEVICE))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_model_of_kernels_has_the_loss_and_every_gradient_of_the_references(changes):
    fused, plain = pair(changes)
    inputs, targets = rows()
    losses = {}
    for name, model in (("fused", fused), ("plain", plain)):
        total, count = loss(model, inputs, targets)
        (total / count).backward()
        losses[name] = (total / count).item()
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    # a key's bias shifts all scores of a query alike: its gradient is zero but for rounding
    noise = 1e-7 * max(grad.norm() for grad in wanted.values())
    for name, p in fused.named_parameters():
        off = (p.grad - wanted[name]).norm()
        assert off < 1e-4 * wanted[name].norm() + noise, f"{name}: {off:.1e}"
    torch.testing.assert_close(fused(inputs), plain(inputs), rtol=1e-4, atol=1e-4)


@needs_triton
def test_the_comparison_would_see_a_missing_mask(monkeypatch):
    attention = ops.kernels.attention.attention
    monkeypatch.setattr(
        ops.kernels.attention, "attention", lambda *a, **k: attention(*a, **k | {"causal": False})
    )
    with pytest.raises(AssertionError):
        test_a_model_of_kernels_has_the_loss_and_every_gradient_of_the_references(LLAMA)


@needs_triton
@pytest.mark.slow
def test_the_storytellers_shape_trains_with_kernels_as_with_references():
    """A few steps of the recipe's loss and optimizer; rows shorter than the recipe's."""
    from minillm.recipes.storyteller import Recipe, Rows
    from minillm.tokenizers import load_course_tokenizer

    tokenizer = load_course_tokenizer()
    shape = (tokenizer.vocab_size, 64, 2, 2)
    cfg = ModelConfig(*shape, max_len=384, norm="rms", position="rope", mlp="swiglu")
    found = {}
    for impl in ("triton", "reference"):
        model = LM(replace(cfg, impl=impl), seed=0).to(DEVICE)
        batches = Rows(Recipe(batch=2, questions=1), tokenizer)
        short = ([x[:, :48].to(DEVICE) for x in next(batches)] for _ in range(3))
        optimizer = AdamW(model.parameters(), lr=4e-3)
        steps = train(model, short, optimizer, clip=1.0, loss_fn=loss)
        found[impl] = [step.loss for step in steps]
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-4)
    assert found["triton"][-1] < found["triton"][0] - 0.2


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_a_window_is_its_mask(impl):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, 8, generator=rng).double() for n in (5, 9, 9))
    attention, look = op("attention", impl), op("attention_weights", impl)
    for window in (1, 3, 9, 20):
        mask = sliding_window_mask(5, window, 4)
        want = attention(q, k, v, mask=mask)
        torch.testing.assert_close(attention(q, k, v, causal=True, window=window), want)
        seen = look(q, k, causal=True, window=window)
        torch.testing.assert_close(seen @ v, want)
        assert torch.equal(seen > 0, mask.expand_as(seen))
    want = attention(q, k, v, mask=causal_mask(5, 4))
    torch.testing.assert_close(attention(q, k, v, causal=True), want)


def on_a_gpu(dtype=torch.float32):
    """Looks like a tensor of a GPU to the dispatch."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))


def test_auto_decides_at_each_call_by_the_device(monkeypatch):
    """One function, made before the model is moved, serves both places."""
    ways = ops._Ways(
        lambda x: "reference", lambda x, **k: "torch", lambda x, **k: "triton", lambda x, **k: not k
    )
    call = ops._by_device(ways)
    assert call(torch.ones(1)) == "torch"
    monkeypatch.setattr(ops.runtime, "MODE", "gpu")
    assert call(on_a_gpu()) == "triton"
    assert call(torch.ones(1)) == "torch"
    assert call(on_a_gpu(), bias=1) == "torch"  # more than the kernel can do
    assert call(on_a_gpu(torch.float64)) == "torch"
    monkeypatch.setattr(ops.runtime, "MODE", "absent")
    assert call(on_a_gpu()) == "torch"


def test_attention_goes_to_the_kernel_only_with_what_it_knows():
    wide, narrow = torch.ones(1, 1, 2, 300), torch.ones(1, 1, 2, 64)
    assert ops._no_matrix(narrow, narrow, narrow, causal=True, window=3)
    assert not ops._no_matrix(wide, wide, wide)
    assert not ops._no_matrix(narrow, narrow, narrow, mask=causal_mask(2))
    assert not ops._no_matrix(narrow, narrow, narrow, bias=torch.ones(2, 2))
    for extra in ({"mask": causal_mask(2)}, {"bias": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="knows no masks but causal ones"):
            op("attention", "triton")(narrow, narrow, narrow, **extra)


def test_the_kernels_references_are_what_a_model_computes_without_kernels():
    rng = torch.Generator().manual_seed(2)
    x, y, w, b = (torch.randn(s, generator=rng) for s in ((3, 8), (3, 8), (8,), (8,)))
    for name, reference, args in (
        ("rms_norm", kernels.rms_norm.reference, (x, w, 1e-5)),
        ("layer_norm", kernels.layer_norm.reference, (x, w, b, 1e-5)),
        ("layer_norm", kernels.layer_norm.reference, (x, w, None, 0.1)),
        ("glu", kernels.swiglu.reference, (x, y, "gelu")),
        ("glu", kernels.swiglu.reference, (x, y, "silu")),
    ):
        for impl in ("reference", "auto"):
            torch.testing.assert_close(op(name, impl)(*args), reference(*args))
    torch.testing.assert_close(op("layer_norm")(x, w, b, 1e-5), F.layer_norm(x, (8,), w, b))


def test_a_moved_model_needs_no_new_choice():
    """The choice is by tensor, so nothing that a model holds names a device."""
    lm = LM(ModelConfig(16, 8, 1, 2, max_len=4))
    assert lm.to("meta")(torch.zeros(1, 3, dtype=torch.long, device="meta")).shape == (1, 3, 16)
