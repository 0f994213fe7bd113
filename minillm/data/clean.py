"""Filters: what is kept out of a training corpus, and how to tell whether a filter is any good.

Every filter is a pure function from a document to a score, plus a range of scores that is kept.
Five families, from cheap to costly: language, statistics, keywords, perplexity, classifier. After
Zhao et al., A Survey of Large Language Models, 2023, section 4.1, which names these steps.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+|\n\s*\n")
PLAIN_PUNCTUATION = frozenset(".,;:!?'\"()-–—‘’“”…、。，！？：；「」")

# The most frequent short words of four languages.
_LISTS = (
    (
        "en",
        "the of and to a in is it you that he was for on are with as i his they be at one have "
        "this from or had by not but what all were when we there can an your which their if will "
        "do how she them then so her would him has two its who been",
    ),
    (
        "de",
        "der die das und in zu den nicht von sie ist des sich mit dem dass er es ein ich auf so "
        "eine auch als an nach wie im für man aber aus durch wenn nur war noch werden bei hat wir "
        "was wird sein einen welche sind oder zur um haben einer mir über ihm diese",
    ),
    (
        "fr",
        "de la le et les des en un du une que est pour qui dans par plus pas au sur ne se ce il "
        "sont avec son aux d'un cette ou ses mais comme on tout nous sa fait été aussi leur bien "
        "peut ces deux elle je vous y sans",
    ),
    (
        "es",
        "de la que el en y a los se del las un por con no una su para es al lo como más o pero "
        "sus le ha me si sin sobre este ya entre cuando todo esta ser son dos también fue había "
        "era muy hasta desde está mi porque",
    ),
)
FUNCTION_WORDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {language: frozenset(text.split()) for language, text in _LISTS}
)


@dataclass(frozen=True)
class Filter:
    """A score and the range of scores that is kept, both ends included.

    A score of NaN (there was nothing to measure) is outside every range.

    >>> Filter("not too short", len, low=5).keeps("four")
    False
    """

    name: str
    score: Callable[[str], float]
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(
                f"filter {self.name!r}: low={self.low} must not exceed high={self.high}"
            )

    def keeps(self, document: str) -> bool:
        """Whether `document` passes."""
        return self.low <= self.score(document) <= self.high


def kept_by(
    scores: Mapping[str, np.ndarray], ranges: Mapping[str, tuple[float, float]]
) -> np.ndarray:
    """Which documents pass all filters at once, from scores computed before: bool [documents].

    `scores[name]` is [documents], `ranges[name]` the lowest and the highest score kept. Raises
    ValueError for a range without scores.

    >>> kept_by({"a": np.array([1.0, 2.0, np.nan]), "b": np.zeros(3)}, {"a": (1, 2)}).tolist()
    [True, True, False]
    """
    if unknown := sorted(set(ranges) - set(scores)):
        raise ValueError(f"no scores for {unknown}, there are {sorted(scores)}")
    kept = np.ones(len(next(iter(scores.values()))) if scores else 0, dtype=bool)
    for name, (low, high) in ranges.items():
        kept &= (scores[name] >= low) & (scores[name] <= high)
    return kept


def words(text: str) -> list[str]:
    """The words of `text` in lower case: runs of letters, an apostrophe inside allowed."""
    return WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """Sentences: cut after . ! ? and a space, and at blank lines."""
    return [part for piece in SENTENCE_END.split(text) if (part := piece.strip())]


def language_score(text: str, language: str = "en") -> float:
    """Share of words that are function words of `language`, minus the best other language's share.

    In [-1, 1]; NaN without words. Function words are short, frequent and hard to avoid, so a
    paragraph is enough. Raises ValueError for a language that is not in FUNCTION_WORDS.

    >>> language_score("The cat sat on the mat and it was glad.") > 0.4
    True
    >>> language_score("Die Katze saß auf der Matte und sie war froh.") < -0.4
    True
    """
    if language not in FUNCTION_WORDS:
        raise ValueError(f"language={language!r} must be one of {sorted(FUNCTION_WORDS)}")
    found = words(text)
    if not found:
        return math.nan
    share = {name: sum(w in ws for w in found) / len(found) for name, ws in FUNCTION_WORDS.items()}
    return share.pop(language) - max(share.values())


def symbol_ratio(text: str) -> float:
    """Share of visible characters that are neither letters, digits nor ordinary punctuation.

    >>> symbol_ratio("x = {1}")
    0.6
    """
    visible = [c for c in text if not c.isspace()]
    odd = sum(not (c.isalnum() or c in PLAIN_PUNCTUATION) for c in visible)
    return odd / len(visible) if visible else math.nan


def sentence_length(text: str) -> float:
    """Mean number of words in a sentence; NaN without sentences."""
    lengths = [len(words(s)) for s in sentences(text)]
    return sum(lengths) / len(lengths) if lengths else math.nan


def repeated_lines(text: str) -> float:
    """Share of non-empty lines that occurred before in the same document.

    After Rae et al., Scaling Language Models: Methods, Analysis & Insights from Training Gopher,
    2021.

    >>> repeated_lines("Home\\nNews\\nHome\\nHome")
    0.5
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else math.nan


def keyword_rate(text: str, keywords: Collection[str]) -> float:
    """Hits per word of `text`, whole words only: "Essex" does not match a shorter word inside it.

    >>> keyword_rate("Buy now, buy cheap!", {"buy", "cheap"})
    0.75
    """
    wanted = {word.lower() for word in keywords}
    found = words(text)
    return sum(word in wanted for word in found) / len(found) if found else math.nan


