"""Checkpoints in shards: every rank writes its parts, ranks in another layout read what they need.

A tensor is known by its name and shape in the whole model. A rank says which rectangles of it are
its own (`Piece`), and PyTorch's `torch.distributed.checkpoint` (DCP) finds out who writes what,
and which saved rectangles a reader's rectangle overlaps. The layouts need not know each other.

DCP's own files begin with `.metadata`, which is a pickle and read as one: whoever can change that
file can run code here. So these checkpoints go through DCP's storage interfaces into a folder of

    rank_0.safetensors ...   the rectangles that each rank wrote
    manifest.json            names, shapes, which rectangle is in which file, sizes and SHA-256

and nothing that is loaded can execute. A folder is written under another name, and renamed when
all ranks are done: it is there whole, or not at all. All ranks see one file system.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minillm.parallel.storage import (
    LoadPieces,
    Piece,
    Reader,
    SavePieces,
    Writer,
    rank,
    read_manifest,
    sha256,
)

__all__ = [
    *("CheckpointError", "Piece", "checkpoints", "flat_pieces", "keep_newest", "load", "newest"),
    *("rectangles", "save", "verify"),
]

_NAME = re.compile(r"step_\d{8,}")


class CheckpointError(RuntimeError):
    """A rank could not write or read; the message names it and the cause, on every rank."""


def rectangles(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of rectangles that make up numbers `start` to `stop` - 1 of a tensor.

    Numbers are counted row by row, and the rectangles come in this order: 2a - 1 at most for a
    axes. An optimizer that keeps flat parts of parameters needs it.

    >>> list(rectangles((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    edges = [(start, stop)] if first > last else [(start, first * row), (last * row, stop)]
    inside = []
    for a, b in edges:
        i = a // row
        parts = rectangles(shape[1:], a - i * row, b - i * row)
        inside.append([((i, *offsets), (1, *sizes)) for offsets, sizes in parts])
    yield from inside[0]
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from inside[1] if len(inside) > 1 else ()


def flat_pieces(whole: Piece, flat: Tensor, start: int) -> Iterator[Piece]:
    """Pieces for numbers `start`, `start` + 1, ... of the rectangle that `whole` describes.

    `flat` holds these numbers, one after the other; `whole.tensor` only gives the shape.
    """
    for offsets, sizes in rectangles(whole.tensor.shape, start, start + len(flat)):
        n = math.prod(sizes)
        part, flat = flat[:n].view(sizes), flat[n:]
        at = tuple(a + b for a, b in zip(whole.offsets, offsets, strict=True))
        yield Piece(whole.name, whole.shape, at, part)


# -- saving and loading --------------------------------------------------------------------------


def save(path: Path | str, pieces: Iterable[Piece], extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint into the folder `path`; every rank calls it, with its own pieces.

    Pieces that several ranks hold are written by one of them. `extra` is kept beside them: plain
    values, those of rank 0. What a save that was killed has left behind is removed; if this one
    fails, nothing stays of it, and a checkpoint that was at `path` is still there.

    Raises CheckpointError where a rank fails (a full disk) or pieces do not make up whole tensors.
    """
    path = Path(path)
    state = {"pieces": [piece for piece in pieces if piece.tensor.numel()]}
    writer = Writer(path, dict(extra or {}))
    try:
        with _quiet() as setting:
            dcp.save(state, storage_writer=writer, planner=SavePieces(), **setting)
    except CheckpointException as error:
        if rank() == 0:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        raise CheckpointError(f"{path} was not written, {_causes(error)}") from None


def load(path: Path | str, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Fill the pieces of this rank from a checkpoint of any layout; returns its `extra`.

    Every rank calls it. The tensors take the numbers in their own dtype.

    Raises ValueError when the checkpoint is torn or foreign (see `verify`); CheckpointError when
    it lacks a tensor or has it in another shape. Nothing was changed then.
    """
    path, manifest = Path(path), verify(path)
    state = {"pieces": [piece for piece in pieces if piece.tensor.numel()]}
    reader = Reader(path, manifest)
    try:
        with _quiet() as setting:
            dcp.load(state, storage_reader=reader, planner=LoadPieces(), **setting)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be loaded, {_causes(error)}") from None
    return manifest["extra"]


def verify(path: Path | str) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole: every file there, with its size and SHA-256.

    Every rank calls it, and reads a share of the files; all come to the same result. Raises
    ValueError that says what is wrong.
    """
    path, manifest, wrong = Path(path), {}, ""
    size = dist.get_world_size() if dist.is_initialized() else 1
    try:
        manifest = read_manifest(path)
        files = sorted(manifest["files"].items())
        for name, (length, digest) in files[rank() :: size]:
            if (found := (path / name).stat().st_size) != length:
                raise ValueError(f"{name} has {found} bytes of {length}: it is torn")
            if sha256(path / name) != digest:
                raise ValueError(f"{name} was changed since it was written: its SHA-256 differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = f"{path} is refused: {error}"
    said = [wrong]
    if dist.is_initialized():
        said *= size
        dist.all_gather_object(said, wrong)
    if found := sorted({text for text in said if text}):
        raise ValueError("; ".join(found))
    return manifest


def newest(folder: Path | str) -> Path | None:
    """The newest whole checkpoint `step_00000120` in a folder; every rank calls it.

    Torn and foreign ones are refused with a warning, and the previous one is taken. Raises
    ValueError when there are some but none is whole.
    """
    refused, found = [], [checkpoints(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # what rank 0 sees, others may see later
    for path in reversed(found[0]):
        try:
            verify(path)
        except ValueError as reason:
            refused.append(str(reason))
            continue
        for text in refused:
            warnings.warn(f"{text}; going back to {path.name}", stacklevel=2)
        return path
    if refused:
        raise ValueError("no checkpoint is whole: " + "; ".join(refused))
    return None


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoints in a folder by their names, oldest first, whole or not."""
    found = Path(folder).glob("step_*")
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def keep_newest(folder: Path | str, keep: int, last: Path) -> None:
    """Remove, on rank 0, all checkpoints newer than `last`, and all but the `keep` newest others.

    A folder loses its name before its files: no moment shows half a checkpoint.
    """
    if rank() != 0:
        return
    known = checkpoints(folder)
    kept = [path for path in known if int(path.name[5:]) <= int(last.name[5:])][-keep:]
    for path in known:
        if path not in kept:
            hidden = path.with_name(f".{path.name}.old")
            path.rename(hidden)
            shutil.rmtree(hidden)


def _causes(error: CheckpointException) -> str:
    """Which ranks failed, and why."""
    said: dict[str, list[int]] = {}
    for r, (cause, _) in sorted(error.failures.items()):
        said.setdefault(f"{type(cause).__name__}: {cause}", []).append(r)
    return "; ".join(f"rank {', '.join(map(str, rs))}: {text}" for text, rs in said.items())


@contextmanager
def _quiet() -> Iterator[dict[str, bool]]:
    """DCP's setting for one process, and no warning that there is but one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield {"no_dist": not dist.is_initialized()}
