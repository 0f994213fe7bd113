"""Prompts, prefixes, adapters, (IA)³, LLaMA-Adapter: against the bare model and brute force."""

import copy
from dataclasses import replace

import pytest
import torch

from minillm.config import ModelConfig
from minillm.infer import generate, prepare
from minillm.model import LM
from minillm.peft.adapters import Adapter, AdapterConfig, apply_adapter
from minillm.peft.ia3 import IA3Config, IA3Linear, apply_ia3, merge_ia3
from minillm.peft.inject import base_hash, detach, find, trainable
from minillm.peft.llama_adapter import (
    LlamaAdapterConfig,
    apply_llama_adapter,
    remove_llama_adapter,
)
from minillm.peft.lora import LoRAConfig, apply_lora
from minillm.peft.prefix import PrefixConfig, apply_prefix
from minillm.peft.prompt import PromptConfig, apply_prompt, prompt_vectors
from minillm.peft.ptuning import PTuningConfig, apply_ptuning
from minillm.peft.spot import mixture, rank, similarity
from minillm.peft.virtual import attached, fold, remove_virtual
from minillm.train import train

KINDS = {
    "learned": {},
    "rope": {"position": "rope", "norm": "rms", "mlp": "swiglu", "n_kv_heads": 2},
    "interleaved": {"position": "rope", "rope_layout": "interleaved", "qk_norm": True},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5", "t5_buckets": 8, "t5_max_distance": 16},
    "sinusoidal": {"position": "sinusoidal", "embedding_norm": True},
    "biases, post": {"bias": True, "placement": "post"},
}
SHAPE = {"vocab_size": 50, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_len": 40}
SHAPE |= {"tie_embeddings": False}  # tied, a random model repeats what it reads
PROMPT = [3, 7, 1, 9]


def make(kind="rope", dtype=torch.float32, seed=0):
    """A model whose layers do something: weights four times those of a fresh one, biases too."""
    model = LM(ModelConfig(**SHAPE, **KINDS[kind]), seed=seed).eval()
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = p.data * 4 if p.ndim > 1 else p.data + 0.1 * torch.randn(p.shape, generator=rng)
    return model.to(dtype)


def draw(b=2, t=9, seed=5):
    return torch.randint(50, (b, t), generator=torch.Generator().manual_seed(seed))


def behind(tokens, prompt=PROMPT):
    return torch.cat([torch.tensor(prompt).expand(len(tokens), -1), tokens], 1)


VIRTUAL = {
    "prompt": (apply_prompt, PromptConfig(4)),
    "ptuning": (apply_ptuning, PTuningConfig(4, hidden=8)),
    "prefix": (apply_prefix, PrefixConfig(4, hidden=8)),
    "prefix, no MLP": (apply_prefix, PrefixConfig(4, std=1.0)),
}
UNCHANGED = {
    "serial": (apply_adapter, AdapterConfig(5)),
    "parallel": (apply_adapter, AdapterConfig(5, parallel=True, scale=4.0)),
    "around attention": (apply_adapter, AdapterConfig(5, targets="attn", activation="gelu")),
    "ia3": (apply_ia3, IA3Config()),
    "llama": (apply_llama_adapter, LlamaAdapterConfig(6, layers=2)),
}
ALL = VIRTUAL | UNCHANGED


def adapt(method, kind="rope", seed=1, model=None):
    apply, config = ALL[method]
    return apply(make(kind) if model is None else model, config, seed=seed)


def shaken(model, seed=2):
    """All that is trained moved away from the start, where much of it does nothing."""
    rng = torch.Generator().manual_seed(seed)
    for p in trainable(model):
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=rng).to(p.dtype)
    return model


def said(model, tokens, n=8, mask=None):
    return torch.stack(list(generate(model, tokens, n, temperature=0, mask=mask)), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "apply, config", [(apply_prompt, PromptConfig), (apply_prefix, PrefixConfig)]
)
def test_virtual_tokens_made_of_text_are_that_text(apply, config, kind):
    """Started from tokens, a prompt or a prefix is the base with these tokens before every text."""
    base, tokens = make(kind), draw()
    model = apply(copy.deepcopy(base), config(length=4, tokens=PROMPT))
    torch.testing.assert_close(model(tokens), base(behind(tokens))[:, 4:], rtol=0, atol=2e-5)
    assert torch.equal(said(model, tokens), said(base, behind(tokens)))
    assert torch.equal(said(prepare(model), tokens), said(base, behind(tokens)))
    # two rows of different length in one batch, padded on the left
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    padded[1, :3] = draw(1, 3)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[0, :3] = False
    both = said(model, padded, mask=mask)
    assert torch.equal(both[:1], said(base, behind(tokens[:1])))
    assert torch.equal(both[1:], said(base, behind(padded[1:])))