class NGramLM:
    """A byte n-gram model with Witten-Bell smoothing, the quality model of a perplexity filter.

    p(c | h) = (n(hc) + T(h) p(c | h')) / (n(h) + T(h)), where h' drops the oldest byte of h, T(h)
    is the number of different bytes seen after h, and the empty context falls back to 1/256. Bytes
    keep the alphabet closed: every text has a probability. (Witten and Bell, The Zero-Frequency
    Problem, 1991; used as a filter by Wenzek et al., CCNet, 2019, with 5-grams of subwords.)

    >>> lm = NGramLM(["abababab"], order=2)
    >>> lm.perplexity("abab") < 3 < lm.perplexity("zzzz")
    True
    """

    def __init__(self, texts: Iterable[str], order: int = 5) -> None:
        if order < 1:
            raise ValueError(f"order={order} must be at least 1")
        self.order = order
        self.counts: Counter[bytes] = Counter()
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            for n in range(1, order + 1):
                self.counts.update([data[i : i + n] for i in range(len(data) - n + 1)])
        self.totals: Counter[bytes] = Counter()
        self.types: Counter[bytes] = Counter()
        for gram, count in self.counts.items():
            self.totals[gram[:-1]] += count
            self.types[gram[:-1]] += 1

    def probability(self, byte: int, history: bytes) -> float:
        """p(byte | the last order - 1 bytes of history); sums to 1 over the 256 bytes."""
        p = 1 / 256
        for n in range(min(self.order - 1, len(history)) + 1):
            context = history[len(history) - n :]
            if not (total := self.totals.get(context, 0)):
                break  # a longer context was not seen either
            kinds = self.types[context]
            p = (self.counts.get(context + bytes([byte]), 0) + kinds * p) / (total + kinds)
        return p

    def log_prob(self, text: str) -> float:
        """Natural logarithm of the probability of the bytes of `text`, given its length."""
        data, n = text.encode("utf-8", "surrogatepass"), self.order - 1
        return sum(
            math.log(self.probability(b, data[max(0, i - n) : i])) for i, b in enumerate(data)
        )

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-probability per byte; NaN for an empty text."""
        length = len(text.encode("utf-8", "surrogatepass"))
        return math.exp(-self.log_prob(text) / length) if length else math.nan


def hashed_ngrams(text: str, buckets: int) -> np.ndarray:
    """Words and pairs of words, hashed into `buckets` counts of total length 1: float32 [buckets].

    CRC-32 instead of Python's `hash`, which differs from process to process.
    """
    found = words(text)
    grams = found + [f"{a} {b}" for a, b in pairwise(found)]
    slots = np.array([zlib.crc32(gram.encode()) % buckets for gram in grams], dtype=np.int64)
    counts = np.log1p(np.bincount(slots, minlength=buckets)).astype(np.float32)
    return counts / max(float(np.linalg.norm(counts)), 1e-12)


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on hashed n-grams: score(text) = sigmoid(w · x + b), in (0, 1)."""

    weights: np.ndarray
    bias: float

    def score(self, text: str) -> float:
        """Probability that `text` is of the positive class."""
        logit = float(self.weights @ hashed_ngrams(text, len(self.weights))) + self.bias
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))


def train_classifier(
    positive: Sequence[str],
    negative: Sequence[str],
    buckets: int = 4096,
    steps: int = 300,
    lr: float = 2.0,
    l2: float = 1e-3,
) -> Classifier:
    """Fit a `Classifier`: least mean loss + l2/2 |w|^2, the two classes weighted equally.

    Gradient descent with momentum 0.9 from zero on everything at once, so it is deterministic; as
    features have length 1, the loss curves by at most 1/2 and `lr` up to 7 is stable. The quality
    classifiers of GPT-3 and LLaMA are of this kind (Brown et al., 2020, appendix A; Touvron et
    al., 2023, section 2.1). Raises ValueError if a class is empty.
    """
    if not positive or not negative:
        raise ValueError(f"both classes need texts, got {len(positive)} and {len(negative)}")
    x = np.stack([hashed_ngrams(text, buckets) for text in [*positive, *negative]])
    y = np.repeat([1.0, 0.0], [len(positive), len(negative)]).astype(np.float32)
    share = np.where(y == 1, 0.5 / len(positive), 0.5 / len(negative)).astype(np.float32)
    w, b, v_w, v_b = np.zeros(buckets, np.float32), 0.0, np.zeros(buckets, np.float32), 0.0
    for _ in range(steps):
        error = share * (1 / (1 + np.exp(-(x @ w + b))) - y)
        v_w = 0.9 * v_w - lr * (x.T @ error + l2 * w)
        v_b = 0.9 * v_b - lr * float(error.sum())
        w, b = w + v_w, b + v_b
    return Classifier(w, b)


def precision_recall(kept: Sequence[bool], good: Sequence[bool]) -> tuple[float, float]:
    """Precision = share of the kept that is good; recall = share of the good that is kept.

    NaN where the share is of nothing. Raises ValueError for different lengths.

    >>> precision_recall([True, True, False], [True, False, True])
    (0.5, 0.5)
    """
    if len(kept) != len(good):
        raise ValueError(f"{len(kept)} decisions for {len(good)} labels")
    both = sum(bool(k and g) for k, g in zip(kept, good, strict=True))
    return tuple(both / n if (n := sum(map(bool, of))) else math.nan for of in (kept, good))
