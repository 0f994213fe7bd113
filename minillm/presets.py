"""Published models by name, as configs: their shapes alone give their parameter counts.

`assets/data/model_shapes.csv` holds what was printed about each, with its source, and a test
compares. Where a paper leaves a detail open (the exact GELU, the padded vocabulary), the comment
says what was chosen.
"""

from __future__ import annotations

from minillm.config import ModelConfig


def _gpt(vocab: int, d: int, layers: int, heads: int, context: int, **other: object) -> ModelConfig:
    """GPT-2's kind of decoder: biases, learned positions, GELU, norms before the branches."""
    kind = {"bias": True, "mlp": "gelu_tanh", "max_len": context}
    return ModelConfig(vocab, d_model=d, n_layers=layers, n_heads=heads, **kind, **other)


def _bert(d: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        *(30_522, d, layers, heads),
        kind="encoder",
        max_len=512,
        placement="post",
        embedding_norm=True,
        norm_eps=1e-12,
        mlp="gelu",
        bias=True,
        n_segments=2,
        mlm_head=True,
        init="normal",
    )


def _llama(d: int, layers: int, heads: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        *(32_000, d, layers, heads),
        d_ff=hidden,
        max_len=2048,
        norm="rms",
        norm_eps=1e-6,
        position="rope",
        mlp="swiglu",
        tie_embeddings=False,
    )


PRESETS: dict[str, ModelConfig] = {
    # Radford et al., Improving Language Understanding by Generative Pre-Training, 2018: norms after
    # the branches, 40,000 merges and their alphabet
    "gpt1": _gpt(40_478, 768, 12, 12, 512, placement="post", init="normal"),
    # Radford et al., Language Models are Unsupervised Multitask Learners, 2019, table 2
    "gpt2": _gpt(50_257, 768, 12, 12, 1024),
    "gpt2-medium": _gpt(50_257, 1024, 24, 16, 1024),
    "gpt2-large": _gpt(50_257, 1280, 36, 20, 1024),
    "gpt2-xl": _gpt(50_257, 1600, 48, 25, 1024),
    # Brown et al., Language Models are Few-Shot Learners, 2020, table 2.1. Its alternating sparse
    # attention has no parameters of its own and is left out.
    "gpt3": _gpt(50_257, 12_288, 96, 96, 2048),
    # Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2019, with the head of
    # masked language modeling, without the pooler of next-sentence prediction
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    # Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    # Transformer, 2020, section 3.7: 128 heads of width 128 in a model of width 1024
    "t5-11b": ModelConfig(
        *(32_128, 1024, 24, 128),
        head_dim=128,
        d_ff=65_536,
        max_len=512,
        kind="encoder-decoder",
        norm="rms",
        norm_eps=1e-6,
        position="t5",
        mlp="relu",
        attention_scale=1.0,
        logit_scale=1024**-0.5,
        init="normal",
    ),
    # Shoeybi et al., Megatron-LM, 2019, table 1; vocabulary padded to a multiple of 128 per GPU
    "megatron-8.3b": _gpt(51_200, 3072, 72, 32, 1024),
    # Microsoft, Turing-NLG: A 17-Billion-Parameter Language Model, 2020
    "turing-nlg": _gpt(51_200, 4256, 78, 28, 1024),
    # Smith et al., Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B, 2022, section 3
    "mt-nlg-530b": _gpt(51_200, 20_480, 105, 128, 2048),
    # Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023, table 2; the MLP's
    # width is 2/3 of 4 d_model, rounded up to a multiple of 256
    "llama-7b": _llama(4096, 32, 32, 11_008),
    "llama-13b": _llama(5120, 40, 40, 13_824),
    "llama-33b": _llama(6656, 60, 52, 17_920),
    "llama-65b": _llama(8192, 80, 64, 22_016),
}


def preset(name: str) -> ModelConfig:
    """The published model `name`.

    Raises ValueError for an unknown name, listing the known ones.

    >>> preset("llama-65b").n_layers
    80
    >>> preset("gpt5")
    Traceback (most recent call last):
        ...
    ValueError: no preset 'gpt5'; there are gpt1, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3, \
bert-base, bert-large, t5-11b, megatron-8.3b, turing-nlg, mt-nlg-530b, llama-7b, llama-13b, \
llama-33b, llama-65b
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
