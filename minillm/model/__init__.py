"""The transformer and its parts."""

from minillm.model.attention import Attention, attend, attend_chunked
from minillm.model.block import Block, initialize
from minillm.model.cache import KVCache, LayerCache
from minillm.model.lm import LM, attention_maps
from minillm.model.mask import causal_mask, prefix_mask, sliding_window_mask, strided_mask
from minillm.model.mlp import MLP
from minillm.model.norm import LayerNorm, RMSNorm, deepnorm_constants
from minillm.model.position import Position, rotate, rotation
from minillm.model.sparse import attend_local, attend_strided

__all__ = [
    "LM",
    "MLP",
    "Attention",
    "Block",
    "KVCache",
    "LayerCache",
    "LayerNorm",
    "Position",
    "RMSNorm",
    "attend",
    "attend_chunked",
    "attend_local",
    "attend_strided",
    "attention_maps",
    "causal_mask",
    "deepnorm_constants",
    "initialize",
    "prefix_mask",
    "rotate",
    "rotation",
    "sliding_window_mask",
    "strided_mask",
]
