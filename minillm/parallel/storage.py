"""What sharded checkpoints ask of PyTorch's DCP: plans for pieces, files that cannot run code.

See `minillm.parallel.checkpoint`, which uses it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

FORMAT = "minillm sharded checkpoint 1"
MANIFEST = "manifest.json"
_FILE = re.compile(r"rank_\d+\.safetensors")


class Piece(NamedTuple):
    """A rectangle of a tensor, held by this rank. `load` writes into `tensor`."""

    name: str
    """of the whole tensor; the same on every rank that has a part of it"""
    shape: tuple[int, ...]
    """of the whole tensor"""
    offsets: tuple[int, ...]
    """where the rectangle begins"""
    tensor: Tensor


def rank() -> int:
    """This rank's number; 0 where there are no others."""
    return dist.get_rank() if dist.is_initialized() else 0


# -- who writes what, who needs what -------------------------------------------------------------


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.name, piece.offsets)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)


class SavePieces(dcp.DefaultSavePlanner):
    """DCP's plan, which gives a rectangle that several ranks hold to one of them, for pieces."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> dcp.SavePlan:
        self.pieces, items = {}, []
        for piece in self.state_dict["pieces"]:
            properties = TensorProperties(dtype=piece.tensor.dtype)
            data = TensorWriteData(_chunk(piece), properties, torch.Size(piece.shape))
            items.append(WriteItem(_index(piece), WriteItemType.SHARD, tensor_data=data))
            if self.pieces.setdefault(_index(piece), piece) is not piece:
                raise ValueError(f"{piece.name} has two pieces at {piece.offsets}")
        self.plan = dcp.SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index].tensor.detach()


class LoadPieces(dcp.LoadPlanner):
    """Which parts of saved rectangles fill this rank's."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.wanted, self.metadata = state_dict["pieces"], metadata

    def create_local_plan(self) -> dcp.LoadPlan:
        saved, items, wrong = self.metadata.state_dict_metadata, [], []
        for i, piece in enumerate(self.wanted):
            if piece.name not in saved:
                wrong.append(f"{piece.name} is not in it")
            elif (shape := tuple(saved[piece.name].size)) != tuple(piece.shape):
                wrong.append(f"{piece.name} is {shape} in it, {tuple(piece.shape)} here")
            else:
                found = create_read_items_for_chunk_list(str(i), saved[piece.name], [_chunk(piece)])
                if (n := sum(math.prod(x.lengths) for x in found)) != piece.tensor.numel():
                    wrong.append(f"{piece.name}: {n} of {piece.tensor.numel()} numbers are in it")
                for item in found:
                    saved_at = MetadataIndex(piece.name, item.storage_index.offset)
                    items.append(dataclasses.replace(item, storage_index=saved_at))
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError("it is of another model: " + "; ".join(wrong[:3]) + more)
        return dcp.LoadPlan(items)

    def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return central_plan

    def load_bytes(self, read_item: dcp.ReadItem, value: Any) -> None:
        raise ValueError("these checkpoints hold tensors only")

    def resolve_tensor(self, read_item: dcp.ReadItem) -> Tensor:
        x = self.wanted[int(read_item.dest_index.fqn)].tensor.detach()
        return _part(x, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: dcp.ReadItem, tensor: Tensor) -> None:
        """`resolve_tensor` gave a view: nothing is left to do."""


def _part(x: Any, offsets: Sequence[int], sizes: Sequence[int]) -> Any:
    return x[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]


# -- files ---------------------------------------------------------------------------------------


def _key(index: MetadataIndex) -> str:
    return f"{index.fqn} @ {','.join(map(str, index.offset))}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer(dcp.StorageWriter):
    """One file a rank, then the manifest, then the folder's name."""

    def __init__(self, path: Path, extra: dict[str, Any]) -> None:
        self.path, self.extra = path, extra
        self.temporary, self.old = (path.with_name(f".{path.name}.{x}") for x in ("new", "old"))

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer serves once."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing before all ranks have planned."""

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return dataclasses.replace(plan, storage_data=rank())

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        """By rank 0, before any rank writes: what an earlier run left, away; a new folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(".step_*.new"):
            shutil.rmtree(left)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        name, results = f"rank_{rank()}.safetensors", []
        tensors = {_key(i.index): planner.resolve_data(i).contiguous() for i in plan.items}
        if tensors:
            file = self.temporary / name
            save_file(tensors, file)
            _flush(file)
            seal = (name, file.stat().st_size, sha256(file))
            results = [
                WriteResult(i.index, tensors[_key(i.index)].nbytes, seal) for i in plan.items
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """By rank 0, when all have written."""
        written = {r.index: r.storage_data for several in results for r in several}
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            chunks = [
                [list(c.offsets), list(c.sizes), written[MetadataIndex(name, c.offsets)][0]]
                for c in saved.chunks
            ]
            dtype = str(saved.properties.dtype).removeprefix("torch.")
            tensors[name] = {"shape": list(saved.size), "dtype": dtype, "chunks": chunks}
        files = {name: [size, digest] for name, size, digest in written.values()}
        content = {"format": FORMAT, "files": files, "tensors": tensors, "extra": self.extra}
        body = json.dumps(content)
        seal = {"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest()}
        manifest = self.temporary / MANIFEST
        manifest.write_text(f"{json.dumps(seal)}\n{body}\n")
        for file in (manifest, self.temporary):
            _flush(file)
        shutil.rmtree(self.old, ignore_errors=True)
        if self.path.exists():  # a folder cannot be renamed over another one
            self.path.rename(self.old)
        self.temporary.rename(self.path)
        _flush(self.path.parent)
        shutil.rmtree(self.old, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def read_manifest(path: Path) -> dict[str, Any]:
    head, _, body = (path / MANIFEST).read_text().partition("\n")
    try:
        seal = json.loads(head)
    except ValueError:
        seal = None
    if not isinstance(seal, dict) or seal.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} does not begin as a {FORMAT!r} does")
    if hashlib.sha256(body.removesuffix("\n").encode()).hexdigest() != seal.get("sha256"):
        raise ValueError(f"{MANIFEST} is torn or changed: its SHA-256 is not the one inside")
    content = json.loads(body)
    named = {file for saved in content["tensors"].values() for *_, file in saved["chunks"]}
    if strange := [x for x in {*named, *content["files"]} if not _FILE.fullmatch(x)]:
        raise ValueError(f"{MANIFEST} leads to files that no rank wrote: {sorted(strange)}")
    return content


class Reader(dcp.StorageReader):
    """Reads what `Writer` wrote."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.files = {
            MetadataIndex(name, offsets): file
            for name, saved in manifest["tensors"].items()
            for offsets, _, file in saved["chunks"]
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader serves once."""

    def read_metadata(self) -> Metadata:
        found = {}
        for name, saved in self.manifest["tensors"].items():
            properties = TensorProperties(dtype=getattr(torch, saved["dtype"]))
            chunks = [
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes, _ in saved["chunks"]
            ]
            found[name] = TensorStorageMetadata(properties, torch.Size(saved["shape"]), chunks)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing: files are opened where they are read."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        for name in sorted({self.files[item.storage_index] for item in plan.items}):
            with safe_open(self.path / name, framework="pt") as file:
                for item in plan.items:
                    if self.files[item.storage_index] == name:
                        saved = file.get_slice(_key(item.storage_index))
                        part = _part(saved, item.storage_offsets, item.lengths)
                        planner.resolve_tensor(item).copy_(part)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
