"""Normalization: keep the size of the numbers in the stream, whatever the depth."""

# d model width; N encoder blocks, M decoder blocks

from __future__ import annotations

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.ops import op


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last axis, [..., d] -> [..., d].

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    def __init__(
        self, width: int, eps: float = 1e-5, bias: bool = True, impl: str = "auto"
    ) -> None:
        super().__init__(width, eps=eps, bias=bias)
        self.normalize = op("layer_norm", impl)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.normalize(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis: no mean, no bias.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def __init__(self, width: int, eps: float = 1e-5, impl: str = "auto") -> None:
        super().__init__()
        self.eps, self.normalize = eps, op("rms_norm", impl)
        self.weight = nn.Parameter(Tensor(width).fill_(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return self.normalize(x, self.weight, self.eps)


def make_norm(cfg: ModelConfig, width: int | None = None) -> LayerNorm | RMSNorm:
    """The norm that `cfg` names, over `width` numbers (`None`: d_model)."""
    width = cfg.d_model if width is None else width
    if cfg.norm == "rms":
        return RMSNorm(width, cfg.norm_eps, cfg.impl)
    return LayerNorm(width, cfg.norm_eps, cfg.bias, cfg.impl)


def deepnorm_constants(cfg: ModelConfig, stack: str | None = None) -> tuple[float, float]:
    """DeepNorm's α (weight of the stream) and β (gain of the initialization) for one stack.

    One stack of L blocks: α = (2L)^(1/4), β = (8L)^(-1/4). Of an encoder-decoder, `stack` says
    which: encoder α = 0.81 (N⁴M)^(1/16), β = 0.87 (N⁴M)^(-1/16); decoder α = (3M)^(1/4),
    β = (12M)^(-1/4).

    Source: Wang et al., DeepNet: Scaling Transformers to 1,000 Layers, 2022, figure 2.

    >>> cfg = ModelConfig(8, 8, 8, 1, placement="deepnorm", init="xavier")
    >>> alpha, beta = deepnorm_constants(cfg)
    >>> alpha, round(beta, 4)
    (2.0, 0.3536)
    """
    n, m = cfg.encoder_layers, cfg.n_layers
    if cfg.kind != "encoder-decoder":
        return (2 * m) ** 0.25, (8 * m) ** -0.25
    if stack == "encoder":
        return 0.81 * (n**4 * m) ** 0.0625, 0.87 * (n**4 * m) ** -0.0625
    if stack == "decoder":
        return (3 * m) ** 0.25, (12 * m) ** -0.25
    raise ValueError(f"stack={stack!r} of an encoder-decoder must be 'encoder' or 'decoder'")
