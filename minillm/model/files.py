"""Weights to files and back: safetensors only, whole or not at all, checked by their SHA-256."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.data.download import OFFLINE, DownloadError, Source, download
from minillm.model.lm import LM
from minillm.model.position import Position, alibi_slopes
from minillm.model.seq2seq import Encoder, Seq2Seq
from minillm.paths import write_atomically

Model = LM | Encoder | Seq2Seq


@dataclasses.dataclass(frozen=True)
class Published:
    """A model on a hub: where its files lie, under which license, and how large they may be."""

    url: str
    license: str
    max_bytes: int
    weights: str = "model.safetensors"
    """or "model.safetensors.index.json", which names several files"""


_HUB = "https://huggingface.co/{}/resolve/main"
PUBLISHED: Mapping[str, Published] = {
    "gpt2": Published(_HUB.format("openai-community/gpt2"), "MIT", 10**9),
    "gpt2-medium": Published(_HUB.format("openai-community/gpt2-medium"), "MIT", 2 * 10**9),
    "gpt2-large": Published(_HUB.format("openai-community/gpt2-large"), "MIT", 4 * 10**9),
    "gpt2-xl": Published(_HUB.format("openai-community/gpt2-xl"), "MIT", 8 * 10**9),
    "bert-base": Published(_HUB.format("google-bert/bert-base-uncased"), "Apache-2.0", 10**9),
    "t5-small": Published(_HUB.format("google-t5/t5-small"), "Apache-2.0", 10**9),
    "flan-t5-small": Published(_HUB.format("google/flan-t5-small"), "Apache-2.0", 10**9),
    "smollm2-135m": Published(_HUB.format("HuggingFaceTB/SmolLM2-135M"), "Apache-2.0", 10**9),
    "qwen3-0.6b": Published(_HUB.format("Qwen/Qwen3-0.6B"), "Apache-2.0", 4 * 10**9),
}


def build(cfg: ModelConfig, state: dict[str, Tensor]) -> Model:
    """The model that `cfg` describes around the tensors of `state`, in evaluation mode.

    Nothing is drawn or copied: the tensors become the parameters. Their names must be the model's.
    """
    with torch.device("meta"):
        model = make(cfg)
    if cfg.tie_embeddings:
        state = {**state, "head.weight": state["tokens.weight"]}
    model.load_state_dict(state, assign=True)
    if cfg.tie_embeddings:
        model.head.weight = model.tokens.weight
    for part in model.modules():
        if isinstance(part, Position) and cfg.position == "alibi":  # no weights, so in no file
            part.slopes = alibi_slopes(cfg.n_heads)
    return model.eval()


def make(cfg: ModelConfig, seed: int | None = None) -> Model:
    """A new model of the kind that `cfg` names."""
    return {"decoder": LM, "encoder": Encoder, "encoder-decoder": Seq2Seq}[cfg.kind](cfg, seed)


def save(model: Model, folder: Path, name: str, tokenizer: Path | None) -> None:
    """Write `name`.safetensors in float16 and `name`.json, which has the config and both SHA-256.

    `tokenizer` is the file of the tokenizer that the model was trained with; None for a model that
    reads no text.
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
        "tokenizer_sha256": tokenizer and hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.safetensors", weights)
    write_atomically(folder / f"{name}.json", (json.dumps(card, indent=2) + "\n").encode())


def load(folder: Path, name: str, tokenizer: Path | None) -> Model:
    """The model that `save` wrote, in float32 and evaluation mode; `tokenizer` as given to it.

    Raises ValueError when the weights or the tokenizer's file were changed since.
    """
    card = read_card(folder, name)
    weights = (folder / f"{name}.safetensors").read_bytes()
    _check(f"{name}.safetensors", weights, card["sha256"])
    if (tokenizer is None) != (card["tokenizer_sha256"] is None):
        raise ValueError(f"{name} was saved with{'out' * (tokenizer is not None)} a tokenizer")
    if tokenizer is not None:
        _check(tokenizer.name, tokenizer.read_bytes(), card["tokenizer_sha256"])
    state = {key: x.float() for key, x in safetensors.torch.load(weights).items()}
    return build(ModelConfig(**card["config"]), state)


def read_card(folder: Path, name: str) -> dict[str, Any]:
    """What `save` wrote beside the weights: config, parameters, SHA-256."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def _check(file: str, data: bytes, expected: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != expected:
        raise ValueError(
            f"{file} has SHA-256 {found}, written down was {expected}: it was changed since the "
            "model was saved; restore it or run the model's recipe again"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises ValueError when files are missing, torn, or hold other names than the index says.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return _tensors(folder / "model.safetensors")
    if not index.exists():
        there = sorted(path.name for path in folder.glob("*"))
        raise ValueError(
            f"{folder} holds {there}, but neither model.safetensors nor {index.name}; files of "
            "other kinds can run code when they are read, so they are not"
        )
    where = read_index(index)
    state: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        state |= _tensors(folder / file)
    if wrong := sorted(set(where) ^ set(state)):
        raise ValueError(f"{index.name} and its files disagree about {shorten(wrong)}")
    return state


def read_index(index: Path) -> dict[str, str]:
    """Name of tensor -> name of file; ValueError unless these are plain safetensors files."""
    where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for file in where.values():
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {file!r}, not a .safetensors file beside it")
    return where


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def shorten(names: list[str], most: int = 6) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def fetch_published(
    name: str, folder: Path | None = None, published: Mapping[str, Published] = PUBLISHED
) -> Path:
    """The folder with a published model's config.json and weights, downloaded unless there already.

    What comes is resumed where it was cut, gets its name when it is whole, and is pinned: from then
    on its SHA-256 must stay the same (see `minillm.data.download`). `folder` is ~/.cache/minillm
    if not given.

    Raises ValueError for an unknown name, DownloadError without a network, when a server refuses
    or announces more bytes than the model may have.
    """
    if name not in published:
        raise ValueError(f"unknown model {name!r}: known are {', '.join(published)}")
    model = published[name]
    target = Path(folder or Path.home() / ".cache" / "minillm") / name

    def fetch(file: str, limit: int) -> Path:
        source = Source(f"{model.url}/{file}", file, model.license)
        if not (target / file).exists():
            _refuse_large(source.url, limit)
        return download(f"{name}/{file}", target, sources={f"{name}/{file}": source})

    try:
        fetch("config.json", 10**6)
        weights = fetch(model.weights, model.max_bytes)
        if weights.suffix == ".json":
            for file in sorted(set(read_index(weights).values())):
                fetch(file, model.max_bytes)
    except DownloadError as error:
        text = str(error).removesuffix(f"; {OFFLINE}")
        raise DownloadError(f"{text}; the models of minillm.zoo need no network") from error
    return target


def _refuse_large(url: str, limit: int) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "minillm"}, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=30.0) as response:
            size = int(response.headers.get("Content-Length") or 0)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}") from error
    except OSError as error:  # no route, no such name, reset, timed out
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} needs a network that reaches it ({reason})") from error
    if size > limit:
        raise DownloadError(f"{url} has {size:,} bytes, more than the {limit:,} expected at most")
