"""How a kernel is compiled where it does not run: argument types, constants, warps and stages."""

from __future__ import annotations

from typing import Any, NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""NVIDIA's A100, H100 and B200; AMD's MI300."""


class Spec(NamedTuple):
    """One kernel at one configuration; pointers and sizes are taken to be multiples of 16."""

    name: str
    """as in "rms_norm backward bf16" """
    kernel: Any
    """what `@jit` or `@autotune` made of the function"""
    types: dict[str, str]
    """of each argument that is no constant: "*bf16" (a pointer), "i32", "fp32", ..."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = TARGETS
    """those that know the types"""