def test_packed_documents_each_stand_behind_the_prompt():
    base, first, second = make(), draw(1, 5, seed=6), draw(1, 4, seed=7)
    model = apply_prompt(copy.deepcopy(base), PromptConfig(4, tokens=PROMPT))
    documents = torch.tensor([0] * 5 + [1] * 4)
    mask = (documents[:, None] == documents) & torch.ones(9, 9, dtype=torch.bool).tril()
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    packed = model(torch.cat([first, second], 1), positions, mask)
    apart = [base(behind(x))[:, 4:] for x in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=0, atol=2e-5)


def test_a_prompt_learns_by_the_gradient_of_its_vectors():
    """The gradient is that of the same vectors put before the text's in the bare model."""
    base, tokens = make("alibi", torch.float64), draw()
    model = apply_prompt(copy.deepcopy(base), PromptConfig(4, tokens=PROMPT))
    model(tokens).square().sum().backward()
    vectors = base.tokens.weight[PROMPT].detach().requires_grad_()
    x = torch.cat([vectors.expand(2, -1, -1), base.tokens(tokens)], 1)
    base.head(base.run(x))[:, 4:].square().sum().backward()
    (got,) = (p.grad for p in trainable(model))
    torch.testing.assert_close(got, vectors.grad, rtol=1e-9, atol=1e-9)


