"""LLaMA-Adapter: the upper layers also look at learned vectors, through a gate that starts shut."""

# b batch, g key/value heads, n vectors, d head width, w model width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm.model.attention import Attention
from minillm.model.lm import LM
from minillm.peft import files, virtual
from minillm.peft.inject import Addition, freeze


@dataclass(frozen=True)
class LlamaAdapterConfig:
    """`length` vectors [w] and one gate in each of the upper `layers` (None: in all).

    Source: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init
    Attention, 2023. As in `peft`, a layer has one gate, which may grow beyond 1; the authors' code
    has one for each head, behind a tanh.
    """

    length: int = 10
    layers: int | None = None


class GatedAttend(Addition):
    """Stands for a layer's attention operation: attend(q, k, v) + gate · attend(q, k', v').

    k' and v' are what the layer's own projections make of the vectors; they have no positions. Two
    softmaxes, not one over both: with the gate at 0 the layer does exactly what it did.
    """

    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"

    def __init__(self, attn: Attention, length: int, width: int) -> None:
        super().__init__()
        self.base, self.attn = attn.attend, (attn,)
        self.prompt = nn.Parameter(torch.randn(1, length, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **others: Any
    ) -> Tensor:
        """As `minillm.model.attention.attend`."""
        y, attn = self.base(q, k, v, scale=scale, **others), self.attn[0]
        keys, values = (
            rearrange(part(self.prompt), "1 n (g d) -> 1 g n d", d=attn.d_head)
            for part in (attn.k, attn.v)
        )
        keys = keys if attn.k_norm is None else attn.k_norm(keys)
        keys, values = (x.expand(len(q), -1, -1, -1) for x in (keys, values))
        return y + self.gate * self.base(q, keys, values, scale=scale)


def apply_llama_adapter(
    model: LM, config: LlamaAdapterConfig | None = None, *, seed: int = 0
) -> LM:
    """Attach gated vectors, in place; the base is frozen, and the function is what it was.

    Raises ValueError for more layers than there are, and when such or virtual tokens are attached.
    """
    config = config or LlamaAdapterConfig()
    virtual.check(model, config.length, room=False)
    most, layers = len(model.blocks), config.layers
    if layers is not None and not 1 <= layers <= most:
        raise ValueError(f"layers={layers} must lie between 1 and the {most} that there are")
    freeze(model)
    with virtual.seeded(seed):
        for attn in virtual.attentions(model)[-(layers or most) :]:
            gated = GatedAttend(attn, config.length, model.cfg.d_model)
            virtual.put(attn, gated.to(model.head.weight))
    return model


def remove_llama_adapter(model: LM) -> LM:
    """Take it off again; the base stays frozen. ValueError if there is none."""
    for gated in _gated(model).values():
        virtual.put(gated.attn[0], gated.base)
    return model


def _gated(model: LM) -> dict[int, GatedAttend]:
    """By the number of the block."""
    operations = enumerate(attn.attend for attn in virtual.attentions(model))
    found = {i: gated for i, gated in operations if isinstance(gated, GatedAttend)}
    if not found:
        raise ValueError("no LLaMA-Adapter is attached to this model")
    return found


def _named(model: LM) -> dict[str, nn.Parameter]:
    """The parameters by the names of `peft`."""
    hub, found = files.hub_names(model), {}
    for i, gated in _gated(model).items():
        attn = files.PREFIX + hub[f"blocks.{i}.attn.q"].rpartition(".")[0]
        found[f"{attn}.adaption_prompt"], found[f"{attn}.adaption_gate"] = gated.prompt, gated.gate
    return found


def to_peft(model: LM, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `files.save_adapter` writes; there is one set of vectors, whatever `name` says."""
    named = _named(model)
    length, module = next(iter(named.values())).shape[1], next(iter(named)).split(".")[-2]
    sizes = {"adapter_len": length, "adapter_layers": len(named) // 2}
    return {**sizes, "target_modules": module}, dict(named)


def from_peft(
    model: LM, config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Attach what `peft` wrote; ValueError for settings, tensors or shapes that do not fit."""
    files.check_config(config, dict.fromkeys(("adapter_len", "adapter_layers", "target_modules")))
    apply_llama_adapter(model, LlamaAdapterConfig(config["adapter_len"], config["adapter_layers"]))
    named, shapes = _named(model), {key: x.shape for key, x in tensors.items()}
    if shapes != (wanted := {key: x.shape for key, x in named.items()}):
        remove_llama_adapter(model)
        raise ValueError(f"this model needs {wanted}, the adapter has {shapes}")
    for key, x in named.items():
        x.data.copy_(tensors[key])
