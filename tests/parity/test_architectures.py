"""Our models compute what `transformers` computes, with its weights in its files, both ways."""

import dataclasses
import json
import logging
import warnings

import pytest
import torch

from minillm.infer.generate import generate
from minillm.model.load import (
    from_huggingface,
    load_pretrained,
    save_pretrained,
)

warnings.filterwarnings("ignore")
logging.getLogger("transformers").setLevel(logging.ERROR)
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = {"n_positions": 24, "n_embd": 20, "n_layer": 3, "n_head": 5}
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
T5 = {"d_model": 20, "d_kv": 6, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {"num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
BERT = {
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 24,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
VARIANTS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 relu untied": (
        "GPT2",
        GPT2 | {"activation_function": "relu", "tie_word_embeddings": False, "n_inner": 31},
    ),
    "llama": ("Llama", LLAMA),
    "llama linear tied": (
        "Llama",
        LLAMA | {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama multi-query biases": (
        "Llama",
        LLAMA | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama wide heads": ("Llama", LLAMA | {"head_dim": 10, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 14}),
    "qwen3 tied": ("Qwen3", LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3 window": ("Qwen3", LLAMA | {"head_dim": 8, **WINDOW}),
    "t5": ("T5", T5),
    "t5 v1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 gated relu": ("T5", T5 | {"feed_forward_proj": "gated-relu"}),
    "bert": ("Bert", BERT),
    "bert three segments": ("Bert", BERT | {"type_vocab_size": 3, "num_attention_heads": 1}),
}
CLASSES = {
    "GPT2": "GPT2LMHeadModel",
    "Llama": "LlamaForCausalLM",
    "Qwen3": "Qwen3ForCausalLM",
    "T5": "T5ForConditionalGeneration",
    "Bert": "BertForMaskedLM",
}
DECODERS = [name for name in VARIANTS if VARIANTS[name][0] not in ("T5", "Bert")]
VOCABULARY = 43


def peer(variant, seed=0):
    """A model of theirs with random weights, all of them: norms and biases too."""
    family, options = VARIANTS[variant]
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if family == "T5":
        tokens["decoder_start_token_id"] = 0
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **tokens, **options)
    config._attn_implementation = "eager"
    model = getattr(transformers, CLASSES[family])(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            # T5 does not scale its scores: in a wide softmax rounding would grow
            scale = 0.3 if family == "T5" else 0.5
            p.copy_(noise * scale if p.ndim > 1 else p + 0.2 * noise)
    if variant == "t5 v1.1":  # as published: an output matrix of its own
        head = torch.randn(VOCABULARY, 20, generator=generator) * 0.2
        model.lm_head.weight = torch.nn.Parameter(head)
    return model


def config_of(model):
    return json.loads(model.config.to_json_string(use_diff=False))


def ours_of(model):
    return from_huggingface(model.state_dict(), config_of(model))


def rows(b, t, seed=1, low=1):
    return torch.randint(low, VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


def both(model, ours, b=3, t=11, seed=1):
    """Logits of both for the same random tokens."""
    x, y = rows(b, t, seed), rows(b, t - 4, seed + 100)
    with torch.no_grad():
        if ours.cfg.kind == "encoder-decoder":
            return model(input_ids=x, decoder_input_ids=y).logits, ours(x, y)
        return model(x).logits, ours(x)


def close(got, want):
    assert want.std() > 0.05  # something to compare
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree(variant, seed):
    model = peer(variant, seed)
    ours = ours_of(model)
    for t in (5, 11, 24):
        close(*reversed(both(model, ours, t=t, seed=t + seed)))
    assert not ours.training and all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("variant", DECODERS)
def test_left_padding_agrees(variant):
    model = peer(variant)
    ours, x = ours_of(model), rows(3, 9)
    real = torch.arange(9) >= torch.tensor([[0], [3], [7]])
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    if ours.cfg.window:
        causal = causal.triu(1 - ours.cfg.window)
    mask = real[:, None, None] & causal
    with torch.no_grad():
        want = model(x, attention_mask=real.long(), position_ids=positions).logits
        got = ours(x, positions=positions, mask=mask)
    close(got[real], want[real])
    unpadded = ours(x[1:2, 3:])
    close(got[1, 3:], unpadded[0])


@pytest.mark.parametrize("variant", ["bert", "bert three segments"])
def test_right_padding_and_segments_agree(variant):
    model = peer(variant)
    ours, x = ours_of(model), rows(3, 9)
    real = torch.arange(9) < torch.tensor([[9], [4], [1]])
    segments = (torch.arange(9) > 3).long().expand(3, 9)
    with torch.no_grad():
        want = model(x, attention_mask=real.long(), token_type_ids=segments).logits
        got = ours(x, mask=real[:, None, None], segments=segments)
    close(got[real], want[real])
    assert (got[0] - ours(x, mask=real[:, None, None])[0]).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["t5", "t5 v1.1", "t5 gated relu"])
def test_source_padding_agrees(variant):
    model = peer(variant)
    ours, x, y = ours_of(model), rows(3, 12), rows(3, 7, 5)
    real = torch.arange(12) < torch.tensor([[12], [4], [1]])
    with torch.no_grad():
        want = model(input_ids=x, attention_mask=real.long(), decoder_input_ids=y).logits
        got = ours(x, y, real[:, None, None])
    close(got, want)


@pytest.mark.parametrize("variant", DECODERS)
def test_greedy_generation_agrees(variant):
    seen = set()
    for seed in (0, 3):
        model = peer(variant, seed)
        ours, x = ours_of(model), rows(3, 5, seed)
        want = model.generate(x, max_new_tokens=17, do_sample=False)
        got = torch.stack(list(generate(ours, x, 17, temperature=0)), 1)
        assert torch.equal(want[:, 5:], got)
        seen |= set(got.flatten().tolist())
    assert len(seen) > 5, "too monotonous to prove much"


@pytest.mark.parametrize("variant", DECODERS)
def test_padded_greedy_generation_agrees(variant):
    model = peer(variant)
    ours, x = ours_of(model), rows(3, 6)
    real = torch.arange(6) >= torch.tensor([[0], [2], [5]])
    x = x.masked_fill(~real, 0)
    want = model.generate(x, attention_mask=real.long(), max_new_tokens=15, do_sample=False)
    got = torch.stack(list(generate(ours, x, 15, temperature=0, mask=real)), 1)
    assert torch.equal(want[:, 6:], got)


@pytest.mark.parametrize("variant", ["t5", "t5 v1.1"])
def test_greedy_answers_agree(variant):
    model = peer(variant)
    ours, x = ours_of(model), rows(3, 9)
    real = torch.arange(9) < torch.tensor([[9], [4], [2]])
    settings = {"max_new_tokens": 15, "do_sample": False}
    # its cache has as many layers as the encoder, here fewer than the decoder
    want = model.generate(x, attention_mask=real.long(), use_cache=False, **settings)
    start = torch.zeros(3, 1, dtype=torch.long)
    new = generate(ours, start, 15, temperature=0, source=x, source_mask=real[:, None, None])
    assert torch.equal(want[:, 1:], torch.stack(list(new), 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_files_are_read_and_ours_by_them(variant, tmp_path):
    model = peer(variant)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    close(*reversed(both(model, ours)))
    save_pretrained(ours, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    family, _ = VARIANTS[variant]
    theirs, info = getattr(transformers, CLASSES[family]).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    want, got = model.state_dict(), theirs.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    close(both(theirs, ours)[0], both(model, ours)[0])
    back = load_pretrained(tmp_path / "ours")
    assert back.cfg == dataclasses.replace(ours.cfg, d_ff=ours.cfg.mlp_width)
    for (name, p), (_, q) in zip(back.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("variant", ["llama", "t5", "gpt2"])
def test_shards_and_half_precision(variant, tmp_path):
    model = peer(variant).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    # a model of theirs that was in half precision keeps RoPE's frequencies in it: read it anew
    family, _ = VARIANTS[variant]
    fresh = getattr(transformers, CLASSES[family]).from_pretrained(tmp_path, dtype=torch.float32)
    close(*reversed(both(fresh, ours)))
    kept = load_pretrained(tmp_path, dtype=None)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
