"""AdamW, in place, for a whole list of parameters in one launch.

A step moves every byte of parameters, gradients and state once and computes next to nothing.
Written as tensor operations it moves them several times; launched once for each tensor it waits for
the launches, since a model has hundreds of tensors, most of them small.
"""

# p parameter, g gradient, m and v running means of g and g²; k tensors, n numbers of one of them

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.cost import Cost
from kernels.runtime import MODE, check, jit, tl, widened
from kernels.spec import Spec

BLOCK = 2048
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    params: Tensor,
    grads: Tensor,
    exp_avgs: Tensor,
    exp_avg_sqs: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One parameter after step number `step`, with its new running means; the old ones stay.

        g ← scale · g      m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²
        p ← (1 - lr · wd) p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    Four tensors of one shape; several parameters of one shape may be stacked, since each number
    has its own step. In float32 at least, then rounded to each tensor's dtype. Arithmetic of
    `torch.optim.AdamW`. Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    given = params, exp_avgs, exp_avg_sqs
    p, m, v, g = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (*given, grads))
    g = g * scale
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    root = (1 - betas[1] ** step) ** 0.5
    p = (1 - lr * weight_decay) * p - lr / (1 - betas[0] ** step) * m / (v.sqrt() / root + eps)
    p, m, v = (new.to(old.dtype) for new, old in zip((p, m, v), given, strict=True))
    return p, m, v


