"""Where kernels run: on a GPU, in Triton's interpreter, or not at all. Decided once, here.

The interpreter carries out a kernel on the CPU, program by program, with NumPy. It has to be chosen
before Triton is imported, so every kernel file takes `triton`, `tl` and `jit` from this one, and no
other file of the course reads the environment for it:

    TRITON_INTERPRET unset   a GPU where there is one, else the interpreter
    TRITON_INTERPRET=1       the interpreter, even beside a GPU
    TRITON_INTERPRET=0       no interpreter: without a GPU kernels can be compiled, but not run
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "MODE",
    "autotune",
    "can_run",
    "check",
    "config",
    "jit",
    "programs",
    "tl",
    "triton",
    "widened",
]

NARROW = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def _choose() -> str:
    if importlib.util.find_spec("triton") is None:
        return "absent"
    asked = os.environ.get("TRITON_INTERPRET", "").lower()
    if asked in ("1", "true", "on", "yes") or (not asked and not torch.cuda.is_available()):
        if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
            return "too late"  # its own functions were made for a GPU when it was imported
        os.environ["TRITON_INTERPRET"] = "1"
        return "interpreter"
    return "gpu" if torch.cuda.is_available() else "compiler"


MODE = _choose()
"""One of "gpu", "interpreter", "compiler" (compiles, runs nothing), "too late" and "absent"."""

if MODE == "absent":
    triton = tl = None
else:
    import triton
    import triton.language as tl

_WHY_NOT = {
    "compiler": "TRITON_INTERPRET=0 forbids the interpreter, and there is no GPU",
    "too late": "Triton was imported before minillm: import minillm first, then the interpreter "
    "can be chosen",
    "absent": "Triton is not installed (it exists for Linux only): the reference runs everywhere",
}


def check(*tensors: Tensor | None, dtypes: Sequence[torch.dtype] | None = None) -> None:
    """Raise an error that helps unless kernels can run on these tensors (`None` is skipped).

    RuntimeError where no kernel runs at all; ValueError for tensors on several devices, on another
    than the current one, on a CPU while kernels run on a GPU, or of a dtype not among `dtypes`.
    """
    if MODE in _WHY_NOT:
        raise RuntimeError(f"no Triton kernel can run here: {_WHY_NOT[MODE]}")
    given = [x for x in tensors if x is not None]
    devices = {x.device for x in given}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    if MODE == "gpu" and device.type != "cuda":
        raise ValueError(
            f"kernels run on the GPU here, the tensors are on {device}: move them there, take the "
            "reference, or start Python with TRITON_INTERPRET=1"
        )
    if MODE == "interpreter" and device.type != "cpu":
        raise ValueError(f"the interpreter works on CPU tensors, these are on {device}")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"the tensors are on {device}, the current device is "
            f"cuda:{torch.cuda.current_device()}: call torch.cuda.set_device({device.index})"
        )
    wrong = [x.dtype for x in given if dtypes is not None and x.dtype not in dtypes]
    if wrong:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"dtype {str(wrong[0]).removeprefix('torch.')} must be one of {known}")


def can_run(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device."""
    return {"cuda": "gpu", "cpu": "interpreter"}.get(device.type) == MODE


def jit(fn: Callable[..., None]) -> Any:
    """`triton.jit`; where kernels are interpreted, with the interpreter's known faults mended."""
    if MODE in ("absent", "too late"):
        return fn
    return _Interpreted(triton.jit(fn)) if MODE == "interpreter" else triton.jit(fn)


def autotune(configs: Sequence[Any], key: Sequence[str], **settings: Any) -> Callable[[Any], Any]:
    """`triton.autotune` on a GPU; elsewhere the first of `configs`, which is the default.

    `configs` come from `config`. Place it above `@jit`.
    """

    def decorate(kernel: Any) -> Any:
        if MODE == "gpu":
            return triton.autotune(list(configs), list(key), **settings)(kernel)
        return _Default(kernel, configs[0]) if triton is not None else kernel

    return decorate


def config(num_warps: int = 4, num_stages: int = 3, **constants: Any) -> Any:
    """`triton.Config`, or None without Triton: tile sizes and how many warps and stages work."""
    if triton is None:
        return None
    return triton.Config(constants, num_warps=num_warps, num_stages=num_stages)


class _Default:
    """A kernel with the constants of one configuration filled in."""

    def __init__(self, kernel: Any, chosen: Any) -> None:
        self.fn, self.chosen = kernel, chosen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.fn[grid](*args, **{**self.chosen.kwargs, **kwargs})

        return launch


class _Interpreted:
    """A kernel for the interpreter, which holds bf16 and fp8 as raw bits and computes garbage.

    So tensors of these types are widened to float32 for the time of the launch and rounded back
    after it: to nearest even, as a GPU does, where the interpreter would cut digits off.
    """

    def __init__(self, interpreted: Any) -> None:
        self.fn, self.interpreted = interpreted.fn, interpreted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called inside of another kernel."""
        return self.interpreted(*args, **kwargs)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            import numpy as np

            with widened(args, kwargs) as (wide, named), np.errstate(all="ignore"):
                self.interpreted[grid](*wide, **named)

        return launch


@contextlib.contextmanager
def widened(args: tuple, kwargs: dict) -> Iterator[tuple[list, dict]]:
    """The arguments with bf16 and fp8 tensors in float32; rounded back into them at the end."""
    storages: dict[tuple, tuple[Tensor, Tensor]] = {}

    def wide(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in NARROW:
            return x.detach() if isinstance(x, Tensor) else x
        storage = x.untyped_storage()
        key = (storage.data_ptr(), x.dtype)
        if key not in storages:
            flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(storage)
            storages[key] = (flat, flat.float())
        return storages[key][1].as_strided(x.shape, x.stride(), x.storage_offset())

    yield [wide(x) for x in args], {name: wide(x) for name, x in kwargs.items()}
    for flat, wide_flat in storages.values():
        flat.copy_(wide_flat)


def programs(device: torch.device) -> int:
    """How many programs fill the device: several for each of its processors; few to interpret."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
