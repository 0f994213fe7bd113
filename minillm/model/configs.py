"""config.json of Hugging Face's architectures <-> `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minillm.config import ModelConfig
from minillm.model import names

# theirs -> ours, without and with a gate
ACTIVATIONS = {
    "relu": ("relu", "reglu"),
    "gelu": ("gelu", "geglu"),
    "gelu_new": ("gelu_tanh", "geglu_tanh"),
    "gelu_pytorch_tanh": ("gelu_tanh", "geglu_tanh"),
    "silu": ("swish", "swiglu"),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of model as Hugging Face files describe it."""

    model: str
    """its class in `transformers`"""
    table: str
    fields: Mapping[str, str]
    """our config field -> their key"""
    fixed: Mapping[str, object]
    """our config fields that never vary"""
    activation: str
    """their key for the MLP's activation"""
    gated: bool = False
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """what a key means that is left out; the others are required"""
    only: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """their keys of which we build one value alone"""
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """second names of theirs for one parameter"""
    prefix: str = ""
    """that some files leave out"""
    ignored: str = r"(?!)"
    """regular expression of names, after the prefix, that hold nothing we need"""


_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_ROPE = {"norm": "rms", "position": "rope", "init": "normal"}
_INVERSE_FREQUENCIES = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # computed, in old files

ARCHITECTURES: Mapping[str, Architecture] = {
    "gpt2": Architecture(
        model="GPT2LMHeadModel",
        table=names.GPT2,
        fields=names.pairs(names.GPT2_FIELDS),
        fixed={"bias": True},
        activation="activation_function",
        defaults={"n_inner": None, "resid_pdrop": 0.1, "tie_word_embeddings": True},
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(masked_)?bias",  # the causal mask, in old files
    ),
    "llama": Architecture(
        model="LlamaForCausalLM",
        table=names.LLAMA,
        fields=names.pairs(names.LLAMA_FIELDS),
        fixed=_ROPE,
        activation="hidden_act",
        gated=True,
        defaults=_LLAMA_DEFAULTS,
        prefix="model.",
        ignored=_INVERSE_FREQUENCIES,
    ),
    "qwen3": Architecture(
        model="Qwen3ForCausalLM",
        table=names.QWEN3,
        fields=names.pairs(names.LLAMA_FIELDS),
        fixed={**_ROPE, "qk_norm": True},
        activation="hidden_act",
        gated=True,
        defaults={**_LLAMA_DEFAULTS, "head_dim": 128},
        only={"attention_bias": False},
        prefix="model.",
        ignored=_INVERSE_FREQUENCIES,
    ),
    "t5": Architecture(
        model="T5ForConditionalGeneration",
        table=names.T5,
        fields=names.pairs(names.T5_FIELDS),
        fixed={
            "kind": "encoder-decoder",
            "norm": "rms",
            "position": "t5",
            "attention_scale": 1.0,
            "init": "normal",
        },
        activation="feed_forward_proj",
        defaults={
            "n_positions": 512,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "tie_word_embeddings": True,
            "feed_forward_proj": "relu",
        },
        aliases={
            f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")
        },
        # in the first files, unused since the biases belong to self-attention
        ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    "bert": Architecture(
        model="BertForMaskedLM",
        table=names.BERT,
        fields=names.pairs(names.BERT_FIELDS),
        fixed={
            "kind": "encoder",
            "placement": "post",
            "embedding_norm": True,
            "mlm_head": True,
            "bias": True,
            "init": "normal",
        },
        activation="hidden_act",
        defaults={"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "tie_word_embeddings": True},
        only={
            "tie_word_embeddings": True,
            "position_embedding_type": "absolute",
            "hidden_act": "gelu",
            "is_decoder": False,
        },
        aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        prefix="bert.",
        # the head of next-sentence prediction, which a model for masked tokens does not use
        ignored=r"embeddings\.position_ids|pooler\.dense\.\w+|cls\.seq_relationship\.\w+",
    ),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names; ValueError for an unknown one."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type={model_type!r} must be one of {list(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """Our config from the contents of a config.json.

    Raises ValueError when it is of an unknown architecture, lacks a key, asks for something that
    we do not build, or contradicts itself.
    """
    arch, kind = architecture(config), config["model_type"]
    config = {**arch.defaults, **config}
    if kind == "t5" and config.get("num_decoder_layers") is None:
        config["num_decoder_layers"] = config.get("num_layers")
    if lacking := [key for key in arch.fields.values() if key not in config]:
        raise ValueError(f"the config of this {kind} model lacks {', '.join(lacking)}")
    for key, value in arch.only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r} of a {kind} model: only {value!r} is built")
    fields = {**arch.fixed, **{ours: config[key] for ours, key in arch.fields.items()}}
    fields["mlp"] = _activation(config[arch.activation], arch, kind)
    if kind == "llama" and config.get("mlp_bias", fields["bias"]) != fields["bias"]:
        raise ValueError(
            f"attention_bias={fields['bias']} and mlp_bias={config['mlp_bias']}: "
            "only both or neither is built"
        )
    if kind == "t5" and config.get("scale_decoder_outputs", fields["tie_embeddings"]):
        fields["logit_scale"] = fields["d_model"] ** -0.5
    if fields.get("position") == "rope":
        fields |= _read_rope(config)
    if kind == "qwen3":
        fields["window"] = _read_window(config)
    try:
        return ModelConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the config of this {kind} model contradicts itself: {error}") from error


def _activation(theirs: str, arch: Architecture, kind: str) -> str:
    gated = arch.gated
    if kind == "t5":
        gated, theirs = theirs.startswith("gated-"), theirs.removeprefix("gated-")
        theirs = "gelu_new" if gated and theirs == "gelu" else theirs  # as T5 v1.1 means it
    if theirs not in ACTIVATIONS:
        raise ValueError(f"{arch.activation}={theirs!r} must be one of {list(ACTIVATIONS)}")
    return ACTIVATIONS[theirs][gated]


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's fields, from `rope_parameters` or, in older files, `rope_theta` and `rope_scaling`."""
    old = {**(config.get("rope_scaling") or {})}
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e4), **old}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", 1e4))
    if float(config.get("rope_theta", theta)) != theta:
        raise ValueError(f"rope_theta={config['rope_theta']} contradicts rope_parameters={rope}")
    if kind not in ("default", "linear") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"RoPE {rope} is not built; rope_type must be 'default' or 'linear'")
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "linear":
        fields |= {"rope_scaling": "linear", "rope_factor": float(rope.get("factor", 1.0))}
    return fields


