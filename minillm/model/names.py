"""What Hugging Face files call our parameters and config fields: tables for each architecture.

In the tables a line is a module, ours and theirs, whose `.weight` and `.bias` go by these names, or
a single parameter. A star stands for the number of the block. Lines of ours that share a name of
theirs are stored there one below the other; `transposed` ones as [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable

GPT2 = """
    tokens              transformer.wte
    position.table      transformer.wpe.weight
    blocks.*.norm1      transformer.h.*.ln_1
    blocks.*.attn.q     transformer.h.*.attn.c_attn     transposed
    blocks.*.attn.k     transformer.h.*.attn.c_attn     transposed
    blocks.*.attn.v     transformer.h.*.attn.c_attn     transposed
    blocks.*.attn.out   transformer.h.*.attn.c_proj     transposed
    blocks.*.norm2      transformer.h.*.ln_2
    blocks.*.mlp.up     transformer.h.*.mlp.c_fc        transposed
    blocks.*.mlp.down   transformer.h.*.mlp.c_proj      transposed
    norm                transformer.ln_f
    head                lm_head
"""

LLAMA = """
    tokens                  model.embed_tokens
    blocks.*.norm1          model.layers.*.input_layernorm
    blocks.*.attn.q         model.layers.*.self_attn.q_proj
    blocks.*.attn.k         model.layers.*.self_attn.k_proj
    blocks.*.attn.v         model.layers.*.self_attn.v_proj
    blocks.*.attn.out       model.layers.*.self_attn.o_proj
    blocks.*.norm2          model.layers.*.post_attention_layernorm
    blocks.*.mlp.gate       model.layers.*.mlp.gate_proj
    blocks.*.mlp.up         model.layers.*.mlp.up_proj
    blocks.*.mlp.down       model.layers.*.mlp.down_proj
    norm                    model.norm
    head                    lm_head
"""

QWEN3 = f"""{LLAMA}
    blocks.*.attn.q_norm    model.layers.*.self_attn.q_norm
    blocks.*.attn.k_norm    model.layers.*.self_attn.k_norm
"""

BERT = """
    tokens              bert.embeddings.word_embeddings
    segments            bert.embeddings.token_type_embeddings
    position.table      bert.embeddings.position_embeddings.weight
    embedding_norm      bert.embeddings.LayerNorm
    blocks.*.attn.q     bert.encoder.layer.*.attention.self.query
    blocks.*.attn.k     bert.encoder.layer.*.attention.self.key
    blocks.*.attn.v     bert.encoder.layer.*.attention.self.value
    blocks.*.attn.out   bert.encoder.layer.*.attention.output.dense
    blocks.*.norm1      bert.encoder.layer.*.attention.output.LayerNorm
    blocks.*.mlp.up     bert.encoder.layer.*.intermediate.dense
    blocks.*.mlp.down   bert.encoder.layer.*.output.dense
    blocks.*.norm2      bert.encoder.layer.*.output.LayerNorm
    mlm.dense           cls.predictions.transform.dense
    mlm.norm            cls.predictions.transform.LayerNorm
    mlm.bias            cls.predictions.bias
    head                cls.predictions.decoder
"""

# T5's MLP is layer 1 in the encoder, 2 in the decoder; `wi` if it has no gate
_STACK = """
    {0}.position.buckets    {0}.block.0.layer.0.SelfAttention.relative_attention_bias.weight
    {0}.blocks.*.norm1      {0}.block.*.layer.0.layer_norm
    {0}.blocks.*.attn.q     {0}.block.*.layer.0.SelfAttention.q
    {0}.blocks.*.attn.k     {0}.block.*.layer.0.SelfAttention.k
    {0}.blocks.*.attn.v     {0}.block.*.layer.0.SelfAttention.v
    {0}.blocks.*.attn.out   {0}.block.*.layer.0.SelfAttention.o
    {0}.blocks.*.norm2      {0}.block.*.layer.{1}.layer_norm
    {0}.blocks.*.mlp.gate   {0}.block.*.layer.{1}.DenseReluDense.wi_0
    {0}.blocks.*.mlp.up     {0}.block.*.layer.{1}.DenseReluDense.wi_1
    {0}.blocks.*.mlp.down   {0}.block.*.layer.{1}.DenseReluDense.wo
    {0}.norm                {0}.final_layer_norm
