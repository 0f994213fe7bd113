"""Shards: the layout byte by byte, every mode against a list, damage, races, kills and memory."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.shards import Shard, ShardWriter, read_documents, tokenize_to_shards

ROOT = Path(__file__).resolve().parents[1]
MODES = ("lazy", "cached", "mmap")


class Bytes:
    """A tokenizer whose answer is known: the bytes of the text."""

    vocab_size = 257

    def encode(self, text):
        return list(text.encode())


def _write(path, documents, **options):
    with ShardWriter(path, **options) as out:
        for document in documents:
            for sequence in document:
                out.add(sequence)
            out.end_document()


def test_layout_byte_by_byte(tmp_path):
    """Read with `struct` and nothing else, field by field as Megatron-LM reads it."""
    _write(tmp_path / "x", [[[1, 2, 3], [4]], [[5, 6]]], dtype=np.int32)
    raw = (tmp_path / "x.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<Q", raw[9:17]) == (1,)
    assert struct.unpack("<B", raw[17:18]) == (4,)  # int32
    assert struct.unpack("<QQ", raw[18:34]) == (3, 3)  # sequences, marks = documents + 1
    assert struct.unpack("<3i", raw[34:46]) == (3, 1, 2)
    assert struct.unpack("<3q", raw[46:70]) == (0, 12, 16)
    assert struct.unpack("<3q", raw[70:]) == (0, 2, 3)
    assert struct.unpack("<6i", (tmp_path / "x.bin").read_bytes()) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("dtype", "code"), [("uint8", 1), ("int8", 2), ("int16", 3), ("int32", 4), ("uint16", 8)]
)
def test_dtype_codes(tmp_path, dtype, code):
    _write(tmp_path / "x", [[[1, 100]]], dtype=dtype)
    assert (tmp_path / "x.idx").read_bytes()[17] == code
    assert Shard(tmp_path / "x").dtype == np.dtype(dtype)


@given(
    st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=4), max_size=6),
    st.sampled_from(MODES),
)
@settings(max_examples=60, deadline=None)
def test_every_mode_gives_back_what_was_written(tmp_path_factory, documents, mode):
    path = tmp_path_factory.mktemp("shard") / "x"
    _write(path, documents)
    sequences = [s for document in documents for s in document]
    flat = [token for s in sequences for token in s]
    with Shard(path, mode) as shard:
        assert [s.tolist() for s in shard] == sequences
        assert shard.n_tokens == len(flat)
        bounds = shard.documents.tolist()
        assert [sequences[a:b] for a, b in pairwise(bounds)] == documents
        for start in range(len(flat) + 1):
            count = min(5, len(flat) - start)
            assert shard.read(start, count).tolist() == flat[start : start + count]


def test_tokens_are_views_that_cannot_be_written(tmp_path):
    _write(tmp_path / "x", [[[1, 2, 3]]])
    for mode in ("mmap", "cached"):
        shard = Shard(tmp_path / "x", mode)
        assert np.shares_memory(shard[0], shard.tokens)
        with pytest.raises(ValueError, match="read-only"):
            shard[0][0] = 9
    with pytest.raises(ValueError, match="lazy"):
        _ = Shard(tmp_path / "x", "lazy").tokens


def test_extend_grows_a_sequence_and_close_ends_what_is_open(tmp_path):
    with ShardWriter(tmp_path / "x") as out:
        out.extend([1])
        out.extend(np.array([2, 3]))
        out.end_sequence()
        out.extend([4])
    shard = Shard(tmp_path / "x")
    assert [s.tolist() for s in shard] == [[1, 2, 3], [4]]
    assert shard.documents.tolist() == [0, 2]


def test_bad_tokens_and_types_are_named(tmp_path):
    with ShardWriter(tmp_path / "x") as out:
        with pytest.raises(ValueError, match=r"tokens 1..65536 do not fit uint16 \(0..65535\)"):
            out.add([1, 65536])
        with pytest.raises(ValueError, match=r"tokens -1..2 do not fit"):
            out.add([-1, 2])
        with pytest.raises(ValueError, match="row of integers, got float64"):
            out.add([1.5])
        with pytest.raises(ValueError, match=r"row of integers, got int64\(1, 1\)"):
            out.add([[1]])
        out.add([7])
    assert Shard(tmp_path / "x")[0].tolist() == [7]  # refused tokens left no trace
    for dtype in ("float32", "uint32", "bool"):
        with pytest.raises(ValueError, match=f"dtype={dtype} has no code"):
            ShardWriter(tmp_path / "y", dtype)
    with pytest.raises(ValueError, match="mode='ram'"):
        Shard(tmp_path / "x", "ram")


def test_reading_outside_is_refused(tmp_path):
    _write(tmp_path / "x", [[[1, 2, 3]]])
    for mode in MODES:
        shard = Shard(tmp_path / "x", mode)
        assert shard[-1].tolist() == [1, 2, 3]
        with pytest.raises(IndexError, match="sequence 1 of a shard of 1"):
            _ = shard[1]
        for start, count in ((2, 2), (-1, 1), (0, -1)):
            with pytest.raises(ValueError, match=r"exceed 0..3"):
                shard.read(start, count)
    lazy = Shard(tmp_path / "x", "lazy")
    lazy.close()
    with pytest.raises(ValueError, match="closed"):
        lazy.read(0, 1)


def _damage(path: Path, at: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, i: i.write_bytes(b"TNTIDX\x00\x00" + i.read_bytes()[8:]), "starts with"),
        (lambda b, i: i.write_bytes(b""), "starts with b''"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "starts with"),
        (lambda b, i: _damage(i, 9, b"\x02"), "has version 2, this reads version 1"),
        (lambda b, i: _damage(i, 17, b"\x09"), "dtype code 9, known are"),
        (lambda b, i: _damage(i, 17, b"\x04"), "contradict"),  # int32 instead of uint16
        (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "3 sequences need"),
        (lambda b, i: i.write_bytes(i.read_bytes() + b"\x00"), "3 sequences need"),
        (lambda b, i: _damage(i, 18, b"\xff" * 8), "sequences need"),
        (lambda b, i: _damage(i, 34, struct.pack("<i", -3)), "contradict"),
        (lambda b, i: _damage(i, 34 + 12 + 8, struct.pack("<q", 2)), "contradict"),
        (lambda b, i: _damage(i, 34 + 36, struct.pack("<q", 1)), "document marks"),
        (lambda b, i: _damage(i, 34 + 36 + 8, struct.pack("<q", 9)), "document marks"),
        (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), "has 10 bytes, its index needs 12"),
        (lambda b, i: b.write_bytes(b.read_bytes()[:-1]), "has 11 bytes, its index needs 12"),
        (lambda b, i: b.write_bytes(b.read_bytes() + b"??"), "has 14 bytes, its index needs 12"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, damage, message):
    _write(tmp_path / "x", [[[1, 2, 3], [4]], [[5, 6]]])
    damage(tmp_path / "x.bin", tmp_path / "x.idx")
    for mode in MODES:
        with pytest.raises(ValueError, match=message):
            Shard(tmp_path / "x", mode)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "nothing")
    _write(tmp_path / "x", [[[1]]])
    (tmp_path / "x.bin").unlink()
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "x")


def test_nothing_is_published_before_close_nor_after_an_exception(tmp_path):
    out = ShardWriter(tmp_path / "x")
    out.add(list(range(1000)))
    assert not (tmp_path / "x.bin").exists() and not (tmp_path / "x.idx").exists()
    out.close()
    assert len(Shard(tmp_path / "x")[0]) == 1000
    with pytest.raises(KeyError), ShardWriter(tmp_path / "y") as out:
        out.add([1])
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_an_existing_shard_is_not_overwritten_by_accident(tmp_path):
    _write(tmp_path / "x", [[[1]]])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ShardWriter(tmp_path / "x")
    old = Shard(tmp_path / "x")
    _write(tmp_path / "x", [[[2, 3]]], overwrite=True)
    assert old[0].tolist() == [1]  # a map stays what it was
    assert Shard(tmp_path / "x")[0].tolist() == [2, 3]


def test_a_failing_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    _write(tmp_path / "x", [[[1]]])

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "y", [[[2]]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_readers_see_all_of_a_shard_or_none_while_it_is_replaced(tmp_path):
    """One thread replaces the shard, its content all of one value; readers must never see a mix."""
    path, stop, seen, wrong = tmp_path / "x", threading.Event(), set(), []

    def write():
        value = 0
        while not stop.is_set():
            value += 1
            _write(path, [[[value % 60_000] * (1 + value % 7)] * 3], overwrite=True)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        turn, deadline = 0, time.monotonic() + 30
        while len(seen) < 40 and time.monotonic() < deadline:
            turn += 1
            try:
                with Shard(path, MODES[turn % 3]) as shard:
                    values = {v for s in shard for v in s.tolist()}
                    lengths = {len(s) for s in shard}
            except FileNotFoundError:
                continue
            except ValueError as error:
                wrong.append(str(error))
                continue
            value = next(iter(values))
            seen.add(value)
            if len(values) != 1 or lengths != {1 + value % 7}:
                wrong.append(f"{values} {lengths}")
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert len(seen) == 40  # different versions, so the race did take place


def test_between_any_two_renames_there_is_no_half_shard(tmp_path, monkeypatch):
    """Stop the clock before and after each rename, and look as a reader would."""
    _write(tmp_path / "x", [[[1, 1]]])
    replace, states = os.replace, []

    def look():
        try:
            with Shard(tmp_path / "x") as shard:
                states.append(shard[0].tolist())
        except FileNotFoundError:
            states.append(None)

    def watched(source, target):
        look()
        replace(source, target)
        look()

    monkeypatch.setattr(os, "replace", watched)
    _write(tmp_path / "x", [[[2, 2]]], overwrite=True)
    assert states[-1] == [2, 2]
    assert states[:-1] == [None, None, None]  # never new tokens under an old index, or the reverse


def test_a_killed_writer_publishes_nothing(tmp_path):
    code = (
        "import sys\nfrom minillm.data.shards import ShardWriter\n"
        "out = ShardWriter(sys.argv[1])\n"
        "while True:\n    out.add(list(range(1000)))\n    print('written', flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, cwd=ROOT
    )
    for _ in range(20):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with pytest.raises(FileNotFoundError):
        Shard(tmp_path / "x")
    _write(tmp_path / "x", [[[1]]])  # and its remains are in nobody's way
    assert Shard(tmp_path / "x")[0].tolist() == [1]


@given(
    st.lists(st.text(alphabet="ab \n\té天|<", max_size=40), max_size=6),
    st.integers(1, 20),
    st.sampled_from(["<|sep|>", "a b", "\n\n"]),  # spaces inside invite a cut through the middle
)
@settings(max_examples=200, deadline=None)
def test_reading_documents_in_pieces_is_splitting_at_the_separator(
    tmp_path_factory, documents, chunk, separator
):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    text = separator.join(documents)
    path.write_bytes(text.encode())
    got = ["".join(pieces) for pieces in read_documents(path, separator, chunk)]
    assert [d for d in got if d] == [d for d in text.split(separator) if d]


def test_pieces_are_small_and_skipped_documents_do_not_disturb(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one two three four " * 500 + "<|endoftext|>" + "five six " * 500)
    sizes = [[len(piece) for piece in document] for document in read_documents(path, chunk=100)]
    assert max(map(max, sizes)) < 250 and len(sizes[0]) > 50
    documents = read_documents(path, chunk=100)
    next(next(documents))  # one piece of the first
    assert next(next(documents)).startswith("five six")
    with pytest.raises(ValueError, match="separator"):
        next(read_documents(path, ""))


def test_pieces_do_not_change_the_tokens(tmp_path):
    """Real split patterns, old and new style: encoding pieces equals encoding the whole."""
    tiktoken = pytest.importorskip("tiktoken")
    patterns = [
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
        r"""|\s*[\r\n]|\s+(?!\S)|\s+""",
    ]
    rng = random.Random(0)
    marks = ["word", "12", "345", "!", "...", "'s", "天", "_"]
    parts = [*marks, " ", "  ", "\n", "\n\n", "\t", "\r\n"]
    text = "".join(rng.choices(parts, k=6000))
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    ranks = {bytes([b]): b for b in range(256)}
    pairs = [
        a + b for a in (b" ", b"\n", b"!", b"w", b"1") for b in (b" ", b"\n", b"w", b"1", b".")
    ]
    ranks |= {pair: 256 + i for i, pair in enumerate(pairs)}
    for pattern in patterns:
        names = {"mergeable_ranks": ranks, "special_tokens": {}}
        encoding = tiktoken.Encoding("t", pat_str=pattern, **names)
        for chunk in (7, 64, 1000):
            pieces = [piece for doc in read_documents(path, chunk=chunk) for piece in doc]
            assert len(pieces) > 3
            got = [token for piece in pieces for token in encoding.encode(piece)]
            assert got == encoding.encode(text), (pattern, chunk)


def test_tokenize_to_shards(tmp_path):
    texts = ["first", "", iter(["sec", "", "ond"]), "third"]
    shard = tokenize_to_shards(texts, Bytes(), tmp_path / "x", eos=256)
    got = [bytes(s[:-1].tolist()).decode() for s in shard]
    assert got == ["first", "second", "third"]
    assert all(s[-1] == 256 for s in shard)
    assert shard.documents.tolist() == [0, 1, 2, 3]
    assert shard.dtype == np.uint16
    bare = tokenize_to_shards(["ab"], Bytes(), tmp_path / "y")
    assert bare.tokens.tolist() == [97, 98]


def test_dtype_follows_the_vocabulary(tmp_path):
    class Big(Bytes):
        vocab_size = 65_537

    class Tik(Bytes):
        vocab_size = None
        n_vocab = 65_536

    class Unknown:
        encode = Bytes.encode

    for i, (tokenizer, dtype) in enumerate(
        [(Big(), np.int32), (Tik(), np.uint16), (Unknown(), np.int32)]
    ):
        assert tokenize_to_shards(["a"], tokenizer, tmp_path / f"x{i}").dtype == dtype


def test_an_error_in_the_texts_leaves_no_shard(tmp_path):
    def texts():
        yield "good"
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    with pytest.raises(UnicodeDecodeError):
        tokenize_to_shards(texts(), Bytes(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
