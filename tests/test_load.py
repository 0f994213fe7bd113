"""Checkpoints of other libraries: old spellings, wrong weights, contradictions, downloads."""

import dataclasses
import functools
import http.server
import json
import re
import socket
import threading

import pytest
import safetensors.torch
import torch

from minillm.config import ModelConfig
from minillm.data.download import DownloadError
from minillm.model import LM
from minillm.model.files import PUBLISHED, Published, make
from minillm.model.load import (
    from_huggingface,
    from_pretrained,
    load_pretrained,
    read_config,
    save_pretrained,
    to_huggingface,
    write_config,
)

GPT2 = ModelConfig(31, 12, 2, 3, max_len=16, bias=True, mlp="gelu_tanh")
LLAMA = ModelConfig(
    *(31, 12, 2, 3),
    n_kv_heads=1,
    norm="rms",
    position="rope",
    mlp="swiglu",
    tie_embeddings=False,
    init="normal",
)
QWEN3 = dataclasses.replace(LLAMA, head_dim=6, qk_norm=True, window=4)
T5 = ModelConfig(
    *(31, 12, 3, 3),
    n_encoder_layers=2,
    head_dim=6,
    kind="encoder-decoder",
    norm="rms",
    position="t5",
    mlp="relu",
    attention_scale=1.0,
    logit_scale=12**-0.5,
    init="normal",
)
BERT = ModelConfig(
    *(31, 12, 2, 3),
    kind="encoder",
    max_len=16,
    placement="post",
    embedding_norm=True,
    bias=True,
    n_segments=2,
    mlm_head=True,
    init="normal",
)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "t5": T5, "bert": BERT}


