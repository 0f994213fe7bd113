"""Byte-pair encoding against brute force, and everything that can go wrong around it."""

import gc
import itertools
import json
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import paths
from minillm.tokenizers import BPE, bpe_file, bpe_train, extend, load_course_tokenizer, train_bpe
from minillm.tokenizers import bpe as bpe_module
from minillm.tokenizers import count as count_module
from minillm.tokenizers.chat import Message, render
from minillm.tokenizers.count import count_pieces
from minillm.tokenizers.pretokenize import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    cut_text,
    nfkc,
    split_special,
    split_text,
)

ROOT = Path(__file__).resolve().parents[1]
END = "<|endoftext|>"
# A pattern with more reach than ours: newlines end a piece, and the end of the text matters.
WIDE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TRICKY = "abAB10 \n\t\r'!<|>sltve\u00a0\u2003\x1c\u0301é你ß٣²🙂"
texts = st.text(alphabet=st.one_of(st.sampled_from(TRICKY), st.characters(codec="utf-8")))
few_letters = st.text(alphabet="ab \n", max_size=60)


# --- what the trainer and the encoder should do, written as plainly as possible


def brute_force_merges(text, n_merges, special=(), pattern=GPT2_PATTERN):
    """Count all pairs anew before every merge; take the greatest (count, pair of byte strings)."""
    segments = regex.split("|".join(map(regex.escape, special)), text) if special else [text]
    words = Counter(piece for s in segments for piece in regex.findall(pattern, s))
    words = {tuple(bytes([b]) for b in w.encode()): n for w, n in words.items()}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            merged[brute_force_merge(word, best)] += n
        words = merged
    return merges


def brute_force_merge(word, pair):
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def brute_force_encode(bpe, text):
    ids = {token: i for i, token in bpe.vocab.items()}
    out = []
    for piece in regex.findall(bpe.pattern, text):
        word = tuple(bytes([b]) for b in piece.encode())
        for pair in bpe.merges:
            word = brute_force_merge(word, pair)
        out += [ids[token] for token in word]
    return out


@pytest.fixture(scope="module")
def sample():
    """40 kB of real source code, 12 kB of Chinese."""
    return Path(regex.__file__).with_name("_regex_core.py").read_text()[:40_000]


@pytest.fixture(scope="module")
def chinese():
    return (ROOT / "assets/data/chinese.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bpe(sample, chinese):
    return train_bpe(sample + chinese[:1500], 256 + 600, [END, "<|pad|>", END * 2])


@pytest.fixture(scope="module")
def course():
    return load_course_tokenizer()


# --- splitting


def test_pieces_lose_nothing_and_split_as_written():
    text = "I'll pay $12.50,  you'VE\n\n  seen naïve 你好 x²  "
    assert "".join(split_text(text)) == text
    assert split_text("I'll  go\n\n  x") == ["I", "'ll", " ", " go", "\n\n ", " x"]
    assert split_text("a 2019b", DIGITS_PATTERN) == ["a", " ", "2", "0", "1", "9", "b"]


@given(texts)
@settings(max_examples=200, deadline=None)
def test_no_piece_has_whitespace_after_text(text):
    # The reason why cutting there is safe, for both patterns.
    for pattern in (GPT2_PATTERN, DIGITS_PATTERN):
        pieces = split_text(text, pattern)
        assert "".join(pieces) == text
        assert not [piece for piece in pieces if regex.search(r"\S\s", piece)]


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, DIGITS_PATTERN])
def test_cutting_never_changes_the_pieces(pattern):
    # Exhaustive: every string of up to 5 characters of every kind that the patterns know.
    kinds = "al1 \n'!\u0301"
    for n in range(6):
        for chars in itertools.product(kinds, repeat=n):
            text = "".join(chars)
            chunks = cut_text(text, 1, pattern)
            assert "".join(chunks) == text
            pieces = [piece for chunk in chunks for piece in split_text(chunk, pattern)]
            assert pieces == split_text(text, pattern), repr(text)
    assert len(cut_text("a b c d", 1, pattern)) == 4, "it does cut"