def test_a_prefix_learns_by_finite_differences():
    model = apply_prefix(make("t5", torch.float64), PrefixConfig(2, std=1.0), seed=1)
    (table,), tokens = trainable(model), draw(1, 4)
    model(tokens).square().sum().backward()
    with torch.no_grad():
        for place in ((0, 3), (1, 70), (1, 191)):
            values = []
            for step in (1e-5, -1e-5):
                table[place] += step
                values.append(model(tokens).square().sum().item())
                table[place] -= step
            assert table.grad[place].item() == pytest.approx(
                (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", UNCHANGED)
def test_at_the_start_nothing_changes(method, kind):
    base, tokens = make(kind), draw()
    with torch.no_grad():
        before = base(tokens)
        assert torch.equal(adapt(method, model=base)(tokens), before)
        assert not torch.equal(shaken(base)(tokens), before)


@pytest.mark.parametrize("method", ALL)
def test_only_the_new_parameters_are_trained(method):
    base = make()
    model = adapt(method, model=copy.deepcopy(base))
    new = trainable(model)
    before = [p.detach().clone() for p in new]
    tokens = draw(4, 13)
    batches = [(tokens[:, :-1], tokens[:, 1:])] * 40
    losses = [s.loss for s in train(model, batches, torch.optim.Adam(new, 1e-2), clip=1.0)]
    assert losses[-1] < losses[0] - 0.03
    assert base_hash(model) == base_hash(base)
    for old, p in zip(before, new, strict=True):
        assert not torch.equal(old, p)
    assert {id(p) for p in new} == {id(p) for p in model.parameters() if p.grad is not None}
    # a copy is as good as the trained one, and generates the same with the cache as without
    model = copy.deepcopy(model).eval()
    text = tokens[:2, :4]
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(said(model, tokens[:2, :4], 5), text[:, 4:])
    assert torch.equal(said(prepare(model), tokens[:2, :4], 5), text[:, 4:])


@pytest.mark.parametrize("method", ALL)
def test_padding_changes_nothing(method):
    model = shaken(adapt(method))
    tokens, short = draw(1, 8), draw(1, 5, seed=8)
    both = torch.cat([tokens, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :3] = False
    together = said(model, both, mask=mask)
    assert torch.equal(together, torch.cat([said(model, tokens), said(model, short)]))


REMOVE = dict.fromkeys(VIRTUAL, remove_virtual) | {
    **dict.fromkeys(("serial", "parallel", "around attention"), lambda m: detach(m, Adapter)),
    "ia3": lambda m: detach(m, IA3Linear),
    "llama": remove_llama_adapter,
}


@pytest.mark.parametrize("method", ALL)
def test_taken_off_it_leaves_no_trace(method):
    base, tokens = make(), draw()
    model = shaken(adapt(method, model=copy.deepcopy(base)))
    REMOVE[method](model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert model.cfg == base.cfg
    torch.testing.assert_close(model(tokens), base(tokens), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="nothing to train"):
        trainable(model)
    with pytest.raises(ValueError, match="attached"):
        REMOVE[method](model)
    adapt(method, model=model)  # and there is room for it again


def test_parameters_are_as_many_as_the_formulas_say():
    w, layers, kv, f = 32, 3, 16, make().cfg.mlp_width
    expected = {
        "prompt": 4 * w,
        "prefix, no MLP": 4 * 2 * layers * kv,
        "prefix": 4 * kv + (kv * 8 + 8) + (8 + 1) * 2 * layers * kv,
        "serial": 2 * layers * (2 * w * 5 + w + 5),
        "parallel": layers * (2 * w * 5 + w + 5),
        "ia3": layers * (2 * kv + f),
        "llama": 2 * (6 * w + 1),
    }
    for method, count in expected.items():
        assert sum(p.numel() for p in trainable(adapt(method))) == count, method


@pytest.mark.parametrize("method", ["ptuning", "prefix"])
def test_folding_drops_the_encoder_and_keeps_the_function(method):
    model, tokens = shaken(adapt(method)), draw()
    before = model(tokens)
    assert torch.equal(fold(model)(tokens), before)
    width = {"ptuning": 32, "prefix": 2 * 3 * 16}[method]
    assert [p.shape for p in trainable(model)] == [(4, width)]


def test_a_prompt_is_read_anew_where_a_text_begins():
    """A step of training shows in the next generation, and not in the middle of one."""
    model = apply_prompt(make(), PromptConfig(4), seed=1)
    (table,), tokens = trainable(model), draw()
    before = said(model, tokens)
    run = generate(model, tokens, 8, temperature=0)
    first = next(run)
    model(tokens).sum().backward()  # a pass with gradients leaves nothing behind for the next
    with torch.no_grad():
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    after = said(model, tokens)
    assert not torch.equal(after, before)
    vectors = prompt_vectors(model)
    fresh = apply_prompt(make(), PromptConfig(4), start=vectors)
    assert torch.equal(said(fresh, tokens), after)
    assert torch.equal(first, before[:, 0])


def test_adapters_are_what_their_formula_says():
    """Serial behind both branches and parallel to the MLP, written out for one block."""
    tokens = draw()
    for method in ("serial", "parallel"):
        model = shaken(adapt(method, model=make("rope", torch.float64)))
        block = model.blocks[1]
        x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rotation = model.position.rotation(torch.arange(9))

        def bottleneck(part, z):
            return (
                z @ part.down.weight.T + part.down.bias
            ).relu() @ part.up.weight.T + part.up.bias

        serial = method == "serial"
        out = block.attn.out
        q, k, v = block.attn.project(block.norm1(x), rotation)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        scores = (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = y @ (out.base if serial else out).weight.T
        h = x + (y + bottleneck(out, y) if serial else y)
        z = block.norm2(h)
        mlp = block.mlp if serial else block.mlp.base
        y = torch.nn.functional.silu(mlp.gate(z)) * mlp.up(z)
        y = y @ (mlp.down.base if serial else mlp.down).weight.T
        y = y + (bottleneck(mlp.down, y) if serial else 4.0 * bottleneck(block.mlp, z))
        torch.testing.assert_close(block(x, rotation=rotation), h + y, rtol=1e-9, atol=1e-9)
        assert model(tokens).isfinite().all()


@pytest.mark.parametrize("kind", ["rope", "biases, post"])
def test_ia3_is_a_model_with_rescaled_weights(kind):
    model, tokens = shaken(adapt("ia3", kind)), draw()
    base, before = make(kind), model(tokens)
    for i, block in enumerate(model.blocks):
        for name in ("k", "v"):
            part, scale = getattr(base.blocks[i].attn, name), getattr(block.attn, name).scale
            part.weight.data *= scale.data[:, None]
            if part.bias is not None:
                part.bias.data *= scale.data
        base.blocks[i].mlp.down.weight.data *= block.mlp.down.scale.data
    torch.testing.assert_close(before, base(tokens), rtol=0, atol=2e-5)
    merged = merge_ia3(model)
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(merged(tokens), base(tokens), rtol=0, atol=1e-6)


def test_llama_adapter_is_a_second_softmax_behind_a_gate():
    model = shaken(adapt("llama", model=make("rope", torch.float64)))
    attn, x = model.blocks[2].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    rotation = model.position.rotation(torch.arange(5))
    gated = attn.attend
    q, k, v = attn.project(x, rotation)
    want = torch.zeros(2, 4, 5, 8, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)):
        g = h // 2
        rows = slice(8 * g, 8 * g + 8)
        extra_k = gated.prompt[0] @ attn.k.weight[rows].T
        extra_v = gated.prompt[0] @ attn.v.weight[rows].T
        own = (k[b, g, : i + 1] @ q[b, h, i] * 8**-0.5).softmax(0)
        other = (extra_k @ q[b, h, i] * 8**-0.5).softmax(0)
        want[b, h, i] = own @ v[b, g, : i + 1] + gated.gate * (other @ extra_v)
    want = attn.out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, rotation=rotation), want, rtol=1e-9, atol=1e-9)
    assert not hasattr(model.blocks[0].attn.attend, "gate")


def test_methods_go_together():
    """LoRA inside a prefixed model, (IA)³ on top of LoRA; the base stays what it was."""
    base, tokens = make(), draw()
    model = apply_lora(copy.deepcopy(base), LoRAConfig(rank=2), seed=1)
    apply_prompt(model, PromptConfig(4, tokens=PROMPT))
    apply_ia3(model, IA3Config(outputs=("attn.v",)))
    apply_adapter(model, AdapterConfig(3), seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), base(behind(tokens))[:, 4:], rtol=0, atol=2e-5)
    assert base_hash(model) == base_hash(base)
    shaken(model)(tokens).sum().backward()
    assert all(p.grad is not None for p in trainable(model))
    assert torch.equal(said(model, tokens), said(prepare(model), tokens))


def test_seeds_decide_and_leave_pytorch_alone():
    bare = make()
    state = torch.get_rng_state()
    for method in ALL:
        models = [adapt(method, seed=s, model=copy.deepcopy(bare)) for s in (1, 1, 2)]
        a, b, c = ([p.detach() for p in trainable(m)] for m in models)
        assert all(map(torch.equal, a, b))
        assert method == "ia3" or not all(map(torch.equal, a, c))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["learned", "rope"])