# How one launch gets at hundreds of tensors: a kernel has only so many arguments, and each number
# of arguments would be compiled anew. So it takes a table of addresses, one row for each tensor,
# and turns them into pointers. It knows their types from its constants: tensors are sorted into
# launches by dtypes, mostly a single one. `owner` tells each program whose numbers it has.
@jit
def _adamw(
    table_ptr,
    owner_ptr,
    scale_ptr,
    b1,
    a1,
    b2,
    a2,
    decay,
    size,
    small,
    KINDS: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = table_ptr + 7 * tl.load(owner_ptr + program)
    # The compiler reads 16 bytes at once only where it knows that addresses, and the number where
    # a mask ends, are multiples of 16: of arguments it sees that by itself, of a table it is told.
    p_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(KINDS[0])), ALIGN)
    g_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(KINDS[1])), ALIGN)
    m_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(KINDS[2])), ALIGN)
    v_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(KINDS[3])), ALIGN)
    exact_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(KINDS[4])), ALIGN)
    n = tl.multiple_of(tl.load(row + 5), ALIGN)
    place = (program - tl.load(row + 6)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    g = tl.load(g_ptr + place, mask=inside).to(tl.float32) * tl.load(scale_ptr)
    m = b1 * tl.load(m_ptr + place, mask=inside).to(tl.float32) + a1 * g
    v = b2 * tl.load(v_ptr + place, mask=inside).to(tl.float32) + a2 * g * g
    p = tl.load(exact_ptr + place, mask=inside).to(tl.float32)
    p = decay * p - size * tl.div_rn(m, tl.sqrt_rn(v) + small)
    tl.store(m_ptr + place, m, mask=inside)
    tl.store(v_ptr + place, v, mask=inside)
    tl.store(p_ptr + place, p, mask=inside)
    if MASTER:
        tl.store(exact_ptr + place, p, mask=inside)


def _launch(
    rows: list[Sequence[Tensor]], scale: Tensor, numbers: Sequence[float], **constants: Any
) -> None:
    """One launch: rows of (p, g, m, v, p or its master), dtypes alike in all of them."""
    table, blocks = [], 0
    for row in rows:
        n = row[0].numel()
        table.append([*(x.data_ptr() for x in row), n, blocks])
        blocks += -(-n // BLOCK)
    addresses = torch.tensor(table).to(scale.device, non_blocking=True)
    owner = torch.repeat_interleave((addresses[:, 5] + BLOCK - 1) // BLOCK, output_size=blocks)
    kinds = tuple(getattr(tl, str(x.dtype).removeprefix("torch.")) for x in rows[0])
    _adamw[(blocks,)](addresses, owner, scale, *numbers, KINDS=kinds, **constants, BLOCK=BLOCK)


@contextlib.contextmanager
def _readable(rows: list[Sequence[Tensor]]) -> Iterator[list[Sequence[Tensor]]]:
    """The interpreter needs bf16 widened, and behind addresses `jit` does not see it."""
    if MODE != "interpreter":
        yield rows
        return
    with widened(tuple(x for row in rows for x in row), {}) as (wide, _):
        yield [wide[i : i + 5] for i in range(0, len(wide), 5)]


@torch.no_grad()
def fused_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float | Tensor = 1.0,
    masters: Sequence[Tensor] | None = None,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """`reference` for each parameter, in place; returns the parameters and their running means.

    Tensors of float32, float16 and bfloat16 in any mixture, of any shapes; the state is best kept
    in float32. With `masters`, float32 copies of the parameters, these are updated and the
    parameters become their rounded values. `scale` multiplies the gradients, which stay: a factor
    that clips, or 1 / loss scale; as a tensor of one number on the same device it is never waited
    for. `step` counts from 1. There is no autograd function: nothing differentiates a step; but
    autograd is told of the change, so that a backward pass through the old values fails.

    Raises ValueError when lists or shapes do not fit, an option is out of range, a tensor that is
    overwritten is not contiguous or shares memory with another, and as `kernels.runtime.check`.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {} if masters is None else {"masters": masters}
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not value >= 0:  # written so that NaN is refused as well
            raise ValueError(f"{name}={value} must be at least 0")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step={step} must be a whole number, 1 or more")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")
    _check_tensors(lists)
    if len(params) == 0:
        return params, exp_avgs, exp_avg_sqs
    device = params[0].device
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=device)
    if scale.numel() != 1 or scale.device != device:
        raise ValueError(f"scale {tuple(scale.shape)} must be one number on {device}")
    b1, b2 = betas
    # √v / c + ε = (√v + c ε) / c: the corrections touch two numbers, and no tensor
    c = (1 - b2**step) ** 0.5
    numbers = b1, 1 - b1, b2, 1 - b2, 1 - lr * weight_decay, c * lr / (1 - b1**step), c * eps
    exact = params if masters is None else masters
    columns = params, [g.contiguous() for g in grads], exp_avgs, exp_avg_sqs, exact
    groups: dict[Any, list[Sequence[Tensor]]] = {}
    with _readable([row for row in zip(*columns, strict=True) if row[0].numel()]) as rows:
        for row in rows:
            even = all(x.data_ptr() % 16 == 0 for x in row) and row[0].numel() % 16 == 0
            groups.setdefault((even, *(x.dtype for x in row)), []).append(row)
        for (even, *_), group in groups.items():
            constants = {"MASTER": masters is not None, "ALIGN": 16 if even else 1}
            _launch(group, scale.float(), numbers, **constants)
    for name, tensors in lists.items():
        if name != "grads":
            torch.autograd.graph.increment_version(list(tensors))
    return params, exp_avgs, exp_avg_sqs


def _check_tensors(lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{len(params)} params, but {len(tensors)} {name}")
        for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
            if x is None or x.shape != p.shape:
                found = None if x is None else tuple(x.shape)
                raise ValueError(f"{name}[{i}] is {found}, params[{i}] is {tuple(p.shape)}")
            if name == "masters" and x.dtype != torch.float32:
                raise ValueError(f"masters[{i}] must be float32, not {x.dtype}")
            if name != "grads" and not x.is_contiguous():
                raise ValueError(f"{name}[{i}] is overwritten and must be contiguous: {x.stride()}")
    if len(params):
        check(*(x for tensors in lists.values() for x in tensors), dtypes=FLOATS)
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.nbytes, f"{name}[{i}]")
        for name, tensors in lists.items()
        for i, x in enumerate(tensors)
        if name != "grads" and x.numel()
    )
    for (_, end, one), (start, _, two) in pairwise(spans):
        if start < end:
            raise ValueError(f"{one} and {two} share memory, and both are overwritten")


def cost(numbers: int, param: int = 4, grad: int = 4, state: int = 4, master: int = 0) -> Cost:
    """Of one step: gradients read; parameters, both running means and masters read and written.

    Sizes of one number in bytes; with masters the parameters are only written.

    >>> cost(1).bytes, cost(1, param=2, grad=2).bytes, cost(1, param=2, grad=2, master=4).bytes
    (28, 22, 28)
    """
    exact = param if not master else 2 * master
    return Cost(flops=15 * numbers, bytes=(grad + param + exact + 4 * state) * numbers)


def specs() -> list[Spec]:
    """float32 throughout; bf16 parameters and gradients with float32 state and masters."""
    types = {"table_ptr": "*i64", "owner_ptr": "*i64", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("b1", "a1", "b2", "a2", "decay", "size", "small"), "fp32")
    fp32, bf16, more = tl.float32, tl.bfloat16, {"ALIGN": 16, "BLOCK": BLOCK}
    alike = {"KINDS": (fp32,) * 5, "MASTER": False} | more
    mixed = {"KINDS": (bf16, bf16, fp32, fp32, fp32), "MASTER": True} | more
    return [Spec("adamw fp32", _adamw, types, alike), Spec("adamw bf16", _adamw, types, mixed)]
