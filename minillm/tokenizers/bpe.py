"""Byte-level byte-pair encoding: text to token ids and back. Training is in `bpe_train`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from math import inf
from operator import add, index
from pathlib import Path
from typing import Literal

from minillm.tokenizers import bpe_file
from minillm.tokenizers.pretokenize import GPT2_PATTERN, compile_pattern, split_special
from minillm.tokenizers.vocabulary import check_merges, check_vocab, place_special

CACHE_ENTRIES, CACHE_LENGTH = 1 << 16, 64  # remembered pieces, and the longest one remembered
LONG_PIECE = 32  # bytes; longer pieces are merged with a heap
BLOCK = 1 << 16  # characters that `encode_iterable` collects before it looks for pieces


class BPE:
    """A vocabulary, the merges that made it, and special tokens.

    `vocab` maps the ids 0 .. n-1 to byte strings; each merge joins two of them into a third, and
    the order of the merges is their priority. A special token stands for itself, has an id of its
    own and takes part in no merge: its bytes may be in `vocab`, otherwise it gets the next free id.

    Encoding cuts text into pieces (`pattern`), each piece into bytes, and then applies the
    earliest merge that fits until none does (Sennrich, Haddow and Birch, Neural Machine Translation
    of Rare Words with Subword Units, 2016; on bytes: Radford et al., Language Models are
    Unsupervised Multitask Learners, 2019). Treat an instance as frozen.

    >>> vocab = {0: b"l", 1: b"o", 2: b"w", 3: b"lo", 4: b"low"}
    >>> bpe = BPE(vocab, [(b"l", b"o"), (b"lo", b"w")], ["<end>"])
    >>> bpe.encode("lowlo<end>", allowed_special="all")
    [4, 3, 5]
    >>> bpe.decode([4, 3, 5])
    'lowlo<end>'
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] = (),
        pattern: str = GPT2_PATTERN,
    ) -> None:
        self.vocab, self.special_ids = place_special(dict(sorted(vocab.items())), special_tokens)
        self.merges = [(bytes(left), bytes(right)) for left, right in merges]
        self.pattern = pattern
        self._split = compile_pattern(pattern).findall
        check_vocab(self.vocab)
        special = set(self.special_ids.values())
        # A piece is worked on as a string whose characters are token ids: chr(id).
        chars = {text: chr(i) for i, text in self.vocab.items() if i not in special}
        check_merges(self.merges, chars)
        self._chars = {text[0]: char for text, char in chars.items() if len(text) == 1}
        self._pairs = [chars[left] + chars[right] for left, right in self.merges]
        self._results = [chars[left + right] for left, right in self.merges]
        self._ranks = {pair: rank for rank, pair in enumerate(self._pairs)}
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.vocab)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens, by id."""
        return tuple(sorted(self.special_ids, key=self.special_ids.__getitem__))

    def __repr__(self) -> str:
        return f"BPE({self.vocab_size} tokens, {len(self.special_ids)} special)"

    def encode(
        self, text: str, allowed_special: Collection[str] | Literal["all"] = frozenset()
    ) -> list[int]:
        """The ids of `text`.

        Special tokens in `text` must be named in `allowed_special` (or "all"); others raise
        ValueError, for text from outside could contain them by design. `encode_ordinary` takes
        all of them as plain text.
        """
        allowed = self._check_allowed(allowed_special)
        ids: list[int] = []
        for segment, is_special in split_special(text, self.special_ids):
            if is_special:
                ids.append(self._special_id(segment, allowed))
            else:
                ids += self.encode_ordinary(segment)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text` with special tokens taken as plain text: never a special id."""
        return self._encode_pieces(self._pieces(text))

    def encode_bytes(self, piece: bytes) -> list[int]:
        """The ids of one piece, given as bytes (which need not be valid UTF-8)."""
        try:
            word = "".join([self._chars[byte] for byte in piece])
        except KeyError as missing:
            raise ValueError(f"byte {missing} of {piece!r} is not in the vocabulary") from None
        return [ord(char) for char in self._merge(word)]

    def encode_iterable(
        self,
        texts: Iterable[str],
        allowed_special: Collection[str] | Literal["all"] = frozenset(),
    ) -> Iterator[int]:
        """Yield the ids of the concatenation of `texts`, however it was cut into strings.

        Keeps no more than the end of the text that may still change: a special token that has only
        begun, or the last piece. So memory does not grow with the input, only with its longest
        single piece. `pattern` must not look back, nor ahead past the next run of whitespace.
        """
        allowed = self._check_allowed(allowed_special)
        waiting, size, enough = [], 0, BLOCK
        for text in texts:
            for start in range(0, len(text), BLOCK):
                waiting.append(text[start : start + BLOCK])
                size += len(waiting[-1])
                if size >= enough:
                    ids, rest = self._encode_settled("".join(waiting), allowed)
                    yield from ids
                    # A long piece is looked at again only when it has doubled: linear in all.
                    waiting, size, enough = [rest], len(rest), BLOCK + 2 * len(rest)
        yield from self.encode("".join(waiting), allowed)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of `ids`; ValueError for ids outside the vocabulary.

        Single ids may hold part of a character; bytes that are not valid UTF-8 become U+FFFD, or
        raise UnicodeDecodeError (a ValueError) with `errors="strict"`.
        """
        ids = [index(i) for i in ids]
        try:
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", errors)
        except KeyError:
            unknown = sorted({i for i in ids if i not in self.vocab})
            raise ValueError(
                f"cannot decode ids {unknown[:10]}: the vocabulary has 0 to {self.vocab_size - 1}"
            ) from None

    def save(self, path: str | Path, about: str = "") -> None:
        """Write the tokenizer as JSON that a person can read; `about` may say how it was made."""
        ordinary = {"vocab": self.vocab, "merges": self.merges}
        special = {"special_tokens": self.special_tokens, "pattern": self.pattern}
        bpe_file.write(path, **ordinary, **special, about=about)

    @classmethod
    def load(cls, path: str | Path) -> BPE:
        """Read a tokenizer that `save` wrote; ValueError if the file is anything else."""
        return cls(**bpe_file.read(path))

    def _check_allowed(self, allowed: Collection[str] | str) -> Collection[str]:
        if allowed == "all":
            return self.special_ids
        if isinstance(allowed, str):
            raise ValueError(
                f'allowed_special={allowed!r} must be "all" or a set of special tokens'
            )
        if unknown := sorted(set(allowed) - set(self.special_ids)):
            raise ValueError(f"{unknown} are not special tokens; these are: {self.special_tokens}")
        return allowed

    def _special_id(self, token: str, allowed: Collection[str]) -> int:
        if token not in allowed:
            raise ValueError(
                f"the text contains the special token {token!r}, which is not allowed: "
                f"pass allowed_special={{{token!r}}} to encode it as such, "
                "or use encode_ordinary to encode it as plain text"
            )
        return self.special_ids[token]

    def _pieces(self, text: str) -> list[str]:
        pieces = self._split(text)
        if sum(map(len, pieces)) != len(text):
            raise ValueError(
                f"the split pattern {self.pattern!r} leaves out characters of {text[:40]!r}: "
                "they would be lost"
            )
        return pieces

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        cache, ids = self._cache, []
        for piece in pieces:
            known = cache.get(piece)
            ids += self._encode_piece(piece) if known is None else known
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self.encode_bytes(piece.encode())
        if len(piece) <= CACHE_LENGTH:
            if len(self._cache) >= CACHE_ENTRIES:
                self._cache.clear()  # the frequent pieces are back in a moment
            self._cache[piece] = ids
        return ids

    def _merge(self, word: str) -> str:
        """Apply the earliest merge that fits, everywhere in `word`, until none fits."""
        if len(word) >= LONG_PIECE:
            return self._merge_long(word)
        while len(word) > 1:
            rank = min([self._ranks.get(pair, inf) for pair in map(add, word, word[1:])])
            if rank == inf:
                break
            word = word.replace(self._pairs[rank], self._results[rank])
        return word

    def _merge_long(self, word: str) -> str:
        """The same in O(n log n) instead of O(n^2), for pieces that are long or hostile.

        A heap holds the pairs by priority, then place; links lead over merged tokens to the next.
        """
        ranks, n = self._ranks, len(word)
        chars, before, after = list(word), list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [
            (ranks[pair], i) for i, pair in enumerate(map(add, word, word[1:])) if pair in ranks
        ]
        heapify(heap)
        while heap:
            rank, i = heappop(heap)
            j = after[i]
            if j == n or ranks.get(chars[i] + chars[j]) != rank:
                continue  # one of the two has been merged meanwhile
            chars[i], chars[j] = self._results[rank], ""
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < n and chars[left] + chars[right] in ranks:
                    heappush(heap, (ranks[chars[left] + chars[right]], left))
        return "".join(chars)

    def _encode_settled(self, text: str, allowed: Collection[str]) -> tuple[list[int], str]:
        """The ids of the front of `text` that no continuation can change, and the rest of it."""
        longest = max(map(len, self.special_ids), default=1)
        horizon = len(text) - longest + 1  # from here on a special token may have begun
        ids: list[int] = []
        start = 0
        for segment, is_special in split_special(text, self.special_ids):
            end = start + len(segment)
            if is_special and start < horizon:
                ids.append(self._special_id(segment, allowed))
            elif not is_special and end <= horizon and end < len(text):
                ids += self.encode_ordinary(segment)
            else:
                # A piece is settled once non-whitespace, and one more character, follow it.
                known = text[start : max(start, horizon)]
                settled = len(known[:-1].rstrip()) - 1
                pieces = self._pieces(known)
                ends = list(accumulate(map(len, pieces), initial=0))
                n = max(bisect_right(ends, settled) - 1, 0)
                ids += self._encode_pieces(pieces[:n])
                start += ends[n]
                break
            start = end
        return ids, text[start:]
