"""The state of anything, as files that cannot run code: tensors as safetensors, the rest as JSON.

State is nested dictionaries, lists and tuples of tensors and plain values, as `state_dict()`
returns it. JSON forgets tuples and keys that are numbers, and pickle would run what it reads, so
the tree is written with the kind of every node, and tensors by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minillm.paths import write_atomically

FORMAT = "minillm state 1"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` (JSON) and its tensors beside it (`.safetensors`), each atomically.

    The JSON comes last and holds the SHA-256 of both: until it is there, there is nothing.
    Tensors that are one (tied weights) are written once.

    Raises ValueError, naming the place, for values that are neither plain nor tensors.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "state", tensors, {})
    blob = safetensors.torch.save(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".safetensors"), blob)
    body = json.dumps({"tensors": hashlib.sha256(blob).hexdigest(), "tree": tree})
    seal = {"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    write_atomically(path, f"{json.dumps(seal)}\n{body}\n".encode())


def read_state(path: Path) -> Any:
    """What `write_state` wrote to `path`, bit for bit, tensors on the CPU.

    Raises ValueError for a file that is torn or foreign, saying which and why.
    """
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        seal = json.loads(head)
    except ValueError:
        seal = None
    if not isinstance(seal, dict) or seal.get("format") != FORMAT:
        raise ValueError(f"{path} is refused: it does not begin as a {FORMAT!r} does")
    if hashlib.sha256(body.removesuffix(b"\n")).hexdigest() != seal.get("sha256"):
        raise ValueError(f"{path} is refused: torn or changed, its SHA-256 is not the one inside")
    content, beside = json.loads(body), path.with_suffix(".safetensors")
    blob = beside.read_bytes() if beside.exists() else b""
    if hashlib.sha256(blob).hexdigest() != content["tensors"]:
        found = f"{len(blob)} bytes" if beside.exists() else "missing"
        raise ValueError(f"{beside} ({found}) is refused: torn or changed since it was written")
    return _unpack(content["tree"], safetensors.torch.load(blob))


def _pack(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> Any:
    """`value` as JSON, its tensors collected in `tensors`; `seen` finds those that are one."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        same = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and same in seen:
            return {"tensor": seen[same]}
        name = where if where not in tensors else f"{where}#{len(tensors)}"
        # a copy of its own: safetensors refuses tensors that share memory with others
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        seen[same] = name
        return {"tensor": name}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if type(key) not in (str, int)]:
            raise ValueError(f"{where} has keys {wrong}: keys are text or whole numbers")
        return {"dict": [[k, _pack(v, f"{where}.{k}", tensors, seen)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, f"{where}.{i}", tensors, seen) for i, v in enumerate(value)]}
    raise ValueError(
        f"{where} is a {type(value).__name__}: state is tensors, numbers and text, in "
        "dictionaries, lists and tuples"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside].clone()  # aligned memory of its own, not a slice of the file
    if kind == "dict":
        return {key: _unpack(part, tensors) for key, part in inside}
    parts = (_unpack(part, tensors) for part in inside)
    return list(parts) if kind == "list" else tuple(parts)
