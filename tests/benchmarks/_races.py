"""Who is compared with whom: for each kernel its contestants, at some size, with its cost.

Each builder yields races, ("forward", Race) and so on. Contestants get copies of the inputs of
their own, since some work in place; the first call of each is what is compared with the judge's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import _record  # noqa: F401 (puts the course on the path, before this folder's own kernels.py)
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import (
    adamw,
    add,
    attention,
    attention_backward,
    cross_entropy,
    decode_attention,
    dropout,
    grouped_matmul,
    layer_norm,
    linear_cross_entropy,
    matmul,
    quantize,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from kernels.cost import Cost


def _compiled(f: Callable) -> Callable:
    return torch.compile(f, dynamic=False)


@dataclass(frozen=True)
class Setting:
    """Where and with what: a test takes the CPU, and a `compile` that returns its argument."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    compile: Callable[[Callable], Callable] = _compiled

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, the same for the same shape."""
        rng = torch.Generator(self.device).manual_seed(sum(shape))
        x = torch.randn(shape, generator=rng, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def liger(self, name: str, **more: Any) -> dict[str, Callable]:
        """Liger-Kernel's function of this name, where it is installed and can run."""
        if self.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
            return {}
        functional = importlib.import_module("liger_kernel.transformers.functional")
        return {"Liger": partial(getattr(functional, name), **more)}


@dataclass(frozen=True)
class Race:
    """Functions without arguments that do the same, and what each has to move or to compute."""

    contestants: dict[str, Callable[[], Any]]
    cost: Cost
    peak: str = "copy"
    """what it is measured against: "copy", a bandwidth, or the best product of a type ("bf16")"""
    judge: str = "eager"
    unlike: tuple[str, ...] = ()
    """contestants whose numbers differ by nature"""
    tolerance: float = 0.03
    """of the largest number of a result"""


Races = Iterator[tuple[str, Race]]


@dataclass
class _Backward:
    """The gradients, again and again; the graph is made at the first call."""

    function: Callable
    inputs: Sequence[Any]
    up: Tensor
    graph: list = field(default_factory=list)

    def __call__(self) -> tuple[Tensor, ...]:
        leaves = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        if not self.graph:
            self.graph.append(self.function(*self.inputs))
        return torch.autograd.grad(self.graph[0], leaves, self.up, retain_graph=True)


