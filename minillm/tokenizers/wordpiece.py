"""WordPiece: merges chosen by a likelihood score, text cut by the longest match from the left.

Sources: Schuster and Nakajima, Japanese and Korean Voice Search, 2012 (training: add the unit that
raises the likelihood of the corpus most); Devlin et al., BERT: Pre-training of Deep Bidirectional
Transformers for Language Understanding, 2019 (`##` pieces, `[UNK]`, greedy encoding).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex

PREFIX = "##"  # marks a piece that continues a word
UNK = "[UNK]"
# BERT's rule: white space separates, every punctuation mark (all ASCII symbols count as such)
# stands alone, everything else sticks together.
_WORD = regex.compile(r"[^\p{White_Space}\p{P}$+<=>^`|~]+|[\p{P}$+<=>^`|~]")


def split_words(text: str) -> list[str]:
    """Cut text as BERT does: at white space (which is lost) and around punctuation.

    >>> split_words("Don't panic: 50% of it's ok.")
    ['Don', "'", 't', 'panic', ':', '50', '%', 'of', 'it', "'", 's', 'ok', '.']
    """
    return _WORD.findall(text)


class WordPiece:
    """Greedy longest-match-first encoder over a list of pieces; a piece's id is its position.

    `vocab` holds whole-word or word-initial pieces as they are (`play`) and continuations with a
    prefix (`##ing`). A word of which some part matches no piece becomes one `[UNK]` as a whole, so
    encoding loses information. White space is lost too: `decode` puts one space between words.

    Raises ValueError for a vocabulary without `unk`, with duplicates, or with empty pieces.

    >>> tokenizer = WordPiece(["[UNK]", "un", "##aff", "##able", "##a"])
    >>> tokenizer.tokenize("unaffable unicorn")
    ['un', '##aff', '##able', '[UNK]']
    >>> tokenizer.decode(tokenizer.encode("unaffable unicorn"))
    'unaffable [UNK]'
    """

    def __init__(self, vocab: Sequence[str], unk: str = UNK, max_chars: int = 100):
        self.vocab = list(vocab)
        self.ids = {piece: i for i, piece in enumerate(self.vocab)}
        if len(self.ids) != len(self.vocab):
            twice = sorted(p for p, n in Counter(self.vocab).items() if n > 1)
            raise ValueError(f"every piece must occur once in vocab; these occur twice: {twice}")
        if unk not in self.ids:
            raise ValueError(f"unk={unk!r} must be one of the {len(self.vocab)} pieces in vocab")
        if "" in self.ids or PREFIX in self.ids:
            raise ValueError(f"a piece in vocab must not be empty, nor the bare prefix {PREFIX!r}")
        self.unk = unk
        self.max_chars = max_chars
        # No piece is longer than this, so no longer match needs to be tried.
        self._longest = max(len(piece.removeprefix(PREFIX)) for piece in self.vocab)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, `unk` included."""
        return len(self.vocab)

    def cut_word(self, word: str) -> list[str]:
        """Pieces of one word: repeatedly the longest piece that starts what is left of it.

        Words over `max_chars` characters become `unk`, as in BERT. The empty word has no pieces.
        """
        if len(word) > self.max_chars:
            return [self.unk]
        pieces, start = [], 0
        while start < len(word):
            prefix = PREFIX if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                if prefix + word[start:end] in self.ids:
                    break
            else:
                return [self.unk]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text as strings."""
        return [piece for word in split_words(text) for piece in self.cut_word(word)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [self.ids[piece] for piece in self.tokenize(text)]

    def encode_iterable(self, texts: Iterable[str]) -> Iterable[int]:
        """Ids of a stream of texts, one at a time; a word must not be cut between two texts."""
        for text in texts:
            yield from self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by single spaces. Raises ValueError for an id outside the vocabulary."""
        words: list[str] = []
        for i in ids:
            if not 0 <= i < len(self.vocab):
                raise ValueError(f"id {i} is outside the vocabulary of {len(self.vocab)} pieces")
            piece = self.vocab[i]
            if piece.startswith(PREFIX) and words:
                words[-1] += piece[len(PREFIX) :]
            else:
                words.append(piece)
        return " ".join(words)


def _glue(left: str, right: str) -> str:
    return left + right.removeprefix(PREFIX)


def train_wordpiece(
    text: str | Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (UNK,),
    min_count: int = 1,
) -> WordPiece:
    """Learn a vocabulary of `vocab_size` pieces (special tokens and characters included).

    Each step merges the neighbours a, b with the highest

        score(a, b) = count(ab) / (count(a) count(b)),

    the factor by which one joint symbol makes this pair likelier than two independent ones. The
    original trainer was never published; this score is the usual reading of "increases the
    likelihood most" (Tunstall, von Werra and Wolf, Natural Language Processing with Transformers,
    2022). It has no regard for how often a pair occurs: two characters that each occur once, side
    by side, score the maximum. `min_count` ignores rarer pairs. Ties go to the more frequent pair,
    then to the lexicographically greatest one.

    Raises ValueError for an empty corpus, a vocabulary smaller than special tokens and alphabet,
    or one larger than merging can reach.
    """
    texts = [text] if isinstance(text, str) else text
    word_counts = Counter(word for t in texts for word in split_words(t))
    if not word_counts:
        raise ValueError("the corpus is empty: no word to learn from")
    words = [[w[0], *(PREFIX + c for c in w[1:])] for w in word_counts]
    weights = list(word_counts.values())
    alphabet = sorted({symbol for word in words for symbol in word} - set(special_tokens))
    vocab = [*special_tokens, *alphabet]
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {len(vocab)}: "
            f"{len(special_tokens)} special tokens and an alphabet of {len(alphabet)}"
        )

    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    known = set(vocab)

    def count_word(i: int, sign: int) -> None:
        word = words[i]
        for symbol in word:
            singles[symbol] += sign * weights[i]
        for pair in pairwise(word):
            pairs[pair] += sign * weights[i]
            if sign > 0:
                where[pair].add(i)
            elif pairs[pair] == 0:
                del pairs[pair]

    for i in range(len(words)):
        count_word(i, +1)
    while len(vocab) < vocab_size:
        # A merge changes the score of every pair that shares a symbol, so all are looked at.
        scored = (
            (n / (singles[a] * singles[b]), n, (a, b))
            for (a, b), n in pairs.items()
            if n >= min_count
        )
        best = max(scored, default=None)
        if best is None:
            raise ValueError(
                f"vocab_size={vocab_size} cannot be reached: after {len(vocab)} pieces no pair of "
                f"neighbours occurs min_count={min_count} times"
            )
        left, right = best[2]
        merged = _glue(left, right)
        for i in where.pop((left, right)):
            count_word(i, -1)
            words[i] = _merge(words[i], left, right, merged)
            count_word(i, +1)
        # A merge may spell a special token, or a piece that another pair has spelled before.
        if merged not in known:
            known.add(merged)
            vocab.append(merged)
    return WordPiece(vocab, unk=special_tokens[0] if UNK not in special_tokens else UNK)


def _merge(word: list[str], left: str, right: str, merged: str) -> list[str]:
    out, k = [], 0
    while k < len(word):
        if k + 1 < len(word) and word[k] == left and word[k + 1] == right:
            out.append(merged)
            k += 2
        else:
            out.append(word[k])
            k += 1
    return out
