"""Counting the pieces of a text, the part of training that several processes can share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from minillm.paths import ROOT
from minillm.tokenizers.pretokenize import GPT2_PATTERN, cut_text, split_special, split_text

CHUNK = 1 << 18  # characters; small enough that the pieces of one chunk are a passing thing

# A helper process is a fresh interpreter that runs this module and nothing of the caller's. Unlike
# fork it is safe after torch has started threads, and unlike multiprocessing's spawn it does not
# import the caller's script, so neither notebooks nor unguarded scripts need to prepare for it.
_WORKER = (
    "import sys; sys.path.insert(0, sys.argv[1]); import minillm.tokenizers.count as c; c.main()"
)


def ordinary_chunks(
    texts: Iterable[str], special_tokens: Collection[str], pattern: str
) -> Iterator[str]:
    """What is left between special tokens, in chunks that no piece reaches across."""
    for text in texts:
        for segment, is_special in split_special(text, special_tokens):
            if not is_special:
                yield from cut_text(segment, CHUNK, pattern)


def count_chunks(chunks: Iterable[str], pattern: str) -> Counter[str]:
    """How often each piece occurs in `chunks`."""
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(split_text(chunk, pattern))
    return counts


def count_pieces(
    texts: str | Iterable[str],
    special_tokens: Collection[str] = (),
    pattern: str = GPT2_PATTERN,
    processes: int = 1,
) -> Counter[str]:
    """How often each piece occurs in `texts` (one text or many); special tokens are left out.

    One process streams over `texts`; several hold all of it in memory and share it out. The counts
    are the same.

    >>> sorted(count_pieces("to be or not to be<end>", ["<end>"]).items())
    [(' be', 2), (' not', 1), (' or', 1), (' to', 1), ('to', 1)]
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    texts = [texts] if isinstance(texts, str) else texts
    chunks = ordinary_chunks(texts, special_tokens, pattern)
    if processes == 1:
        return count_chunks(chunks, pattern)
    shares = [[] for _ in range(processes)]
    for chunk in chunks:
        min(shares, key=lambda share: sum(map(len, share))).append(chunk)
    with ThreadPoolExecutor(processes - 1) as pool:  # threads only wait for the processes
        helped = [pool.submit(_count_elsewhere, share, pattern) for share in shares[1:]]
        counts = count_chunks(shares[0], pattern)
        for future in helped:
            counts.update(future.result())
    return counts


def _count_elsewhere(chunks: list[str], pattern: str) -> dict[str, int]:
    """`count_chunks` in a process of its own; in this one where none can be started."""
    job = json.dumps({"pattern": pattern, "chunks": chunks}).encode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, str(ROOT)], input=job, capture_output=True, check=True
        )
    except OSError:
        return count_chunks(chunks, pattern)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"a counting process failed:\n{error.stderr.decode()}") from error
    return json.loads(done.stdout)


def main() -> None:
    """The helper process: a job as JSON on standard input, counts as JSON on standard output."""
    job = json.loads(sys.stdin.buffer.read())
    sys.stdout.write(json.dumps(count_chunks(job["chunks"], job["pattern"])))


if __name__ == "__main__":
    main()