def _own(inputs: Sequence[Any], learn: bool = True) -> list[Any]:
    """Copies; the floats among them want gradients."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    for x in copies:
        if learn and isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    return copies


def both(
    functions: dict[str, Callable], inputs: Sequence[Any], costs: Sequence[Cost], **more: Any
) -> Races:
    """Forward, and with a second cost backward alone."""
    own = {name: _own(inputs, len(costs) > 1) for name in functions}
    calls = {name: partial(f, *own[name]) for name, f in functions.items()}
    yield "forward", Race(calls, costs[0], **more)
    if len(costs) > 1:
        with torch.no_grad():
            up = torch.randn_like(functions["ours"](*_own(inputs, learn=False)))
        calls = {n: _Backward(f, _own(inputs), up.clone()) for n, f in functions.items()}
        yield "backward", Race(calls, costs[1], **more)


def step(
    functions: dict[str, Callable], inputs: Sequence[Tensor], cost: Cost, **more: Any
) -> Races:
    """Forward and backward of a loss in one go."""

    def run(f: Callable, own: list[Tensor]) -> tuple[Tensor, ...]:
        loss = f(*own)
        leaves = [x for x in own if x.requires_grad]
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    calls = {name: partial(run, f, _own(inputs)) for name, f in functions.items()}
    yield "forward + backward", Race(calls, cost, **more)


def adding(on: Setting, n: int) -> Races:
    functions = {"ours": add.add, "eager": torch.add, "compiled": on.compile(torch.add)}
    yield from both(
        functions, [on.randn(n), on.randn(n, scale=2)], [add.cost(n, on.dtype.itemsize)]
    )


def softmaxes(on: Setting, rows: int, width: int) -> Races:
    def eager(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    functions = {"ours": softmax.softmax, "eager": eager, "compiled": on.compile(eager)}
    costs = [softmax.cost(rows, width, on.dtype.itemsize, backward=b) for b in (False, True)]
    yield from both(functions, [on.randn(rows, width)], costs)


def rms_norms(on: Setting, rows: int, width: int) -> Races:
    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-5)

    functions = {"ours": rms_norm.rms_norm, "eager": eager, "compiled": on.compile(eager)}
    functions |= on.liger("liger_rms_norm", eps=1e-5)
    costs = [rms_norm.cost(rows, width, on.dtype.itemsize, backward=b) for b in (False, True)]
    yield from both(functions, [on.randn(rows, width), on.randn(width)], costs)


def layer_norms(on: Setting, rows: int, width: int) -> Races:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, 1e-5)

    functions = {"ours": layer_norm.layer_norm, "eager": eager, "compiled": on.compile(eager)}
    functions |= on.liger("liger_layer_norm", eps=1e-5)
    costs = [layer_norm.cost(rows, width, on.dtype.itemsize, backward=b) for b in (False, True)]
    yield from both(functions, [on.randn(rows, width), on.randn(width), on.randn(width)], costs)


def swiglus(on: Setting, rows: int, width: int) -> Races:
    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    functions = {"ours": swiglu.swiglu, "eager": eager, "compiled": on.compile(eager)}
    functions |= on.liger("liger_swiglu")
    costs = [swiglu.cost(rows * width, on.dtype.itemsize, backward=b) for b in (False, True)]
    yield from both(functions, [on.randn(rows, width), on.randn(rows, width, scale=0.5)], costs)


def ropes(on: Setting, batch: int, heads: int, tokens: int, d_head: int) -> Races:
    angles = torch.arange(tokens)[:, None] * 10_000 ** (-torch.arange(0, d_head, 2) / d_head)
    cos, sin = (f(angles).to(on.device) for f in (torch.cos, torch.sin))

    def eager(x: Tensor) -> Tensor:
        return rope.reference(x, cos, sin)

    functions = {"ours": lambda x: rope.rope(x, cos, sin), "eager": eager}
    functions["compiled"] = on.compile(eager)
    costs = [rope.cost(batch, heads, tokens, d_head, on.dtype.itemsize)] * 2
    yield from both(functions, [on.randn(batch, heads, tokens, d_head)], costs)


def dropouts(on: Setting, n: int) -> Races:
    def eager(x: Tensor) -> Tensor:
        return F.dropout(x, 0.1)

    functions = {"ours": partial(dropout.dropout, p=0.1, seed=1), "eager": eager}
    functions["compiled"] = on.compile(eager)
    functions["reference"] = partial(dropout.reference, p=0.1, seed=1)
    more = {"judge": "reference", "unlike": ("eager", "compiled")}
    yield from both(functions, [on.randn(n)], [dropout.cost(n, on.dtype.itemsize)] * 2, **more)


def _targets(on: Setting, n: int, vocab: int) -> Tensor:
    return torch.arange(n, device=on.device) * 7919 % vocab


def cross_entropies(on: Setting, rows: int, vocab: int) -> Races:
    def eager(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    functions = {"ours": cross_entropy.cross_entropy, "eager": eager}
    functions["compiled"] = on.compile(eager)
    inputs = [on.randn(rows, vocab, scale=2), _targets(on, rows, vocab)]
    size = on.dtype.itemsize
    costs = [cross_entropy.cost(rows, vocab, size, backward=b) for b in (False, True)]
    yield from both(functions, inputs, costs)
    ours = partial(cross_entropy.cross_entropy, inplace=True)
    functions = {"ours": lambda x, targets: ours(x, targets).sum()}
    functions["eager"] = lambda x, targets: F.cross_entropy(x, targets, reduction="sum")
    functions["compiled"] = on.compile(functions["eager"])
    functions |= on.liger("liger_cross_entropy", reduction="sum")
    yield from step(functions, inputs, cross_entropy.cost(rows, vocab, size, inplace=True))


def linear_cross_entropies(on: Setting, tokens: int, vocab: int, d_model: int) -> Races:
    functions = {"ours": linear_cross_entropy.linear_cross_entropy}
    functions["eager"] = lambda x, w, targets: F.cross_entropy(x @ w.T, targets, reduction="sum")
    functions["compiled"] = on.compile(functions["eager"])
    functions |= on.liger("liger_fused_linear_cross_entropy", reduction="sum")
    inputs = [on.randn(tokens, d_model), on.randn(vocab, d_model, scale=d_model**-0.5)]
    cost = linear_cross_entropy.cost(tokens, vocab, d_model, on.dtype.itemsize)
    yield from step(functions, [*inputs, _targets(on, tokens, vocab)], cost, peak="bf16")


def adamws(on: Setting, tensors: int, n: int) -> Races:
    rates = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    float32 = replace(on, dtype=torch.float32)

    def state() -> list[Tensor]:
        params = [float32.randn(n, scale=1 + i) for i in range(tensors)]
        for p in params:
            p.grad = p.sin()
        return params

    def torchs(**form: bool) -> Callable[[], list[Tensor]]:
        params = state()
        optimizer = torch.optim.AdamW(params, **rates, **form)
        return lambda: optimizer.step() or params

    mine = state()
    means = [[torch.zeros_like(p) for p in mine] for _ in range(2)]
    grads = [p.grad for p in mine]
    calls = {"ours": lambda: adamw.fused_adamw_(mine, grads, *means, 1, **rates)[0]}
    calls |= {"eager": torchs(foreach=True), "fused": torchs(fused=True)}
    yield "step", Race(calls, adamw.cost(tensors * n), tolerance=1e-5)


def matmuls(on: Setting, m: int, n: int, k: int) -> Races:
    """ "eager" is cuBLAS on a GPU; forward only: backward consists of two more products."""
    a, b, bias = on.randn(m, k), on.randn(k, n), on.randn(n)
    cost = matmul.cost(m, n, k, on.dtype.itemsize)
    yield from both({"ours": matmul.matmul, "eager": torch.matmul}, [a, b], [cost], peak="bf16")

    def eager(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(torch.addmm(bias, a, b), approximate="tanh")

    functions = {"ours": partial(matmul.matmul, activation="gelu_tanh"), "eager": eager}
    functions["compiled"] = on.compile(eager)
    for _, race in both(functions, [a, b, bias], [cost], peak="bf16"):
        yield "with bias and GELU", race
    wide = [x.float() for x in (a, b)]
    for name in ("tf32", "tf32x3"):
        functions = {"ours": partial(matmul.matmul, precision=name), "eager": _precise(name)}
        for _, race in both(functions, wide, [matmul.cost(m, n, k)], peak="tf32"):
            yield name, race
    if on.device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        low = [(x / x.abs().max()).to(torch.float8_e4m3fn) for x in (a, b.T)]
        one = torch.ones((), device=on.device)
        functions = {"ours": lambda a, b: matmul.matmul(a, b.T, out_dtype=on.dtype)}
        functions["eager"] = lambda a, b: torch._scaled_mm(a, b.T, one, one, out_dtype=on.dtype)
        functions["exact"] = lambda a, b: (a.float() @ b.T.float()).to(on.dtype)
        cost = matmul.cost(m, n, k, 1, on.dtype.itemsize)
        for _, race in both(functions, low, [cost], peak="fp8", judge="exact"):
            yield "fp8", race


def _precise(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """PyTorch's product of float32, with tensor cores or without."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return product


