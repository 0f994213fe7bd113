"""QLoRA: the frozen base in four bits a number, the update beside it in full precision.

A frozen matrix is only read. NF4 (`minillm.numerics`) keeps 4 bits a number and for each block of
64 the largest absolute value; double quantization keeps these in 8 bits too. Each use unpacks one
matrix. Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
"""

# n numbers of a matrix, block how many share one absmax

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.numerics import FORMATS, from_nf4, to_nf4
from minillm.peft.inject import Wrapper, digest, replace, walk
from minillm.peft.lora import LoRAConfig, apply_lora, check_targets

GROUP = 256
"""how many absmax share one scale under double quantization, as in the paper"""


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """A LoRA on a quantized base; targets default to all Linears of the blocks, as in the paper."""

    targets: tuple[str, ...] = (r"re:blocks\..*\.(q|k|v|out|up|gate|down)",)
    block: int = 64
    double: bool = True


class NF4Linear(nn.Module):
    """A Linear whose weight [out, in] is stored in NF4; the weight is never trained."""

    def __init__(self, linear: nn.Linear, block: int = 64, double: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.block, self.dtype = block, linear.weight.dtype
        self.digests = {"weight": (tuple(linear.weight.shape), digest(linear.weight))}
        self.bias = linear.bias
        codes, absmax = to_nf4(linear.weight, block)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)
        if double:
            self.absmax, self.scale, self.mean = compress(absmax)

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in], unpacked; not a parameter."""
        absmax = self.absmax
        if self.scale is not None:
            absmax = decompress(absmax, self.scale, self.mean)
        shape = (self.out_features, self.in_features)
        return from_nf4(self.codes, absmax, shape, self.block).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias

    def bytes(self) -> int:
        """Of the stored weight."""
        return sum(
            x.nbytes for x in (self.codes, self.absmax, self.mean, self.scale) if x is not None
        )


class _Product(torch.autograd.Function):
    """x Wᵀ that unpacks W again for the backward pass, where autograd would keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.weight.to(grad.dtype), None


def compress(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax in 8 bits: their mean is taken off, and `GROUP` of them share a scale.

    [k] float32 -> ([k] float8, [ceil(k / GROUP)], [1]).
    """
    mean = absmax.mean().view(1)
    rows = F.pad(absmax - mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)
    scale = rows.abs().amax(1) / FORMATS["fp8e4m3"].largest
    small = rows / scale.where(scale > 0, 1.0)[:, None]
    return small.flatten()[: len(absmax)].to(torch.float8_e4m3fn), scale, mean


def decompress(codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """The numbers behind `compress`, [k]; never below zero."""
    return (codes.float() * scale.repeat_interleave(GROUP)[: len(codes)] + mean).clamp(min=0)


def bytes_per_parameter(block: int = 64, double: bool = True) -> float:
    """4 bits for the code, and for each block 32 bits, or 8 and for each GROUP of blocks 32.

    >>> 8 * bytes_per_parameter(double=False), round(8 * bytes_per_parameter(), 3)
    (4.5, 4.127)
    """
    absmax = 1 + 4 / GROUP if double else 4
    return 0.5 + absmax / block


def quantize_base(model: nn.Module, block: int = 64, double: bool = True) -> list[str]:
    """Put an `NF4Linear` in the place of every Linear in the blocks; which ones these are.

    Embeddings, norms and the output matrix stay. The values change by rounding; the hash of the
    base stays that of the model it was. Raises ValueError when there is no Linear to quantize.
    """
    found = {name: part for name, part in walk(model) if name.startswith("blocks.")}
    if wrapped := [name for name, part in found.items() if isinstance(part, Wrapper)]:
        raise ValueError(f"{wrapped[0]} has something attached: quantize the base before")
    names = [name for name, part in found.items() if isinstance(part, nn.Linear)]
    if not names:
        raise ValueError("no Linear in blocks.*: nothing to quantize, or it is done already")
    for name in names:
        replace(model, name, NF4Linear(found[name], block, double))
    return names


def apply_qlora(
    model: nn.Module, config: QLoRAConfig | None = None, *, seed: int, name: str = "default"
) -> nn.Module:
    """Quantize the blocks' Linears and put a LoRA beside them (in place); the rest is frozen.

    Everything else is as with `apply_lora`: `set_adapter`, `merge` (into an unpacked copy),
    `remove_lora` (the base stays in 4 bits), files (they belong to the base before quantization).
    Raises ValueError as `apply_lora` and `quantize_base`.
    """
    config = config or QLoRAConfig()
    check_targets(model, config)  # before anything is changed
    quantize_base(model, config.block, config.double)
    return apply_lora(model, config, seed=seed, name=name)
