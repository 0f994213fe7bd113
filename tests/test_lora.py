"""LoRA, AdaLoRA, DyLoRA, QLoRA and what puts them into a model, against formulas and float64."""

import itertools
import json
from functools import partial

import pytest
import safetensors.torch as st
import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.infer import generate, prepare
from minillm.model import LM
from minillm.numerics import NF4, from_nf4, to_nf4
from minillm.peft.adalora import (
    AdaLoRAConfig,
    Allocator,
    apply_adalora,
    budget,
    orthogonality,
    ranks,
    with_orthogonality,
)
from minillm.peft.dylora import DyLoRAConfig, apply_dylora, remove_dylora, set_rank
from minillm.peft.files import load_adapter, save_adapter
from minillm.peft.inject import (
    Addition,
    Wrapper,
    base_hash,
    detach,
    find,
    freeze,
    matches,
    replace,
    trainable,
)
from minillm.peft.lora import (
    LoRAConfig,
    LoRALinear,
    adapters,
    apply_lora,
    layers,
    merge,
    remove_lora,
    set_adapter,
    unmerge,
)
from minillm.peft.qlora import (
    NF4Linear,
    QLoRAConfig,
    apply_qlora,
    bytes_per_parameter,
    compress,
    decompress,
    quantize_base,
)
from minillm.train import AdamW, next_token_loss, train

