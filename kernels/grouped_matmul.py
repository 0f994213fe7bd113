"""Matrix multiplication of groups: rows sorted by expert, each times its expert's matrix.

One launch for all experts, however many rows each has, and nobody on the host needs to know that:
there are as many programs as the worst case takes, and each finds its rows from the sizes.
"""

# n rows, e experts, k length of the sums, m columns of the result

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.matmul import place, worth_trying
from kernels.runtime import autotune, check, config, jit, tl, triton
from kernels.spec import Spec

MOST = 1023
"""So many experts' sizes, and one more, are held by every program."""


def reference(x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """x [n, k] and weights [e, k, m] -> [n, m]: the first sizes[0] rows @ weights[0], and so on.

    Rows behind the last expert's give zeros. In float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    *groups, rest = x.to(wide).split([*sizes.tolist(), len(x) - int(sizes.sum())])
    products = [group @ weight.to(wide) for group, weight in zip(groups, weights, strict=True)]
    return torch.cat([*products, rest.new_zeros(len(rest), weights.shape[2])]).to(x.dtype)


@jit
def _spans(sizes_ptr, n, experts, EXPERTS: tl.constexpr):
    # Where each expert's rows begin and end: within the tensor, whatever the sizes are.
    each = tl.arange(0, EXPERTS)
    sizes = tl.load(sizes_ptr + each, mask=each < experts, other=0).to(tl.int64)
    sizes = tl.minimum(tl.maximum(sizes, 0), n)
    ends = tl.cumsum(sizes, 0)
    return each, tl.minimum(ends - sizes, n), tl.minimum(ends, n)


CONFIGS = [
    config(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8)
    for m, n, k, warps, stages in (
        (64, 64, 32, 4, 3),  # the default: fits every target and dtype
        (32, 64, 64, 4, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4),
        (128, 128, 64, 8, 3), (128, 256, 64, 8, 3),
    )
]  # fmt: skip
TUNED = {"configs": CONFIGS, "key": ["n", "k", "m", "experts"]}
TUNED |= {"prune_configs_by": {"early_config_prune": worth_trying}}


@autotune(**TUNED)
@jit
def _forward(
    x_ptr, w_ptr, sizes_ptr, out_ptr, n, k, m, experts, w_e, w_k, w_m, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i, j = place(tl.program_id(0), n // BLOCK_M + experts + 1, tl.cdiv(m, BLOCK_N), GROUP)
    each, begins, ends = _spans(sizes_ptr, n, experts, EXPERTS)
    # Groups are cut into tiles one after the other; this program's group is the one that the i-th
    # falls in. The rows behind the last expert's are a group as well, of no expert.
    ends = tl.where(each == experts, n, ends)
    tiles = tl.cdiv(ends - begins, BLOCK_M)
    until = tl.cumsum(tiles, 0)
    group = tl.sum((until <= i).to(tl.int32), 0)
    mine = each == group
    end = tl.sum(tl.where(mine, ends, 0), 0)
    row = tl.sum(tl.where(mine, begins + (i - until + tiles) * BLOCK_M, 0), 0)
    rows = row + tl.arange(0, BLOCK_M)
    cols, steps = j * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # Rows beyond the group's end read others, which costs no mask; they are never stored.
    x_ptrs = x_ptr + tl.minimum(rows, n - 1)[:, None] * k + steps[None, :]
    w_ptr += tl.minimum(group, experts - 1).to(tl.int64) * w_e
    w_ptrs = w_ptr + steps.to(tl.int64)[:, None] * w_k + (cols % m).to(tl.int64)[None, :] * w_m
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, tl.where((group < experts) & (row < end), k, 0), BLOCK_K):
        inside = steps < k - start
        x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += tl.cast(w_k, tl.int64) * BLOCK_K
    inside = (rows < end)[:, None] & (cols < m)[None, :]
    tl.store(out_ptr + rows[:, None] * m + cols[None, :], acc, mask=inside)


@autotune(**TUNED)
@jit
def _weight_gradient(
    x_ptr, dy_ptr, sizes_ptr, dw_ptr, n, k, m, experts, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # A tile of one expert's dw = xᵀ dy [k, m]; the sums run over its rows, none gives zeros.
    i, j = place(tl.program_id(0), tl.cdiv(k, BLOCK_M), tl.cdiv(m, BLOCK_N), GROUP)
    expert = tl.program_id(1)
    each, begins, ends = _spans(sizes_ptr, n, experts, EXPERTS)
    begin = tl.sum(tl.where(each == expert, begins, 0), 0)
    end = tl.sum(tl.where(each == expert, ends, 0), 0)
    ks, cols = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        x = tl.load(x_ptr + rows[None, :] * k + (ks % k)[:, None], mask=inside[None, :], other=0.0)
        dy = tl.load(
            dy_ptr + rows[:, None] * m + (cols % m)[None, :], mask=inside[:, None], other=0.0
        )
        acc = tl.dot(x, dy, acc, input_precision="ieee")
    there = (expert.to(tl.int64) * k + ks)[:, None] * m + cols[None, :]
    tl.store(dw_ptr + there, acc, mask=(ks < k)[:, None] & (cols < m)[None, :])


def _multiply(x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    (n, k), (experts, _, m) = x.shape, weights.shape
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)

    def grid(meta: dict) -> tuple[int]:  # every group can end with a tile that is not full
        return ((n // meta["BLOCK_M"] + experts + 1) * triton.cdiv(m, meta["BLOCK_N"]),)

    if out.numel():
        block = triton.next_power_of_2(experts + 1)
        _forward[grid](x, weights, sizes, out, n, k, m, experts, *weights.stride(), EXPERTS=block)
    return out


def _outer(x: Tensor, dy: Tensor, sizes: Tensor) -> Tensor:
    (n, k), m, experts = x.shape, dy.shape[1], len(sizes)
    dw = torch.empty(experts, k, m, dtype=x.dtype, device=x.device)

    def grid(meta: dict) -> tuple[int, int]:
        return triton.cdiv(k, meta["BLOCK_M"]) * triton.cdiv(m, meta["BLOCK_N"]), experts

    if dw.numel():
        block = triton.next_power_of_2(experts + 1)
        _weight_gradient[grid](x, dy, sizes, dw, n, k, m, experts, EXPERTS=block)
    return dw


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weights, sizes)
        return _multiply(x, weights, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weights, sizes), dy = ctx.saved_tensors, dy.contiguous()
        for_x, for_weights, _ = ctx.needs_input_grad
        dx = _multiply(dy, weights.transpose(1, 2), sizes) if for_x else None
        return dx, _outer(x, dy, sizes) if for_weights else None, None


def grouped_matmul(x: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """`reference` for any number of rows per expert, also none, in one launch forward.

    x [n, k] sorted by expert and weights [e, k, m] of any strides, both float32, float16 or
    bfloat16; sizes [e], int32 or int64. Backward takes two launches.

    On a GPU the sizes are not read by the host, which would have to wait for them: negative ones
    count as 0 there, and rows that x does not have are left out. On a CPU both raise ValueError, as
    do shapes and dtypes that do not fit; else as `kernels.runtime.check`.
    """
    check(x, weights, dtypes=(torch.float32, torch.float16, torch.bfloat16))
    check(x, sizes)
    if (
        x.ndim != 2
        or weights.ndim != 3
        or x.shape[1] != weights.shape[1]
        or x.dtype != weights.dtype
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and weights {tuple(weights.shape)} {weights.dtype} must "
            "be [n, k] and [e, k, m], with one k and one dtype"
        )
    if sizes.shape != weights.shape[:1] or not 1 <= len(sizes) <= MOST:
        raise ValueError(
            f"sizes {tuple(sizes.shape)} must have one number for each of the {len(weights)} "
            f"experts, of which there can be 1 to {MOST}"
        )
    if sizes.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sizes are {sizes.dtype}, they must be int32 or int64")
    if not sizes.is_cuda and (sizes.min() < 0 or sizes.sum() > len(x)):
        raise ValueError(f"sizes {sizes.tolist()} must not be negative, and x has {len(x)} rows")
    return _GroupedMatmul.apply(x, weights, sizes.contiguous())


def cost(n: int, k: int, m: int, experts: int, itemsize: int = 4) -> Cost:
    """2nkm FLOPs, whatever the sizes; x and the matrices of all experts read, the result written.

    >>> cost(n=8, k=4, m=3, experts=2)
    Cost(flops=192, bytes=320)
    """
    return Cost(2 * n * k * m, (n * k + experts * k * m + n * m) * itemsize)


def specs() -> list[Spec]:
    """Sixteen experts in bf16."""
    tiles = {**CONFIGS[0].kwargs, "EXPERTS": 32}
    sizes = dict.fromkeys(("n", "k", "m", "experts"), "i32")
    forward = {"x_ptr": "*bf16", "w_ptr": "*bf16", "sizes_ptr": "*i64", "out_ptr": "*bf16", **sizes}
    forward |= {"w_e": "i32", "w_k": "i32"}
    backward = {
        "x_ptr": "*bf16",
        "dy_ptr": "*bf16",
        "sizes_ptr": "*i64",
        "dw_ptr": "*bf16",
        **sizes,
    }
    return [
        Spec("grouped_matmul forward bf16", _forward, forward, {"w_m": 1, **tiles}),
        Spec("grouped_matmul weights bf16", _weight_gradient, backward, tiles),
    ]
