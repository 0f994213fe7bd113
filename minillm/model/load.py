"""Checkpoints in the Hugging Face layout, both ways: GPT-2, Llama, Qwen3, T5 and BERT.

A folder holds config.json and model.safetensors. The tables of names are in
`minillm.model.names`, the configs in `minillm.model.configs`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.model.configs import (
    ARCHITECTURES,
    Architecture,
    architecture,
    read_config,
    write_config,
)
from minillm.model.files import (
    PUBLISHED,
    Model,
    Published,
    build,
    fetch_published,
    load,
    make,
    read_weights,
    save,
    shorten,
)
from minillm.model.names import their_names
from minillm.model.position import convert_layout
from minillm.paths import write_atomically

__all__ = [
    "from_huggingface",
    "from_pretrained",
    "load",
    "load_pretrained",
    "read_config",
    "save",
    "save_pretrained",
    "to_huggingface",
    "write_config",
]


def from_pretrained(
    name: str,
    folder: Path | None = None,
    published: Mapping[str, Published] = PUBLISHED,
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """A published model, such as "gpt2", downloaded on first use.

    Raises ValueError for an unknown name, and `minillm.data.download.DownloadError` without a
    network or when the download fails.

    >>> from_pretrained("gpt5")
    Traceback (most recent call last):
        ...
    ValueError: unknown model 'gpt5': known are gpt2, gpt2-medium, gpt2-large, gpt2-xl, bert-base, \
t5-small, flan-t5-small, smollm2-135m, qwen3-0.6b
    """
    return load_pretrained(fetch_published(name, folder, published), dtype)


def load_pretrained(folder: Path | str, dtype: torch.dtype | None = torch.float32) -> Model:
    """The model in a folder with config.json and model.safetensors (one file, or shards).

    `dtype` None keeps that of the file. Raises ValueError, see `from_huggingface`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model: it has no config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _assemble(read_weights(folder), config, dtype)


def save_pretrained(model: Model, folder: Path | str) -> None:
    """Write config.json and model.safetensors, as `transformers` reads them."""
    state, config = to_huggingface(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # not through memory: the weights may be large
    part = folder / "model.safetensors.part"
    safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def from_huggingface(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """Our model with the weights `state` of a model that config.json describes, in eval mode.

    Weights stored as we need them are shared with `state`, not copied.

    Raises ValueError when the config is of an unknown architecture or contradicts itself, and when
    weights are missing, unexpected or mis-shaped, naming them as in `state`.
    """
    return _assemble(dict(state), config, dtype)


def _assemble(
    state: dict[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype | None
) -> Model:
    """As above, but empties `state` on the way, so that no weight is held twice."""
    cfg, arch = read_config(config), architecture(config)
    shapes = _shapes(cfg)
    names = their_names(arch.table, shapes, cfg.gated)
    _rename(state, arch, names)
    head, table = (_name_of(names, part) for part in ("head.weight", "tokens.weight"))
    if cfg.kind == "encoder-decoder" and cfg.logit_scale == 1 and _differ(state, head, table):
        # T5 v1.1 has an output matrix of its own, even where `transformers` 5 writes it is tied
        cfg = dataclasses.replace(cfg, tie_embeddings=False)
    if cfg.tie_embeddings:
        del names[head]
        _merge(state, head, table)
    for alias, name in arch.aliases.items():
        _merge(state, alias, name)
    _compare(state, names, shapes, config["model_type"])
    ours: dict[str, Tensor] = {}
    for theirs, (parts, transposed) in names.items():
        whole = state.pop(theirs)
        whole = whole if dtype is None else whole.to(dtype)
        axis = int(transposed and whole.ndim == 2)
        pieces = whole.split([shapes[name][0] for name in parts], axis)
        for name, piece in zip(parts, pieces, strict=True):
            piece = piece.t() if transposed else piece
            if transposed:  # a view would keep the whole alive
                piece = piece.clone(memory_format=torch.contiguous_format)
            ours[name] = piece
    return build(cfg, ours)


def to_huggingface(model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config under their names; what needs no change is shared with the model.

    Raises ValueError when none of the architectures has all that the model's config asks for,
    naming what the nearest one lacks.
    """
    model_type, config = write_config(model.cfg)
    cfg, arch = model.cfg, ARCHITECTURES[model_type]
    ours = {name: x.detach() for name, x in model.state_dict().items()}
    if cfg.tie_embeddings:
        del ours["head.weight"]
    state = {}
    for theirs, (parts, transposed) in their_names(arch.table, ours, cfg.gated).items():
        pieces = [_half(name, ours[name], cfg) for name in parts]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        state[theirs] = (whole.t() if transposed else whole).contiguous()
    return state, config


def _half(name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    """RoPE's pairs as their files have them: i and i + d/2."""
    turned = re.search(r"attn\.(q|k|q_norm|k_norm)\.", name)
    if cfg.position != "rope" or cfg.rope_layout == "half" or not turned:
        return x
    return convert_layout(x, cfg.d_head, "half")


def _rename(state: dict[str, Tensor], arch: Architecture, names: Iterable[str]) -> None:
    """Give `state` the full, present-day names, and drop what we do not need."""
    known = {*names, *arch.aliases}
    for name in list(state):
        full = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        full = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", full)
        full = arch.prefix + full if arch.prefix + full in known else full
        tensor = state.pop(name)
        if not re.fullmatch(f"({re.escape(arch.prefix)})?({arch.ignored})", name):
            state[full] = tensor


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in make(cfg).state_dict().items()}


def _name_of(names: Mapping[str, tuple[list[str], bool]], ours: str) -> str:
    return next(theirs for theirs, (parts, _) in names.items() if ours in parts)


def _merge(state: dict[str, Tensor], name: str, other: str) -> None:
    """Two names of one parameter become `other`."""
    if _differ(state, name, other):
        raise ValueError(f"{name} and {other} should be one parameter, but their values differ")
    if name in state:
        state[other] = state.pop(name)


def _differ(state: Mapping[str, Tensor], name: str, other: str) -> bool:
    return name in state and other in state and not torch.equal(state[name], state[other])


def _compare(
    state: Mapping[str, Tensor],
    names: Mapping[str, tuple[list[str], bool]],
    shapes: Mapping[str, tuple[int, ...]],
    model_type: str,
) -> None:
    """Raise ValueError unless `state` has exactly these names, in the right shapes."""
    wrong = []
    for theirs, (parts, transposed) in names.items():
        shape = (sum(shapes[name][0] for name in parts), *shapes[parts[0]][1:])
        shape = shape[::-1] if transposed else shape
        if theirs in state and tuple(state[theirs].shape) != shape:
            wrong.append(f"{theirs} is {tuple(state[theirs].shape)}, not {shape}")
    faults = {
        "missing": [name for name in names if name not in state],
        "unexpected": [name for name in state if name not in names],
        "mis-shaped": wrong,
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {shorten(found)}" for kind, found in faults.items() if found)
        raise ValueError(f"these are not the weights of this {model_type} config: {found}")
