"""LoRA and AdaLoRA against the `peft` library: its files load here, ours there, same logits."""

import json

import pytest
import safetensors
import torch

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.model.load import save_pretrained
from minillm.peft.adalora import AdaLoRAConfig, Allocator, apply_adalora, ranks
from minillm.peft.dylora import DyLoRAConfig, apply_dylora, set_rank
from minillm.peft.files import load_adapter, save_adapter
from minillm.peft.inject import base_hash
from minillm.peft.lora import LoRAConfig, apply_lora, layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 61, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
LLAMA = {"norm": "rms", "position": "rope", "mlp": "swiglu", "d_ff": 40, "init": "normal"}
TOKENS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(0))


def ours(layout="half"):
    return LM(ModelConfig(**SHAPE, **LLAMA, max_len=32, rope_layout=layout), seed=1).eval()


def theirs(model, folder):
    save_pretrained(model, folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def fill(parameters, seed=2):
    rng = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = 0.2 * torch.randn(p.shape, generator=rng)


def logits(model):
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


def same(a, b):
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-4, atol=2e-5)


CASES = [
    (LoRAConfig(rank=4, alpha=8), "half"),
    (LoRAConfig(rank=4, alpha=8), "interleaved"),
    (LoRAConfig(rank=3, alpha=5, rslora=True, targets=("attn.k", "mlp.down")), "interleaved"),
    (LoRAConfig(rank=2, targets=("blocks.1.attn.q", "re:blocks.0.mlp.(up|gate)")), "half"),
    (LoRAConfig(rank=2, dropout=0.3, targets=("attn.out", "q", "k", "v")), "half"),
]


@pytest.mark.parametrize(("config", "layout"), CASES)
def test_our_lora_loads_in_peft(config, layout, tmp_path):
    model = ours(layout)
    bare = logits(model)
    base = theirs(model, tmp_path / "base")
    apply_lora(model, config, seed=0)
    fill(part.lora_B["default"] for part in layers(model).values())
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    same(model, loaded)
    assert (logits(model) - bare).abs().max() > 0.05
    # and once around: what peft writes of it again is the same file, tensor by tensor
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        safetensors.safe_open(tmp_path / f / "adapter_model.safetensors", "pt")
        for f in ("ours", "again")
    )
    assert set(first.keys()) == set(second.keys())
    assert all(torch.equal(first.get_tensor(k), second.get_tensor(k)) for k in first.keys())  # noqa: SIM118
    written, again = (
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "again")
    )
    for config in (written, again):
        config["target_modules"].sort()
        del config["base_model_name_or_path"]
    assert written.items() <= again.items()


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, "half"),
        ({"r": 4, "lora_alpha": 7, "target_modules": ["k_proj", "up_proj"]}, "interleaved"),
        ({"r": 3, "use_rslora": True, "target_modules": "all-linear"}, "half"),
        ({"r": 2, "target_modules": r".*layers\.1\..*(o|gate)_proj", "lora_dropout": 0.2}, "half"),
    ],
)
def test_peft_lora_loads_here(settings, layout, tmp_path):
    model = ours(layout)
    base = theirs(model, tmp_path / "base")
    config = peft.LoraConfig(**settings, task_type="CAUSAL_LM", init_lora_weights="gaussian")
    wrapped = peft.get_peft_model(base, config).eval()
    fill(p for name, p in wrapped.named_parameters() if "lora_B" in name)
    wrapped.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    same(model, wrapped)


def test_a_dylora_cut_to_a_rank_is_a_lora_in_peft(tmp_path):
    model = ours()
    base = theirs(model, tmp_path / "base")
    apply_dylora(model, DyLoRAConfig(rank=6, alpha=6), seed=0)
    fill(part.lora_B["default"] for part in layers(model).values())
    set_rank(model, 2)
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert loaded.peft_config["default"].r == 2
    same(model, loaded)


def grown(model, seed=3):
    """AdaLoRA on q and v with numbers everywhere and gradients set by hand."""
    config = AdaLoRAConfig(rank=6, alpha=9, final_rank=2, steps=8, warmup=1, settle=2, every=2)
    apply_adalora(model, config, seed=0)
    fill([x["default"] for p in layers(model).values() for x in (p.lora_A, p.lora_B, p.lora_E)])
    return config


def test_our_adalora_loads_in_peft(tmp_path):
    model = ours("interleaved")
    base = theirs(model, tmp_path / "base")
    grown(model)
    save_adapter(model, tmp_path / "whole")
    same(model, peft.PeftModel.from_pretrained(base, tmp_path / "whole"))
    parts = list(layers(model).values())
    for i, part in enumerate(parts):  # ranks 6, 5, ... 1
        part.lora_E["default"].data[6 - i :] = 0
    save_adapter(model, tmp_path / "cut")
    loaded = peft.PeftModel.from_pretrained(
        theirs(ours("interleaved"), tmp_path / "b"), tmp_path / "cut"
    )
    same(model, loaded)
    again = ours("interleaved")
    load_adapter(again, tmp_path / "cut")
    same(model, again)
    assert ranks(again) == ranks(model) and sorted(ranks(model).values()) == [1, 2, 3, 4, 5, 6]


def test_adalora_allocates_as_peft_and_its_file_loads_here(tmp_path):
    model = ours()
    base = theirs(model, tmp_path / "base")
    config = grown(model)
    allocator = Allocator(model, config)
    settings = {"init_r": 6, "target_r": 2, "lora_alpha": 9, "total_step": 8, "tinit": 1}
    settings |= {"tfinal": 2, "deltaT": 2, "target_modules": ["q_proj", "v_proj"]}
    wrapped = peft.get_peft_model(base, peft.AdaLoraConfig(**settings, task_type="CAUSAL_LM"))
    names = [
        (f"blocks.{i}.attn.{m}", f"base_model.model.model.layers.{i}.self_attn.{m}_proj")
        for i in range(3)
        for m in "qv"
    ]
    pairs = [
        (
            getattr(layers(model)[mine], kind)["default"],
            wrapped.get_parameter(f"{path}.{kind}.default"),
        )
        for mine, path in names
        for kind in ("lora_A", "lora_B", "lora_E")
    ]
    for mine, other in pairs:
        other.data.copy_(mine.data)
    rng = torch.Generator().manual_seed(5)
    for step in range(1, 9):
        for mine, other in pairs:
            mine.grad = torch.randn(mine.shape, generator=rng)
            other.grad = mine.grad.clone()
        if step >= 3:  # as an optimizer would, let some come back
            for mine, other in pairs:
                mine.data -= 0.01 * mine.grad
                other.data -= 0.01 * other.grad
        allocator.step(step)
        wrapped.base_model.update_and_allocate(step)
        for mine, other in pairs:
            assert torch.equal(mine.data, other.data), step
    assert sum(ranks(model).values()) == 2 * 6
    wrapped.eval()
    same(model, wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    fresh = ours()
    load_adapter(fresh, tmp_path / "theirs")
    same(fresh, wrapped)
    assert ranks(fresh) == ranks(model)


def test_the_hash_travels_where_peft_does_not_look(tmp_path):
    model = ours()
    apply_lora(model, LoRAConfig(rank=1), seed=0)
    save_adapter(model, tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_sha256": base_hash(model)}


def test_what_peft_can_do_and_we_cannot_is_refused(tmp_path):
    model = ours()
    base = theirs(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="use_dora=True"):
        load_adapter(model, tmp_path / "dora")
    assert not layers(model)
    base = theirs(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "bias")
    with pytest.raises(ValueError, match="bias='all'"):
        load_adapter(model, tmp_path / "bias")
