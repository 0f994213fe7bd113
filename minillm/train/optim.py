"""Optimizers from scratch: AdamW and Adafactor; clipping; which parameters decay.

Every update is written out in tensor operations. Operations on lists (`torch._foreach_...`) save
Python's overhead, and on a GPU one kernel serves many tensors.
"""

# p parameter, g gradient, m and v running means of g and g², s bias-corrected step; [n, k] a matrix

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

PIECE = 2**16  # numbers; five arrays of as many float32 stay in a core's cache between operations


def _require(group: dict[str, Any], name: str, rule: str, holds: bool) -> None:
    if not holds:  # written so that NaN is refused as well
        raise ValueError(f"{name}={group[name]} must be {rule}")


class _Optimizer(torch.optim.Optimizer):
    """Calls `check` on every group at first and `update` on every group at each step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; ValueError names an option out of range."""
        self.check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; the others and their state stay.

        Raises ValueError when a schedule set a learning rate below zero, or a gradient is sparse
        or complex.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            rate = group["lr"]
            _require(group, "lr", "at least 0 in every step", rate is None or rate >= 0)
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.grad.is_sparse or p.is_complex():
                    kind = f"{p.grad.layout} gradient of {p.dtype}"
                    raise ValueError(f"a {kind}: gradients must be dense and real")
            if params:
                self.update(group, params)
        return loss


