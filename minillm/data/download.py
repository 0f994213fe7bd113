"""Verified downloads: resumed where they were cut, checked, and never half-written.

Bytes go to ``<name>.part``. Only when all of them are there and their SHA-256 is right does the
file get its name, in one atomic rename: whatever carries the final name is whole.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tqdm.auto import tqdm

from minillm.paths import write_atomically

OFFLINE = "the offline corpora are pydocs, stdlib, stories"


class DownloadError(OSError):
    """A download that could not be finished or verified; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and under which terms.

    ``sha256`` is written down only if it was computed from the real bytes. Where it is None, the
    first download is pinned: its sum is kept in ``<file>.sha256`` and later downloads must match.
    """

    url: str
    file: str
    license: str
    sha256: str | None = None


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "tiny_shakespeare": Source(
            url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            file="tiny_shakespeare.txt",
            license="public domain (plays by William Shakespeare, collected by A. Karpathy, 2015)",
        ),
        "tinystories": Source(
            url="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt",
            file="tinystories_valid.txt",
            license="CDLA-Sharing-1.0 (R. Eldan and Y. Li, TinyStories, 2023)",
        ),
    }
)


def download(
    name: str, folder: Path | None = None, *, sources: Mapping[str, Source] = SOURCES
) -> Path:
    """Path of the data set ``name``, downloaded into ``folder`` unless it is there already.

    Args:
        name: a key of ``sources``.
        folder: where to keep it; ``~/.cache/minillm`` if not given.
        sources: the table of known data sets.

    Raises:
        ValueError: unknown name.
        DownloadError: no network, a server's refusal, a wrong checksum, a full disk.
    """
    if name not in sources:
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(sources)}; {OFFLINE}")
    source = sources[name]
    path = Path(folder or Path.home() / ".cache" / "minillm") / source.file
    pin = path.with_name(path.name + ".sha256")
    expected = source.sha256 or (pin.read_text().split()[0] if pin.exists() else None)
    if path.exists():
        actual = sha256(path)
        if expected not in (None, actual):
            raise DownloadError(
                f"{path} was changed: its sha256 is {actual}, expected {expected}. "
                "Delete it to download it again."
            )
    else:
        actual = fetch(source.url, path, expected)
        state = "verified" if source.sha256 else f"unverified, pinned in {pin.name}"
        print(f"{name}: {path.stat().st_size:,} bytes, sha256 {actual} ({state})")
        print(f"{name}: license: {source.license}")
    if expected is None:
        write_atomically(
            pin, f"{actual}  {path.name}\n".encode()
        )  # the format that `sha256sum -c` reads
    return path


def fetch(
    url: str,
    path: Path,
    expected: str | None = None,
    *,
    attempts: int = 4,
    timeout: float = 30.0,
    pause: float = 1.0,
) -> str:
    """Download ``url`` to ``path`` and return its SHA-256 as 64 hexadecimal digits.

    A cut connection is resumed (HTTP ``Range``, guarded by ``If-Range`` so that two versions of a
    file are never mixed), up to ``attempts`` times here and again in the next call. A server that
    ignores the range sends everything anew.

    Args:
        expected: the sum the file must have, if one is known.
        timeout: seconds without a byte after which a connection counts as cut.
        pause: seconds to wait before the second attempt, doubled for each further one.

    Raises:
        ValueError: the address is not http or https.
        DownloadError: see ``download``. A wrong file is deleted; a cut one is kept for resuming.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url!r}: only http:// and https:// are downloaded")
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = ""
    for attempt in range(attempts):
        time.sleep(pause * 2 ** (attempt - 1) if attempt else 0)
        cut = _receive(url, part, tag, timeout)
        if not cut:
            break
    else:
        raise DownloadError(
            f"{url}: cut {attempts} times, the last time {cut}. {part.name} is kept: "
            "call again to resume."
        )
    actual = sha256(part)
    tag.unlink(missing_ok=True)
    if expected not in (None, actual):
        part.unlink()
        raise DownloadError(
            f"{url}: wrong checksum, the file was removed: sha256 is {actual}, expected {expected}"
        )
    os.replace(part, path)
    return actual


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _receive(url: str, part: Path, tag: Path, timeout: float) -> str:
    """One connection: append what comes to ``part``. Empty if whole, else how it was cut."""
    # Without a tag (the server's name for this version) the rest may belong to another file.
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "minillm"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": tag.read_text()}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            start, total = _extent(response, done)
            _keep_tag(response, tag)
            return _copy(response, part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what we hold is not a beginning of the file: start over
            part.unlink()
            return "because the partial file did not fit"
        if error.code >= 500:
            return f"by the server ({error.code} {error.reason})"
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise DownloadError(
            f"{url} needs a network that reaches it ({error.reason}); {OFFLINE}"
        ) from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:  # reset, timed out, garbled
        return f"by {type(error).__name__} ({error})"


def _extent(response: http.client.HTTPResponse, done: int) -> tuple[int, int]:
    """The first byte this response carries and the length of the whole file."""
    length = response.headers.get("Content-Length")
    if length is None:
        raise DownloadError(
            f"{response.url}: the server gave no Content-Length, so a cut file could not be told "
            "from a whole one"
        )
    if response.status != 206:
        return 0, int(length)
    extent = response.headers.get("Content-Range", "")
    if not extent.startswith(f"bytes {done}-"):
        raise DownloadError(f"{response.url}: asked for bytes {done}-, was sent {extent!r}")
    return done, done + int(length)


def _keep_tag(response: http.client.HTTPResponse, tag: Path) -> None:
    name = response.headers.get("ETag", "")
    if not name or name.startswith("W/"):  # a weak tag may not guard a range
        name = response.headers.get("Last-Modified", "")
    if name:
        write_atomically(tag, name.encode())
    else:
        tag.unlink(missing_ok=True)


def _copy(response: http.client.HTTPResponse, part: Path, start: int, total: int) -> str:
    """Write the response's bytes from ``start`` on; how it was cut, or empty if it was not."""
    done = start
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, leave=False)
    with bar, open(part, "ab" if start else "wb", buffering=0) as file:
        while chunk := response.read1(1 << 20):
            rest = memoryview(chunk)
            try:
                while rest:  # a disk that is nearly full takes a part before it refuses
                    rest = rest[file.write(rest) :]
            except OSError as error:
                part.unlink()  # gives the space back
                raise DownloadError(
                    f"cannot write {part} ({error.strerror} after {done:,} of {total:,} bytes); "
                    "the partial file was removed"
                ) from error
            done += len(chunk)
            bar.update(len(chunk))
    return "" if done == total else f"after {done:,} of {total:,} bytes"
