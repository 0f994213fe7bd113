"""What the tests know of each kernel: one file per kernel file, of the same name.

Each holds `CASES`, inputs with the function that gets them, and `FAULTS`, mistakes in the kernel
file that these cases have to find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A kernel against its reference in float64 on the same inputs, forward and backward.

    The kernel's inputs are rounded to the dtype first, and the reference gets exactly the rounded
    ones, so what is measured is the kernel's own error. It may be `slack` units of roundoff u of
    the dtype, relative to the largest number of the result in the same row (or of `norm_over`):

        |got - want| <= slack · u · (|want| + max |want| + terms),   u = 2^-24, 2^-11, 2^-8

    A result is rounded once (half a unit); float32 sums of n terms add about √n units of 2^-24,
    which the narrower types do not notice. State in `slack` what the operation needs, and why in a
    comment where that is more than 4 (narrow types) or 2 √n (float32).
    """

    name: str
    """shows in the test's id; unique in the file"""
    function: str
    """the public function, by its name in the kernel file"""
    inputs: Callable[[torch.Generator], dict[str, Any]]
    """float64 tensors, which are rounded to the dtype; others, and all else, are handed as is"""
    gradients: tuple[str, ...] = ()
    """the inputs whose gradients are compared"""
    reference: str | Callable[..., Any] = "reference"
    """by its name in the kernel file, or a function; gets the same keywords"""
    slack: float | dict[torch.dtype, float] = 4.0
    dtypes: tuple[torch.dtype, ...] = FLOATS
    terms: float = 0.0
    """size of terms that cancel in a result: added to max |want|"""
    norm_over: str = "row"
    """"row": the last axis; "all": the whole tensor (for sums over rows, such as a weight's)"""


@dataclass(frozen=True)
class Fault:
    """A mistake: `old` in the kernel file's text becomes `new`; some case has to notice."""

    what: str
    old: str
    new: str
    caught_by: str
    """the name of a case that fails with it"""
    dtype: torch.dtype = torch.float32
    file: str = ""
    """another kernel file that the mistake is in, from which this one imports"""


def shapes(*sizes: int) -> tuple[int, ...]:
    """The awkward sizes of every suite, in front of its own."""
    return (1, 3, 5, 41, 127, 1023, *sizes)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, not contiguous: every second place of a larger tensor."""
    return torch.stack([x, torch.full_like(x, 7.0)], -1)[..., 0]
