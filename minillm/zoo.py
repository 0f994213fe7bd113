"""The zoo: small trained models that come with the course, each made by a recipe beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from minillm.config import ModelConfig
from minillm.model.lm import LM
from minillm.paths import ASSETS
from minillm.tokenizers import BPE, load_course_tokenizer

MODELS = ASSETS / "models"


def names(folder: Path = MODELS) -> list[str]:
    """The models there are.

    >>> "tiny" in names()
    True
    """
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def load(name: str, folder: Path = MODELS) -> tuple[LM, BPE]:
    """A trained model, in float32 and evaluation mode, and the tokenizer it was trained with.

    Weights and tokenizer must have the SHA-256 that `save` wrote down beside them.

    Raises ValueError for an unknown name, listing the known ones, and for a changed file.

    >>> model, tokenizer = load("tiny")
    >>> model.cfg.vocab_size == tokenizer.vocab_size
    True
    """
    if name not in names(folder):
        raise ValueError(f"there is no model {name!r}; choose one of {names(folder)}")
    card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    weights = (folder / f"{name}.safetensors").read_bytes()
    _check(f"{name}.safetensors", weights, card["sha256"])
    _check("tokenizer.json", (MODELS / "tokenizer.json").read_bytes(), card["tokenizer_sha256"])
    cfg = ModelConfig(**card["config"])
    state = {key: x.float() for key, x in safetensors.torch.load(weights).items()}
    if cfg.tie_embeddings:
        state["head.weight"] = state["tokens.weight"]
    model = LM(cfg, seed=0)
    model.load_state_dict(state)
    return model.eval(), load_course_tokenizer()


def save(name: str, model: LM, folder: Path = MODELS) -> None:
    """Write `name`.safetensors, in float16, and `name`.json with the config and the checksums."""
    state = {
        key: x.detach().to("cpu", torch.float16).contiguous()
        for key, x in model.state_dict().items()
        if not (model.cfg.tie_embeddings and key == "head.weight")  # the same tensor twice
    }
    weights = safetensors.torch.save(state)
    card = {
        "config": dataclasses.asdict(model.cfg),
        "parameters": sum(x.numel() for x in state.values()),
        "sha256": _sha256(weights),
        "tokenizer_sha256": _sha256((MODELS / "tokenizer.json").read_bytes()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.safetensors", weights)
    _replace(folder / f"{name}.json", (json.dumps(card, indent=2) + "\n").encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _check(file: str, data: bytes, expected: str) -> None:
    if _sha256(data) != expected:
        raise ValueError(
            f"{file} has SHA-256 {_sha256(data)}, written down was {expected}: "
            "it was changed since the model was saved; restore it or run the model's recipe again"
        )


def _replace(path: Path, data: bytes) -> None:
    """Write under another name first, so that nobody sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)