def _read_window(config: Mapping[str, Any]) -> int | None:
    if not config.get("use_sliding_window"):
        return None
    layers = config["num_hidden_layers"]
    first = config.get("max_window_layers", 28)
    types = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(types)) > 1:
        raise ValueError(f"layer_types={types}: a window in some layers only is not built")
    return config.get("sliding_window") if types[0] == "sliding_attention" else None


def write_config(cfg: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture that `cfg` describes and its config.json.

    Raises ValueError when there is none, with the fields in which the nearest one differs.
    """
    asked, found = _meaning(cfg), []
    for kind, arch in ARCHITECTURES.items():
        if arch.fixed.get("kind", "decoder") != cfg.kind:
            continue
        config = _write(cfg, kind, arch)
        try:
            back = _meaning(read_config(config))
        except ValueError:  # its own rules forbid such a shape
            back = dict.fromkeys(asked)
        differ = [f"{n}={asked[n]!r}" for n in asked if n in back and asked[n] != back[n]]
        found.append((len(differ), kind, config, differ))
    _, kind, config, differ = min(found, key=lambda candidate: candidate[0])
    if differ:
        raise ValueError(f"no known architecture has all of this; {kind} lacks {', '.join(differ)}")
    return kind, config


def _meaning(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that say what a trained model computes, resolved."""
    fields = dataclasses.asdict(cfg) | {
        "n_kv_heads": cfg.kv_heads,
        "head_dim": cfg.d_head,
        "d_ff": cfg.mlp_width,
        "n_encoder_layers": cfg.encoder_layers,
    }
    if cfg.attention_scale == cfg.d_head**-0.5:
        fields["attention_scale"] = None
    unused = ["init", "impl", "rope_layout"]  # our own affair, or converted
    unused += [] if cfg.position == "rope" else ["rope_theta"]
    unused += [] if cfg.position == "t5" else ["t5_buckets", "t5_max_distance"]
    unused += [] if cfg.position == "hierarchical" else ["hierarchical_alpha"]
    return {name: value for name, value in fields.items() if name not in unused}


def _write(cfg: ModelConfig, kind: str, arch: Architecture) -> dict[str, Any]:
    """config.json for `cfg`, as far as this architecture can say it."""
    fields = dataclasses.asdict(cfg) | _meaning(cfg)
    config: dict[str, Any] = {"model_type": kind, "architectures": [arch.model]}
    config |= {"bos_token_id": None, "eos_token_id": None}  # the tokenizer's affair
    config |= {theirs: fields[ours] for ours, theirs in arch.fields.items()}
    gated = cfg.gated if kind == "t5" else arch.gated
    words = {ours[gated]: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config[arch.activation] = words.get(cfg.mlp, "relu")
    config |= arch.only
    if arch.fixed.get("position") == "rope":
        scaling = {"rope_type": "default"}
        if cfg.rope_scaling == "linear":
            scaling = {"rope_type": "linear", "factor": cfg.rope_factor}
        config["rope_parameters"] = {"rope_theta": cfg.rope_theta, **scaling}
    if kind == "gpt2":
        config |= {"embd_pdrop": cfg.dropout, "attn_pdrop": 0.0}
    elif kind == "llama":
        config["mlp_bias"] = cfg.bias
    elif kind == "qwen3":
        config |= {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window}
        config |= {"max_window_layers": 0 if cfg.window else cfg.n_layers}
    elif kind == "bert":
        config["attention_probs_dropout_prob"] = 0.0
    elif kind == "t5":
        activation = config[arch.activation].replace("gelu_new", "gelu" if gated else "gelu_new")
        config[arch.activation] = f"gated-{activation}" if gated else activation
        config |= {"scale_decoder_outputs": cfg.logit_scale != 1, "decoder_start_token_id": 0}
    return config