class AdamW(_Optimizer):
    """Adam with decoupled weight decay and bias correction; all operations elementwise.

        m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²
        p ← p - lr · wd · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    t counts a parameter's own steps. Follows `torch.optim.AdamW` step for step and exchanges
    `state_dict`s with it; state is kept in the parameters' dtype, two numbers a parameter. With
    `fused` PyTorch's own kernel does the arithmetic on CPU, in one pass through memory instead of
    seven; results agree up to rounding.

    Raises ValueError unless lr > 0, both betas are in [0, 1), eps >= 0 and weight_decay >= 0.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.

    >>> p = nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> p.grad = torch.tensor([1e-3, -1e3])  # the first step has length lr, whatever the gradient
    >>> AdamW([p], lr=0.1, weight_decay=0.0).step()
    >>> [round(x, 3) for x in p.tolist()]
    [0.9, -1.9]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        fused: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"fused": fused})

    @staticmethod
    def check(group: dict[str, Any]) -> None:
        """ValueError unless the options of a group make sense."""
        betas = group["betas"]
        _require(group, "lr", "positive and finite", 0 < group["lr"] < math.inf)
        two = len(betas) == 2 and all(0 <= b < 1 for b in betas)
        _require(group, "betas", "two numbers in [0, 1)", two)
        _require(group, "eps", "at least 0", 0 <= group["eps"] < math.inf)
        _require(group, "weight_decay", "at least 0", 0 <= group["weight_decay"] < math.inf)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One step of all `params`."""
        for p in params:
            if not (state := self.state[p]):
                state["step"] = torch.tensor(0.0)  # a tensor, as PyTorch stores it
                state |= {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
        grads = [_like(p.grad, p) for p in params]
        states = [self.state[p] for p in params]
        steps, m, v = ([s[k] for s in states] for k in ("step", "exp_avg", "exp_avg_sq"))
        lr, (b1, b2), eps, decay = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
        if group["fused"] and all(p.is_cpu and p.is_contiguous() for p in params):
            options = {"lr": lr, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": decay}
            options |= {"amsgrad": False, "maximize": False, "fused": True}
            return adamw(params, grads, m, v, [], steps, **options)
        torch._foreach_add_(steps, 1)
        # √(v / c²) + ε = (√v + ε c) / c: the corrections touch scalars, not tensors
        c = [(1 - b2 ** float(t)) ** 0.5 for t in steps]
        sizes = [-lr * c / (1 - b1 ** float(t)) for c, t in zip(c, steps, strict=True)]
        lists = (params, grads, m, v, [eps * x for x in c], sizes)
        for p, g, mean, square, small, size in _pieces(*lists):
            torch._foreach_lerp_(mean, g, 1 - b1)
            torch._foreach_mul_(square, b2)
            torch._foreach_addcmul_(square, g, g, 1 - b2)
            below = torch._foreach_sqrt(square)
            torch._foreach_add_(below, small)
            if decay:
                torch._foreach_mul_(p, 1 - lr * decay)
            torch._foreach_addcdiv_(p, mean, below, size)


def _like(g: Tensor, p: Tensor) -> Tensor:
    """The gradient laid out as its parameter: flat views, and fused kernels, pair by address."""
    return g if g.stride() == p.stride() and g.dtype == p.dtype else torch.empty_like(p).copy_(g)


def _pieces(*lists: list[Any]) -> Iterator[list[list[Any]]]:
    """Corresponding pieces of all lists; together about PIECE numbers on CPU, all at once else.

    What an operation wrote is still in the cache when the next one reads it, which on CPU saves
    most of the way to memory. A number instead of a tensor is repeated for each piece.
    """
    batch: list[tuple[Any, ...]] = []
    size = 0
    for row in zip(*lists, strict=True):
        rows = [row]
        if row[0].is_cpu and row[0].numel() > PIECE and row[0].is_contiguous():
            cut = (x.view(-1).split(PIECE) if isinstance(x, Tensor) else repeat(x) for x in row)
            rows = list(zip(*cut, strict=False))
        for piece in rows:
            batch.append(piece)
            size += piece[0].numel() if piece[0].is_cpu else 0
            if size >= PIECE:
                yield [list(column) for column in zip(*batch, strict=True)]
                batch, size = [], 0
    if batch:
        yield [list(column) for column in zip(*batch, strict=True)]


class Adafactor(_Optimizer):
    """Adam's second moment from its row and column means, without a first moment.

        V = R C / mean(R)      R ← β R + (1 - β) rowmean(g² + ε₁),  C likewise,  β = 1 - t^-0.8
        U = g / √V             p ← p - α U / max(1, rms(U) / d)     α = max(ε₂, rms(p)) ρ

    A matrix [n, k] stores n + k numbers instead of n k; more axes are factored over the last two;
    a vector keeps its whole V. Without `lr` the relative step ρ is min(0.01, 1/√t), or, with
    `warmup_init`, min(t / 10⁶, 1/√t); with `lr` it is lr. Without `scale_parameter` α = ρ. `beta1`
    adds a running mean of the updates; `weight_decay` is decoupled and scaled by α.

    Raises ValueError when an option is out of range, or a parameter has fewer than 32 bits: the
    state adds up small numbers over many steps, so pass float32 master weights.
    Source: Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018.

    >>> p = nn.Parameter(torch.ones(30, 20))
    >>> p.grad = torch.ones(30, 20)
    >>> optimizer = Adafactor([p])
    >>> optimizer.step()
    >>> sum(x.numel() for x in optimizer.state[p].values() if isinstance(x, Tensor))
    50
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        beta1: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = 0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        warmup_init: bool = False,
    ) -> None:
        names = ("lr", "beta1", "eps", "clip_threshold", "decay_rate", "weight_decay")
        values = (lr, beta1, tuple(eps), clip_threshold, decay_rate, weight_decay)
        options = {"scale_parameter": scale_parameter, "warmup_init": warmup_init}
        super().__init__(params, options | dict(zip(names, values, strict=True)))

    @staticmethod
    def check(group: dict[str, Any]) -> None:
        """ValueError unless the options of a group make sense."""
        lr, beta1 = group["lr"], group["beta1"]
        _require(group, "lr", "positive and finite, or None", lr is None or 0 < lr < math.inf)
        _require(group, "beta1", "in [0, 1), or None", beta1 is None or 0 <= beta1 < 1)
        _require(group, "eps", "two positive numbers", [e > 0 for e in group["eps"]] == [True] * 2)
        _require(group, "clip_threshold", "positive", group["clip_threshold"] > 0)
        _require(group, "decay_rate", "in (0, 1]", 0 < group["decay_rate"] <= 1)
        _require(group, "weight_decay", "at least 0", 0 <= group["weight_decay"] < math.inf)
        rule = "False when lr is given: it belongs to the relative step"
        _require(group, "warmup_init", rule, lr is None or not group["warmup_init"])

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One step of all `params`."""
        for p in params:
            if p.dtype.itemsize < 4:
                raise ValueError(f"a parameter of {p.dtype} needs float32 master weights")
            state, g = self.state[p], p.grad
            t = state["step"] = state.get("step", 0) + 1
            rate = group["lr"]
            if rate is None:
                rate = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
            if group["scale_parameter"]:
                rate = rate * _rms(p).clamp(min=group["eps"][1])
            keep = 1 - t ** -group["decay_rate"]
            squared = g.square().add_(group["eps"][0])
            if p.ndim >= 2:
                row = _running(state, "exp_avg_sq_row", squared.mean(-1), keep)
                column = _running(state, "exp_avg_sq_col", squared.mean(-2), keep)
                row = (row / row.mean(-1, keepdim=True)).rsqrt()
                update = g * row[..., None] * column.rsqrt()[..., None, :]
            else:
                update = g * _running(state, "exp_avg_sq", squared, keep).rsqrt()
            update *= rate / (_rms(update) / group["clip_threshold"]).clamp(min=1)
            if group["beta1"] is not None:
                update = _running(state, "exp_avg", update, group["beta1"])
            p.mul_(1 - group["weight_decay"] * rate).sub_(update)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _running(state: dict[str, Any], name: str, new: Tensor, keep: float) -> Tensor:
    """state[name] ← keep · state[name] + (1 - keep) · new, from zero on."""
    if name not in state:
        state[name] = torch.zeros_like(new)
    return state[name].lerp_(new, 1 - keep)


@torch.no_grad()
def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by one factor so that their common L2 norm is at most `max_norm`.

    Returns the norm before, 0 if there is no gradient. One factor for all: the direction stays.
    A norm that is not finite is returned as it is, and the gradients are left alone: no factor
    mends them, and the caller decides whether to skip the step. `max_norm=inf` only measures.

    Raises ValueError unless max_norm > 0.
    Source: Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013.

    >>> p = nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([30.0, 40.0])
    >>> clip_grad_norm([p], max_norm=1.0).item(), [round(x, 3) for x in p.grad.tolist()]
    (50.0, [0.6, 0.8])
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    first = grads[0].device
    norm = torch.stack([x.to(first) for x in torch._foreach_norm(grads)]).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1).where(norm.isfinite(), 1.0)
    if first.type != "cpu" or factor < 1:  # on a GPU reading the factor would stop the queue
        for device in {g.device for g in grads}:
            torch._foreach_mul_([g for g in grads if g.device == device], factor.to(device))
    return norm


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: matrices decay, vectors (biases, norms) do not.

    Frozen parameters are left out, tied ones appear once. A norm's gain is drawn to 1 by nothing
    but the data: decay would shrink what it passes on.

    Raises ValueError when weight_decay is negative or nothing is left to train.

    >>> [(len(g["params"]), g["weight_decay"]) for g in decay_groups(nn.Linear(3, 2), 0.1)]
    [(1, 0.1), (1, 0.0)]
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
