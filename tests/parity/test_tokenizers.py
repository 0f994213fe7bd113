"""Our tokenizer gives the same ids in tiktoken and in the `tokenizers` library."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
import tiktoken_ext.openai_public as shipped
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import corpora
from minillm.tokenizers import (
    BPE,
    extend,
    load_course_tokenizer,
    to_huggingface_json,
    to_tiktoken,
    train_bpe,
)
from minillm.tokenizers.export import byte_characters
from minillm.tokenizers.pretokenize import DIGITS_PATTERN, GPT2_PATTERN, split_text

# The libraries carry tables of different Unicode versions, so that a letter of last year is no
# letter to all of them. What Unicode 3.2 (2002) knew, all agree on.
OLD = [
    c for c in map(chr, range(0x110000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs")
]
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|endoftext|><|endoftext|>"]


@pytest.fixture(scope="module")
def chinese():
    return (Path(__file__).parents[2] / "assets/data/chinese.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source():
    return corpora.stdlib()[::12]


@pytest.fixture(scope="module", params=["course", "gpt2 pattern", "digits, extended"])
def trio(request, source, chinese):
    """One tokenizer in three forms."""
    if request.param == "course":
        bpe = load_course_tokenizer()
    elif request.param == "gpt2 pattern":
        bpe = train_bpe([*source[:200], chinese], 256 + 3000, SPECIAL, GPT2_PATTERN)
    else:
        english = train_bpe(source[:200], 256 + 1500, SPECIAL, DIGITS_PATTERN)
        bpe = extend(english, chinese, 800)
    return bpe, to_tiktoken(bpe), tokenizers.Tokenizer.from_str(to_huggingface_json(bpe))


def assert_same(trio, text):
    bpe, fast, rust = trio
    ids = bpe.encode(text)
    assert fast.encode(text) == ids
    assert rust.encode(text).ids == ids
    assert fast.decode(ids) == rust.decode(ids, skip_special_tokens=False) == text


def test_a_whole_corpus(trio, source, chinese):
    bpe, fast, rust = trio
    text = "\n".join([*source, chinese])
    ids = bpe.encode(text)
    assert len(text) > 300_000 and len(ids) < len(text) / 2
    assert fast.encode_ordinary(text) == ids
    assert rust.encode(text).ids == ids


def test_random_unicode(trio):
    rng = random.Random(0)
    for _ in range(30):
        alphabet = rng.sample(OLD, 30) + list(" \n\t a1'!你") * 3
        assert_same(trio, "".join(rng.choices(alphabet, k=2000)))


@given(st.text(st.one_of(st.sampled_from(OLD), st.sampled_from("ab1 \n\t'slt.,你好"))))
@settings(max_examples=150, deadline=None)
def test_any_text(trio, text):
    assert_same(trio, text)


def test_long_pieces(trio):
    for text in ("a" * 3000, "abc" * 1000, " " * 2000 + "x", "\n" * 999, "你好吗" * 700, "1" * 500):
        assert_same(trio, text)


def test_special_tokens(trio):
    bpe, fast, rust = trio
    end, pad = "<|endoftext|>", "<|pad|>"
    text = f"{end}one {pad} two{end}{end}{end} <|pad"
    ids = bpe.encode(text, allowed_special="all")
    assert fast.encode(text, allowed_special="all") == rust.encode(text).ids == ids
    assert fast.encode_ordinary(text) == bpe.encode_ordinary(text)
    assert bpe.special_ids == fast._special_tokens
    assert rust.get_vocab_size() == fast.n_vocab == bpe.vocab_size
    for encode in (bpe.encode, fast.encode):  # refused alike
        with pytest.raises(ValueError, match="special token"):
            encode(text)


@given(corpus=st.text("ab ", min_size=1), text=st.text("aab ", max_size=80))
@settings(max_examples=200, deadline=None)
def test_runs_of_few_letters(corpus, text):
    # Where many tokens are concatenations of others, joining by bytes and by merges could differ.
    bpe = train_bpe(corpus, 256 + 40)
    trio = bpe, to_tiktoken(bpe), tokenizers.Tokenizer.from_str(to_huggingface_json(bpe))
    assert_same(trio, text)


def test_special_ids_in_front(source):
    trained = train_bpe(source[:20], 256 + 300)
    shifted = {0: b"<|endoftext|>", **{i + 1: text for i, text in trained.vocab.items()}}
    bpe = BPE(shifted, trained.merges, ["<|endoftext|>"])
    trio = bpe, to_tiktoken(bpe), tokenizers.Tokenizer.from_str(to_huggingface_json(bpe))
    assert_same(trio, source[30])
    assert bpe.encode("<|endoftext|>a", allowed_special="all") == [0, 98]
    assert trio[1].encode("<|endoftext|>a", allowed_special="all") == [0, 98]
    assert trio[2].encode("<|endoftext|>a").ids == [0, 98]


def test_special_tokens_that_look_like_bytes():
    # In the library's files a space is written as Ġ: there, this could not be told from " a".
    confusing = train_bpe("x a a", 258, ["Ġa"])
    with pytest.raises(ValueError, match="'Ġa'"):
        to_huggingface_json(confusing)
    assert to_tiktoken(confusing).encode(" aĠa", allowed_special="all") == [256, 257]
    accented = train_bpe("x a a", 258, ["<é>"])
    rust = tokenizers.Tokenizer.from_str(to_huggingface_json(accented))
    assert rust.encode("é<é> a").ids == accented.encode("é<é> a", allowed_special="all")


BYTES = {i: bytes([i]) for i in range(256)}


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({**BYTES, 256: b"ab", 257: b"cd"}, [(b"c", b"d"), (b"a", b"b")], "order of the merges"),
        ({**BYTES, 256: b"bc", 257: b"ab", 258: b"abc"}, "bc ab ab|c", "find it whole"),
        ({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")], r"all 256 bytes .* \[0, 1"),
        ({**BYTES, 256: b"ab"}, [], "find it whole"),
    ],
)
def test_merges_without_an_equal_in_tiktoken_are_refused(vocab, merges, message):
    if isinstance(merges, str):
        merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(ValueError, match=message):
        to_tiktoken(BPE(vocab, merges))


def test_training_is_as_good_as_the_rust_trainer(source):
    # Ties are broken otherwise there, so a few merges differ; how well they compress must not.
    text = source[:30]
    rust = tokenizers.Tokenizer.from_str(to_huggingface_json(train_bpe("a", 256)))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + 1000, initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator(text, trainer)
    ours = train_bpe(text, 256 + 1000)
    lengths = [sum(len(e(t)) for t in text) for e in (ours.encode, lambda t: rust.encode(t).ids)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.002
    assert len(set(ours.merges) & set(to_pairs(rust))) > 900


def to_pairs(rust):
    back = {char: byte for byte, char in byte_characters().items()}
    merges = json.loads(rust.to_str())["model"]["merges"]
    return [tuple(bytes(back[char] for char in side) for side in pair) for pair in merges]


def test_byte_characters_are_those_of_the_library():
    assert sorted(byte_characters().values()) == sorted(
        tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a b\n", "é\x00\x7f", "你"):
        shown = "".join(piece for piece, _ in pieces.pre_tokenize_str(text))
        assert shown == "".join(byte_characters()[byte] for byte in text.encode())


def test_our_pattern_is_the_one_of_gpt2(source, chinese):
    # tiktoken writes it with possessive quantifiers, which only changes speed.
    bytes_only = train_bpe("a", 256)
    shipped_pattern = regex.compile(shipped.r50k_pat_str)
    for text in (*source[:100], chinese):
        assert split_text(text, GPT2_PATTERN) == shipped_pattern.findall(text)
    assert to_tiktoken(bytes_only).encode_ordinary("I'll") == list(b"I'll")
