"""WordPiece and the unigram model against brute force and against the `tokenizers` library."""

import math
import unicodedata
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.tokenizers import unigram as ug
from minillm.tokenizers.unigram import Unigram, train_unigram
from minillm.tokenizers.wordpiece import WordPiece, split_words, train_wordpiece

TEXT = (
    "the lowest newer slower wider widest newest low lower; the longest and the strongest "
    "tokens, tokenizers and tokenization: untold unkind unfolding folding holding holder "
    "the theory of thinking, the thick thin thing. newest newest low low low widest wide "
)
ODD = [
    "a  b\tc\nd",
    "naïve café, 50% €3 – «ok» x_y $1+2=3",
    "汉字 and 漢字。完了",
    "the 🙂 token \u200d zero-width \u00a0 space \u3000 wide",
    "lowestest " * 3,
    "x" * 120,
    "",
    "zzz the qqq",
    "low" * 33 + " " + "low" * 34,
]


def segmentations(word):
    """All 2^(n-1) ways to cut a word, by brute force."""
    for cuts in product([False, True], repeat=len(word) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(word)]
        yield tuple(word[i:j] for i, j in pairwise(places))


def scored(word, log_probs):
    """Segmentations that use only known pieces, with their log-probability."""
    return {
        s: sum(log_probs[p] for p in s)
        for s in segmentations(word)
        if all(p in log_probs for p in s)
    }


@st.composite
def lattices(draw):
    word = draw(st.text("abc", min_size=1, max_size=9))
    substrings = sorted({word[i:j] for i in range(len(word)) for j in range(i + 1, len(word) + 1)})
    chosen = draw(st.sets(st.sampled_from(substrings))) | set(word)
    scores = st.floats(-12, -0.1, allow_nan=False)
    return word, {p: draw(scores) for p in sorted(chosen)}


# --- WordPiece ---------------------------------------------------------------------------------


def brute_force_wordpiece(text, size, min_count=1):
    """Recount everything at every step; return the vocabulary without special tokens."""
    words = Counter(split_words(text))
    cut = {w: tuple([w[0]] + ["##" + c for c in w[1:]]) for w in words}
    vocab = sorted({s for pieces in cut.values() for s in pieces})
    while len(vocab) < size:
        single, pair = Counter(), Counter()
        for w, pieces in cut.items():
            for s in pieces:
                single[s] += words[w]
            for p in pairwise(pieces):
                pair[p] += words[w]
        frequent = {p: n for p, n in pair.items() if n >= min_count}
        if not frequent:
            return None
        best = max(frequent, key=lambda p: (pair[p] / (single[p[0]] * single[p[1]]), pair[p], p))
        joined = best[0] + best[1][2:]
        for w, pieces in cut.items():
            out, i = [], 0
            while i < len(pieces):
                if pieces[i : i + 2] == best:
                    out.append(joined)
                    i += 2
                else:
                    out.append(pieces[i])
                    i += 1
            cut[w] = tuple(out)
        if joined not in vocab:
            vocab.append(joined)
    return vocab


@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_wordpiece_training_equals_recounting_everything(min_count):
    size = 55
    got = train_wordpiece(TEXT, size + 1, min_count=min_count)
    assert got.vocab == ["[UNK]", *brute_force_wordpiece(TEXT, size, min_count)]


def test_wordpiece_prefers_the_rarer_pair_where_bpe_prefers_the_frequent_one():
    # th: 3/(3*3); qu: 1/(1*1)
    assert train_wordpiece("the that this qu", 11).vocab[-1] == "qu"
    assert train_wordpiece("the that this qu", 11, min_count=2).vocab[-1] == "th"


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab "), min_size=1, max_size=40), st.integers(0, 12))
def test_wordpiece_training_on_any_text_of_two_letters(text, merges):
    alphabet = {s for w in split_words(text) for s in [w[0], *("##" + c for c in w[1:])]}
    want = brute_force_wordpiece(text, len(alphabet) + merges)
    if want is None or not alphabet:
        with pytest.raises(ValueError, match=r"cannot be reached|empty"):
            train_wordpiece(text, len(alphabet) + merges + 1)
    else:
        assert train_wordpiece(text, len(want) + 1).vocab[1:] == want


