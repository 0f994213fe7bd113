"""Text to numbers and back: splitting, byte-pair encoding, and the course's own tokenizer."""

from __future__ import annotations

from minillm.paths import ASSETS
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.bpe_train import extend, train_bpe
from minillm.tokenizers.chat import Chat, Message, render
from minillm.tokenizers.export import to_huggingface_json, to_tiktoken

COURSE_TOKENIZER = ASSETS / "models" / "tokenizer.json"
"""The tokenizer of the course's models, made by `python -m minillm.recipes.tokenizer`."""

__all__ = [
    "BPE",
    "COURSE_TOKENIZER",
    "Chat",
    "Message",
    "extend",
    "load_course_tokenizer",
    "render",
    "to_huggingface_json",
    "to_tiktoken",
    "train_bpe",
]


def load_course_tokenizer() -> BPE:
    """The tokenizer of the course: 4,096 tokens, five of them special, every digit one token.

    >>> bpe = load_course_tokenizer()
    >>> bpe.vocab_size, bpe.special_tokens
    (4096, ('<|endoftext|>', '<|pad|>', '<|user|>', '<|assistant|>', '<|system|>'))
    """
    return BPE.load(COURSE_TOKENIZER)
