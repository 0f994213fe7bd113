"""Weights in eight bits: a copy of a model that takes about a quarter of the memory.

    W[i, j] ≈ codes[i, j] · scale[i]        codes in -127 .. 127, scale[i] = max_j |W[i, j]| / 127

One scale for each row of a matrix, that is for each output; zero stays zero. Only what is stored
has fewer bits: activations keep their format, and each product unpacks one matrix. Memory is what
is gained; on a CPU the unpacking costs time. A kernel that multiplies integers as they are is in
`kernels/quantize.py`. Source: Dettmers et al., LLM.int8(), 2022 (a scale for each row, absmax).
"""

# n outputs (rows), k inputs, b batch, t tokens, d model width, v vocabulary

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model import files
from minillm.model.lm import LM
from minillm.paths import write_atomically


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [n, k] as codes int8 [n, k] and scales float32 [n]; a row of zeros has scale 1.

    Off by half a step, scale / 2, at most. Raises ValueError for what is no matrix of finite
    numbers.

    >>> quantize_rows(torch.tensor([[-2.0, 0.5, 1.0]]))
    (tensor([[-127,   32,   64]], dtype=torch.int8), tensor([0.0157]))
    """
    if weight.ndim != 2 or not weight.numel() or not weight.isfinite().all():
        raise ValueError(
            f"weight {tuple(weight.shape)} must be a matrix of finite numbers: a row with NaN or "
            "inf has no largest absolute value to scale by"
        )
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / 127
    scale = scale.where(scale > 0, 1.0)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class _Rows(nn.Module):
    """A matrix [n, k] as codes and scales; not trained."""

    def __init__(self, matrix: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        codes, scale = quantize_rows(matrix.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The matrix [n, k], unpacked."""
        return self.codes * self.scale[:, None]


class Int8Linear(_Rows):
    """y = (x codesᵀ) · scale + bias, [..., k] -> [..., n]; the bias as it was."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.out_features, self.in_features = self.codes.shape
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] -> [..., n] in x's format, which holds the codes exactly (bfloat16 too)."""
        y = F.linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def bound(self, x: Tensor) -> Tensor:
        """How far an output can be from that of the unrounded weights: scale/2 · Σ|x|, [..., n].

        Every weight is off by half a step at most, and in the worst case all errors have the sign
        of what they are multiplied by. (The rounding of sums in x's format comes on top.)
        """
        return self.scale / 2 * x.abs().sum(-1, keepdim=True)


class Int8Embedding(_Rows):
    """Rows of a table by their ids, [b, t] -> [b, t, d]; only those asked for are unpacked."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table)
        self.num_embeddings, self.embedding_dim = self.codes.shape

    def forward(self, ids: Tensor) -> Tensor:
        """[b, t] -> [b, t, d]."""
        return F.embedding(ids, self.codes) * F.embedding(ids, self.scale[:, None])


def quantize_int8(model: LM) -> LM:
    """A copy of a decoder whose matrices are stored in int8: all Linears and the table of tokens.

    Norms, biases and tables of positions keep their format. A head that is tied to the table still
    shares it. The copy has no gradients and does what the model does: `complete`, `generate`,
    `prepare` and scoring take it. (`prepare` finds nothing to fuse in it; to have one product for
    queries, keys and values, prepare first and quantize then.)

    Raises ValueError for weights that are not finite, and where no matrix is left to quantize.
    """
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    kinds = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}
    found = [(name, part) for name, part in ready.named_modules() if type(part) in kinds]
    if not found:
        raise ValueError("no Linear and no table of tokens is left: the model is quantized already")
    for name, part in found:
        ready.set_submodule(name, kinds[type(part)](part))
    if ready.cfg.tie_embeddings:
        ready.head.codes, ready.head.scale = ready.tokens.codes, ready.tokens.scale
    return ready


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model; what is shared counts once.

    A quantized decoder has one for every number of a matrix, 4 for every row of one (its scale)
    and, if it was in float32, 4 for all the rest.
    """
    tensors = (*model.parameters(), *model.buffers())
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors}.values())


def save_int8(model: LM, folder: Path, name: str, tokenizer: Path | None) -> None:
    """Write a quantized model as `name`.safetensors, with its config in the file's metadata.

    `tokenizer` is the file of the tokenizer that the model was trained with, if it reads text; its
    SHA-256 is kept. Raises ValueError for a model that is not quantized, and for one that was
    prepared before: its fused matrices are not those of its config.
    """
    tied = model.cfg.tie_embeddings
    state = {k: x for k, x in model.state_dict().items() if not (tied and k.startswith("head."))}
    if "tokens.codes" not in state or "blocks.0.attn.q.codes" not in state:
        raise ValueError("only what quantize_int8 makes of a model as it was trained can be saved")
    card = {"config": json.dumps(dataclasses.asdict(model.cfg)), "tokenizer": _digest(tokenizer)}
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({k: x.contiguous() for k, x in state.items()}, card)
    write_atomically(folder / f"{name}.safetensors", data)


def load_int8(folder: Path, name: str, tokenizer: Path | None) -> LM:
    """The model that `save_int8` wrote, to the last bit; `tokenizer` as given to it.

    Raises ValueError for a file of another kind, and for another tokenizer.
    """
    path = folder / f"{name}.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        card = file.metadata() or {}
    if "config" not in card:
        raise ValueError(f"{path.name} holds no int8 model: minillm.model.load reads other ones")
    if card["tokenizer"] != (found := _digest(tokenizer)):
        raise ValueError(
            f"{name} was trained with a tokenizer of SHA-256 {card['tokenizer'] or None}, given is "
            f"{found or None}: its tokens would mean something else"
        )
    state, cfg = safetensors.torch.load_file(path), ModelConfig(**json.loads(card["config"]))
    if cfg.tie_embeddings:
        state |= {f"head.{part}": state[f"tokens.{part}"] for part in ("codes", "scale")}
    model = quantize_int8(files.make(cfg, seed=0))
    model.load_state_dict(state)
    return model


def _digest(file: Path | None) -> str:
    return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
