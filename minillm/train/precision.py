"""Training in 16 bits: a dynamic loss scale, an eye on it, and fp32 master weights.

fp16 has few exponents: small gradients become zero unless the loss, and with it every gradient,
is multiplied by a large number first. fp16 and bf16 have few fraction bits: a weight that is
changed by less than half of its last bit does not change at all, unless a finer copy remembers.

Source: Micikevicius et al., Mixed Precision Training, 2018.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _fp32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


class LossScaler:
    """The number that the loss is multiplied by, found by trial.

    An overflow multiplies the scale by `backoff`, and the step has to be skipped; `window` steps
    in a row without one multiply it by `growth`. The trajectory is that of `torch.amp.GradScaler`:
    kept in float32, without a floor, and never growing to infinity. Only below 2^-127, where
    1 / scale is infinite and PyTorch's would write infinities into the weights, this one reports
    an overflow. Each function in `hooks` is called with every overflow flag.

        (loss * scaler.scale).backward()
        overflow = scaler.unscale(parameters)
        if not overflow:
            optimizer.step()
        scaler.update(overflow)

    Raises ValueError for settings that cannot work.

    >>> scaler = LossScaler(scale=8.0, window=2)
    >>> for overflow in (False, False, True, False, False):
    ...     scaler.update(overflow)
    ...     print(overflow, scaler.scale)
    False 8.0
    False 16.0
    True 8.0
    False 8.0
    False 16.0
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        window: int = 2000,
    ) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be positive and finite")
        if not (growth > 1 and 0 < backoff < 1 and window >= 1):
            raise ValueError(
                f"growth={growth} must exceed 1, backoff={backoff} lie in (0, 1), "
                f"window={window} be at least 1"
            )
        self.scale, self.growth, self.backoff, self.window = float(scale), growth, backoff, window
        self.clean_steps = 0
        self.hooks: list[Callable[[bool], object]] = []

    def unscale(self, parameters: Iterable[Tensor]) -> bool:
        """Divide the gradients by the scale, in place; True if any of them is not finite.

        Raises ValueError if there is no gradient, and for float16 gradients, which would lose
        again what the scale has saved (`MasterWeights` makes float32 ones).
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise ValueError("no parameter has a gradient: call backward first")
        if any(g.dtype == torch.float16 for g in gradients):
            raise ValueError("gradients are float16: unscaled there, small ones would be flushed")
        inverse = _fp32(1 / self.scale) if self.scale else float("inf")
        finite = []
        for g in gradients:
            g.mul_(inverse)
            finite.append(g.isfinite().all())
        return not torch.stack([f.to(finite[0].device) for f in finite]).all().item()

    def update(self, overflow: bool) -> None:
        """Move the scale after a step; `overflow` is what `unscale` said."""
        self.clean_steps = 0 if overflow else self.clean_steps + 1
        if overflow:
            self.scale = _fp32(self.scale * self.backoff)
        elif self.clean_steps == self.window:
            grown = _fp32(self.scale * self.growth)
            self.scale = grown if grown < float("inf") else self.scale
            self.clean_steps = 0
        for hook in self.hooks:
            hook(overflow)

    def state_dict(self) -> dict[str, float | int]:
        """Everything that the next `update` depends on."""
        names = ("scale", "growth", "backoff", "window", "clean_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError if the names differ."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"a scaler has {list(self.state_dict())}, the state {list(state)}")
        vars(self).update(state)


class OverflowRatio:
    """Share of overflows among the last `window` steps: the pulse of a 16-bit run.

    A settled, healthy run overflows once after each growth, so the ratio stays near
    1 / (scaler.window + 1). A ratio that rises says that gradients grow, or are NaN. Hang it on a
    scaler, `scaler.hooks.append(ratio)`, and read `ratio.value`, or call it yourself.

    >>> ratio = OverflowRatio(window=4)
    >>> [ratio(overflow) for overflow in (True, False, False, False, False)]
    [1.0, 0.5, 0.3333333333333333, 0.25, 0.0]
    """

    def __init__(self, window: int = 1000) -> None:
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self._recent: deque[bool] = deque(maxlen=window)

    def __call__(self, overflow: bool) -> float:
        """Note one step and return the ratio."""
        self._recent.append(bool(overflow))
        return self.value

    @property
    def value(self) -> float:
        """The ratio now; NaN before the first step."""
        return sum(self._recent) / len(self._recent) if self._recent else float("nan")


def simulate(scaler: LossScaler, limits: Iterable[float]) -> Iterator[tuple[float, bool]]:
    """(scale, overflow) of each step if step i overflows exactly when the scale exceeds limit i.

    A limit is the largest number of the format over the largest gradient; NaN (a gradient that is
    NaN whatever the scale) and 0 always overflow.

    >>> list(simulate(LossScaler(scale=4.0, window=1), [9.0, 9.0, 9.0]))
    [(4.0, False), (8.0, False), (16.0, True)]
    """
    for limit in limits:
        scale, overflow = scaler.scale, not scaler.scale <= limit
        scaler.update(overflow)
        yield scale, overflow


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over float32 copies of parameters that the model holds in 16 bits.

    Every parameter that requires a gradient and is not float32 gets a master. Its gradient is
    kept in float32 (`grad_dtype`), so that unscaling, clipping and accumulation lose nothing.
    `step` moves the masters and rounds them into the model. With Adam a parameter takes
    2 (weight) + 4 (gradient) + 4 (master) + 8 (state) = 18 bytes.

    `params` are parameters or groups, as for `optimizer_cls(params, **kwargs)`. With `dtype` they
    are converted here, after the masters were taken, which therefore start unrounded. A tied
    parameter is one parameter; frozen ones are left out, so unfreeze before.

    Raises ValueError if nothing is to be trained.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        optimizer_cls: type[torch.optim.Optimizer],
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ) -> None:
        groups = [dict(g) if isinstance(g, dict) else g for g in params]
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (in the model, master)
        for group in groups:
            given = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
            given = dict.fromkeys(p for p in given if p.requires_grad)  # each once, in order
            group["params"] = [self._master(p, dtype) for p in given]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        super().__init__([dict(group) for group in groups], {})
        self.inner = optimizer_cls(groups, **kwargs)
        self._share()

    def _master(self, p: Tensor, dtype: torch.dtype | None) -> Tensor:
        if p.dtype == torch.float32 and dtype in (None, torch.float32):
            return p
        master = nn.Parameter(p.detach().to(torch.float32, copy=True))
        if dtype is not None:
            p.data = p.data.to(dtype)
        p.grad = None
        p.grad_dtype = torch.float32
        self._pairs.append((p, master))
        return master

    def _share(self) -> None:
        # One set of groups and states: schedules write to ours, the inner optimizer reads them.
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults = self.inner.defaults

    @torch.no_grad()
    def _publish(self) -> None:
        for p, master in self._pairs:
            p.copy_(master)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the masters, then round them into the model."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, master in self._pairs:
            master.grad = p.grad
        self.inner.step()
        for _, master in self._pairs:
            master.grad = None  # it stays with the model's parameter
        self._publish()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model's parameters."""
        self.inner.zero_grad(set_to_none)
        for p, _ in self._pairs:
            if p.grad is not None:
                p.grad = None if set_to_none else p.grad.zero_()

    def add_param_group(self, param_group: dict) -> None:
        """Only while being built: raises ValueError later."""
        if hasattr(self, "inner"):
            raise ValueError("masters are made with the optimizer: give it all groups at once")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, object]:
        """The inner optimizer's state and the masters, without which the low bits were lost."""
        return {**self.inner.state_dict(), "masters": [m.detach() for _, m in self._pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Continue where `state_dict` was taken; the model's weights follow the masters.

        Raises ValueError if the masters do not fit.
        """
        rest = dict(state_dict)
        saved = rest.pop("masters", [])
        theirs, ours = [tuple(m.shape) for m in saved], [tuple(m.shape) for _, m in self._pairs]
        if theirs != ours:
            raise ValueError(f"the state has masters of shapes {theirs}, the model needs {ours}")
        self.inner.load_state_dict(rest)
        for (_, master), value in zip(self._pairs, saved, strict=True):
            master.copy_(value)
        self._share()
        self._publish()


def prepare(
    model: nn.Module,
    precision: str,
    optimizer_cls: type[torch.optim.Optimizer],
    params: Iterable[Tensor] | Iterable[dict] | None = None,
    **kwargs: object,
) -> tuple[torch.optim.Optimizer, LossScaler | None]:
    """Convert `model` in place to "fp32", "bf16" or "fp16"; its optimizer and loss scaler.

    In 16 bits the optimizer is `MasterWeights` around `optimizer_cls(params, **kwargs)`; `params`
    are all of the model's, or groups of them. Only fp16 needs a scaler, else it is None.

        optimizer, scaler = prepare(model, "fp16", AdamW, lr=1e-3)
        for step in train(model, batches, optimizer, scaler=scaler): ...

    Raises ValueError for another precision and for a model that is not in float32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {list(PRECISIONS)}")
    found = {p.dtype for p in model.parameters()}
    if found != {torch.float32}:
        raise ValueError(f"the model must be in torch.float32 to begin with, it is in {found}")
    params = model.parameters() if params is None else params
    if precision == "fp32":
        return optimizer_cls(params, **kwargs), None
    optimizer = MasterWeights(params, optimizer_cls, PRECISIONS[precision], **kwargs)
    model.to(PRECISIONS[precision])  # frozen parameters and buffers
    return optimizer, LossScaler() if precision == "fp16" else None