SHAPE = {"vocab_size": 37, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
LINEARS = ("q", "k", "v", "out", "up", "gate", "down")
APPLY = {
    "lora": (apply_lora, LoRAConfig),
    "adalora": (apply_adalora, partial(AdaLoRAConfig, final_rank=1)),
    "dylora": (apply_dylora, DyLoRAConfig),
    "qlora": (apply_qlora, QLoRAConfig),
}


def model(seed=1, **kwargs):
    cfg = ModelConfig(**SHAPE, norm="rms", position="rope", mlp="swiglu", **kwargs)
    made = LM(cfg, seed=seed).eval()
    with torch.no_grad():  # far enough from zero that every part of it matters
        for p in made.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    return made


def tokens(b=2, t=9, seed=0):
    return torch.randint(0, 37, (b, t), generator=torch.Generator().manual_seed(seed))


def stir(module, seed=2, size=0.2):
    """Numbers other than zero everywhere in the updates."""
    rng = torch.Generator().manual_seed(seed)
    for part in layers(module).values():
        for name, p in part.named_parameters():
            if "lora_" in name:
                p.data = size * torch.randn(p.shape, generator=rng)
    return module


def numbers(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def batches(n, seed=0):
    for i in range(n):
        row = tokens(4, 12, seed=seed * 100 + i)
        yield row, (row * 3 + 1) % 37  # something that can be learned


class Named(Wrapper):
    """A wrapper with a parameter of its own."""

    def __init__(self, base):
        super().__init__(base)
        self.extra = nn.Parameter(torch.ones(3))

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class Other(Named):
    pass


def test_targets_are_compared_on_whole_parts_and_regular_expressions_when_asked():
    m = model()
    assert matches(m, "q") == ["blocks.0.attn.q", "blocks.1.attn.q"]
    assert matches(m, ("attn.v", "blocks.1.attn.q")) == [
        *("blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v"),
    ]
    assert matches(m, "attn") == ["blocks.0.attn", "blocks.1.attn"]
    assert matches(m, r"re:.*\.0\..*(up|down)") == ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    for bad in ("tn.q", "Q", "re:attn.q", "blocks.2.attn.q", "base", ""):
        with pytest.raises(ValueError, match=r"matches no module; there are tokens, .*attn\.q"):
            matches(m, bad)
    with pytest.raises(ValueError, match="'nothing'"):  # each target, not only all of them
        matches(m, ("q", "nothing"))
    with pytest.raises(ValueError, match="no targets"):
        matches(m, ())


def test_names_and_hash_are_the_bases_whatever_is_attached():
    m, x = model(), tokens()
    names, value, before = matches(m, "re:.*"), base_hash(m), m(x)
    for kind in (Named, Other):
        for target in ("attn", "attn.q", "tokens", "mlp", "head"):
            for name in matches(m, target):
                replace(m, name, kind(find(m, name)))
    m.add_module("prompt", Addition())
    m.prompt.weight = nn.Parameter(torch.ones(4))
    assert matches(m, "re:.*") == names and base_hash(m) == value
    assert torch.equal(m(x), before)
    freeze(m)
    assert sum(p.numel() for p in trainable(m)) == 2 * 3 * (2 * 3 + 2) + 4
    assert detach(m, Other) == 8
    assert {type(find(m, name)) for name in matches(m, ("attn", "q"))} == {Named}
    assert detach(m, Named) == 8 and base_hash(m) == value
    del m.prompt
    with pytest.raises(ValueError, match="nothing to train"):
        trainable(m)
    with pytest.raises(ValueError, match="no Named is attached"):
        detach(m, Named)


def test_the_hash_tells_bases_apart():
    value = base_hash(model())
    assert base_hash(model()) == value != base_hash(model(seed=2))
    changed = model()
    changed.blocks[1].norm2.weight.data[3] += 1e-6
    assert base_hash(changed) != value
    swapped = model()
    a, b = swapped.blocks[0].attn, swapped.blocks[1].attn
    a.q, b.q = b.q, a.q  # the same numbers under other names
    assert base_hash(swapped) != value
    untied = model(tie_embeddings=False)
    before = base_hash(untied)
    untied.head.weight.data[0, 0] += 1
    assert base_hash(untied) != before


@pytest.mark.parametrize("kind", APPLY)
def test_at_first_nothing_changes_and_only_the_update_trains(kind):
    apply, config = APPLY[kind]
    m = model()
    if kind == "qlora":
        quantize_base(m)
        before = m(tokens())
        m = model()
    else:
        before = m(tokens())
    value = base_hash(m)
    shapes = [find(m, n).weight.shape for n in matches(m, ("attn.q", "mlp.down"))]
    assert apply(m, config(rank=4, targets=("attn.q", "mlp.down")), seed=0) is m
    assert torch.equal(m(tokens()), before)
    assert base_hash(m) == value
    count = sum(4 * sum(shape) + (4 if kind == "adalora" else 0) for shape in shapes)
    assert sum(p.numel() for p in trainable(m)) == count
    assert all("lora_" in name for name, p in m.named_parameters() if p.requires_grad)
    start = numbers(m)
    optimizer = AdamW(trainable(m), lr=1e-2)
    losses = [step.loss for step in train(m, batches(30), optimizer)]
    assert losses[-1] < losses[0] - 0.1
    moved = {name for name, x in m.state_dict().items() if not torch.equal(x, start[name])}
    assert moved and all("lora_" in name for name in moved)
    assert base_hash(m) == value


def test_a_is_gaussian_from_the_seed():
    big = LM(ModelConfig(64, 256, 2, 4))
    apply_lora(big, LoRAConfig(rank=64, targets=("attn.q", "mlp.up")), seed=3)
    a = torch.cat([p.lora_A["default"].detach().flatten() for p in layers(big).values()])
    assert abs(a.mean()) < 0.002 and abs(a.std() * 16 - 1) < 0.02
    assert abs((a**4).mean() / a.var() ** 2 - 3) < 0.1  # a Gaussian's, a uniform's would be 1.8
    again = apply_lora(LM(big.cfg), LoRAConfig(rank=64, targets=("attn.q", "mlp.up")), seed=3)
    other = apply_lora(LM(big.cfg), LoRAConfig(rank=64, targets=("attn.q", "mlp.up")), seed=4)
    for name, part in layers(big).items():
        assert torch.equal(part.lora_A["default"], layers(again)[name].lora_A["default"])
        assert not torch.equal(part.lora_A["default"], layers(other)[name].lora_A["default"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 7 / 3), (True, 7 / 3**0.5)])
def test_the_linear_is_its_formula_with_gradients(bias, rslora, scale):
    rng = torch.Generator().manual_seed(0)
    linear = nn.Linear(11, 5, bias=bias).double()
    part = LoRALinear(linear)
    part.add("x", LoRAConfig(rank=3, alpha=7, rslora=rslora), rng)
    part.active = "x"
    a = torch.randn(3, 11, generator=rng).double().requires_grad_()
    b = torch.randn(5, 3, generator=rng).double().requires_grad_()
    part.lora_A["x"].data, part.lora_B["x"].data = a.detach().clone(), b.detach().clone()
    x = torch.randn(2, 4, 11, generator=rng).double().requires_grad_()
    expected = x @ (linear.weight + scale * b @ a).T + (linear.bias if bias else 0)
    torch.testing.assert_close(part(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.weight, linear.weight + scale * b @ a)
    g = torch.randn(2, 4, 5, generator=rng).double()
    wanted = torch.autograd.grad(expected, (x, a, b), g)
    got = torch.autograd.grad(part(x), (x, part.lora_A["x"], part.lora_B["x"]), g)
    for w, y in zip(wanted, got, strict=True):
        torch.testing.assert_close(y, w, rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    m = stir(apply_lora(model(), LoRAConfig(rank=2, dropout=0.5), seed=0))
    a, b = m(tokens()), m(tokens())
    assert torch.equal(a, b)
    m.train()
    assert not torch.equal(m(tokens()), m(tokens()))
    set_adapter(m, None)
    assert torch.equal(m(tokens()), m(tokens()))


@pytest.mark.parametrize("kind", APPLY)
def test_merged_is_unmerged_and_unmerging_is_exact(kind):
    apply, config = APPLY[kind]
    m, x = model(), tokens()
    stir(apply(m, config(rank=3, targets=LINEARS), seed=0))
    bare_hash, before = base_hash(m), m(x)
    base = numbers(m)
    merge(m)
    torch.testing.assert_close(m(x), before, rtol=1e-4, atol=1e-4)
    merge(m)  # once more changes nothing
    torch.testing.assert_close(m(x), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="unmerge first"):
        base_hash(m)
    with pytest.raises(ValueError, match="unmerge first"):
        set_adapter(m, None)
    unmerge(m)
    assert all(torch.equal(v, base[k]) for k, v in m.state_dict().items())
    assert torch.equal(m(x), before) and base_hash(m) == bare_hash
    (remove_dylora if kind == "dylora" else remove_lora)(m, keep=True)
    torch.testing.assert_close(m(x), before, rtol=1e-4, atol=1e-4)
    assert not layers(m) and {type(find(m, n)) for n in matches(m, "q")} == {nn.Linear}


@pytest.mark.parametrize("kind", ["lora", "adalora", "dylora"])
def test_taken_off_leaves_the_base_bit_by_bit(kind):
    apply, config = APPLY[kind]
    m = model()
    base, before = numbers(m), m(tokens())
    stir(apply(m, config(rank=3, targets=LINEARS), seed=0))
    merge(m)
    (remove_dylora if kind == "dylora" else remove_lora)(m)
    now = m.state_dict()
    assert now.keys() == base.keys() and all(torch.equal(now[k], base[k]) for k in base)
    assert torch.equal(m(tokens()), before)
    with pytest.raises(ValueError, match="no low-rank update"):
        remove_lora(m)


@pytest.mark.parametrize("kind", APPLY)
def test_generation_with_cache_padding_and_fused_products(kind):
    apply, config = APPLY[kind]
    m = stir(apply(model(), config(rank=3, targets=LINEARS), seed=0))
    prompts = tokens(3, 6)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :4] = mask[1, :1] = False

    def told(it):
        return torch.stack(list(generate(it, prompts, 8, temperature=0.0, mask=mask)), 1)

    text = told(m)
    for row, seen in enumerate(mask):
        alone = list(generate(m, prompts[row : row + 1, seen], 8, temperature=0.0))
        assert torch.equal(text[row], torch.cat(alone))
    merge(m)
    assert torch.equal(told(m), text)
    unmerge(m)
    assert torch.equal(told(prepare(m)), text)  # reads `weight` of q, k and v


def test_many_adapters_share_one_base_and_switching_copies_nothing():
    m, x, shape = model(), tokens(), {"rank": 2, "targets": ("attn.q",)}
    bare = m(x)
    weights = {name: p.data_ptr() for name, p in m.named_parameters()}
    alone = {}
    for i, name in enumerate("abc"):
        config = LoRAConfig(**{**shape, "targets": ("mlp.up",)} if name == "c" else shape)
        single = apply_lora(model(), config, seed=i, name=name)
        apply_lora(m, config, seed=i, name=name)
        for part, other in zip(
            *((p for p in layers(y).values() if name in p.configs) for y in (m, single)),
            strict=True,
        ):
            part.lora_B[name].data += i + 0.3
            other.lora_B[name].data += i + 0.3
        alone[name] = single(x)
    assert adapters(m) == ["a", "b", "c"]
    for name in "cabacb":
        set_adapter(m, name)
        assert torch.equal(m(x), alone[name])
        assert all(k.endswith(f".{name}") for k, p in m.named_parameters() if p.requires_grad)
    set_adapter(m, None)
    assert torch.equal(m(x), bare)
    now = {name.replace(".base", ""): p.data_ptr() for name, p in m.named_parameters()}
    assert weights.items() <= now.items()
    assert len({*alone, *(str(v) for v in alone.values())}) == 6
    with pytest.raises(ValueError, match=r"no adapter 'd', known are \['a', 'b', 'c'\]"):
        set_adapter(m, "d")
    with pytest.raises(ValueError, match="'a' already"):
        apply_lora(m, LoRAConfig(rank=1), seed=0, name="a")


def test_updates_are_found_behind_other_wrappers_and_of_one_kind_a_place():
    m, x = stir(apply_lora(model(), LoRAConfig(rank=2, targets=("q",)), seed=0)), tokens()
    with_lora = m(x)
    for name in matches(m, "q"):
        replace(m, name, Named(find(m, name)))
    assert list(layers(m)) == matches(m, "q") and torch.equal(m(x), with_lora)
    apply_lora(m, LoRAConfig(rank=1, targets=("q",)), seed=1, name="second")
    assert adapters(m) == ["default", "second"] and len(layers(m)) == 2
    set_adapter(m, "default")
    merge(m)
    with pytest.raises(ValueError, match="unmerge first"):
        base_hash(m)
    unmerge(m)
    assert torch.equal(m(x), with_lora)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q has a LoRALinear"):
        apply_adalora(m, AdaLoRAConfig(rank=4, targets=("v", "q")), seed=0, name="third")
    assert adapters(m) == ["default", "second"] and torch.equal(m(x), with_lora)
    remove_lora(m)
    assert detach(m, Named) == 2 and base_hash(m) == base_hash(model())


@pytest.mark.parametrize("kind", APPLY)
def test_refused_settings_leave_the_model_as_it_was(kind):
    apply, config = APPLY[kind]
    m = model()
    before = list(m.state_dict())
    for settings, message in [
        ({"rank": 17, "targets": ("attn.q", "attn.k")}, r"rank=17 exceeds 16.*attn\.k.*16, 32"),
        ({"rank": 4, "targets": ("attn.q", "qkv")}, "'qkv' matches no module"),
        ({"rank": 4, "targets": ("attn",)}, "is no Linear but Attention"),
        ({"rank": 4, "targets": ("tokens",)}, "is no Linear but Embedding"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(m, config(**settings), seed=0)
        assert list(m.state_dict()) == before
    for wrong in ({"rank": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="rank="):
            config(**wrong)


def test_full_rank_represents_any_update():
    torch.manual_seed(0)
    w, target = torch.randn(12, 7).double(), torch.randn(12, 7).double()
    linear = nn.Linear(7, 12, bias=False).double()
    linear.weight.data = w
    part = LoRALinear(linear)
    part.add("x", LoRAConfig(rank=7, alpha=7), torch.Generator().manual_seed(0))
    part.active = "x"
    u, s, v = torch.linalg.svd(target - w, full_matrices=False)
    part.lora_B["x"].data, part.lora_A["x"].data = u * s, v
    torch.testing.assert_close(part.weight, target)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    m = stir(apply_lora(model(), LoRAConfig(rank=2), seed=0))
    save_adapter(m, tmp_path)
    same = model()
    load_adapter(same, tmp_path)
    assert torch.equal(same(tokens()), m(tokens()))
    other = model(seed=2)
    with pytest.raises(ValueError, match=f"SHA-256 {base_hash(m)}, this model has"):
        load_adapter(other, tmp_path)
    assert not layers(other)
    load_adapter(same, tmp_path, name="again")  # beside the first
    set_adapter(same, "default")
    load_adapter(remove_lora(m), tmp_path)
    torch.testing.assert_close(m(tokens()), same(tokens()))


def test_an_adapter_trained_on_four_bits_belongs_to_the_base_they_came_from(tmp_path):
    m = stir(apply_qlora(model(), QLoRAConfig(rank=2), seed=0))
    save_adapter(m, tmp_path)
    whole = model()
    load_adapter(whole, tmp_path)
    for name, part in layers(whole).items():
        assert torch.equal(part.delta(), layers(m)[name].delta())


def test_files_that_do_not_fit_are_refused(tmp_path):
    m = apply_lora(model(), LoRAConfig(rank=2), seed=0)
    save_adapter(m, tmp_path)
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, config = st.load_file(file), json.loads(settings.read_text())
    first = next(iter(good))

    def refused(tensors, message, **changed):
        st.save_file(tensors, file)
        settings.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            load_adapter(fresh := model(), tmp_path)
            assert not layers(fresh)

    refused({**good, "base_model.model.lm_head.lora_magnitude": torch.ones(2)}, "unknown here")
    refused({k: x for k, x in good.items() if k != first}, f"no {first}")
    refused({**good, first: torch.ones(2, 31)}, r"needs A \(2, 32\).*has \(2, 31\)")
    refused({**good, first: torch.ones(1, 32)}, r"needs A \(2, 32\).*has \(1, 32\)")
    refused(good, "use_dora=True", use_dora=True)
    refused(good, "layer_replication", layer_replication=[[0, 2]])
    refused(good, "init_lora_weights='pissa'", init_lora_weights="pissa")
    refused(good, "peft_type 'LOHA' is not known", peft_type="LOHA")
    refused({}, "unknown here")
    bare = model()
    with pytest.raises(ValueError, match="one method"):
        save_adapter(bare, tmp_path)
    merge(m)
    with pytest.raises(ValueError, match="unmerge first"):
        save_adapter(m, tmp_path)


def test_orthogonality_is_zero_for_a_singular_value_decomposition():
    m = apply_adalora(model(), AdaLoRAConfig(rank=4), seed=0)
    assert orthogonality(m) > 1  # 2 for numbers near zero: |I|
    for part in layers(m).values():
        u, s, v = torch.linalg.svd(torch.randn(part.out_features, part.in_features))
        part.lora_B["default"].data, part.lora_A["default"].data = u[:, :4], v[:4]
        part.lora_E["default"].data = s[:4, None]
    assert orthogonality(m) < 1e-5
    part.lora_A["default"].data *= 2  # |4 I - I| = 3 · 2 in one of 8 factors
    torch.testing.assert_close(orthogonality(m).item(), 6 / 8, rtol=1e-4, atol=0)
    x = tokens()
    total, count = with_orthogonality(next_token_loss, 0.5)(m, x, x)
    plain, _ = with_orthogonality(next_token_loss, 0.0)(m, x, x)
    torch.testing.assert_close((total - plain) / count, 0.5 * orthogonality(m))
    with pytest.raises(ValueError, match="nothing to keep orthogonal"):
        orthogonality(model())


def test_the_budget_falls_as_a_cubic():
    config = AdaLoRAConfig(rank=8, final_rank=2, steps=100, warmup=10, settle=30)
    path = [budget(step, 32, 8, config) for step in range(1, 101)]
    assert path[:10] == [32] * 10 and path[69:] == [8] * 31
    assert all(a >= b for a, b in itertools.pairwise(path))
    assert path[39] == 8 + 24 // 8  # half of the way: an eighth is left
    for wrong in ({"final_rank": 9}, {"warmup": 90, "settle": 10}, {"beta": 1.0}, {"every": 0}):
        with pytest.raises(ValueError, match="must be"):
            AdaLoRAConfig(**{"rank": 8, "steps": 100, **wrong})


@pytest.mark.slow
def test_the_allocator_keeps_what_matters():
    """A problem whose answer is known: one matrix needs rank 3, the others nothing."""
    torch.manual_seed(0)
    m = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in "abc"})
    goal = {k: part.weight.detach().clone() for k, part in m.items()}
    goal["b"] += torch.randn(16, 3) @ torch.randn(3, 16) / 2
    config = AdaLoRAConfig(rank=4, alpha=4, targets=("a", "b", "c"), steps=400, final_rank=1)
    config = AdaLoRAConfig(**{**vars(config), "warmup": 60, "settle": 100, "every": 5})
    apply_adalora(m, config, seed=0)
    optimizer = torch.optim.Adam(trainable(m), lr=2e-2)
    allocator = Allocator(m, config)
    with pytest.raises(ValueError, match="no gradients"):
        allocator.step(1)
    for step in range(1, 401):
        x = torch.randn(64, 16)
        loss = sum(((part(x) - x @ goal[k].T) ** 2).mean() for k, part in m.items())
        optimizer.zero_grad()
        (loss + 0.1 * orthogonality(m)).backward()
        optimizer.step()
        allocator.step(step)
        if step > config.warmup:
            assert sum(ranks(m).values()) <= budget(step - step % 5, 12, 3, config) or step % 5
    assert ranks(m) == {"a": 0, "b": 3, "c": 0}
    assert loss < 0.02


def test_every_rank_is_drawn_in_training_and_cut_updates_are_the_first_ranks():
    m = apply_dylora(model(), DyLoRAConfig(rank=4, alpha=6, min_rank=2), seed=0)
    stir(m)
    part = layers(m)["blocks.0.attn.q"]
    a, b = part.lora_A["default"], part.lora_B["default"]
    for rank in (2, 3, 4):
        set_rank(m, rank)
        torch.testing.assert_close(part.delta(), 6 / rank * b[:, :rank] @ a[:rank])
        cut = apply_lora(model(), LoRAConfig(rank=rank, alpha=6), seed=0)
        for name, other in layers(cut).items():
            mine = layers(m)[name]
            other.lora_A["default"].data = mine.lora_A["default"].data[:rank]
            other.lora_B["default"].data = mine.lora_B["default"].data[:, :rank]
        torch.testing.assert_close(m(tokens()), cut(tokens()))
    set_rank(m, 2)
    at_two = m(tokens())
    m.train()
    drawn = []
    for i in range(60):
        (m if i % 2 else m.hidden)(tokens(1, 2))  # a loss may do without the output matrix
        assert len({part.drawn for part in layers(m).values()}) == 1
        drawn.append(part.drawn)
    assert {drawn.count(r) > 8 for r in (2, 3, 4)} == {True} and set(drawn) == {2, 3, 4}
    m.eval()
    assert torch.equal(m(tokens()), at_two)  # what was drawn last is forgotten
    for wrong in (1, 5):
        with pytest.raises(ValueError, match=f"rank={wrong} was not trained: 2 to 4"):
            set_rank(m, wrong)
    with pytest.raises(ValueError, match="min_rank=5"):
        DyLoRAConfig(rank=4, min_rank=5)
    with pytest.raises(ValueError, match="remove that one first"):
        apply_dylora(m, seed=0, name="second")
    with pytest.raises(ValueError, match="no DyLoRA"):
        set_rank(model(), 1)


@pytest.mark.parametrize("newest", [False, True])
def test_a_step_trains_the_drawn_ranks_or_the_newest_of_them(newest):
    m = apply_dylora(model(), DyLoRAConfig(rank=6, newest_only=newest), seed=0)
    stir(m).train()
    part = layers(m)["blocks.1.attn.v"]
    for _ in range(5):
        m.zero_grad()
        m(tokens()).square().mean().backward()
        touched = part.lora_A["default"].grad.abs().sum(1) > 0
        columns = part.lora_B["default"].grad.abs().sum(0) > 0
        expected = torch.arange(6) == part.drawn - 1 if newest else torch.arange(6) < part.drawn
        assert torch.equal(touched, expected) and torch.equal(columns, expected)


PUBLISHED = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534
0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
0.7229568362236023 1.0"""


def test_nf4_has_the_published_levels():
    """Dettmers et al., QLoRA, 2023, appendix E."""
    for level, published in zip(NF4, map(float, PUBLISHED.split()), strict=True):
        assert abs(level - published) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("block", [2, 64])
def test_nf4_takes_the_nearest_level_of_each_block(n, block):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3
    x[: n // 3] = 0
    codes, absmax = to_nf4(x, block)
    back = from_nf4(codes, absmax, (n,), block)
    assert codes.shape == (-(-n // 2),) and absmax.shape == (-(-n // block),)
    levels = torch.tensor(NF4)
    for i in range(n):
        scale = x[i // block * block : (i // block + 1) * block].abs().max()
        best = (levels * scale - x[i]).abs().min()
        torch.testing.assert_close((back[i] - x[i]).abs(), best, rtol=1e-4, atol=1e-6)
    again = to_nf4(back, block)
    assert torch.equal(again[0], codes) or (absmax == 0).any()


def test_nf4_refuses_what_has_no_place():
    with pytest.raises(ValueError, match="block=3"):
        to_nf4(torch.ones(6), 3)
    with pytest.raises(ValueError, match="not finite"):
        to_nf4(torch.tensor([1.0, float("nan")]))


def test_nf4_is_made_for_gaussian_weights():
    """Smaller error than sixteen evenly spaced levels, and no level is idle."""
    x = torch.randn(64 * 4000, generator=torch.Generator().manual_seed(0))
    codes, absmax = to_nf4(x)
    error = (from_nf4(codes, absmax, x.shape) - x).square().mean()
    scale = absmax.repeat_interleave(64)
    even = ((x / scale * 7).round() / 7 * scale - x).square().mean()
    assert error < 0.75 * even
    use = torch.bincount(torch.cat([codes >> 4, codes & 15]).int(), minlength=16) / len(x)
    assert use.min() > 0.01 and use.max() < 0.12


def test_four_bits_take_the_memory_that_the_formula_says():
    for double, block in itertools.product((False, True), (32, 64)):
        linear = nn.Linear(512, 1024, bias=False)
        small = NF4Linear(linear, block, double)
        n = linear.weight.numel()
        expected = n * bytes_per_parameter(block, double) + (4 if double else 0)  # the mean
        assert small.bytes() == expected
        assert sum(x.nbytes for x in small.buffers()) == expected
    assert 0.12 < expected / linear.weight.nbytes < 0.14


def test_double_quantization_keeps_absmax_to_a_few_percent():
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1
    codes, scale, mean = compress(absmax)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (4,)
    error = (decompress(codes, scale, mean) - absmax).abs()
    # 3 bits of fraction: at most 1/16 of the distance to the mean
    assert (error <= (absmax - mean).abs() / 16 + 1e-3).all() and error.max() > 0
    same = torch.full((5,), 2.0)
    assert torch.equal(decompress(*compress(same)), same)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_in_four_bits_is_a_linear_with_rounded_weights(bias):
    torch.manual_seed(0)
    linear = nn.Linear(70, 33, bias=bias)
    small = NF4Linear(linear)
    rounded = nn.Linear(70, 33, bias=bias)
    rounded.weight.data = small.weight
    if bias:
        rounded.bias.data = linear.bias.data
    assert 0.02 < (small.weight - linear.weight).std() / linear.weight.std() < 0.12
    x = torch.randn(4, 5, 70, requires_grad=True)
    y, z = small(x), rounded(x)
    torch.testing.assert_close(y, z)
    g = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (y, z)))
    kept = {}
    for name, part in (("small", small), ("rounded", rounded.requires_grad_(False))):
        sizes = kept[name] = []

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            part(x)
    assert 33 * 70 in kept["rounded"] and 33 * 70 not in kept["small"]  # it is unpacked again


def test_qlora_quantizes_the_blocks_and_nothing_else():
    m = apply_qlora(model(), QLoRAConfig(rank=2), seed=0)
    assert sum(isinstance(part, NF4Linear) for part in m.modules()) == 2 * 7
    assert isinstance(m.head, nn.Linear) and isinstance(m.tokens, nn.Embedding)
    with pytest.raises(ValueError, match="something attached"):
        quantize_base(m)
    remove_lora(m)
    with pytest.raises(ValueError, match="done already"):
        quantize_base(m)