def attentions(
    on: Setting, batch: int, heads: int, kv: int, tokens: int, d_head: int, causal: bool
) -> Races:
    """PyTorch's own choice is the judge; on a GPU also each of its back ends by name."""
    more = {"is_causal": causal, "enable_gqa": heads != kv}

    def by(backend: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **more)

        return run

    functions = {"ours": partial(attention.attention, causal=causal)}
    functions["SDPA"] = partial(F.scaled_dot_product_attention, **more)
    if on.device == "cuda":
        functions["SDPA flash"] = by(SDPBackend.FLASH_ATTENTION)
        functions["SDPA cuDNN"] = by(SDPBackend.CUDNN_ATTENTION)
    shapes = ((batch, heads, tokens, d_head), *((batch, kv, tokens, d_head),) * 2)
    q, k, v = (on.randn(*shape) for shape in shapes)
    sizes = (batch, heads, tokens, tokens, d_head, kv, on.dtype.itemsize)
    costs = [
        attention.cost(*sizes, fused=True, causal=causal),
        attention_backward.cost(*sizes, causal=causal),
    ]
    yield from both(functions, [q, k, v.roll(1, -1)], costs, peak="bf16", judge="SDPA")


def decodings(on: Setting, batch: int, heads: int, kv: int, keys: int, d_head: int) -> Races:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv)

    functions = {"ours": decode_attention.decode_attention, "eager": eager}
    k = on.randn(batch, kv, keys, d_head)
    cost = decode_attention.cost(batch, heads, keys, d_head, kv, itemsize=on.dtype.itemsize)
    yield from both(functions, [on.randn(batch, heads, 1, d_head), k, k.roll(1, -1)], [cost])


