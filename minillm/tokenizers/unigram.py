"""Unigram language model: keep the pieces that explain the corpus best, cut text by Viterbi.

Source: Kudo, Subword Regularization: Improving Neural Network Translation Models with Multiple
Subword Candidates, 2018. Words carry their leading space as U+2581 (Kudo and Richardson,
SentencePiece, 2018).

A segmentation x = x1 ... xm of a word has probability p(x1) ... p(xm). The lattice of a word has a
node between any two characters and an edge i -> j wherever word[i:j] is a piece.
"""

import math
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import regex

SPACE = "▁"
UNK = "<unk>"
UNK_PENALTY = 10.0  # nats below the least likely piece, as SentencePiece has it
_WORD = regex.compile(rf"{SPACE}?[^\s{SPACE}]+|{SPACE}|\s")


def split_words(text: str) -> list[str]:
    """Mark spaces (one is put in front) and cut before each mark; nothing is lost.

    >>> split_words("to be  or")
    ['▁to', '▁be', '▁', '▁or']
    """
    return _WORD.findall(SPACE + text.replace(" ", SPACE)) if text else []


def _edges(word: str, log_probs: Mapping[str, float], longest: int | None) -> list[list[int]]:
    """For each end j, the starts i of the pieces word[i:j], which are at most `longest` long."""
    reach = longest or len(word)
    return [
        [i for i in range(max(0, j - reach), j) if word[i:j] in log_probs]
        for j in range(len(word) + 1)
    ]


def _log_sum(values: list[float]) -> float:
    top = max(values, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(v - top) for v in values))


def viterbi(
    word: str,
    log_probs: Mapping[str, float],
    longest: int | None = None,
    forbid: str | None = None,
) -> tuple[list[str], float]:
    """The likeliest segmentation and its log-probability (nats), without using piece `forbid`.

    best(j) = max over pieces word[i:j] of best(i) + log p(word[i:j]): O(n · longest piece) instead
    of 2^(n-1) segmentations. Returns ([], -inf) if no segmentation exists.

    >>> viterbi("abc", {"a": -1, "b": -1, "c": -1, "ab": -1.5, "bc": -1.2})
    (['a', 'bc'], -2.2)
    """
    best, back = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
    for j, starts in enumerate(_edges(word, log_probs, longest)):
        for i in starts:
            piece = word[i:j]
            if piece != forbid and (score := best[i] + log_probs[piece]) > best[j]:
                best[j], back[j] = score, i
    if best[-1] == -math.inf:
        return [], -math.inf
    pieces, j = [], len(word)
    while j:
        pieces.append(word[back[j] : j])
        j = back[j]
    return pieces[::-1], best[-1]


def expected_counts(
    word: str, log_probs: Mapping[str, float], longest: int | None = None
) -> tuple[dict[str, float], float]:
    """Expected number of uses of each piece over all segmentations, and log p(word).

    Forward-backward: E[count of piece] = sum over its edges i -> j of
    exp(forward(i) + log p(piece) + backward(j)) / p(word). Raises ValueError for a word that the
    pieces cannot spell.
    """
    n, edges = len(word), _edges(word, log_probs, longest)
    forward = [0.0] * (n + 1)
    for j in range(1, n + 1):
        forward[j] = _log_sum([forward[i] + log_probs[word[i:j]] for i in edges[j]])
    total = forward[n]
    if total == -math.inf:
        raise ValueError(f"no sequence of the {len(log_probs)} pieces spells {word!r}")
    counts: dict[str, float] = {}
    backward: list[list[float]] = [[] for _ in range(n)] + [[0.0]]
    for j in range(n, 0, -1):  # all edges that leave j have been seen when j is reached
        after = _log_sum(backward[j])
        for i in edges[j]:
            score = log_probs[word[i:j]] + after
            backward[i].append(score)
            counts[word[i:j]] = counts.get(word[i:j], 0) + math.exp(forward[i] + score - total)
    return counts, total


