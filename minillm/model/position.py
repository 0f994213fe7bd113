"""Positions: attention alone sees a set; here it learns what stands where."""

# b batch, h heads, t tokens or queries, s keys, d width (of a head where it is rotated)

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.ops import op


def sinusoidal(positions: Tensor, d: int, base: float = 10_000.0) -> Tensor:
    """sin and cos of position · base^(-2i/d), alternating: positions [...] -> [..., d].

    Raises ValueError for an odd d. Source: Vaswani et al., Attention Is All You Need, 2017.

    >>> sinusoidal(torch.tensor([0]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    angles = _angles(positions, d, base)
    return rearrange(torch.stack([angles.sin(), angles.cos()], -1), "... d two -> ... (d two)")


def _angles(positions: Tensor, d: int, base: float) -> Tensor:
    """position · base^(-2i/d) for i = 0 .. d/2 - 1, in float32 at least: [...] -> [..., d/2]."""
    if d < 2 or d % 2:
        raise ValueError(f"numbers turn in pairs: d={d} must be even and at least 2")
    wide = torch.promote_types(positions.dtype, torch.float32)
    # written as published models write it: at position 10,000 another rounding would be visible
    step = 1.0 / base ** (torch.arange(0, d, 2, device=positions.device).to(wide) / d)
    return positions[..., None].to(wide) * step


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
    times. Raises ValueError for an odd d, an unknown scaling, or a factor that would do nothing.

    Source: Su et al., RoFormer, 2021; Chen et al., Extending Context Window of Large Language
    Models via Positional Interpolation, 2023; Peng et al., YaRN, 2023 (on "NTK-aware").
    """
    if scaling not in ("none", "linear", "ntk") or (scaling == "none" and factor != 1):
        raise ValueError(
            f"scaling={scaling!r} must be 'none' (and factor={factor} then 1), 'linear' or 'ntk'"
        )
    if scaling == "ntk":
        if d <= 2:
            raise ValueError(f"scaling='ntk' leaves the fastest pair alone; d={d} has no other")
        theta = theta * factor ** (d / (d - 2))
    angles = _angles(positions, d, theta)
    angles = angles / factor if scaling == "linear" else angles
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half", impl: str = "auto") -> Tensor:
    """Turn each pair of numbers in x [b, h, t, d] by its angle, given by cos and sin [.., t, d/2].

    `layout` says which numbers make a pair: "half" i and i + d/2 (the Llama and Qwen weights as
    published on model hubs), "interleaved" 2i and 2i + 1 (the paper, and Llama's original files).
    Raises ValueError for another layout, or a width that does not fit the angles.
    """
    _check_layout(layout)
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"{cos.shape[-1]} angles turn {2 * cos.shape[-1]} numbers, not {x.shape[-1]}"
        )
    return op("rope", impl)(x, cos, sin, layout)


def convert_layout(weight: Tensor, d_head: int, to: str) -> Tensor:
    """Permute the rows of a query or key projection [h · d_head, ...] to the other layout.

    With the new weight and `layout=to`, the rotated queries and keys are permuted within each
    head in the same way, so their scores stay what they were. Biases and the weights of norms
    over one head convert alike. Raises ValueError where rows do not fill heads.

    >>> rows = torch.tensor([0, 1, 2, 3])
    >>> convert_layout(rows, 4, to="interleaved").tolist()
    [0, 2, 1, 3]
    """
    _check_layout(to)
    if d_head < 2 or d_head % 2 or weight.shape[0] % d_head:
        raise ValueError(f"{weight.shape[0]} rows are not heads of d_head={d_head}, an even number")
    halves, pairs = "(h two d) ...", "(h d two) ..."
    old, new = (halves, pairs) if to == "interleaved" else (pairs, halves)
    return rearrange(weight, f"{old} -> {new}", two=2, d=d_head // 2)


def _check_layout(layout: str) -> None:
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout={layout!r} must be 'half' or 'interleaved'")


def alibi_slopes(n_heads: int) -> Tensor:
    """2^(-8i/h) for head i = 1 .. h, a power of two; else as in the authors' code, [h].

    Between powers of two: the slopes of the power below, then every other one of the power above.
    Source: Press, Smith and Lewis, Train Short, Test Long, 2022.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if n_heads < 1:
        raise ValueError(f"n_heads={n_heads} must be at least 1")
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * (n_heads - power), 2)]
    return torch.tensor(slopes)


def t5_bucket(
    distance: Tensor, bidirectional: bool = False, buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Bucket of `distance` = position of the key minus position of the query, same shape.

    Half of the buckets are exact, the other half grow logarithmically up to `max_distance`;
    everything beyond shares the last. With `bidirectional`, half of all are for keys ahead;
    without, keys ahead share bucket 0. Raises ValueError when there are too few buckets, or
    `max_distance` lies within the exact ones. Source: Raffel et al., Exploring the Limits of
    Transfer Learning with a Unified Text-to-Text Transformer, 2020.

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
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{buckets} buckets in one direction are {exact} exact ones: there must be at least "
            f"one, and max_distance={max_distance} must lie beyond them"
        )
    share = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (share * (buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def hierarchical(table: Tensor, positions: Tensor, alpha: float = 0.4) -> Tensor:
    """n² position vectors from n learned rows p: positions [...] -> [..., d].

    Position i·n + j gets α u_i + (1 - α) u_j with u = (p - α p_0) / (1 - α), so that the first n
    positions are the learned rows themselves. Raises ValueError for an α outside (0, 1) or of
    1/2, which would give (i, j) and (j, i) one row; IndexError beyond n². Source: Su, Hierarchical
    decomposition of position embeddings, 2020 (blog, in Chinese).
    """
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"alpha={alpha} must lie in (0, 1) and not be 0.5")
    u = (table - alpha * table[0]) / (1 - alpha)
    n = len(table)
    return alpha * F.embedding(positions // n, u) + (1 - alpha) * F.embedding(positions % n, u)


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
        """x [b, t, d] with the positions' vectors added; positions [t] or [b, t].

        Raises ValueError for positions that a table does not reach (looked at on the CPU only).
        """
        if self.cfg.position == "learned":
            try:
                return x + F.embedding(positions, self.table)
            except IndexError:
                raise ValueError(self._outside(positions)) from None
        if self.cfg.position == "hierarchical":
            if positions.is_cpu and not 0 <= positions.min() <= positions.max() < self.cfg.max_len:
                raise ValueError(self._outside(positions))
            return x + hierarchical(self.table, positions, self.cfg.hierarchical_alpha)
        if self.cfg.position == "sinusoidal":
            # tokens scaled as in the paper: else these numbers of size one drown them at the start
            return x * x.shape[-1] ** 0.5 + sinusoidal(positions, x.shape[-1]).to(x.dtype)
        return x

    def _outside(self, positions: Tensor) -> str:
        low, high = positions.min(), positions.max()
        return f"positions run from {low} to {high}, the model knows 0 to {self.cfg.max_len - 1}"

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
            # in 16 bits, products of more than three digits would run together
            slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
            return -slopes[:, None, None] * distance.abs()[:, None]
        cfg = self.cfg
        bucket = t5_bucket(distance, self.bidirectional, cfg.t5_buckets, cfg.t5_max_distance)
        return rearrange(F.embedding(bucket, self.buckets), "b t s h -> b h t s")
