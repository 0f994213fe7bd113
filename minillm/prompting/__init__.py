"""What can be had from a model without touching its weights.

Everything here takes plain functions, so that it works with a model of the zoo as well as with one
that only a server can reach. `minillm.infer.batching.complete` and the functions of
`minillm.infer.scoring` become such functions with `functools.partial(complete, model, tokenizer)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["Embed", "Generate", "Score"]

Generate = Callable[[Sequence[str]], list[str]]
"""n prompts -> n texts that go on from them"""
Score = Callable[[Sequence[str], Sequence[str]], Tensor]
"""n prompts, k texts -> log p(text | prompt) in nats, [n, k]"""
Embed = Callable[[Sequence[str]], Tensor]
"""n texts -> n vectors, [n, d]"""
