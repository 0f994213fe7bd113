"""Matrix multiplication in tiles: an order that reuses the cache, an epilogue, split k, fp8."""

# A program keeps a tile of the result in registers and walks along k, the products of a sum;
# m rows of the result, n columns, z what enters the activation

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cost import Cost
from kernels.runtime import MODE, autotune, check, config, jit, tl, triton
from kernels.spec import TARGETS, Spec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"activation": (None, "relu", "gelu_tanh", "silu")}
OPTIONS |= {"precision": ("ieee", "tf32", "tf32x3"), "out_dtype": DTYPES}


def reference(
    a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None,
    split_k: int = 1, precision: str = "ieee", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """activation(a @ b + bias): a [..., m, k], b [k, n], bias [n] -> [..., m, n].

    In float32 at least. `split_k` and `precision` say how a GPU gets there, and are ignored here.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return _finish(a.to(wide) @ b.to(wide), bias, activation).to(out_dtype or a.dtype)


def _finish(z: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    z, functions = z if bias is None else z + bias.to(z.dtype), torch.nn.functional
    if activation == "gelu_tanh":
        return functions.gelu(z, approximate="tanh")
    return z if activation is None else getattr(functions, activation)(z)


@jit
def place(program, programs_m, programs_n, group):
    """The tile (i, j) of a program; `order` lists them, and says why."""
    together = group * programs_n
    first = program // together * group
    height = min(programs_m - first, group)  # the last group may be lower
    return first + program % together % height, program % together // height


@jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # keeps NaN, unlike a maximum
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u, u = √(2/π) (z + ...)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@jit
def _boxes(ptr, m, n, m_step, n_step, M: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):
    # For Hopper's copy engine, which fetches M × N boxes of a matrix; its last axis is contiguous.
    if TURNED:
        return tl.make_tensor_descriptor(ptr, [n, m], [n_step, 1], [N, M])
    else:
        return tl.make_tensor_descriptor(ptr, [m, n], [m_step, 1], [M, N])


def worth_trying(configs: list, given: dict[str, Any], **how: Any) -> list:
    """For autotuners: the default for small sizes; else what can be fetched and does not spill."""
    if given["m"] * given["n"] * given["k"] <= 2**24:  # done before a choice could pay
        return configs[:1]
    full = how.get("PRECISION", "ieee") == "ieee" and next(iter(given.values())).itemsize == 4
    most = 2048 if full else 4096  # numbers of a tile per warp: more are held without tensor cores
    small = [c for c in configs if c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= most * c.num_warps]
    return [c for c in small if how.get("COPY_ENGINE") or not c.kwargs.get("BOXES")]


CONFIGS = [
    config(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8, BOXES=boxes)
    for m, n, k, warps, stages, boxes in (
        (64, 64, 32, 4, 3, False),  # the default: fits every target and dtype, and spills nowhere
        (128, 64, 64, 4, 3, False), (64, 128, 64, 4, 4, False), (128, 128, 32, 4, 4, False),
        (128, 128, 32, 8, 3, False), (128, 256, 64, 8, 3, False), (256, 128, 64, 8, 3, False),
        (128, 128, 64, 4, 4, True), (128, 256, 64, 8, 3, True), (128, 256, 64, 8, 4, True),
        (256, 128, 64, 8, 4, True), (128, 256, 128, 8, 3, True),  # the last one for fp8
    )
]  # fmt: skip


@autotune(
    CONFIGS, prune_configs_by={"early_config_prune": worth_trying},
    key=["m", "n", "k", "PRECISION", "A_TURNED", "B_TURNED", "COPY_ENGINE"],
)  # fmt: skip
@jit
def _matmul(
    a_ptr, b_ptr, bias_ptr, z_ptr, out_ptr, m, n, k, a_m, a_k, b_k, b_n, share,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, COPY_ENGINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    i, j = place(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP)
    part = tl.program_id(1)  # of k: 0 unless it is split
    x, y, first, last = i * BLOCK_M, j * BLOCK_N, part * share, min(part * share + share, k)
    rows, cols, steps = x + tl.arange(0, BLOCK_M), y + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if BOXES and COPY_ENGINE:
        a_boxes = _boxes(a_ptr, m, k, a_m, a_k, BLOCK_M, BLOCK_K, A_TURNED)
        b_boxes = _boxes(b_ptr, k, n, b_k, b_n, BLOCK_K, BLOCK_N, B_TURNED)
    else:
        # Rows beyond the end read others instead, which costs no mask; they are never stored.
        along = (first + steps).to(tl.int64)
        a_ptrs = a_ptr + (rows % m).to(tl.int64)[:, None] * a_m + along[None, :] * a_k
        b_ptrs = b_ptr + along[:, None] * b_k + (cols % n).to(tl.int64)[None, :] * b_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        if BOXES and COPY_ENGINE:  # what lies outside of the matrix arrives as zero
            a = a_boxes.load([start, x]).T if A_TURNED else a_boxes.load([x, start])
            b = b_boxes.load([y, start]).T if B_TURNED else b_boxes.load([start, y])
        else:
            inside = steps < last - start
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
            a_ptrs += tl.cast(a_k, tl.int64) * BLOCK_K
            b_ptrs += tl.cast(b_k, tl.int64) * BLOCK_K
        # Hopper adds fp8 products with fewer bits than fp32 has: to be moved there block by block.
        acc = tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=BLOCK_K)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    there = (part.to(tl.int64) * m + rows)[:, None] * n + cols[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + there, acc, mask=inside)
    tl.store(out_ptr + there, _activate(acc, ACTIVATION), mask=inside)


def _copyable(x: Tensor) -> bool:
    # NVIDIA has the copy engine from 9.0 on; it wants rows or columns that start at 16 bytes.
    new = torch.version.cuda and x.is_cuda and torch.cuda.get_device_capability() >= (9, 0)
    starts = max(x.stride()) * x.itemsize, x.data_ptr()
    return bool(new) and min(x.stride()) == 1 and all(start % 16 == 0 for start in starts)


def _run(
    a: Tensor, b: Tensor, out_dtype: torch.dtype, precision: str, bias: Tensor | None = None,
    activation: str | None = None, split: int = 1, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    # activation(z) and, if it is to be kept, z = a @ b + bias, of matrices
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    z = torch.empty_like(out) if keep else None
    if out.numel() == 0:
        return out, z
    if MODE == "gpu":  # `_boxes` makes its descriptors in memory that it asks for
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=a.device))
    bias = bias if bias is None else bias.contiguous()
    parts = out if split == 1 else torch.empty(split, m, n, device=a.device, dtype=torch.float32)
    epilogue = (bias, z, activation) if split == 1 else (None, None, None)
    share = triton.cdiv(triton.cdiv(k, split), 128) * 128  # no block of k belongs to two parts
    how = {"A_TURNED": a.stride(1) != 1, "B_TURNED": b.stride(1) != 1, "PRECISION": precision}
    how |= {"ACTIVATION": epilogue[2], "COPY_ENGINE": _copyable(a) and _copyable(b)}
    _matmul[
        lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]), split)
    ](*(a, b, *epilogue[:2], parts, m, n, k, *a.stride(), *b.stride(), share), **how)
    if split > 1:  # added in an order that is always the same; who splits k has few results
        z = _finish(parts.sum(0), bias, None)
        out, z = _finish(z, None, activation).to(out_dtype), z.to(out_dtype) if keep else None
    return out, z


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        split, ctx.activation, ctx.precision, out_dtype, train = (
            how  # ReLU's result shows its slope
        )
        keep = train and ctx.activation in ("gelu_tanh", "silu") and any(ctx.needs_input_grad)
        out, z = _run(a, b, out_dtype, ctx.precision, bias, ctx.activation, split, keep)
        ctx.save_for_backward(a, b, bias, out if ctx.activation == "relu" else z)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b, bias, z = ctx.saved_tensors
        if ctx.activation == "relu":
            dy = torch.ops.aten.threshold_backward(dy, z, 0)
        elif ctx.activation == "silu":
            dy = torch.ops.aten.silu_backward(dy, z)
        elif ctx.activation == "gelu_tanh":
            dy = torch.ops.aten.gelu_backward(dy, z, approximate="tanh")
        dz, (for_a, for_b, for_bias, *_) = dy.to(a.dtype), ctx.needs_input_grad
        da = _run(dz, b.T, a.dtype, ctx.precision)[0] if for_a else None
        db = _run(a.T, dz, b.dtype, ctx.precision)[0] if for_b else None
        dbias = dy.sum(0, dtype=torch.float32).to(bias.dtype) if for_bias else None
        return da, db, dbias, *[None] * 5


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str | None = None,
    split_k: int = 1, precision: str = "ieee", out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`reference` in one pass, or two where k is split; sums in float32, rounded once at the end.

    a [..., m, k], b [k, n], any strides, of one dtype: float32, float16, bfloat16 or fp8 (e4m3fn
    and e5m2, also mixed; forward only, and `out_dtype` has to be given). bias [n]. `activation`:
    None, "relu", "gelu_tanh", "silu". `split_k`: so many programs share a tile's sums, for few
    tiles and a long k. `precision`, of float32 inputs: "ieee", all 23 bits, no tensor cores;
    "tf32", 10 bits, the others cut off; "tf32x3" (not on AMD's), three products of such. Raises
    ValueError for what does not fit, and as `kernels.runtime.check` does.
    """
    check(a, b, bias, dtypes=(*OPTIONS["out_dtype"], torch.float8_e4m3fn, torch.float8_e5m2))
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} @ b {tuple(b.shape)} must be [..., m, k] @ [k, n]")
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{b.shape[1]}], as b has columns")
    narrow, train = a.itemsize == b.itemsize == 1, torch.is_grad_enabled()
    if a.dtype != b.dtype and not narrow:
        raise ValueError(f"a is {a.dtype}, b is {b.dtype}: they must be alike (or both fp8)")
    if narrow and train and (a.requires_grad or b.requires_grad):
        raise ValueError("fp8 inputs have no gradient here: multiply detached tensors")
    chosen = {"activation": activation, "precision": precision, "out_dtype": out_dtype or a.dtype}
    for name in [name for name in chosen if chosen[name] not in OPTIONS[name]]:
        raise ValueError(f"{name}={chosen[name]!r} must be one of {OPTIONS[name]}")
    if not isinstance(split_k, int) or split_k < 1:
        raise ValueError(f"split_k={split_k!r} must be a whole number of parts, 1 or more")
    flat = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    out = _Matmul.apply(flat, b, bias, split_k, *chosen.values(), train)
    return out.view(*a.shape[:-1], b.shape[1])