@given(texts, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_cutting_any_text(text, size):
    for pattern in (GPT2_PATTERN, DIGITS_PATTERN):
        chunks = cut_text(text, size, pattern)
        pieces = [piece for chunk in chunks for piece in split_text(chunk, pattern)]
        assert pieces == split_text(text, pattern)


def test_a_foreign_pattern_is_never_cut_through():
    # In WIDE_PATTERN "!\n" is one piece: a cut before the newline would be wrong.
    assert split_text("hi!\nyou", WIDE_PATTERN) == ["hi", "!\n", "you"]
    assert cut_text("hi!\nyou", 1, WIDE_PATTERN) == ["hi!\nyou"]


def test_longest_special_token_wins():
    assert list(split_special(f"a{END}{END}{END}b", [END, END * 2])) == [
        ("a", False),
        (END * 2, True),
        (END, True),
        ("b", False),
    ]
    assert list(split_special("", ["<s>"])) == []
    with pytest.raises(ValueError, match="empty string"):
        list(split_special("a", [""]))


def test_nfkc_is_idempotent_and_lossy():
    assert nfkc("ﬁ²Ａ") == nfkc(nfkc("ﬁ²Ａ")) == "fi2A"


@pytest.mark.parametrize("pattern", ["(a)|b", "["])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="split pattern"):
        train_bpe("ab", 300, pattern=pattern)


# --- training


def test_worked_example_of_sennrich():
    text = "low low low low low lower lower widest widest widest " + "newest " * 6
    merges = train_bpe(text, 256 + 12, pattern=r"\S+").merges
    joined = [f"{left.decode()} {right.decode()}" for left, right in merges]
    assert joined[:6] == ["s t", "e st", "o w", "l ow", "w est", "n e"]
    assert merges == brute_force_merges(text, 12, pattern=r"\S+")


def test_merges_equal_brute_force_on_source_code(sample, chinese):
    text = sample[:15_000] + chinese[:800]
    assert train_bpe(text, 256 + 250).merges == brute_force_merges(text, 250)


