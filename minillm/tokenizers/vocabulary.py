"""What makes a vocabulary, its merges and its special tokens consistent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def place_special(
    vocab: dict[int, bytes], special_tokens: Sequence[str]
) -> tuple[dict[int, bytes], dict[str, int]]:
    """`vocab` with the special tokens in it, and the id of each: its own, or the next free one."""
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens={special_tokens!r} must be a list of strings")
    ids = {text: i for i, text in vocab.items()}
    placed = {}
    for token in dict.fromkeys(special_tokens):
        text = token.encode()
        if len(text) < 2:
            raise ValueError(f"special token {token!r} must have at least two bytes")
        placed[token] = ids.get(text, len(vocab))
        vocab[placed[token]] = text
    return vocab, placed


def check_vocab(vocab: Mapping[int, bytes]) -> None:
    """ValueError unless the ids are 0 .. n-1 and the tokens different, non-empty byte strings."""
    missing = [i for i in range(len(vocab)) if i not in vocab]
    if missing:
        raise ValueError(f"the ids of vocab must be 0 to {len(vocab) - 1}: {missing[:5]} missing")
    seen: dict[bytes, int] = {}
    for i, text in vocab.items():
        if not isinstance(text, bytes) or not text:
            raise ValueError(f"vocab[{i}]={text!r} must be a non-empty byte string")
        if text in seen:
            raise ValueError(f"vocab has {text!r} twice: ids {seen[text]} and {i}")
        seen[text] = i


def check_merges(merges: Sequence[tuple[bytes, bytes]], ordinary: Collection[bytes]) -> None:
    """ValueError unless every merge joins what bytes and earlier merges made into a new token."""
    made = {text for text in ordinary if len(text) == 1}
    for left, right in merges:
        for text in (left, right):
            if text not in made:
                raise ValueError(f"merge ({left!r}, {right!r}): no earlier merge makes {text!r}")
        if left + right not in ordinary:
            raise ValueError(
                f"merge ({left!r}, {right!r}): the result is no token of the vocabulary"
            )
        if left + right in made:
            raise ValueError(f"merge ({left!r}, {right!r}): an earlier merge makes this token")
        made.add(left + right)
