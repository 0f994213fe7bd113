"""Weights to files and back: safetensors in float16, with the config and checksums beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from minillm.config import ModelConfig
from minillm.model.lm import LM
from minillm.paths import write_atomically


def save(model: LM, folder: Path, name: str, tokenizer: Path) -> None:
    """Write `name`.safetensors and `name`.json, which has the config and both SHA-256.

    `tokenizer` is the file of the tokenizer that the model was trained with.
    """
    state = {
        key: x.detach().to("cpu", torch.float16).contiguous()
        for key, x in model.state_dict().items()
        if not (model.cfg.tie_embeddings and key == "head.weight")  # the same tensor twice
    }
    weights = safetensors.torch.save(state)
    card = {
        "config": dataclasses.asdict(model.cfg),
        "parameters": sum(x.numel() for x in state.values()),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.safetensors", weights)
    write_atomically(folder / f"{name}.json", (json.dumps(card, indent=2) + "\n").encode())


def load(folder: Path, name: str, tokenizer: Path) -> LM:
    """The model that `save` wrote, in float32 and evaluation mode.

    Raises ValueError when the weights or the tokenizer's file were changed since.
    """
    card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    weights = (folder / f"{name}.safetensors").read_bytes()
    _check(f"{name}.safetensors", weights, card["sha256"])
    _check(tokenizer.name, tokenizer.read_bytes(), card["tokenizer_sha256"])
    cfg = ModelConfig(**card["config"])
    state = {key: x.float() for key, x in safetensors.torch.load(weights).items()}
    if cfg.tie_embeddings:
        state["head.weight"] = state["tokens.weight"]
    model = LM(cfg, seed=0)
    model.load_state_dict(state)
    return model.eval()


def _check(file: str, data: bytes, expected: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise ValueError(
            f"{file} has SHA-256 {found}, written down was {expected}: it was changed since the "
            "model was saved; restore it or run the model's recipe again"
        )
