"""Learning the merges of byte-pair encoding (Sennrich, Haddow and Birch, Neural Machine Translation
of Rare Words with Subword Units, 2016), on bytes as in GPT-2.

A word is kept as a string whose characters are token ids: `chr(id)`. The pair of neighbors (x, y)
is then a string of length two, and merging it everywhere in a word is `word.replace(xy, z)`.
"""

from __future__ import annotations

import gc
import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import add

from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.count import count_pieces
from minillm.tokenizers.pretokenize import GPT2_PATTERN

_MIRROR = bytes(range(255, -1, -1))


def train_bpe(
    texts: str | Iterable[str],
    vocab_size: int,
    special_tokens: Collection[str] = (),
    pattern: str = GPT2_PATTERN,
    processes: int = 1,
) -> BPE:
    """Train a byte-level BPE on one text or many.

    Ids 0 to 255 are the bytes, then the merges in the order learned, then the special tokens. Each
    step merges the most frequent pair of neighboring tokens; of equally frequent pairs the
    lexicographically greatest (as a pair of byte strings). Merges never cross pieces (see
    `pattern`), texts or special tokens. Training ends early, with a smaller vocabulary, when every
    piece has become one token.

    Raises ValueError for text without any piece, and for a `vocab_size` without room for the 256
    bytes and the special tokens.

    The example of Sennrich et al. (2016), words split at whitespace:

    >>> text = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3
    >>> bpe = train_bpe(text, 256 + 6, pattern=r"\\S+")
    >>> [(left + right).decode() for left, right in bpe.merges]
    ['st', 'est', 'ow', 'low', 'west', 'ne']
    """
    smallest = 256 + len(set(special_tokens))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {smallest}: "
            f"256 bytes and {smallest - 256} special token(s)"
        )
    counts = count_pieces(texts, special_tokens, pattern, processes)
    if not counts:
        raise ValueError("the corpus is empty: no text outside special tokens to count pairs in")
    words = {piece.encode().decode("latin-1"): count for piece, count in counts.items()}
    vocab = {byte: bytes([byte]) for byte in range(256)}
    merges = learn_merges(words, vocab, vocab_size - smallest)
    return BPE(vocab, merges, special_tokens, pattern)