def sample(
    word: str,
    log_probs: Mapping[str, float],
    generator: np.random.Generator,
    alpha: float = 1.0,
    longest: int | None = None,
) -> list[str]:
    """Draw a segmentation with probability proportional to p(segmentation)^alpha.

    Exact: forward sums, then pieces drawn from the end. alpha = 0 is uniform over segmentations,
    a large alpha approaches Viterbi. Returns [] if no segmentation exists.
    """
    edges = _edges(word, log_probs, longest)
    forward = [0.0] * (len(word) + 1)
    for j in range(1, len(word) + 1):
        forward[j] = _log_sum([forward[i] + alpha * log_probs[word[i:j]] for i in edges[j]])
    if forward[-1] == -math.inf:
        return []
    pieces, j = [], len(word)
    while j:
        p = [math.exp(forward[i] + alpha * log_probs[word[i:j]] - forward[j]) for i in edges[j]]
        i = edges[j][int(generator.choice(len(p), p=np.array(p) / sum(p)))]
        pieces.append(word[i:j])
        j = i
    return pieces[::-1]


class Unigram:
    """Encoder and decoder over scored pieces; ids are positions, `<unk>` is id 0.

    A character that is no piece becomes `<unk>`, neighbours in a word fused into one, as the
    `tokenizers` library does. `pieces` maps each piece to its log-probability (nats).

    >>> tokenizer = Unigram({"▁a": -1.0, "b": -2.0, "▁": -3.0, "a": -3.0, "ab": -2.5})
    >>> tokenizer.tokenize("ab a"), tokenizer.decode(tokenizer.encode("ab a"))
    (['▁a', 'b', '▁a'], 'ab a')
    """

    def __init__(self, pieces: Mapping[str, float]):
        if not pieces or "" in pieces or UNK in pieces:
            raise ValueError(
                f"pieces must be one or more non-empty strings other than {UNK!r}, "
                f"got {len(pieces)} pieces"
            )
        self.log_probs = dict(pieces)
        self.vocab = [UNK, *self.log_probs]
        self.ids = {piece: i for i, piece in enumerate(self.vocab)}
        self._unk_score = min(self.log_probs.values()) - UNK_PENALTY
        self._longest = max(map(len, self.log_probs))

    @property
    def vocab_size(self) -> int:
        """Number of pieces, `<unk>` included."""
        return len(self.vocab)

    def _cut(self, text: str, cut_word: Callable[[str, Mapping[str, float]], list[str]]):
        pieces: list[str] = []
        for word in split_words(text):
            # An unknown character gets an edge of its own, for this word only.
            strange = {c: self._unk_score for c in word if c not in self.log_probs}
            scores = ChainMap(strange, self.log_probs) if strange else self.log_probs
            for unknown, run in groupby(cut_word(word, scores), key=strange.__contains__):
                pieces.extend([UNK] if unknown else run)
        return pieces

    def tokenize(self, text: str) -> list[str]:
        """The likeliest pieces of a text, as strings."""
        return self._cut(text, lambda word, scores: viterbi(word, scores, self._longest)[0])

    def encode(self, text: str) -> list[int]:
        """The ids of the likeliest pieces of a text."""
        return [self.ids[piece] for piece in self.tokenize(text)]

    def encode_iterable(self, texts: Iterable[str]) -> Iterable[int]:
        """Ids of a stream of texts, each encoded on its own (and so with a space in front)."""
        for text in texts:
            yield from self.encode(text)

    def sample(self, text: str, generator: np.random.Generator, alpha: float = 1.0) -> list[str]:
        """Pieces of a random segmentation (subword regularization)."""
        return self._cut(
            text, lambda word, scores: sample(word, scores, generator, alpha, self._longest)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the space put in front. ValueError for ids out of range."""
        if wrong := [i for i in ids if not 0 <= i < len(self.vocab)]:
            raise ValueError(f"ids {wrong} are outside the vocabulary of {len(self.vocab)} pieces")
        return "".join(self.vocab[i] for i in ids).replace(SPACE, " ").removeprefix(" ")


def seed_pieces(word_counts: Mapping[str, int], size: int, longest: int = 12) -> Counter[str]:
    """All characters, and the `size` substrings with the highest count × length.

    Only substrings seen at least twice count; ties go to the lexicographically smallest.
    """
    found: Counter[str] = Counter()
    for word, n in word_counts.items():
        for i in range(len(word)):
            for j in range(i + 1, min(len(word), i + longest) + 1):
                found[word[i:j]] += n
    worth = [(-n * len(s), s) for s, n in found.items() if len(s) > 1 and n > 1]
    keep = {s for _, s in sorted(worth)[:size]}
    return Counter({s: n for s, n in found.items() if len(s) == 1 or s in keep})


def _normalized(counts: Mapping[str, float]) -> dict[str, float]:
    # A character that EM no longer uses stays, so that any word can be spelled; the floor keeps
    # its log-probability finite.
    floored = {piece: max(n, 1e-6) for piece, n in counts.items()}
    log_total = math.log(math.fsum(floored.values()))
    return {piece: math.log(n) - log_total for piece, n in floored.items()}


def em_step(
    word_counts: Mapping[str, int], log_probs: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float], float]:
    """One step of EM: (new log-probabilities, expected counts, log-likelihood before the step).

    The expectation is over all segmentations of all words; the maximization sets p(piece) to its
    share of the expected counts. The log-likelihood (nats) never falls from one step to the next.
    """
    counts, likelihood = dict.fromkeys(log_probs, 0.0), 0.0
    longest = max(map(len, log_probs))
    for word, n in word_counts.items():
        of_word, log_p = expected_counts(word, log_probs, longest)
        likelihood += n * log_p
        for piece, c in of_word.items():
            counts[piece] += n * c
    return _normalized(counts), counts, likelihood


def _prune(
    log_probs: Mapping[str, float], counts: Mapping[str, float], size: int
) -> dict[str, float]:
    """Keep all characters and the pieces whose removal would cost most, `size` in all.

    Without a piece its uses fall to its best other segmentation; the loss is about
    E[count] · (log p(piece) - log p(other segmentation)), never negative for a useful piece.
    """
    longest = max(map(len, log_probs))
    characters = [piece for piece in log_probs if len(piece) == 1]
    losses = sorted(
        (-counts[p] * (log_probs[p] - viterbi(p, log_probs, longest, forbid=p)[1]), p)
        for p in log_probs
        if len(p) > 1
    )
    keep = {p for _, p in losses[: size - len(characters)]}.union(characters)
    return _normalized({p: counts[p] for p in log_probs if p in keep})


def train_unigram(
    text: str | Iterable[str],
    vocab_size: int,
    seed_size: int | None = None,
    em_steps: int = 2,
    shrink: float = 0.75,
) -> Unigram:
    """Learn exactly `vocab_size` pieces, `<unk>` included, by EM and pruning.

    Start from `seed_size` frequent substrings (default 8 · vocab_size); repeat: `em_steps` steps of
    EM, then keep the share `shrink` of the pieces that the likelihood needs most; single
    characters always stay. Pieces come out sorted by falling probability.

    Raises ValueError for an empty corpus, a vocabulary smaller than the alphabet and `<unk>`, one
    larger than the seed, and shrink outside (0, 1).
    """
    if not 0 < shrink < 1 or em_steps < 1:
        raise ValueError(f"need 0 < shrink < 1 and em_steps >= 1, got {shrink=} and {em_steps=}")
    texts = [text] if isinstance(text, str) else text
    word_counts = Counter(word for t in texts for word in split_words(t))
    if not word_counts:
        raise ValueError("the corpus is empty: no word to learn from")
    seed = seed_pieces(word_counts, 8 * vocab_size if seed_size is None else seed_size)
    target, alphabet = vocab_size - 1, sum(len(piece) == 1 for piece in seed)
    if not alphabet <= target <= len(seed):
        raise ValueError(
            f"vocab_size={vocab_size} must lie between {alphabet + 1} (<unk> and an alphabet of "
            f"{alphabet}) and {len(seed) + 1} (<unk> and the pieces to start from)"
        )
    log_probs = _normalized(seed)
    while True:
        for _ in range(em_steps):
            log_probs, counts, _ = em_step(word_counts, log_probs)
        if len(log_probs) == target:
            break
        log_probs = _prune(log_probs, counts, max(target, int(shrink * len(log_probs))))
    return Unigram(dict(sorted(log_probs.items(), key=lambda item: (-item[1], item[0]))))