def theirs(name):
    """Weights, none of them a constant, and config of one architecture."""
    model = make(CONFIGS[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return *to_huggingface(model), model


def same(model, other):
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_for_bit(name, tmp_path):
    state, config, model = theirs(name)
    assert config["model_type"] == name and json.loads(json.dumps(config)) == config
    back = from_huggingface(state, config)
    assert same(model, back) and not back.training
    assert (back.head.weight is back.tokens.weight) == model.cfg.tie_embeddings
    assert all(p.requires_grad and p.is_contiguous() for p in back.parameters())
    kind, again = write_config(back.cfg)
    assert (kind, again) == (name, config)
    save_pretrained(model, tmp_path)
    assert same(model, load_pretrained(tmp_path))
    assert load_pretrained(tmp_path).cfg == back.cfg
    half = load_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_fused_and_transposed_weights_are_where_they_belong():
    state, _, model = theirs("gpt2")
    fused = state["transformer.h.1.attn.c_attn.weight"]
    x = torch.randn(5, 12)
    got = x @ fused + state["transformer.h.1.attn.c_attn.bias"]
    attn = model.blocks[1].attn
    want = torch.cat([attn.q(x), attn.k(x), attn.v(x)], dim=-1)
    assert fused.shape == (12, 36)
    torch.testing.assert_close(got, want)


def test_old_spellings_are_understood():
    state, config, model = theirs("gpt2")  # as first published: no prefix, and the causal masks
    old = {name.removeprefix("transformer."): x for name, x in state.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert same(from_huggingface(old, config), model)

    state, config, model = theirs("bert")
    old = {
        re.sub("LayerNorm.weight", "LayerNorm.gamma", name).replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for name, x in state.items()
    }
    old |= {
        "bert.pooler.dense.weight": torch.ones(12, 12),
        "bert.pooler.dense.bias": torch.ones(12),
    }
    old |= {"cls.seq_relationship.weight": torch.ones(2, 12)}
    old |= {"bert.embeddings.position_ids": torch.arange(16)[None]}
    old["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    assert same(from_huggingface(old, config), model)

    state, config, model = theirs("t5")
    shared = state.pop("shared.weight")
    state |= {f"{part}.embed_tokens.weight": shared.clone() for part in ("encoder", "decoder")}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state |= {"lm_head.weight": shared.clone(), unused: torch.ones(32, 3)}
    for key in ("n_positions", "num_decoder_layers", "feed_forward_proj", "scale_decoder_outputs"):
        del config[key]  # not in the first files
    assert from_huggingface(state, config | {"num_decoder_layers": 3}).cfg.max_len == 512
    state["decoder.embed_tokens.weight"] = shared + 1
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens.* and shared.* should be one"):
        from_huggingface(state, config | {"num_decoder_layers": 3})

    state, config, model = theirs("llama")
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": 2.0}}
    del config["attention_bias"], config["mlp_bias"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    cfg = from_huggingface(state, config).cfg
    assert (cfg.rope_scaling, cfg.rope_factor) == ("linear", 2.0)


def test_other_pairs_of_rope_are_converted():
    model = LM(dataclasses.replace(QWEN3, rope_layout="interleaved"), seed=0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    back = from_huggingface(*to_huggingface(model), dtype=None)
    assert back.cfg.rope_layout == "half" and not same(model, back)
    x = torch.arange(20)[None]
    torch.testing.assert_close(back(x), model(x))


def test_nothing_is_held_twice():
    state, config, _ = theirs("llama")
    model = from_huggingface(state, config)
    addresses = {x.data_ptr() for x in state.values()}
    assert all(p.data_ptr() in addresses for p in model.parameters())
    # what had to be cut out of something larger does not keep it alive
    state, config, _ = theirs("gpt2")
    for name, p in from_huggingface(state, config).named_parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, name
    untouched = theirs("gpt2")[0]
    assert state.keys() == untouched.keys()


def test_wrong_weights_are_named():
    state, config, _ = theirs("gpt2")
    other, _, _ = theirs("llama")
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].t()
    del state["transformer.wpe.weight"]
    state["transformer.extra"] = torch.ones(1)
    with pytest.raises(ValueError) as caught:
        from_huggingface(state, config)
    assert str(caught.value) == (
        "these are not the weights of this gpt2 config: missing: transformer.wpe.weight; "
        "unexpected: transformer.extra; "
        "mis-shaped: transformer.h.0.mlp.c_fc.weight is (48, 12), not (12, 48)"
    )
    with pytest.raises(ValueError, match=r"missing: .*wpe.* and 21 more; unexpected: model\.embed"):
        from_huggingface(other, config)
    more = theirs("gpt2")[1] | {"n_layer": 3}
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.2\.ln_1\.weight, .* 6 more$"):
        from_huggingface(theirs("gpt2")[0], more)
    tied = theirs("llama")[1] | {"tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed.* should be one"):
        from_huggingface(other, tied)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "mamba"}, r"model_type='mamba' must be one of \['gpt2', 'llama'"),
        ("gpt2", {"model_type": None}, "model_type=None"),
        ("gpt2", {"n_embd": 13}, "gpt2 model contradicts itself: d_model=13 must be a multiple"),
        ("gpt2", {"n_embd": "12"}, "gpt2 model contradicts itself"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True .* only False"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish' must be one of"),
        ("llama", {"num_key_value_heads": 2}, "n_heads=3 must be a multiple of n_kv_heads=2"),
        ("llama", {"mlp_bias": True}, "attention_bias=False and mlp_bias=True"),
        ("llama", {"rope_theta": 5.0}, "rope_theta=5.0 contradicts rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3'.* is not built"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True of a qwen3 model: only False"),
        ("qwen3", {"max_window_layers": 1}, "a window in some layers only is not built"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='tanh' must be one of"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings=False of a bert model"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_configs_that_cannot_be_are_named(name, changes, message):
    _, config = write_config(CONFIGS[name])
    read_config(config)
    with pytest.raises(ValueError, match=message):
        read_config(config | changes)


def test_t5_scales_its_output_where_the_matrix_is_shared():
    second = dataclasses.replace(T5, mlp="geglu_tanh", tie_embeddings=False, logit_scale=1.0)
    _, config = write_config(second)
    assert config["feed_forward_proj"] == "gated-gelu"
    assert read_config(config) == dataclasses.replace(second, d_ff=second.mlp_width, max_len=256)
    del config["scale_decoder_outputs"]  # not in published files
    assert read_config(config).logit_scale == 1
    assert read_config(config | {"tie_word_embeddings": True}).logit_scale == 12**-0.5


def test_a_config_that_lacks_keys_names_them():
    _, config = write_config(GPT2)
    del config["n_head"], config["vocab_size"]
    with pytest.raises(ValueError, match="gpt2 model lacks vocab_size, n_head"):
        read_config(config)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dataclasses.replace(GPT2, bias=False), "gpt2 lacks bias=False$"),
        (dataclasses.replace(GPT2, head_dim=5), "gpt2 lacks head_dim=5$"),
        (dataclasses.replace(LLAMA, mlp="geglu_tanh", window=3), "llama lacks window=3$"),
        (dataclasses.replace(LLAMA, rope_scaling="ntk", rope_factor=2.0), "rope_scaling='ntk'"),
        (dataclasses.replace(LLAMA, dropout=0.1), "llama lacks dropout=0.1$"),
        (dataclasses.replace(GPT2, position="alibi"), "gpt2 lacks position='alibi'$"),
        (dataclasses.replace(T5, logit_scale=0.5), "t5 lacks logit_scale=0.5$"),
        (dataclasses.replace(T5, mlp="geglu"), "t5 lacks mlp='geglu'$"),
        (dataclasses.replace(BERT, mlp="relu"), "bert lacks mlp='relu'$"),
        (dataclasses.replace(BERT, mlm_head=False), "bert lacks mlm_head=False$"),
    ],
)
def test_models_without_an_equal_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        write_config(cfg)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match="no config"):
        load_pretrained(tmp_path)
    state, config, _ = theirs("gpt2")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*can run code"):
        load_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for bad in ("../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "x.bin"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(ValueError, match=r"not a \.safetensors file beside it"):
            load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "one.safetensors")}))
    with pytest.raises(ValueError, match=r"one\.safetensors cannot be read"):
        load_pretrained(tmp_path)
    safetensors.torch.save_file(dict(list(state.items())[1:]), tmp_path / "one.safetensors")
    with pytest.raises(
        ValueError, match=r"index\.json and its files disagree about transformer\.wte"
    ):
        load_pretrained(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "one.safetensors")
    assert load_pretrained(tmp_path).cfg.n_layers == 2
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_pretrained(tmp_path)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        super().do_GET()

    def copyfile(self, source, outputfile):
        if self.server.cut and self.path.endswith(".safetensors"):
            outputfile.write(source.read(self.server.cut))
            self.server.cut = 0
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine with one model in one file and one in two."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state, config, model = theirs("gpt2")
    save_pretrained(model, tmp_path / "hub" / "one")
    two = tmp_path / "hub" / "two"
    two.mkdir()
    (two / "config.json").write_text(json.dumps(config))
    where = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        part = {name: x for name, x in state.items() if where[name] == file}
        safetensors.torch.save_file(part, two / file)
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    handler = functools.partial(_Handler, directory=tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.asked, server.cut, server.model = True, [], 0, model
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.table = {
        "one": Published(f"{url}/one", "MIT", 10**6),
        "two": Published(f"{url}/two", "MIT", 10**6, "model.safetensors.index.json"),
        "large": Published(f"{url}/one", "MIT", 1000),
        "absent": Published(f"{url}/nowhere", "MIT", 1000),
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.mark.parametrize("name", ["one", "two"])
def test_published_models_are_downloaded_once_and_pinned(hub, tmp_path, name, capsys):
    cache = tmp_path / "cache"
    model = from_pretrained(name, cache, hub.table)
    assert same(model, hub.model) and "license: MIT" in capsys.readouterr().out
    asked = len(hub.asked)
    assert same(from_pretrained(name, cache, hub.table), model)
    assert len(hub.asked) == asked
    file = sorted((cache / name).glob("*.safetensors"))[0]
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    with pytest.raises(DownloadError, match="was changed: its sha256 is"):
        from_pretrained(name, cache, hub.table)


def test_a_cut_download_goes_on_by_itself(hub, tmp_path):
    hub.cut = 2000
    assert same(from_pretrained("one", tmp_path, hub.table), hub.model)
    asked = [range_ for path, range_ in hub.asked if path.endswith("model.safetensors")]
    assert asked == [None, "bytes=2000-"]
    assert not list((tmp_path / "one").glob("*.part*"))


def test_downloads_that_are_refused(hub, tmp_path):
    with pytest.raises(DownloadError, match=r"bytes, more than the 1,000 expected at most"):
        from_pretrained("large", tmp_path, hub.table)
    assert not (tmp_path / "large" / "model.safetensors").exists()
    with pytest.raises(DownloadError, match=r"nowhere/config\.json: the server answered 404"):
        from_pretrained("absent", tmp_path, hub.table)
    with pytest.raises(ValueError, match="unknown model 'gpt-2': known are gpt2, "):
        from_pretrained("gpt-2", tmp_path)


def test_without_a_network_the_error_says_so(tmp_path):
    with socket.socket() as closed:  # bound but not listening: refuses every connection
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        table = {"far": Published(url, "MIT", 1000)}
        with pytest.raises(DownloadError) as caught:
            from_pretrained("far", tmp_path, table)
    text = str(caught.value)
    assert f"{url}/config.json needs a network that reaches it" in text
    assert text.endswith("the models of minillm.zoo need no network") and "corpora" not in text


def test_published_models_are_safetensors_from_one_place():
    assert "gpt2" in PUBLISHED
    for model in PUBLISHED.values():
        assert model.url.startswith("https://") and model.license and model.max_bytes < 10**10
        assert model.weights.endswith((".safetensors", ".safetensors.index.json"))