def test_repeated_pairs_inside_a_word():
    text = "aaaaa aaaa banana bananana"
    assert train_wordpiece(text, 9).vocab[1:] == brute_force_wordpiece(text, 8)


def test_wordpiece_encoder_equals_the_tokenizers_library():
    from tokenizers import Tokenizer, models, pre_tokenizers

    ours = train_wordpiece(TEXT, 65, min_count=2)
    theirs = Tokenizer(models.WordPiece(ours.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    theirs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    for text in [TEXT, *ODD, TEXT.upper(), TEXT[::-1]]:
        assert ours.tokenize(text) == theirs.encode(text).tokens
        assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_split_words_equals_bert(text):
    from tokenizers import pre_tokenizers

    theirs = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)
    # The two libraries know different versions of Unicode: compare what both have assigned.
    if not any(unicodedata.category(c) == "Cn" for c in text):
        assert split_words(text) == [w for w, _ in theirs]


def test_a_merge_that_spells_a_special_token_adds_no_second_piece():
    got = train_wordpiece("low low lowest", 12, special_tokens=("[UNK]", "low"))
    assert len(set(got.vocab)) == 12 and got.tokenize("low") == ["low"]


def test_wordpiece_is_greedy_not_shortest():
    tokenizer = WordPiece(["[UNK]", "a", "ab", "##b", "##c", "##cd", "##bcd"])
    assert tokenizer.tokenize("abcd") == ["ab", "##cd"]
    assert tokenizer.tokenize("abcb ad") == ["ab", "##c", "##b", "[UNK]"]
    assert tokenizer.decode(tokenizer.encode("abcd a")) == "abcd a"


def test_wordpiece_loses_what_it_does_not_know():
    tokenizer = train_wordpiece(TEXT, 60)
    assert tokenizer.decode(tokenizer.encode("the 🙂")) == "the [UNK]"
    assert list(tokenizer.encode_iterable(["low", "est"])) == tokenizer.encode("low est")


def test_wordpiece_errors_name_the_values():
    with pytest.raises(ValueError, match="empty"):
        train_wordpiece("  \n ", 10)
    with pytest.raises(ValueError, match="vocab_size=3 must be at least 6"):
        train_wordpiece("abab abcd", 3)
    with pytest.raises(ValueError, match="vocab_size=50 cannot be reached: after 6"):
        train_wordpiece("abc", 50)
    with pytest.raises(ValueError, match="UNK"):
        WordPiece(["a"])
    with pytest.raises(ValueError, match=r"twice: \['a'\]"):
        WordPiece(["[UNK]", "a", "a"])
    with pytest.raises(ValueError, match="prefix"):
        WordPiece(["[UNK]", "##"])
    with pytest.raises(ValueError, match="id 9 is outside the vocabulary of 2"):
        WordPiece(["[UNK]", "a"]).decode([1, 9])


# --- Unigram -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(lattices())
def test_viterbi_finds_the_best_of_all_segmentations(lattice):
    word, log_probs = lattice
    every = scored(word, log_probs)
    pieces, score = ug.viterbi(word, log_probs)
    assert math.isclose(score, max(every.values()), abs_tol=1e-9)
    assert math.isclose(every[tuple(pieces)], score, abs_tol=1e-9)


@settings(max_examples=150, deadline=None)
@given(lattices())
def test_expected_counts_equal_the_sum_over_all_segmentations(lattice):
    word, log_probs = lattice
    every = {s: math.exp(x) for s, x in scored(word, log_probs).items()}
    total = sum(every.values())
    want = Counter()
    for s, p in every.items():
        for piece in s:
            want[piece] += p / total
    got, log_total = ug.expected_counts(word, log_probs)
    assert math.isclose(log_total, math.log(total), abs_tol=1e-9)
    assert got.keys() == want.keys()
    assert all(math.isclose(got[p], want[p], rel_tol=1e-9) for p in want)
    # every character is used exactly once
    assert math.isclose(sum(n * len(p) for p, n in got.items()), len(word), rel_tol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(alpha):
    log_probs = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -3.5, "aba": -5.0}
    every = {s: math.exp(alpha * x) for s, x in scored("abab", log_probs).items()}
    total, n = sum(every.values()), 4000
    rng = np.random.default_rng(0)
    got = Counter(tuple(ug.sample("abab", log_probs, rng, alpha)) for _ in range(n))
    assert got.keys() <= every.keys()
    chi2 = sum((got[s] - n * p / total) ** 2 / (n * p / total) for s, p in every.items())
    k = len(every) - 1  # mean and variance of chi-squared with k degrees of freedom: k and 2k
    assert len(every) > 4 and chi2 < k + 5 * math.sqrt(2 * k)


def test_sampling_repeats_with_its_seed_and_decodes_to_the_text():
    tokenizer = train_unigram(TEXT, 80)
    draws = [tokenizer.sample(TEXT, np.random.default_rng(s), alpha=0.3) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    for pieces in draws:
        assert tokenizer.decode([tokenizer.ids[p] for p in pieces]) == TEXT


def test_em_never_lowers_the_likelihood_and_keeps_a_distribution():
    words = Counter(ug.split_words(TEXT))
    seed = ug.seed_pieces(words, 300)
    log_probs = ug._normalized(seed)
    likelihoods = []
    for _ in range(8):
        log_probs, counts, likelihood = ug.em_step(words, log_probs)
        likelihoods.append(likelihood)
        assert math.isclose(sum(map(math.exp, log_probs.values())), 1, rel_tol=1e-9)
        assert math.isclose(
            sum(n * len(p) for p, n in counts.items()),
            sum(n * len(w) for w, n in words.items()),
            rel_tol=1e-9,
        )
    assert all(b > a - 1e-6 for a, b in pairwise(likelihoods))
    assert likelihoods[-1] > likelihoods[0] + 10


def test_em_step_equals_sums_over_all_segmentations():
    words = {"abab": 3, "ba": 5, "abb": 1}
    log_probs = {"a": -1.5, "b": -1.0, "ab": -2.0, "ba": -3.0}
    want, likelihood = Counter(), 0.0
    for word, n in words.items():
        every = {s: math.exp(x) for s, x in scored(word, log_probs).items()}
        likelihood += n * math.log(sum(every.values()))
        for s, p in every.items():
            for piece in s:
                want[piece] += n * p / sum(every.values())
    new, counts, got = ug.em_step(words, log_probs)
    assert math.isclose(got, likelihood, rel_tol=1e-12)
    assert all(math.isclose(counts[p], want[p], rel_tol=1e-9) for p in log_probs)
    assert all(
        math.isclose(math.exp(new[p]), want[p] / want.total(), rel_tol=1e-9) for p in log_probs
    )


def test_seed_pieces_are_the_worthiest_substrings():
    words = {"abcabc": 2, "abd": 1}
    assert ug.seed_pieces(words, 3) == Counter(
        {"a": 5, "b": 5, "c": 4, "d": 1, "abc": 4, "abcabc": 2, "ab": 5}
    )


def test_pruning_keeps_the_pieces_that_cost_most():
    # "zy" halves the cost of a frequent word; "cd" is rare; characters stay whatever they cost.
    words = {"zy": 50, "cd": 2, "e": 1}
    log_probs = ug._normalized({"z": 1, "y": 1, "c": 1, "d": 1, "e": 1, "zy": 40, "cd": 2})
    log_probs, counts, _ = ug.em_step(words, log_probs)
    assert set(ug._prune(log_probs, counts, 6)) == set("zycde") | {"zy"}


@pytest.mark.parametrize("size", [31, 41, 60, 97])
def test_training_reaches_the_requested_size_exactly(size):
    tokenizer = train_unigram(TEXT, size)
    assert tokenizer.vocab_size == size == len(set(tokenizer.vocab))
    assert set(TEXT.replace(" ", "▁")) <= set(tokenizer.vocab)
    assert math.isclose(sum(map(math.exp, tokenizer.log_probs.values())), 1, rel_tol=1e-9)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_larger_vocabulary_makes_shorter_text():
    lengths = [len(train_unigram(TEXT, size).encode(TEXT)) for size in (34, 45, 60)]
    assert lengths[0] > lengths[1] > lengths[2]


def test_viterbi_encoding_equals_the_tokenizers_library():
    from tokenizers import Tokenizer, models, pre_tokenizers

    ours = train_unigram(TEXT, 100)
    pieces = [("<unk>", 0.0), *ours.log_probs.items()]
    # The library takes the least score of all pieces, ours the least of the real ones: equal.
    theirs = Tokenizer(models.Unigram(pieces, unk_id=0))
    for text in [TEXT, *ODD, TEXT[::-1]]:
        words = ug.split_words(text)
        assert ours.encode(text) == [i for word in words for i in theirs.encode(word).ids]
    # A piece may hold a character that is no piece itself; it must still win over <unk>.
    rare = {"▁": -1.0, "a": -2.0, "aé": -30.0}
    theirs_rare = Tokenizer(models.Unigram([("<unk>", 0.0), *rare.items()], unk_id=0))
    assert Unigram(rare).encode("aéaé é") == [1, 3, 3, 1, 0]
    assert theirs_rare.encode("▁aéaé").ids == [1, 3, 3]
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    for text in [TEXT, "the 🙂 token", "zzz the qqq", "unfolding, the thickest!"]:
        assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("the low unking.,  \n\t"), max_size=40))
