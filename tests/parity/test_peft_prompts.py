"""Prefixes, prompts, (IA)³ and LLaMA-Adapter against `peft`: the same logits, both ways."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minillm.config import ModelConfig
from minillm.infer import generate
from minillm.model import LM
from minillm.model.load import save_pretrained
from minillm.peft.files import load_adapter, save_adapter
from minillm.peft.ia3 import IA3Config, apply_ia3
from minillm.peft.inject import trainable
from minillm.peft.llama_adapter import LlamaAdapterConfig, apply_llama_adapter
from minillm.peft.prefix import PrefixConfig, apply_prefix
from minillm.peft.prompt import PromptConfig, apply_prompt
from minillm.peft.ptuning import PTuningConfig, apply_ptuning
from minillm.peft.virtual import fold

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
LLAMA = {"norm": "rms", "position": "rope", "mlp": "swiglu", "d_ff": 40, "max_len": 48}
LLAMA |= {"tie_embeddings": False}  # tied, a random model repeats what it reads
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(1))


def ours(layout):
    model = LM(ModelConfig(**SHAPE, **LLAMA, rope_layout=layout), seed=1).eval()
    for p in model.parameters():  # larger weights, so that what is attended to makes a difference
        p.data *= 3 if p.ndim > 1 else 1
    return model


def theirs(model, folder):
    save_pretrained(model, folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def scatter(parameters, seed=2):
    rng = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data += 0.5 * torch.randn(p.shape, generator=rng)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        out = model(tokens)
    # theirs gives a prompt's own logits as well
    return getattr(out, "logits", out)[:, -tokens.shape[1] :]


def same(a, b):
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-4, atol=5e-5)
    said = torch.stack(list(generate(a, LONG, 6, temperature=0)), 1)
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(LONG)}
    text = b.generate(input_ids=LONG, pad_token_id=0, eos_token_id=None, **asked)
    assert text[:, -6:].tolist() == said.tolist()


METHODS = {
    "prefix": (apply_prefix, PrefixConfig(5, std=1.0)),
    "prefix with an MLP": (apply_prefix, PrefixConfig(5, hidden=7)),
    "prompt": (apply_prompt, PromptConfig(4)),
    "P-tuning": (apply_ptuning, PTuningConfig(4, hidden=8)),
    "ia3": (apply_ia3, IA3Config()),
    "ia3 here and there": (
        apply_ia3,
        IA3Config(outputs=("blocks.1.attn.q", "attn.v"), inputs=("blocks.0.attn.out",)),
    ),
    "LLaMA-Adapter": (apply_llama_adapter, LlamaAdapterConfig(6, layers=2)),
}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("method", METHODS)
def test_ours_loads_in_peft_and_comes_back(method, layout, tmp_path):
    apply, config = METHODS[method]
    model, again = ours(layout), ours(layout)
    base, bare = theirs(model, tmp_path / "base"), logits(model)
    apply(model, config, seed=3)
    scatter(trainable(model))
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    same(model, loaded)
    assert (logits(model) - bare).abs().max() > 0.05, "the adapter must make a difference"
    load_adapter(again, tmp_path / "ours")
    # a copy of the numbers, but not of the encoder that they came from
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in trainable(again)) <= sum(p.numel() for p in trainable(model))


THEIRS = {
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix with an MLP": (
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 7},
    ),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    "P-tuning": (
        peft.PromptEncoderConfig,
        {
            "num_virtual_tokens": 4,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 8,
        },
    ),
    "P-tuning by an MLP": (
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    ),
    "ia3": (
        peft.IA3Config,
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "LLaMA-Adapter": (peft.AdaptionPromptConfig, {"adapter_len": 6, "adapter_layers": 2}),
}


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("method", THEIRS)
def test_what_peft_writes_loads_here(method, layout, tmp_path):
    kind, settings = THEIRS[method]
    model = ours(layout)
    torch.manual_seed(4)
    adapted = peft.get_peft_model(
        theirs(model, tmp_path / "base"), kind(task_type="CAUSAL_LM", **settings)
    ).eval()
    scatter(p for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "theirs")
    bare = logits(model)
    load_adapter(model, tmp_path / "theirs")
    same(model, adapted)
    assert (logits(model) - bare).abs().max() > 0.05
    # and what we write of it has the same numbers under the same names
    save_adapter(model, tmp_path / "ours")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert set(first) == set(second)
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-6)


def test_encoders_start_and_count_as_theirs(tmp_path):
    """The numbers to train are as many as theirs, with the networks that write them and without."""
    counts = {
        "prefix": (apply_prefix, PrefixConfig(5)),
        "prefix with an MLP": (apply_prefix, PrefixConfig(5, hidden=7)),
        "prompt": (apply_prompt, PromptConfig(4)),
        "P-tuning": (apply_ptuning, PTuningConfig(4, hidden=8)),
        "ia3": (apply_ia3, IA3Config()),
        "LLaMA-Adapter": (apply_llama_adapter, LlamaAdapterConfig(6, layers=2)),
    }
    for name, (apply, config) in counts.items():
        model = ours("half")
        kind, settings = THEIRS[name]
        base = theirs(model, tmp_path / "base")
        adapted = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", **settings))
        count = sum(p.numel() for p in trainable(apply(model, config, seed=0)))
        assert count == adapted.get_nb_trainable_parameters()[0], name


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = apply_prefix(ours("half"), PrefixConfig(5))
    save_adapter(model, tmp_path)
    other = LM(ModelConfig(**(SHAPE | {"n_layers": 2}), **LLAMA), seed=1)
    with pytest.raises(ValueError, match="SHA-256"):
        load_adapter(other, tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace('"num_virtual_tokens": 5', '"num_virtual_tokens": 6'))
    with pytest.raises(ValueError, match=r"\(6, 96\).*\(5, 96\)"):
        load_adapter(ours("half"), tmp_path)
    file.write_text(
        text.replace('"num_transformer_submodules": 1', '"num_transformer_submodules": 2')
    )
    with pytest.raises(ValueError, match="num_transformer_submodules=2"):
        load_adapter(ours("half"), tmp_path)
    full = LM(ModelConfig(**SHAPE, **(LLAMA | {"max_len": 5})), seed=1)
    full.load_state_dict(ours("half").state_dict())
    file.write_text(text)
    with pytest.raises(ValueError, match="1 too many"):
        load_adapter(full, tmp_path)

    gated = apply_llama_adapter(ours("half"), LlamaAdapterConfig(6, layers=2))
    save_adapter(gated, tmp_path / "gated")
    file = tmp_path / "gated" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter_layers": 1}))
    model = ours("half")
    bare = logits(model)
    with pytest.raises(ValueError, match="adaption_gate"):
        load_adapter(model, tmp_path / "gated")
    assert torch.equal(logits(model), bare), "a refused file leaves the model as it was"


def test_a_folded_encoder_is_what_was_saved(tmp_path):
    model = apply_ptuning(ours("half"), PTuningConfig(4, hidden=8), seed=0)
    save_adapter(model, tmp_path / "before")
    save_adapter(fold(model), tmp_path / "after")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")
    )
    assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])
