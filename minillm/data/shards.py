"""Token shards on disk, in the layout Megatron-LM reads: `x.bin` holds tokens, `x.idx` says where.

The index: magic, version, code of the number type, count of sequences, count of document marks;
then the length of each sequence (int32), its first byte in the .bin (int64), and the sequence at
which each document starts, with the total at the end (int64). All little-endian. (Layout of the
"indexed dataset" of Shoeybi et al., Megatron-LM, 2019.)
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
DTYPES: Mapping[int, np.dtype] = MappingProxyType(
    {
        code: np.dtype(name).newbyteorder("<")
        for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1)
    }
)
StrPath = str | os.PathLike[str]


class Encoder(Protocol):  # what `tokenize_to_shards` needs of a tokenizer
    def encode(self, text: str) -> list[int]: ...


def shard_paths(path: StrPath) -> tuple[Path, Path]:
    """The .bin and the .idx of a shard, given the name they share."""
    return Path(os.fspath(path) + ".bin"), Path(os.fspath(path) + ".idx")


class ShardWriter:
    """Streams sequences into a shard; nothing is visible under its name until `close`.

    Both files are renamed when complete, the index last: a reader finds all of a shard or none,
    also if the writer is killed. An exception inside the `with` block removes the unfinished
    files. A reader gets sequences by number; a document is one or more of them. Raises
    FileExistsError for a shard that exists, unless `overwrite`, ValueError for tokens that do not
    fit the number type.
    """

    def __init__(
        self, path: StrPath, dtype: np.dtype | type | str = np.uint16, overwrite: bool = False
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if self.dtype.kind not in "iu" or not codes:
            raise ValueError(f"dtype={np.dtype(dtype).name} has no code, take uint16 or int32")
        self.code, (self.bin, self.idx) = codes[0], shard_paths(path)
        if not overwrite and (taken := [p for p in (self.idx, self.bin) if p.exists()]):
            raise FileExistsError(f"{taken[0]} exists; overwrite=True replaces the shard")
        self.bin.parent.mkdir(parents=True, exist_ok=True)
        self.sizes, self.documents = array("i"), array("q", [0])  # 4 and 8 bytes an entry
        self.length = 0  # of the sequence being written
        self.part = self.bin.with_name(f".{self.bin.name}.{secrets.token_hex(4)}.part")
        self.file = open(self.part, "xb")  # noqa: SIM115 (closed by close or abort)

    def extend(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append tokens to the sequence being written."""
        values = np.asarray(tokens)
        if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
            raise ValueError(f"tokens must be a row of integers, got {values.dtype}{values.shape}")
        low, high = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
        if len(values) and (values.min() < low or values.max() > high):
            got = f"{values.min()}..{values.max()}"
            raise ValueError(f"tokens {got} do not fit {self.dtype.name} ({low}..{high})")
        self.file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def end_sequence(self) -> None:
        """What was appended since the last call is one sequence of the current document."""
        self.sizes.append(self.length)
        self.length = 0

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one whole sequence."""
        self.extend(tokens)
        self.end_sequence()

    def end_document(self) -> None:
        """The sequences since the last call are one document."""
        self.documents.append(len(self.sizes))

    def close(self) -> None:
        """Complete both files and publish them under their names."""
        if self.length:
            self.end_sequence()
        if len(self.sizes) > self.documents[-1]:
            self.end_document()
        sizes = np.array(self.sizes, dtype="<i4")
        pointers = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([[0], pointers])[: len(sizes)].astype("<i8")
        header = HEADER.pack(MAGIC, VERSION, self.code, len(sizes), len(self.documents))
        index = self.part.with_suffix(".idx.part")
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            with open(index, "xb") as out:
                for part in (header, sizes, pointers, np.array(self.documents, dtype="<i8")):
                    out.write(part)
                out.flush()
                os.fsync(out.fileno())
            self.idx.unlink(missing_ok=True)  # an old index must never point into a new .bin
            os.replace(self.part, self.bin)
            os.replace(index, self.idx)
        except BaseException:
            index.unlink(missing_ok=True)
            self.abort()
            raise

    def abort(self) -> None:
        """Throw the unfinished shard away."""
        self.file.close()
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.abort() if kind else self.close()


class Shard:
    """A shard open for reading: `shard[i]` is sequence i, `shard.read(a, n)` n tokens from a on.

    `mode` decides who holds the tokens. "lazy": nobody, each access is a read from the disk.
    "cached": this process, all of them. "mmap": the operating system, whose page cache is shared
    between processes and given back under pressure. Arrays are read-only, and views if the mode
    allows. Raises FileNotFoundError without a (complete) shard, ValueError for foreign files.
    """

    def __init__(
        self, path: StrPath, mode: Literal["lazy", "cached", "mmap"] = "mmap", retries: int = 5
    ) -> None:
        if mode not in ("lazy", "cached", "mmap"):
            raise ValueError(f"mode={mode!r} must be 'lazy', 'cached' or 'mmap'")
        self.mode, (self.bin, self.idx) = mode, shard_paths(path)
        for _ in range(retries):
            with open(self.idx, "rb") as index, open(self.bin, "rb") as tokens:
                seen = os.fstat(index.fileno())
                if self.idx.exists() and os.path.samestat(seen, self.idx.stat()):
                    self._open(index, tokens)
                    return
        raise FileNotFoundError(f"{self.idx} was replaced {retries} times while being opened")

    def _open(self, index, tokens) -> None:
        """Map the index, check it against the length of the .bin, and open the .bin."""
        size, header = os.fstat(index.fileno()).st_size, index.read(HEADER.size)
        if len(header) < HEADER.size or header[:9] != MAGIC:
            raise ValueError(f"{self.idx} starts with {header[:9]!r}, an index with {MAGIC!r}")
        _, version, code, n, marks = HEADER.unpack(header)
        if version != VERSION:
            raise ValueError(f"{self.idx} has version {version}, this reads version {VERSION}")
        if code not in DTYPES:
            raise ValueError(f"{self.idx} has dtype code {code}, known are {sorted(DTYPES)}")
        if size != (want := HEADER.size + 12 * n + 8 * marks):
            raise ValueError(f"{self.idx} has {size} bytes, {n} sequences need {want}")
        self.dtype, raw = DTYPES[code], np.memmap(index, mode="r")
        self.sizes = raw[HEADER.size : HEADER.size + 4 * n].view("<i4")
        self.pointers = raw[HEADER.size + 4 * n : HEADER.size + 12 * n].view("<i8")
        self.documents = raw[HEADER.size + 12 * n :].view("<i8")
        length = os.fstat(tokens.fileno()).st_size
        expected = 0
        for at in range(0, n, 1 << 16):  # in blocks: a check must not cost what mapping saves
            ends = expected + np.cumsum(self.sizes[at : at + (1 << 16)], dtype=np.int64)
            starts = np.concatenate([[expected], ends[:-1]]) * self.dtype.itemsize
            wrong = self.pointers[at : at + (1 << 16)] != starts
            if self.sizes[at : at + (1 << 16)].min() < 0 or wrong.any():
                raise ValueError(f"{self.idx}: lengths and positions of sequences contradict")
            expected = int(ends[-1])
        if length != expected * self.dtype.itemsize:
            want = expected * self.dtype.itemsize
            raise ValueError(f"{self.bin} has {length} bytes, its index needs {want}: truncated?")
        marks_ok = marks and self.documents[0] == 0 and self.documents[-1] == n
        if not marks_ok or (self.documents[1:] < self.documents[:-1]).any():
            raise ValueError(f"{self.idx}: document marks must rise from 0 to {n}")
        self.n_tokens, self._file, self._tokens = expected, None, np.zeros(0, self.dtype)
        if self.mode == "lazy":
            self._file = os.dup(tokens.fileno())
        elif self.mode == "cached":
            self._tokens = np.fromfile(tokens, self.dtype)
            self._tokens.flags.writeable = False
        elif length:  # an empty file cannot be mapped
            self._tokens = np.memmap(tokens, self.dtype, mode="r")

    @property
    def tokens(self) -> np.ndarray:
        """All tokens as one row, a view; ValueError for a lazy reader, which has none."""
        if self.mode == "lazy":
            raise ValueError("a lazy reader holds no tokens: use read, or mode='mmap'")
        return self._tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1 of the shard, whatever sequences they belong to."""
        if start < 0 or count < 0 or start + count > self.n_tokens:
            raise ValueError(f"tokens {start}..{start + count} exceed 0..{self.n_tokens}")
        size = self.dtype.itemsize
        if self.mode != "lazy":
            return self._tokens[start : start + count]
        if self._file is None:
            raise ValueError(f"{self.bin} is closed")
        return np.frombuffer(os.pread(self._file, count * size, start * size), self.dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):  # IndexError ends a `for` over the shard
            raise IndexError(f"sequence {i} of a shard of {len(self)}")
        return self.read(int(self.pointers[i]) // self.dtype.itemsize, int(self.sizes[i]))

    def close(self) -> None:
        """Close the file of a lazy reader; maps close with the last array that uses them."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A place between two words where every split pattern in use cuts as well.
_SAFE_CUT = re.compile(r"\S(?=[ \t])|[^\W_](?=[\r\n])")


def read_documents(
    path: StrPath, separator: str = "<|endoftext|>", chunk: int = 1 << 18
) -> Iterator[Iterator[str]]:
    """Documents of a UTF-8 text file, each an iterator of pieces of about `chunk` characters.

    Pieces end before a space that follows none, so tokens do not depend on them, and memory only
    on the longest word. What is left of a document when the next one is asked for is skipped.
    """
    if not separator:
        raise ValueError("separator must not be empty")
    with open(path, encoding="utf-8", newline="") as file:
        buffer, more = "", True

        def pieces() -> Iterator[str]:
            nonlocal buffer, more
            while (cut := buffer.find(separator)) < 0 and more:
                kept = buffer[: max(0, len(buffer) - len(separator))]  # may hold half a separator
                ends = [m.end() for m in _SAFE_CUT.finditer(kept, max(0, len(kept) - 4096))]
                if ends:
                    yield buffer[: ends[-1]]
                    buffer = buffer[ends[-1] :]
                more = len(read := file.read(chunk)) > 0
                buffer += read
            cut = len(buffer) if cut < 0 else cut
            yield buffer[:cut]
            buffer = buffer[cut + len(separator) :]

        while more or buffer:
            document = pieces()
            yield document
            for _ in document:
                pass


def tokenize_to_shards(
    texts: Iterable[str | Iterable[str]],
    tokenizer: Encoder,
    path: StrPath,
    eos: int | None = None,
    dtype: np.dtype | type | str | None = None,
    overwrite: bool = False,
) -> Shard:
    """Encode documents into a shard, one sequence each, and open it.

    A document is a string or an iterator of its pieces (see `read_documents`); `eos` ends each,
    those without tokens are skipped. Without `dtype`, the tokenizer's `vocab_size` (tiktoken:
    `n_vocab`) decides between uint16 and int32.
    """
    size = getattr(tokenizer, "vocab_size", None) or getattr(tokenizer, "n_vocab", 1 << 31)
    with ShardWriter(path, dtype or (np.uint16 if size <= 1 << 16 else np.int32), overwrite) as out:
        for text in texts:
            for piece in [text] if isinstance(text, str) else text:
                out.extend(tokenizer.encode(piece))
            if out.length:
                out.extend([] if eos is None else [eos])
                out.end_sequence()
                out.end_document()
    return Shard(path)
