"""Cutting text into pieces before byte-pair encoding sees it.

BPE merges inside pieces only, so the split pattern decides what a token can never span: in the
pattern of GPT-2 a piece is a run of letters, of digits or of other signs, with the space before it.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Collection, Iterator

import regex

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The split of GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners,
2019)."""

DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The same with every digit a piece of its own, without its space, as Llama splits numbers
(Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023)."""

_CUTTABLE = (GPT2_PATTERN, DIGITS_PATTERN)
_SPACE_AFTER_TEXT = regex.compile(r"(?<=\S)\s")


@functools.lru_cache(maxsize=32)
def compile_pattern(pattern: str) -> regex.Pattern:
    """Compile a split pattern; ValueError if it is malformed or has capturing groups.

    >>> compile_pattern("(a)|b")
    Traceback (most recent call last):
        ...
    ValueError: the split pattern '(a)|b' has 1 capturing group(s): write (?:...) instead of (...)
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern!r} is not valid: {error}") from error
    if compiled.groups:
        raise ValueError(
            f"the split pattern {pattern!r} has {compiled.groups} capturing group(s): "
            "write (?:...) instead of (...)"
        )
    return compiled


def split_text(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """The pieces of `text`. With the two patterns of this module their concatenation is `text`.

    A pattern of your own may leave characters out; they are dropped here (`BPE.encode` refuses).

    >>> split_text("We've 42 low, lower tokens.")
    ['We', "'ve", ' 42', ' low', ',', ' lower', ' tokens', '.']
    >>> split_text("in 2019", DIGITS_PATTERN)
    ['in', ' ', '2', '0', '1', '9']
    """
    return compile_pattern(pattern).findall(text)


def nfkc(text: str) -> str:
    """Unicode normalization form KC: compatible characters become one. Not invertible.

    >>> nfkc("ﬁve ² Ｈｉ")
    'five 2 Hi'
    """
    return unicodedata.normalize("NFKC", text)


@functools.lru_cache(maxsize=32)
def _special_pattern(special_tokens: frozenset[str]) -> regex.Pattern:
    # An alternation takes its first branch that matches: the longest token has to come first.
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)))


def split_special(text: str, special_tokens: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Cut `text` at special tokens: yields (segment, is it a special token?), nothing empty.

    Scans from the left; where several special tokens start, the longest wins.

    >>> list(split_special("a<s><s>b<s>", ["<s>", "<s><s>"]))
    [('a', False), ('<s><s>', True), ('b', False), ('<s>', True)]
    """
    if "" in special_tokens:
        raise ValueError("a special token must not be the empty string")
    start = 0
    if special_tokens:
        for match in _special_pattern(frozenset(special_tokens)).finditer(text):
            if start < match.start():
                yield text[start : match.start()], False
            yield match.group(), True
            start = match.end()
    if start < len(text):
        yield text[start:], False


def cut_text(text: str, size: int, pattern: str = GPT2_PATTERN) -> list[str]:
    """Cut `text` into chunks of about `size` characters, never through a piece.

    Cuts only before whitespace that follows non-whitespace. That is safe for this module's
    patterns: none of their pieces has whitespace after non-whitespace, so every such place is a
    border between pieces, and none looks back, so the rest is split as if nothing stood before it.
    Other patterns may join such places, so for them the text stays whole.

    >>> cut_text("one two  three", 4)
    ['one two', '  three']
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 character")
    if pattern not in _CUTTABLE:
        return [text] if text else []
    chunks, start = [], 0
    while start < len(text):
        place = _SPACE_AFTER_TEXT.search(text, start + size)
        end = place.start() if place else len(text)
        chunks.append(text[start:end])
        start = end
    return chunks
