"""The transformer and its parts."""

from minillm.model.attention import Attention, attend, attend_chunked
from minillm.model.cache import KVCache, LayerCache
from minillm.model.lm import LM, attention_maps
from minillm.model.mask import causal_mask, prefix_mask, sliding_window_mask, strided_mask
from minillm.model.sparse import attend_local, attend_strided

__all__ = [
    "LM",
    "Attention",
    "KVCache",
    "LayerCache",
    "attend",
    "attend_chunked",
    "attend_local",
    "attend_strided",
    "attention_maps",
    "causal_mask",
    "prefix_mask",
    "sliding_window_mask",
    "strided_mask",
]