"""

T5 = f"""
    tokens                          shared
    {_STACK.format("encoder", 1)}
    {_STACK.format("decoder", 2)}
    decoder.blocks.*.norm_cross     decoder.block.*.layer.1.layer_norm
    decoder.blocks.*.cross.q        decoder.block.*.layer.1.EncDecAttention.q
    decoder.blocks.*.cross.k        decoder.block.*.layer.1.EncDecAttention.k
    decoder.blocks.*.cross.v        decoder.block.*.layer.1.EncDecAttention.v
    decoder.blocks.*.cross.out      decoder.block.*.layer.1.EncDecAttention.o
    head                            lm_head
"""

# config fields: ours, theirs
GPT2_FIELDS = """
    vocab_size          vocab_size
    d_model             n_embd
    n_layers            n_layer
    n_heads             n_head
    d_ff                n_inner
    max_len             n_positions
    norm_eps            layer_norm_epsilon
    dropout             resid_pdrop
    tie_embeddings      tie_word_embeddings
"""

LLAMA_FIELDS = """
    vocab_size          vocab_size
    d_model             hidden_size
    n_layers            num_hidden_layers
    n_heads             num_attention_heads
    n_kv_heads          num_key_value_heads
    head_dim            head_dim
    d_ff                intermediate_size
    max_len             max_position_embeddings
    norm_eps            rms_norm_eps
    bias                attention_bias
    tie_embeddings      tie_word_embeddings
"""

T5_FIELDS = """
    vocab_size          vocab_size
    d_model             d_model
    n_layers            num_decoder_layers
    n_encoder_layers    num_layers
    n_heads             num_heads
    head_dim            d_kv
    d_ff                d_ff
    max_len             n_positions
    norm_eps            layer_norm_epsilon
    t5_buckets          relative_attention_num_buckets
    t5_max_distance     relative_attention_max_distance
    dropout             dropout_rate
    tie_embeddings      tie_word_embeddings
"""

BERT_FIELDS = """
    vocab_size          vocab_size
    d_model             hidden_size
    n_layers            num_hidden_layers
    n_heads             num_attention_heads
    d_ff                intermediate_size
    max_len             max_position_embeddings
    norm_eps            layer_norm_eps
    n_segments          type_vocab_size
    dropout             hidden_dropout_prob
    tie_embeddings      tie_word_embeddings
"""


def pairs(table: str) -> dict[str, str]:
    """A table of two columns as a dict."""
    return dict(line.split() for line in table.split("\n") if line.strip())


def their_names(
    table: str, ours: Iterable[str], gated: bool = False
) -> dict[str, tuple[list[str], bool]]:
    """Their name -> our names stored there in this order, and whether transposed.

    `gated` says whether the MLP has a gate.

    >>> their_names(GPT2, ["blocks.3.attn.q.bias", "blocks.3.attn.k.bias"])
    {'transformer.h.3.attn.c_attn.bias': (['blocks.3.attn.q.bias', 'blocks.3.attn.k.bias'], True)}
    """
    lines = [line.split() for line in table.split("\n") if line.strip()]
    rules = {line[0]: (line[1], len(line) == 3) for line in lines}
    found: dict[str, tuple[list[str], bool]] = {}
    for name in ours:
        number = re.search(r"\.(\d+)\.", name)
        general = name if number is None else name.replace(number[0], ".*.", 1)
        module, _, suffix = general.rpartition(".")
        if general not in rules and module not in rules:
            raise ValueError(f"this architecture has no parameter {name}")
        theirs, transposed = rules[general] if general in rules else rules[module]
        if general not in rules:
            theirs = f"{theirs}.{suffix}"
        if not gated and table is T5:
            theirs = theirs.replace("wi_1", "wi")
        theirs = theirs if number is None else theirs.replace("*", number[1])
        found.setdefault(theirs, ([], transposed))[0].append(name)
    return found
