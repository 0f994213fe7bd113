"""The same tokenizer in other libraries' form, for identical ids."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from minillm.tokenizers.bpe import BPE

if TYPE_CHECKING:
    import tiktoken


def to_tiktoken(bpe: BPE, name: str = "minillm") -> tiktoken.Encoding:
    """A `tiktoken.Encoding` that gives the ids of `bpe`.

    tiktoken keeps no merges: it joins any two neighbors whose bytes together are a token, the
    smallest id first. That is the same where ids grow with the merges and every token is what its
    own bytes encode to. Trained vocabularies are so; ValueError for one that is not.
    """
    import tiktoken

    special = set(bpe.special_ids.values())
    ranks = {text: i for i, text in bpe.vocab.items() if i not in special}
    made = [ranks[left + right] for left, right in bpe.merges]
    first = 1 + max((i for text, i in ranks.items() if len(text) == 1), default=-1)
    if made != sorted(made) or (made and made[0] < first):
        raise ValueError("tiktoken needs ids in the order of the merges, after the single bytes")
    if lost := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"tiktoken needs all 256 bytes in the vocabulary: {lost[:10]} are missing")
    encoding = tiktoken.Encoding(
        name, pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens=bpe.special_ids
    )
    for text, i in ranks.items():
        if bpe.encode_bytes(text) != [i]:
            raise ValueError(
                f"token {i} ({text!r}) encodes to {bpe.encode_bytes(text)}, where tiktoken would "
                "find it whole: these merges have no equal there"
            )
    return encoding


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, which files of the `tokenizers` library use.

    Printable Latin-1 characters stand for themselves, the rest for U+0100 and up: a space is Ġ.

    >>> "".join(byte_characters()[byte] for byte in " café".encode())
    'ĠcafÃ©'
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = [*printable, *range(0x100, 0x100 + len(others))]
    return dict(zip([*printable, *others], map(chr, stand_ins), strict=True))


def to_huggingface_json(bpe: BPE) -> str:
    """`bpe` as JSON for `tokenizers.Tokenizer.from_str`, which gives the same ids.

    There special tokens in text are always taken as such, as with `allowed_special="all"`.
    ValueError for a special token that reads like an ordinary one in that form, where Ġ is a space.
    """
    stand_in = byte_characters()

    def show(token: bytes) -> str:
        return "".join([stand_in[byte] for byte in token])

    special = set(bpe.special_ids.values())
    vocab = {show(text): i for i, text in bpe.vocab.items() if i not in special}
    if clash := [text for text in bpe.special_ids if text in vocab]:
        raise ValueError(f"special tokens {clash} cannot be told from the tokens of that spelling")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": bpe.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": text, **added, "special": True}
                for text, i in sorted(bpe.special_ids.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split, {**byte_level, "use_regex": False}],
            },
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": False},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {**vocab, **bpe.special_ids},
                "merges": [[show(left), show(right)] for left, right in bpe.merges],
            },
        },
        ensure_ascii=False,
    )