def order(programs_m: int, programs_n: int, group: int) -> list[tuple[int, int]]:
    """The tiles (i, j) in the order of the programs that make them: the kernel's own `place`.

    Programs start in order; those that run together should read the same strips of a and b, which
    the cache then holds. Row by row, `programs_n` of them share one strip of a and read all of b.
    In groups of `group` rows, walked column by column, they form a square and read its sides.

    >>> order(3, 2, group=2)  # two rows, column by column; then the row that is left
    [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    """
    if min(sizes := (programs_m, programs_n, group)) < 1:
        raise ValueError(f"{programs_m} × {programs_n} programs, group={group}: 1 at least of each")
    return [getattr(place, "fn", place)(p, *sizes) for p in range(programs_m * programs_n)]


def strips(places: list[tuple[int, int]], together: int) -> list[int]:
    """How many different strips of a and b each `together` consecutive programs read.

    >>> strips(order(8, 8, group=1), together=16), strips(order(8, 8, group=4), together=16)
    ([10, 10, 10, 10], [8, 8, 8, 8])
    """
    waves = [places[s : s + together] for s in range(0, len(places), together)]
    return [len({i for i, _ in wave}) + len({j for _, j in wave}) for wave in waves]


def loads(m: int, n: int, k: int, block_m: int, block_n: int, itemsize: int) -> int:
    """Bytes of a and b that all programs ask for: what is read where no cache helps.

    Each reads a strip of each: m · n · k · (1 / block_m + 1 / block_n) numbers where tiles fit.

    >>> loads(512, 512, 512, 1, 1, 2) // loads(512, 512, 512, 64, 64, 2)
    64
    """
    return k * (m * -(-n // block_n) + n * -(-m // block_m)) * itemsize


def cost(m: int, n: int, k: int, itemsize: int = 4, out_itemsize: int | None = None) -> Cost:
    """2mnk FLOPs, a few per result for the epilogue not counted; a, b read once, one m × n written.

    >>> cost(2, 3, 4)
    Cost(flops=48, bytes=104)
    """
    return Cost(2 * m * n * k, (m * k + k * n) * itemsize + m * n * (out_itemsize or itemsize))


def specs() -> list[Spec]:
    """The default with every dtype, with its epilogue and as it runs backward; large tiles."""
    plain = dict.fromkeys(("m", "n", "k", "a_m", "b_k", "share"), "i32")
    plain |= {"a_k": 1, "b_n": 1, "A_TURNED": False, "B_TURNED": False, "COPY_ENGINE": False}
    plain |= {"bias_ptr": None, "z_ptr": None, "ACTIVATION": None, "PRECISION": "ieee"}

    def spec(name: str, kind: str, c=CONFIGS[0], targets: tuple = TARGETS, **more: Any) -> Spec:
        given = {**plain, **dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), f"*{kind}"), **more}
        types = {key: v for key, v in given.items() if str(v).startswith(("*", "i32"))}
        fixed = {key: v for key, v in given.items() if key not in types} | c.kwargs
        return Spec(f"matmul {name}", _matmul, types, fixed, c.num_warps, c.num_stages, targets)

    return [
        spec("bf16", "bf16"),
        spec("bf16 epilogue", "bf16", bias_ptr="*bf16", z_ptr="*bf16", ACTIVATION="gelu_tanh"),
        spec("bf16 a turned", "bf16", A_TURNED=True, a_m=1, a_k="i32"),
        spec("bf16 128x256", "bf16", CONFIGS[5], TARGETS[:3]),
        spec("bf16 128x256 boxes", "bf16", CONFIGS[9], TARGETS[1:3], COPY_ENGINE=True),
        *[spec(f"fp32 {way}", "fp32", PRECISION=way) for way in ("ieee", "tf32")],
        spec("fp32 tf32x3", "fp32", targets=TARGETS[:3], PRECISION="tf32x3"),
        spec("fp8", "fp8e4nv", targets=TARGETS[1:3], out_ptr="*bf16"),
    ]