def test_unigram_round_trips_what_its_alphabet_covers(text):
    tokenizer = Unigram({**dict.fromkeys("thelowunkig.,\n\t▁", -5.0), "▁the": -2.0, "low": -3.0})
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unigram_fuses_unknown_characters():
    tokenizer = Unigram({"▁": -1.0, "a": -1.0})
    assert tokenizer.tokenize("aéü a") == ["▁", "a", "<unk>", "▁", "a"]
    assert list(tokenizer.encode_iterable(["a", "a"])) == [1, 2, 1, 2]


def test_long_words_do_not_underflow():
    log_probs = {"a": math.log(1e-5), "aa": math.log(1e-6)}
    _, log_total = ug.expected_counts("a" * 400, log_probs)
    assert math.isfinite(log_total)
    assert len(ug.sample("a" * 400, log_probs, np.random.default_rng(0))) >= 200


def test_unigram_errors_name_the_values():
    with pytest.raises(ValueError, match="empty"):
        train_unigram("", 10)
    with pytest.raises(ValueError, match="vocab_size=3 must lie between 5 "):
        train_unigram("abc abc", 3)
    with pytest.raises(ValueError, match=r"vocab_size=99 must lie between 5 .* and 11 "):
        train_unigram("abc abc", 99)
    with pytest.raises(ValueError, match=r"shrink=1\.5"):
        train_unigram("abc abc", 9, shrink=1.5)
    with pytest.raises(ValueError, match="spells 'ax'"):
        ug.expected_counts("ax", {"a": -1.0})
    with pytest.raises(ValueError, match="got 0 pieces"):
        Unigram({})
    with pytest.raises(ValueError, match=r"ids \[7\] are outside the vocabulary of 2"):
        Unigram({"a": -1.0}).decode([1, 7])
    assert ug.viterbi("ax", {"a": -1.0}) == ([], -math.inf)
    assert ug.sample("ax", {"a": -1.0}, np.random.default_rng(0)) == []