def test_virtual_tokens_take_room_in_the_context(kind):
    model = apply_prefix(make(kind), PrefixConfig(30))
    assert model.cfg.max_len == 10
    assert model(draw(1, 10)).shape == (1, 10, 50)
    with pytest.raises(ValueError, match=r"30 virtual tokens and 12 tokens of text .* 40 by 2"):
        model(draw(1, 12))
    with pytest.raises(ValueError, match=r"exceed the context of \d+ by \d$"):
        said(model, draw(1, 5), 8)
    assert len(said(model, draw(1, 5), 5)[0]) == 5
    with pytest.raises(ValueError, match=r"length=43 .* of 40: 4 too many"):
        apply_prompt(make(kind), PromptConfig(43))
    with pytest.raises(ValueError, match="1 too many"):
        apply_ptuning(make(kind), PTuningConfig(40))


def test_bad_input_is_refused():
    model = make()
    refused = [
        (lambda: apply_prompt(model, PromptConfig(0)), "length=0"),
        (lambda: apply_prefix(model, PrefixConfig(-1)), "length=-1"),
        (lambda: apply_llama_adapter(model, LlamaAdapterConfig(0)), "length=0"),
        (lambda: apply_llama_adapter(model, LlamaAdapterConfig(3, layers=4)), "layers=4 .* 3"),
        (lambda: apply_llama_adapter(model, LlamaAdapterConfig(3, layers=0)), "layers=0"),
        (lambda: apply_prompt(model, PromptConfig(4, tokens=[])), "at least one id"),
        (lambda: apply_prompt(model, PromptConfig(4, tokens=[50])), "0 to 49"),
        (lambda: PromptConfig(4, tokens=[1], std=0.1), "std=0.1"),
        (lambda: apply_prompt(model, PromptConfig(4), start=torch.zeros(4, 31)), r"\(4, 32\)"),
        (lambda: PrefixConfig(4, hidden=0), "hidden=0"),
        (lambda: PrefixConfig(4, hidden=3, tokens=[1]), "no MLP"),
        (lambda: PTuningConfig(4, hidden=0), "hidden=0"),
        (lambda: PTuningConfig(4, layers=0), "layers=0"),
        (lambda: PTuningConfig(4, dropout=1.0), r"dropout=1.0 .* \[0, 1\)"),
        (lambda: AdapterConfig(0), "width=0"),
        (lambda: AdapterConfig(activation="swiglu"), "relu"),
        (lambda: AdapterConfig(dropout=-0.1), "dropout=-0.1"),
        (lambda: apply_adapter(model, AdapterConfig(targets="attn.output")), "matches no module"),
        (lambda: apply_adapter(model, AdapterConfig(targets=())), "no targets"),
        (lambda: apply_adapter(model, AdapterConfig(targets="norm1")), "RMSNorm"),
        (lambda: apply_ia3(model, IA3Config(inputs=("mlp",))), "is a MLP"),
        (lambda: apply_ia3(model, IA3Config(outputs=("key",))), "attn.k"),
        (lambda: apply_ia3(model, IA3Config((), ())), "nothing to rescale"),
        (lambda: merge_ia3(model), "no .* attached"),
        (lambda: fold(model), "attached"),
        (lambda: attached(model), "attached"),
        (lambda: similarity(torch.ones(3, 4), torch.ones(3, 5)), r"\(3, 5\)"),
        (lambda: mixture(torch.ones(1, 2), {}, 1), "k=1 .* 0"),
    ]
    for call, pattern in refused:
        with pytest.raises(ValueError, match=pattern):
            call()
    assert base_hash(model) == base_hash(make())
    assert all(p.requires_grad for p in model.parameters()), "what is refused changes nothing"
    with pytest.raises(ValueError, match="window of 8"):
        apply_prompt(LM(replace(model.cfg, window=8)), PromptConfig(4))
    apply_prefix(model, PrefixConfig(4))
    for again in (lambda: apply_prompt(model), lambda: apply_llama_adapter(model)):
        with pytest.raises(ValueError, match="take them off first"):
            again()
    with pytest.raises(ValueError, match="a prefix is attached"):
        prompt_vectors(model)
    for method in ("serial", "ia3"):
        with pytest.raises(ValueError, match=r"first|yet"):
            adapt(method, model=adapt(method))