def extend(
    bpe: BPE,
    texts: str | Iterable[str],
    n_tokens: int,
    protect: Iterable[str] = (),
    processes: int = 1,
) -> BPE:
    """Add up to `n_tokens` tokens learned from `texts`, such as text in another language.

    The new tokens come after all old ones, special tokens included, so every old id keeps its
    meaning. The new merges come after all old ones too: a piece is first encoded as before, and
    changes only if two neighbors in that result are a new pair. Two rules keep such pairs out:

    - a new merge joins tokens of non-ASCII bytes only, and ASCII text has none: the ids of *every*
      ASCII text stay the same, seen or not;
    - no new merge joins two tokens that are neighbors in the encoding of a text in `protect`
      (English with “quotes” or a café): the ids of those texts stay the same as well.

    >>> english = train_bpe("the cat sat on the mat", 262, pattern=GPT2_PATTERN)
    >>> both = extend(english, "猫坐在垫子上 猫坐着", 4)
    >>> len(english.encode("猫坐着")), len(both.encode("猫坐着"))
    (9, 5)
    >>> english.encode("the mat") == both.encode("the mat")
    True
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens} must be at least 1")
    counts = count_pieces(texts, bpe.special_ids, bpe.pattern, processes)
    if not counts:
        raise ValueError("the corpus is empty: no text outside special tokens to count pairs in")
    words = {_encoded(bpe, piece): count for piece, count in counts.items()}
    protected = count_pieces(protect, bpe.special_ids, bpe.pattern, processes)
    banned = {pair for piece in protected for pair in _pairs(_encoded(bpe, piece))}
    vocab = dict(bpe.vocab)
    known = set(vocab.values())

    def allowed(pair: str) -> bool:
        left, right = vocab[ord(pair[0])], vocab[ord(pair[1])]
        return min(left + right) >= 0x80 and pair not in banned and left + right not in known

    merges = bpe.merges + learn_merges(words, vocab, n_tokens, allowed)
    return BPE(vocab, merges, bpe.special_tokens, bpe.pattern)


def learn_merges(
    words: Mapping[str, int],
    vocab: dict[int, bytes],
    n_merges: int,
    allowed: Callable[[str], bool] = lambda pair: True,
) -> list[tuple[bytes, bytes]]:
    """Learn up to `n_merges` merges from `words` (strings of token ids, with counts).

    Extends `vocab` by the new tokens, at ids from max(vocab) + 1 on, and returns the merges in
    order. Pairs that are not `allowed` are never merged.

    A pair's count only grows in the step that creates one of its two tokens; later it only falls.
    So each pair goes into the heap once, and is put back with its true count if that has fallen by
    the time it comes up. Only words that hold the pair are touched.
    """
    with _garbage_collection_paused():
        return _learn_merges(words, vocab, n_merges, allowed)


def _learn_merges(words, vocab, n_merges, allowed):
    frequency = list(words.values())
    words = list(words)
    counts: dict[str, int] = defaultdict(int)  # of each pair of neighbors
    holders: dict[str, list[int]] = defaultdict(list)  # words that hold the pair, or once did
    for index, word in enumerate(words):
        n = frequency[index]
        for pair in _pairs(word):
            counts[pair] += n
            holders[pair].append(index)
    order = {chr(token): _descending(text) for token, text in vocab.items()}

    def entry(pair):  # a heap pops its smallest entry
        return -counts[pair], order[pair[0]], order[pair[1]], pair

    heap = [entry(pair) for pair in counts if allowed(pair)]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    token = max(vocab) + 1
    while heap and len(merges) < n_merges:
        negative, _, _, pair = heapq.heappop(heap)
        count = counts[pair]
        if count != -negative:
            if count:
                heapq.heappush(heap, entry(pair))
            continue
        left, right = vocab[ord(pair[0])], vocab[ord(pair[1])]
        merges.append((left, right))
        vocab[token] = left + right
        order[chr(token)] = _descending(left + right)
        for new_pair in _merge_pair(pair, chr(token), words, frequency, counts, holders):
            if allowed(new_pair):
                heapq.heappush(heap, entry(new_pair))
        token += 1
    return merges


def _merge_pair(pair, token, words, frequency, counts, holders):
    """Replace `pair` by `token` in every word, keep counts and holders true; the new pairs."""
    left, right = pair
    new_counts, new_holders = defaultdict(int), defaultdict(list)
    for index in holders.pop(pair):
        parts = words[index].split(pair)
        if len(parts) == 1:
            continue  # another merge took it, or the word was listed twice
        words[index] = token.join(parts)
        n = frequency[index]
        before = parts[0][-1:]  # the neighbor on the left, if any
        for part in parts[1:]:
            if before:
                counts[(right if before is token else before) + left] -= n
                new_counts[before + token] += n
                new_holders[before + token].append(index)
            if part:
                after = part[0]
                counts[right + after] -= n
                new_counts[token + after] += n
                new_holders[token + after].append(index)
                before = part[-1]
            else:
                before = token  # two pairs side by side
    del counts[pair]
    counts.update(new_counts)
    holders.update(new_holders)
    return new_counts


def _pairs(word: str) -> Iterator[str]:
    return map(add, word, word[1:])


def _encoded(bpe: BPE, piece: str) -> str:
    return "".join(map(chr, bpe.encode_bytes(piece.encode())))


def _descending(text: bytes) -> str:
    """A key that sorts byte strings from the greatest down: mirrored, a longer one first."""
    return text.translate(_MIRROR).decode("latin-1") + "\u0100"


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    # Millions of small objects and no cycles: looking for cycles would take a third of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
