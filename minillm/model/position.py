"""Positions: attention alone sees a set; here it learns what stands where."""

# b batch, h heads, t tokens or queries, s keys, d width (of a head where it is rotated)

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm.config import ModelConfig


def sinusoidal(positions: Tensor, d: int, base: float = 10_000.0) -> Tensor:
    """sin and cos of position · base^(-2i/d), alternating: positions [...] -> [..., d].

    Source: Vaswani et al., Attention Is All You Need, 2017.

    >>> sinusoidal(torch.tensor([0]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    angles = positions[..., None].float() * _frequencies(d, base, positions.device)
    return rearrange(torch.stack([angles.sin(), angles.cos()], -1), "... d two -> ... (d two)")


def _frequencies(d: int, base: float, device: torch.device) -> Tensor:
    """base^(-2i/d) for i = 0 .. d/2 - 1: how many radians a pair turns per position."""
    return base ** (-torch.arange(0, d, 2, device=device).float() / d)


def rotation(
    positions: Tensor,
    d: int,
    theta: float = 10_000.0,
    scaling: str = "none",
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle that each pair of a head turns by: positions [...] -> [..., d/2].

    `scaling` stretches the context `factor` times: "linear" divides positions, "ntk" raises theta
    to theta · factor^(d/(d-2)), which leaves the fastest pair alone and slows the slowest `factor`
    times. Source: Su et al., RoFormer, 2021; Chen et al., Extending Context Window of Large
    Language Models via Positional Interpolation, 2023.
    """
    if scaling == "ntk" and d > 2:
        theta = theta * factor ** (d / (d - 2))
    step = 1 / factor if scaling == "linear" else 1.0
    angles = positions[..., None].float() * step * _frequencies(d, theta, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """Turn each pair of numbers in x [b, h, t, d] by its angle, given by cos and sin [.., t, d/2].

    `layout` says which numbers make a pair: "half" i and i + d/2 (the Llama and Qwen weights as
    published on model hubs), "interleaved" 2i and 2i + 1 (the paper, and Llama's original files).
    """
    if layout == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        turned = rearrange(turned, "... d two -> ... (d two)")
    return turned.to(x.dtype)


def alibi_slopes(n_heads: int) -> Tensor:
    """2^(-8i/h) for head i = 1 .. h; between powers of two as in the authors' code, [h].

    Source: Press, Smith and Lewis, Train Short, Test Long, 2022.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (n_heads - power), 2)]
    return torch.tensor(slopes)


def t5_bucket(
    distance: Tensor, bidirectional: bool = False, buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Bucket of `distance` = position of the key minus position of the query, same shape.

    Half of the buckets are exact, the other half grow logarithmically up to `max_distance`;
    everything beyond shares the last. With `bidirectional`, half of all are for keys ahead;
    without, keys ahead share bucket 0. Source: Raffel et al., Exploring the Limits of Transfer
    Learning with a Unified Text-to-Text Transformer, 2020.

    >>> t5_bucket(torch.tensor([0, -1, -15, -16, -127, -1000])).tolist()
    [0, 1, 15, 16, 31, 31]
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = buckets * (distance > 0)
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def hierarchical(table: Tensor, positions: Tensor, alpha: float = 0.4) -> Tensor:
    """n² position vectors from n learned rows p: positions [...] -> [..., d].

    Position i·n + j gets α u_i + (1 - α) u_j with u = (p - α p_0) / (1 - α), so that the first n
    positions are the learned rows themselves. Source: Su, Hierarchical decomposition of position
    embeddings, 2020 (blog, in Chinese).
    """
    u = (table - alpha * table[0]) / (1 - alpha)
    n = len(table)
    return alpha * u[positions // n] + (1 - alpha) * u[positions % n]


class Position(nn.Module):
    """What `cfg.position` names, for one stack of blocks: at most one of three hooks does anything.

    `add` changes the embedding, `rotation` turns queries and keys, `bias` is added to the scores.
    """

    def __init__(self, cfg: ModelConfig, bidirectional: bool = False) -> None:
        super().__init__()
        self.cfg, self.bidirectional = cfg, bidirectional
        rows = {"learned": cfg.max_len, "hierarchical": math.isqrt(cfg.max_len - 1) + 1}
        if cfg.position in rows:
            self.table = nn.Parameter(torch.zeros(rows[cfg.position], cfg.d_model))
        elif cfg.position == "t5":
            self.buckets = nn.Parameter(torch.zeros(cfg.t5_buckets, cfg.n_heads))
        elif cfg.position == "alibi":
            self.register_buffer("slopes", alibi_slopes(cfg.n_heads), persistent=False)

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [b, t, d] with the positions' vectors added; positions [t] or [b, t]."""
        if self.cfg.position == "learned":
            return x + self.table[positions]
        if self.cfg.position == "hierarchical":
            return x + hierarchical(self.table, positions, self.cfg.hierarchical_alpha)
        if self.cfg.position == "sinusoidal":
            return x + sinusoidal(positions, x.shape[-1]).to(x.dtype)
        return x

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin for `rotate`, [t, d/2] or [b, 1, t, d/2]; `None` if nothing turns."""
        cfg = self.cfg
        if cfg.position != "rope":
            return None
        positions = positions[:, None] if positions.ndim == 2 else positions
        return rotation(positions, cfg.d_head, cfg.rope_theta, cfg.rope_scaling, cfg.rope_factor)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What is added to the scores, [1 | b, h, t, s]; positions [t] or [b, t] and [s] or [b, s].

        `None` where the config adds nothing.
        """
        if self.cfg.position not in ("t5", "alibi"):
            return None
        distance = keys[..., None, :] - queries[..., :, None]
        if distance.ndim == 2:
            distance = distance[None]
        if self.cfg.position == "alibi":
            return -self.slopes[:, None, None] * distance.abs()[:, None]
        cfg = self.cfg
        bucket = t5_bucket(distance, self.bidirectional, cfg.t5_buckets, cfg.t5_max_distance)
        return rearrange(self.buckets[bucket], "b t s h -> b h t s")