def test_likeness_of_prompts():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, generator=rng), torch.randn(3, 6, generator=rng)
    assert similarity(a, a) == pytest.approx(1)
    assert similarity(a, -2 * a) == pytest.approx(-1)
    assert similarity(a, b) == pytest.approx(similarity(b, a.flip(0)), abs=1e-6)
    pairs = [float(torch.cosine_similarity(x, y, dim=0)) for x in a for y in b]
    assert similarity(a, b, pairs=True) == pytest.approx(sum(pairs) / 12, abs=1e-6)
    library = {"same": a, "near": a + 0.1 * torch.randn(4, 6, generator=rng), "other": -a}
    ranked = rank(a, library)
    assert list(ranked) == ["same", "near", "other"]
    mean = (ranked["same"] * a + ranked["near"] * library["near"]) / (1 + ranked["near"])
    torch.testing.assert_close(mixture(a, library, 2), mean)
    with pytest.raises(ValueError, match="smaller k"):
        mixture(a, library, 3)
    with pytest.raises(ValueError, match="one shape"):
        mixture(a, {"a": a, "b": a[:2]}, 2)


def train_prompt(answers, steps, start=None, seed=0):
    """Losses and prompt that makes a random model say one of `answers`, whatever it reads."""
    model = apply_prompt(make(), PromptConfig(4), seed=seed, start=start)
    rng = torch.Generator().manual_seed(seed + 1)
    batches = []
    for _ in range(steps):
        inputs = torch.randint(50, (8, 6), generator=rng)
        picked = torch.randint(len(answers), (8, 6), generator=rng)
        batches.append((inputs, torch.tensor(answers)[picked]))
    losses = [s.loss for s in train(model, batches, torch.optim.Adam(trainable(model), 3e-2))]
    return losses, prompt_vectors(model)


@pytest.mark.slow
def test_prompts_tell_which_task_to_start_from():
    """Of two tasks' prompts, that of the one that shares answers is more alike and starts better.

    Three seeds; the unrelated task is the control.
    """
    for seed in range(3):
        tasks = {"near": [5, 6, 7], "far": [30, 31, 32]}
        trained = {name: train_prompt(x, 30, seed=seed)[1] for name, x in tasks.items()}
        _, target = train_prompt([5, 6, 8], 10, seed=seed)
        likeness = rank(target, trained)
        assert likeness["near"] > likeness["far"] + 0.3
        starts = {
            name: train_prompt([5, 6, 8], 3, start, seed + 10)[0] for name, start in trained.items()
        }
        assert all(a < b - 0.15 for a, b in zip(starts["near"], starts["far"], strict=True))


def test_wrapped_places_keep_their_names():
    """Names are those of the bare model, so that targets mean the same whatever is attached."""
    model = adapt("prompt", model=adapt("around attention"))
    apply_lora(model, LoRAConfig(rank=2, targets=("attn.q",)), seed=0)
    assert isinstance(find(model, "blocks.0.attn"), Adapter)
    assert find(model, "blocks.0.attn.q") is find(model, "blocks.0.attn").base.q
    assert base_hash(shaken(model)) == base_hash(make())
    assert model(draw()).isfinite().all()
