"""Memory of the host for what a device cannot hold: optimizer state, and layers in tiles.

The link between them is emulated: moving n bytes takes latency + n / bandwidth seconds, also where
device and host are the same machine.

Source: Ren et al., ZeRO-Offload: Democratizing Billion-Scale Model Training, 2021; Rajbhandari et
al., ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning, 2021.
"""

# b rows, n inputs, m outputs

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.parallel.group import Link
from minillm.parallel.partition import options, storage_bytes


class Bus:
    """The link between a device and its host, and what it has carried.

    `moved` counts bytes both ways. What `fetch` has on the device is `held`, at most `peak` so far;
    more than `capacity` raises MemoryError.
    """

    def __init__(self, link: Link | None = None, capacity: int | None = None) -> None:
        self.link, self.capacity = link, capacity
        self.moved = self.held = self.peak = 0
        self._wire = ThreadPoolExecutor(1, thread_name_prefix="bus")

    def move(self, x: Tensor, device: torch.device | str) -> Tensor:
        """A copy of x on `device`."""
        start = time.monotonic()
        y = x.detach().to(device, copy=True)
        self.moved += y.nbytes
        if self.link is not None:
            time.sleep(max(0.0, start + self.link.seconds(y.nbytes) - time.monotonic()))
        return y

    def later(self, work: Callable[[], Any]) -> Future:
        """Carry out `work`, one after the other, while this thread goes on."""
        return self._wire.submit(work)

    @contextmanager
    def hold(self, n: int) -> Iterator[None]:
        """n bytes of the device are taken meanwhile."""
        if self.capacity is not None and self.held + n > self.capacity:
            raise MemoryError(
                f"{n} bytes more than the {self.held} held do not fit into {self.capacity}"
            )
        self.held += n
        self.peak = max(self.peak, self.held)
        try:
            yield
        finally:
            self.held -= n

    @contextmanager
    def fetch(self, x: Tensor, device: torch.device | str) -> Iterator[Tensor]:
        """x on the device, for as long as the `with` lasts."""
        with self.hold(x.nbytes):
            yield self.move(x, device)


class OffloadedOptimizer(torch.optim.Optimizer):
    """`optimizer_cls(params, **kwargs)` on the host: masters and states leave the device.

    A gradient moves to the host as soon as backward has made it, and is freed; `step` updates the
    masters (float32 at least) there and moves the new parameters back, each in the parameter's
    dtype. What the device keeps is the parameters.

    Raises ValueError if nothing is to be trained.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        optimizer_cls: type[torch.optim.Optimizer],
        bus: Bus,
        host: str = "cpu",
        **kwargs: Any,
    ) -> None:
        self.bus, self.host = bus, host
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (on the device, master)
        self._coming: list[Future] = []
        super().__init__(params, {})
        groups = [{**options(g), "params": self._masters(g["params"])} for g in self.param_groups]
        if not self.pairs:
            raise ValueError("no parameter requires a gradient: there is nothing to train")
        self.inner = optimizer_cls(groups, **kwargs)
        for group, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update(options(theirs))

    def _masters(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        made = []
        for p in dict.fromkeys(p for p in parameters if p.requires_grad):
            dtype = torch.promote_types(p.dtype, torch.float32)
            made.append(nn.Parameter(p.detach().to(self.host, dtype, copy=True)))
            self.pairs.append((p, made[-1]))
            p.register_post_accumulate_grad_hook(lambda p, master=made[-1]: self._send(p, master))
        return made

    def _send(self, p: nn.Parameter, master: nn.Parameter) -> None:
        grad, p.grad = p.grad, None

        def work() -> None:
            arrived = self.bus.move(grad, self.host).to(master.dtype)
            master.grad = arrived if master.grad is None else master.grad.add_(arrived)

        self._coming.append(self.bus.later(work))

    def finish_gradient_synchronization(self) -> None:
        """Wait until all gradients are on the host."""
        for future in self._coming:
            future.result()
        self._coming.clear()

    @property
    def host_bytes(self) -> int:
        """Bytes of masters, states and gradients on the host."""
        masters = [m for _, m in self.pairs]
        states = [x for s in self.inner.state.values() for x in s.values()]
        grads = [m.grad for m in masters]
        return storage_bytes(x for x in (*masters, *states, *grads) if isinstance(x, Tensor))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update on the host, then bring the new parameters."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for p, master in self.pairs:
            if p.grad is not None:  # somebody set it, not backward
                self._send(p, master)
        self.finish_gradient_synchronization()
        for group, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update(options(group))
        self.inner.step()
        for p, master in self.pairs:
            if master.grad is not None:
                p.copy_(self.bus.move(master.to(p.dtype), p.device))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, on both sides."""
        self.finish_gradient_synchronization()
        super().zero_grad(set_to_none)
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the masters."""
        return {**self.inner.state_dict(), "masters": [m.detach() for _, m in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError if the masters do not fit."""
        rest = dict(state_dict)
        saved = rest.pop("masters", [])
        theirs, ours = [tuple(m.shape) for m in saved], [tuple(m.shape) for _, m in self.pairs]
        if theirs != ours:
            raise ValueError(f"the state has masters of shapes {theirs}, these are {ours}")
        self.inner.load_state_dict(rest)
        for group, new in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update(options(new))
        for (p, master), value in zip(self.pairs, saved, strict=True):
            p.copy_(master.copy_(value))


class TiledLinear(nn.Module):
    """x Wᵀ + b with W [m, n] on the host, in `tiles` that visit the device one after the other.

    No more than a tile of W, and in backward of its gradient, is on the device. Raises ValueError
    unless there are 1 to m tiles.
    """

    def __init__(self, linear: nn.Linear, tiles: int, bus: Bus, host: str = "cpu") -> None:
        super().__init__()
        if not 1 <= tiles <= linear.out_features:
            raise ValueError(f"tiles={tiles} must be from 1 to the {linear.out_features} outputs")
        self.bus = bus
        rows = linear.weight.detach().to(host).tensor_split(tiles)
        self.tiles = nn.ParameterList(nn.Parameter(w.clone()) for w in rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m]."""
        y = torch.cat([_Tile.apply(x, w, self.bus) for w in self.tiles], -1)
        return y if self.bias is None else y + self.bias


class _Tile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bus: Bus) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.bus = bus
        with bus.fetch(w, x.device) as here:
            return F.linear(x, here)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            with ctx.bus.fetch(w, x.device) as here:
                grad_x = grad @ here
        if ctx.needs_input_grad[1]:
            with ctx.bus.hold(w.nbytes):
                product = grad.flatten(0, -2).T @ x.flatten(0, -2)
                grad_w = ctx.bus.move(product, w.device)
        return grad_x, grad_w, None