@given(few_letters, st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_merges_equal_brute_force_on_runs_and_ties(text, n):
    if text:
        assert train_bpe(text, 256 + n).merges == brute_force_merges(text, n)


@given(st.lists(st.sampled_from(["ab", "a b", "ba", "<s>", "<s><s>", "é", "你", " "])))
@settings(max_examples=100, deadline=None)
def test_special_tokens_split_before_counting(parts):
    text, special = "x" + "".join(parts), ["<s>", "<s><s>"]
    trained = train_bpe(text, 258 + 30, special)
    assert trained.merges == brute_force_merges(text, 30, sorted(special, key=len, reverse=True))
    assert not any(b"<" in left + right for left, right in trained.merges)


def test_ties_go_to_the_greatest_pair_of_byte_strings():
    # All pairs occur once. ("b", "b") < ("b", "bc") < ("c", "a") is decided on bytes, not on ids.
    assert train_bpe("ab", 257).merges == [(b"a", b"b")]
    assert train_bpe("ab\nac\nbc", 257).merges == [(b"b", b"c")]
    assert train_bpe("aé\na~", 257).merges == [(b"\xc3", b"\xa9")]
    # "abc" makes bc; then (a, bc) and (a, b) of "abd" tie: "bc" is greater than its prefix "b".
    assert train_bpe("abc\nabd", 259).merges == brute_force_merges("abc\nabd", 3)


def test_documents_specials_and_early_end():
    trained = train_bpe(["ab", "ab"], 1000, [END])
    assert trained.merges == [(b"a", b"b")], "no merge across documents, then nothing is left"
    assert trained.vocab_size == 258 and trained.special_ids == {END: 257}
    assert [trained.vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_count_the_same(monkeypatch, sample, processes):
    monkeypatch.setattr(count_module, "CHUNK", 1000)  # many chunks for each process
    documents = [sample[:9000], "", f"x {END} y", sample[9000:20_000] + "\ud800"[:0]]
    alone = count_pieces(documents, [END])
    assert count_pieces(documents, [END], processes=processes) == alone
    assert alone == Counter(
        piece for d in documents for s in d.split(END) for piece in regex.findall(GPT2_PATTERN, s)
    )


def test_processes_need_no_main_guard(tmp_path):
    # multiprocessing's spawn would run this script again in every child.
    script = tmp_path / "unguarded.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from minillm.tokenizers import train_bpe\n"
        "print(train_bpe(['low lower'] * 3, 258, processes=2).merges)\n"
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert out.stdout == "[(b'o', b'w'), (b'l', b'ow')]\n"


def test_counting_falls_back_and_reports(monkeypatch):
    expected = count_pieces("to be or not to be")
    with monkeypatch.context() as patch:
        patch.setattr(count_module.sys, "executable", "/no/such/python")
        assert count_pieces("to be or not to be", processes=2) == expected
    with monkeypatch.context() as patch:
        patch.setattr(count_module, "_WORKER", "raise SystemExit('planted')")
        with pytest.raises(RuntimeError, match="planted"):
            count_pieces("to be or not to be", processes=2)
    with pytest.raises(ValueError, match="processes=0"):
        count_pieces("a", processes=0)


def test_garbage_collection_is_paused_only_while_training(monkeypatch):
    seen = []
    monkeypatch.setattr(bpe_train, "_learn_merges", lambda *a: seen.append(gc.isenabled()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bpe_train.learn_merges({"ab": 1}, {}, 1)
    assert seen == [False] and gc.isenabled()


@pytest.mark.parametrize("empty", ["", [], ["", ""], END, [END, END * 2]])
def test_empty_corpus_is_refused(empty):
    with pytest.raises(ValueError, match="corpus is empty"):
        train_bpe(empty, 300, [END])


@pytest.mark.parametrize("size", [0, 255, 257])
def test_vocabulary_smaller_than_the_alphabet_is_refused(size):
    with pytest.raises(
        ValueError, match=f"vocab_size={size} must be at least 258: 256 bytes and 2"
    ):
        train_bpe("abc", size, ["<s>", "<t>"])


# --- encoding and decoding


@given(texts)
@settings(max_examples=200, deadline=None)
def test_round_trip(bpe, text):
    ids = bpe.encode_ordinary(text)
    assert bpe.decode(ids) == bpe.decode(ids, errors="strict") == text
    assert not set(ids) & set(bpe.special_ids.values())


@given(st.text(alphabet="abe st(\n你好", max_size=30))
@settings(max_examples=60, deadline=None)
def test_encode_equals_brute_force(bpe, text):
    assert bpe.encode(text) == brute_force_encode(bpe, text)


def test_encode_equals_brute_force_on_source_code(bpe, sample):
    assert bpe.encode(sample[:4000]) == brute_force_encode(bpe, sample[:4000])


@given(text=st.text(alphabet="aab", min_size=100, max_size=400), corpus=few_letters)
@settings(max_examples=60, deadline=None)
def test_long_pieces_are_merged_the_same_way(text, corpus):
    trained = train_bpe(corpus + "a", 256 + 30)
    assert trained.encode(text) == brute_force_encode(trained, text)


def test_a_very_long_piece_takes_no_quadratic_time(course):
    start = time.monotonic()
    piece = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200_000))
    assert course.decode(course.encode(piece)) == piece
    assert time.monotonic() - start < 30, "half a second; with a scan for each merge, minutes"


def test_special_tokens(bpe):
    end, pad, double = (bpe.special_ids[t] for t in (END, "<|pad|>", END * 2))
    text = f"hi{END}{END}{END}"
    assert bpe.encode(text, allowed_special="all") == [*bpe.encode("hi"), double, end]
    assert bpe.encode("<|pad|>", allowed_special={"<|pad|>"}) == [pad]
    assert bpe.decode([end, pad]) == END + "<|pad|>"
    assert bpe.decode(bpe.encode_ordinary(text)) == text
    for allowed in (frozenset(), {"<|pad|>"}):
        with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>', which is not"):
            bpe.encode(f"hi{END}", allowed_special=allowed)
    with pytest.raises(ValueError, match=r"\['<s>'\] are not special tokens"):
        bpe.encode("hi", allowed_special={"<s>"})
    with pytest.raises(ValueError, match="must be"):
        bpe.encode("hi", allowed_special="<|pad|>")


def test_undecodable_ids_are_named(bpe):
    with pytest.raises(ValueError, match=rf"ids \[-1, {bpe.vocab_size}\]: .* 0 to 855"):
        bpe.decode([1, bpe.vocab_size, -1])
    assert bpe.decode("你".encode()[:2]) == "\ufffd"
    with pytest.raises(ValueError, match="utf-8"):
        bpe.decode("你".encode()[:2], errors="strict")


def test_lone_surrogates_and_lost_characters_are_refused():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        train_bpe("ab", 257).encode("a\ud800")
    words_only = train_bpe("low lower", 258, pattern=r"\S+")
    assert words_only.encode("low") == [257]
    with pytest.raises(ValueError, match="leaves out characters of 'low low'"):
        words_only.encode("low low")
    with pytest.raises(ValueError, match="leaves out characters"):
        list(words_only.encode_iterable(["low ", "low"]))


def test_the_cache_is_bounded(monkeypatch, bpe):
    monkeypatch.setattr(bpe_module, "CACHE_ENTRIES", 10)
    fresh = BPE(bpe.vocab, bpe.merges, bpe.special_tokens)
    text = " ".join(map(str, range(500))) + " " + "x" * 500
    assert fresh.encode(text) == bpe.encode(text)
    assert 0 < len(fresh._cache) <= 10
    assert max(map(len, fresh._cache)) <= bpe_module.CACHE_LENGTH


def test_decode_takes_integers_of_any_kind(bpe):
    ids = bpe.encode("low lower")
    assert bpe.decode(np.array(ids, dtype=np.uint16)) == "low lower"
    with pytest.raises(TypeError, match="float"):
        bpe.decode([97.5])


def test_ids_beyond_sixteen_bits():
    # A piece is held as characters chr(id); 0xD800 to 0xDFFF are surrogates, which are no text.
    pairs = [(bytes([a]), bytes([b])) for a in range(256) for b in range(256)]
    vocab = dict(enumerate([bytes([i]) for i in range(256)] + [a + b for a, b in pairs]))
    wide = BPE(vocab, pairs, ["<s>"])
    for a, b in ((0, 0), (65, 66), (0xD7, 0), (0xDF, 0xFF), (0xE0, 1), (255, 255)):
        assert wide.encode_bytes(bytes([a, b])) == [256 + 256 * a + b]
    assert wide.encode("ABC<s>", allowed_special="all") == [256 + 256 * 65 + 66, 67, 256 + 65536]
    filled = {**{i: bytes([i]) for i in range(256)}, 0xD7FE: b"filler"}
    merges = bpe_train.learn_merges({"abcabc": 3, "bcd": 1}, filled, 6)
    assert merges == brute_force_merges("abcabc\n" * 3 + "bcd", 6, pattern=r"\w+")
    assert list(filled)[257:] == [0xD7FF + i for i in range(len(merges))]


def test_tokenizers_travel_between_processes(bpe):
    copied = pickle.loads(pickle.dumps(bpe))
    assert copied.encode("lower é") == bpe.encode("lower é") and copied.vocab == bpe.vocab


# --- streaming


def cut_at(text, places):
    borders = [0, *sorted({p for p in places if p <= len(text)}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


bits = st.sampled_from([*"ab1'!<|\n l", "  ", "'ll", "<s>", "<s", "1<s>", "<s><s>", "你"])


@pytest.mark.parametrize("special", [[], ["<s>", "<s><s>"], ["<s>", "1<s>!l"]])
@pytest.mark.parametrize("pattern", [GPT2_PATTERN, DIGITS_PATTERN, WIDE_PATTERN])
@given(parts=st.lists(bits, max_size=12), places=st.lists(st.integers(0, 24), max_size=8))
@settings(max_examples=200, deadline=None)
def test_streaming_equals_encoding_the_whole(pattern, special, parts, places):
    small = train_bpe("ab ab'll 11 !! \n\n  <s你", 256 + 20 + len(special), special, pattern)
    text = "".join(parts)
    block, bpe_module.BLOCK = bpe_module.BLOCK, 1  # look for settled pieces at every chance
    try:
        streamed = list(small.encode_iterable(cut_at(text, places), allowed_special="all"))
    finally:
        bpe_module.BLOCK = block
    assert streamed == small.encode(text, allowed_special="all")


def test_what_is_settled_stays_whatever_follows():
    # A special token may begin inside what looks like another, or like text and a special token.
    small = train_bpe("ab ab'll", 256 + 10, ["<s>", "<s><s>", "1<s>!l"])
    for text in ("a1<s>!l", "1<s>!", "1<s><s>l", "<s><s><s>", "<1<s>!<s", "a'l<s>'ll  <s>  b "):
        whole = small.encode(text, allowed_special="all")
        for end in range(len(text) + 1):
            ids, rest = small._encode_settled(text[:end], small.special_ids)
            assert text[:end].endswith(rest)
            assert ids + small.encode(rest + text[end:], allowed_special="all") == whole, end
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe_module, "BLOCK", 1)
            assert list(small.encode_iterable(text, allowed_special="all")) == whole


def test_streaming_a_long_piece_looks_at_it_a_few_times(bpe, monkeypatch):
    looks = []
    settled = BPE._encode_settled
    monkeypatch.setattr(bpe_module, "BLOCK", 10)
    monkeypatch.setattr(BPE, "_encode_settled", lambda *a: looks.append(1) or settled(*a))
    assert list(bpe.encode_iterable(["abcde"] * 4000)) == bpe.encode("abcde" * 4000)
    assert 1 < len(looks) < 20, "as often as it doubles"


def test_streaming_refuses_special_tokens_cut_by_a_chunk(bpe):
    with pytest.raises(ValueError, match="not allowed"):
        list(bpe.encode_iterable(["hi <|endof", "text|> there"]))


def test_streaming_is_lazy_and_its_memory_constant(bpe, sample, monkeypatch):
    endless = itertools.cycle([sample[:5000], "你好" * 40, END])
    first = list(itertools.islice(bpe.encode_iterable(endless, allowed_special="all"), 1000))
    assert first[:50] == bpe.encode(sample[:200])[:50]

    monkeypatch.setattr(bpe_module, "BLOCK", 1000)

    def peak(chunks):
        lines = (sample[i % 9000 : i % 9000 + 300] for i in range(0, 300 * chunks, 300))
        tracemalloc.start()
        tokens = sum(1 for _ in bpe.encode_iterable(lines))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return tokens, size

    peak(30)  # fills the cache of pieces
    (few, small), (many, large) = peak(30), peak(300)
    assert many > 9 * few and large < 1.3 * small


# --- construction and files


@pytest.mark.parametrize(
    ("vocab", "merges", "special", "message"),
    [
        ({0: b"a", 2: b"b"}, [], [], r"0 to 1: \[1\] missing"),
        ({0: b"a", 1: b"a"}, [], [], "twice: ids 0 and 1"),
        ({0: b"a", 1: ""}, [], [], r"vocab\[1\]=''"),
        ({0: b"a", 1: b"b"}, [(b"a", b"b")], [], "no token of the vocabulary"),
        ({0: b"a", 1: b"aa", 2: b"aaa"}, [(b"aa", b"a")], [], "no earlier merge makes b'aa'"),
        ({0: b"a", 1: b"aa"}, [(b"a", b"a"), (b"a", b"a")], [], "an earlier merge makes"),
        ({0: b"a", 1: b"aa"}, [(b"a", b"a")], ["aa"], "no token of the vocabulary"),
        ({0: b"a"}, [], ["b"], "at least two bytes"),
        ({0: b"a"}, [], "<s>", "must be a list"),
    ],
)
def test_contradictory_vocabularies_are_refused(vocab, merges, special, message):
    with pytest.raises(ValueError, match=message):
        BPE(vocab, merges, special)


def test_missing_bytes_are_refused_when_they_turn_up():
    small = BPE({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")])
    assert small.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match="byte 99 of b'abc'"):
        small.encode("abc")


def test_special_tokens_may_be_in_the_vocabulary():
    vocab = {0: b"<s>", 1: b"a"}
    assert BPE(vocab, [], ["<s>"]).encode("a<s>", allowed_special="all") == [1, 0]
    assert vocab == {0: b"<s>", 1: b"a"}, "the caller's dictionary is left alone"
    assert BPE(vocab, [], ["<s>", "<t>"]).special_ids == {"<s>": 0, "<t>": 2}


@given(st.binary(), st.binary())
def test_bytes_in_files_are_unambiguous(one, other):
    assert bpe_file.from_text(bpe_file.to_text(one)) == one
    assert (bpe_file.to_text(one) == bpe_file.to_text(other)) == (one == other)


def test_save_and_load(bpe, tmp_path):
    odd = train_bpe("\\x41 \\ \\\\ é \x85", 256 + 9, ["<\\x41>", "<你>"], WIDE_PATTERN)
    for tokenizer in (bpe, odd):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path, about="a test")
        again = BPE.load(path)
        for field in ("vocab", "merges", "special_ids", "special_tokens", "pattern"):
            assert getattr(again, field) == getattr(tokenizer, field)
        assert json.loads(path.read_text(encoding="utf-8"))["about"] == "a test"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_truncated_files_are_refused(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, len(whole) // 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer.json is not a complete JSON file"):
            BPE.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [data], "its format is 'list'"),
        (lambda data: {"model": data}, "its format is None"),
        (lambda data: {**data, "version": 2}, "version 2; this code reads 1"),
        (lambda data: {**data, "merges": None}, "'merges' must be a list"),
        (lambda data: {**data, "vocab": data["vocab"][:-5]}, "special|no token of the vocabulary"),
        (lambda data: {**data, "merges": data["merges"][1:]}, "no earlier merge"),
        (lambda data: {**data, "merges": [["a"]]}, r"2 string\(s\), not \['a'\]"),
        (lambda data: {**data, "vocab": ["\\q"]}, "starts neither"),
        (lambda data: {**data, "vocab": [1]}, r"1 string\(s\), not 1"),
        (lambda data: {**data, "pattern": "("}, "split pattern"),
    ],
)
def test_foreign_files_are_refused(bpe, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(ValueError, match=message):
        BPE.load(path)


def test_a_failed_save_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paths.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        bpe.save(path, about="new")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- extension


def test_extension_keeps_every_old_id(bpe, sample, chinese):
    curly = "He said “no” — naïve café… 😀"
    free = extend(bpe, chinese, 400)
    kept = extend(bpe, chinese + "“是”…" * 50, 400, protect=[curly])
    for longer in (free, kept):
        assert longer.vocab_size == bpe.vocab_size + 400
        assert all(longer.vocab[i] == bpe.vocab[i] for i in bpe.vocab)
        assert longer.special_ids == bpe.special_ids
        assert longer.encode(sample) == bpe.encode(sample)
    assert extend(bpe, "“是”…" * 50, 6).encode(curly) != bpe.encode(curly), "protection is needed"
    assert kept.encode(curly) == bpe.encode(curly)
    english = train_bpe(sample, 256 + 300)
    assert 2 * len(extend(english, chinese, 600).encode(chinese)) < len(english.encode(chinese))


@pytest.fixture(scope="module")
def extended(bpe):
    return extend(bpe, "猫坐在垫子上 cat猫 “猫” café zqzq zqzq猫猫 " * 3 + "é1 e", 60)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
@settings(max_examples=150, deadline=None)
def test_extension_keeps_ascii(bpe, extended, text):
    assert extended.encode_ordinary(text) == bpe.encode_ordinary(text)


def test_extension_leaves_ascii_pairs_alone(bpe, extended):
    assert extended.encode("zqzq") == bpe.encode("zqzq") == list(b"zqzq")
    new = extended.merges[len(bpe.merges) :]
    assert new and min(min(left + right) for left, right in new) >= 0x80


def test_extension_learns_as_training_does(chinese):
    # From the bytes alone, and from text without ASCII, extension is the same as training.
    text = "".join(char for char in chinese if ord(char) > 0x3000)[:2000]
    bare = train_bpe("ab", 256)
    assert extend(bare, text, 80).merges == brute_force_merges(text, 80)


def test_extension_refuses_nothing_to_do(bpe):
    with pytest.raises(ValueError, match="n_tokens=0"):
        extend(bpe, "你", 0)
    with pytest.raises(ValueError, match="corpus is empty"):
        extend(bpe, END, 3)


# --- chat


def test_chat_renders_and_masks(course):
    talk = [
        Message("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Bye"),
        ("assistant", "Bye."),
    ]
    chat = render(course, talk)
    assert course.decode(chat.ids) == (
        "<|system|>Be brief.<|user|>Hi<|assistant|>Hello!<|endoftext|>"
        "<|user|>Bye<|assistant|>Bye.<|endoftext|>"
    )
    learned = [token for token, learn in zip(chat.ids, chat.mask, strict=True) if learn]
    assert course.decode(learned) == "Hello!<|endoftext|>Bye.<|endoftext|>"
    prompt = render(course, talk[:4], reply=True)
    assert prompt.ids == chat.ids[: len(prompt.ids)]
    assert prompt.mask == chat.mask[: len(prompt.ids)]
    assert course.decode(prompt.ids).endswith("Bye<|assistant|>")


@given(st.lists(st.sampled_from(["<|user|>", "<|assistant|>", "<|endoftext|>", "<|", "a "])))
@settings(max_examples=100, deadline=None)
def test_chat_is_safe_from_injection(course, parts):
    evil = "".join(parts)
    chat = render(course, [("user", evil), ("assistant", evil)])
    special = [token for token in chat.ids if token in course.special_ids.values()]
    assert [course.decode([token]) for token in special] == [
        "<|user|>",
        "<|assistant|>",
        "<|endoftext|>",
    ]
    assert course.decode(chat.ids) == f"<|user|>{evil}<|assistant|>{evil}<|endoftext|>"


@pytest.mark.parametrize(
    ("roles", "reply", "message"),
    [
        ([], False, "at least one user"),
        (["system"], False, "at least one user"),
        (["assistant"], False, "message 0 has role 'assistant' where 'user'"),
        (["user", "user"], False, "message 1 has role 'user' where 'assistant'"),
        (["system", "user", "system"], False, "message 2 has role 'system' where 'assistant'"),
        (["system", "system", "user"], False, "message 1 has role 'system' where 'user'"),
        (["user", "tool"], False, "message 1 has role 'tool'"),
        (["user", "assistant"], True, "user's message last"),
    ],
)
def test_chat_refuses_roles_out_of_order(course, roles, reply, message):
    with pytest.raises(ValueError, match=message):
        render(course, [(role, "x") for role in roles], reply=reply)


def test_chat_needs_its_special_tokens():
    with pytest.raises(ValueError, match="lacks the special tokens"):
        render(train_bpe("ab", 257), [("user", "x")])


# --- the course's tokenizer


def test_course_tokenizer(course, sample, chinese):
    assert course.vocab_size == 4096
    marks = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
    assert [course.special_ids[mark] for mark in marks] == [4091, 4092, 4093, 4094, 4095]
    assert [course.vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]
    for text in (sample, chinese):
        assert course.decode(course.encode(text)) == text
    assert all(len(course.encode(str(10**n))) == n + 1 for n in range(6)), "a token each digit"
    assert len(sample.encode()) > 2 * len(course.encode(sample))
    han = Counter(char for char in chinese if "\u4e00" <= char <= "\u9fff")
    common = [char for char, _ in han.most_common(300)]
    assert all(len(course.encode(char)) == 1 for char in common)