def quantized(on: Setting, m: int, n: int, k: int) -> Races:
    """Against cuBLAS on the wide weights; few rows are bound by memory, many by arithmetic."""
    x, w = on.randn(m, k), on.randn(n, k, scale=k**-0.5)
    few = m < 128
    packed, eight = (
        quantize.quantize_int4(w),
        (*quantize.quantize_int8(x), *quantize.quantize_int8(w)),
    )
    exact = quantize.dequantize_int4(*packed).to(on.dtype)
    functions = {"ours": lambda x: quantize.int4_matmul(x, *packed), "eager": lambda x: x @ exact.T}
    cost = quantize.cost(m, n, k, 4, itemsize=on.dtype.itemsize)
    for _, race in both(functions, [x], [cost], peak="copy" if few else "bf16"):
        yield "int4", race

    def eager(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
        return (torch._int_mm(x, w.T) * x_scale[:, None] * w_scale).to(on.dtype)

    functions = {"ours": partial(quantize.int8_matmul, out_dtype=on.dtype), "eager": eager}
    functions["compiled"] = on.compile(eager)
    functions["exact"] = partial(quantize.reference_int8, out_dtype=on.dtype)
    cost, peak = quantize.cost(m, n, k, 8, itemsize=on.dtype.itemsize), "copy" if few else "int8"
    for _, race in both(functions, eight, [cost], peak=peak, judge="exact"):
        yield "int8", race


def grouped(on: Setting, n: int, k: int, m: int, experts: int) -> Races:
    """Uneven groups; PyTorch's own grouped product where it has one."""
    shares = torch.arange(1, experts + 1, dtype=torch.float64)
    sizes = (shares / shares.sum() * n).long()
    sizes[-1] += n - sizes.sum()
    ends, sizes = sizes.cumsum(0).int().to(on.device), sizes.to(on.device)
    functions = {"ours": lambda x, w: grouped_matmul.grouped_matmul(x, w, sizes)}
    functions["eager"] = lambda x, w: torch.cat(
        [part @ w[e] for e, part in enumerate(x.split(sizes.tolist()))]
    )
    if on.device == "cuda":
        functions["grouped_mm"] = lambda x, w: F.grouped_mm(x, w, offs=ends)
    cost = grouped_matmul.cost(n, k, m, experts, on.dtype.itemsize)
    inputs = [on.randn(n, k), on.randn(experts, k, m, scale=k**-0.5)]
    yield from both(functions, inputs, [cost, Cost(2 * cost.flops, 2 * cost.bytes)], peak="bf16")


TABLE: dict[str, tuple[Callable[..., Races], tuple[tuple[Any, ...], ...], tuple[Any, ...]]] = {
    # the kernel file: builder, sizes to measure, a tiny size to try
    "add": (adding, ((2**24,), (2**28,)), (1000,)),
    "softmax": (softmaxes, ((32_768, 1024), (16_384, 4096), (4096, 32_768)), (3, 41)),
    "rms_norm": (rms_norms, ((32_768, 1024), (16_384, 4096), (8192, 8192)), (3, 41)),
    "layer_norm": (layer_norms, ((32_768, 1024), (16_384, 4096), (8192, 8192)), (3, 41)),
    "swiglu": (swiglus, ((16_384, 4096), (8192, 14_336)), (3, 41)),
    "rope": (ropes, ((1, 32, 4096, 128), (8, 32, 4096, 128)), (2, 2, 5, 16)),
    "dropout": (dropouts, ((2**22,), (2**26,)), (1000,)),
    "cross_entropy": (cross_entropies, ((8192, 32_000), (4096, 50_257), (8192, 128_256)), (5, 41)),
    "linear_cross_entropy": (
        linear_cross_entropies,
        ((8192, 32_000, 4096), (8192, 128_256, 4096)),
        (7, 41, 16),
    ),
    "adamw": (adamws, ((8, 2**24), (400, 2**18)), (3, 50)),
    "matmul": (matmuls, ((2048,) * 3, (4096,) * 3, (8192,) * 3, (16, 4096, 4096)), (32, 48, 64)),
    "grouped_matmul": (
        grouped,
        ((16_384, 4096, 1536, 64), (16_384, 4096, 14_336, 8)),
        (24, 16, 32, 3),
    ),
    "attention": (
        attentions,
        (
            (8, 16, 16, 2048, 128, True),
            (4, 32, 8, 4096, 128, True),
            (2, 16, 16, 8192, 128, False),
            (1, 16, 16, 16_384, 128, True),
            (4, 32, 32, 4096, 64, True),
        ),
        (1, 2, 1, 17, 16, True),
    ),
    "decode_attention": (
        decodings,
        ((1, 32, 8, 32_768, 128), (16, 32, 8, 8192, 128), (64, 32, 8, 2048, 128)),
        (2, 4, 2, 33, 16),
    ),
    "quantize": (
        quantized,
        ((1, 4096, 4096), (16, 14_336, 4096), (4096, 14_336, 4096)),
        (18, 40, 128),
    ),
}
