"""Triton kernels written in a notebook cell, and a record of what their programs read and write.

    @kernel
    def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        ...

    with record() as tape:
        double[(4,)](x, out, 100, BLOCK=32)
    tape.bytes("load", "x_ptr")

Triton reads a kernel's source from a file, and its interpreter leaves a dozen names in the module
where a kernel stands. So a kernel of a cell becomes a module of its own, whose text is kept where
Python looks for sources (`linecache`): nothing is written to disk. `record` sees every kernel that
the interpreter carries out, those of the package as well.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import linecache
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

HEADER = "from kernels.runtime import jit, tl, triton\n\n\n@jit\n"


@dataclass(frozen=True)
class CellKernel:
    """A kernel made by `kernel`; `fn` is the function as it was written.

    `a_kernel[grid](...)` raises what the kernel itself raised, not the interpreter's wrapping of
    it, and in the interpreter an `IndexError` before anything outside of a tensor is touched.
    """

    fn: Callable[..., None]
    jitted: Any

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            interpreted = hasattr(self.jitted, "interpreted")
            try:
                with record(strict=True) if interpreted else contextlib.nullcontext():
                    self.jitted[grid](*args, **kwargs)
            except Exception as error:
                while type(error).__name__ == "InterpreterError" and error.__cause__:
                    error = error.__cause__
                raise error from None

        return launch


def kernel(fn: Callable[..., None]) -> CellKernel:
    """`kernels.runtime.jit` for a function that is defined in a notebook cell.

    The kernel may use its arguments, `tl`, `triton`, other kernels made here and values wrapped in
    `tl.constexpr`. Raises ValueError for other names, which a GPU could not see, and OSError for
    functions without a source.
    """
    source = textwrap.dedent(inspect.getsource(fn))
    (written,) = ast.parse(source).body
    text = HEADER + "\n".join(source.splitlines()[written.lineno - 1 :]) + "\n"
    filename = f"<kernel {fn.__name__} {zlib.crc32(text.encode()):08x}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    module: dict[str, Any] = {"__name__": "cell_kernels"}
    exec(compile(text, filename, "exec"), module)
    for name in _outside_names(written):
        value = fn.__globals__.get(name)
        if isinstance(value, CellKernel | module["tl"].constexpr):
            module[name] = getattr(value, "jitted", value)
        elif name not in module:
            raise ValueError(
                f"the kernel {fn.__name__} uses {name!r}, which is none of its arguments and was "
                "not computed in it: a slip of the pen? It knows only what its launch hands over"
            )
    return CellKernel(fn, module[fn.__name__])


def _outside_names(written: ast.FunctionDef) -> set[str]:
    nodes = [node for part in (written.args, *written.body) for node in ast.walk(part)]
    named = [(node.id, type(node.ctx)) for node in nodes if isinstance(node, ast.Name)]
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {name for name, context in named if context is not ast.Load}
    return {name for name, _ in named} - own - set(dir(builtins))


class Access(NamedTuple):
    """One load, store or atomic operation of one program, at the lanes that the mask left on."""

    program: tuple[int, int, int]
    kind: str
    """"load", "store" or "atomic" """
    tensor: str
    """the kernel's name for the pointer, as in "x_ptr" """
    places: np.ndarray
    """which numbers of the tensor's memory, counted from its first"""
    lanes: int
    """numbers of the block, masked ones included"""
    itemsize: int

    @property
    def bytes(self) -> int:
        """What the lanes that are on move."""
        return len(self.places) * self.itemsize


@dataclass
class Tape:
    """What happened between the beginning and the end of `record`."""

    launches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """kernel and number of programs along each axis, one entry for each launch"""
    accesses: list[Access] = field(default_factory=list)

    def select(self, kind: str | None = None, tensor: str | None = None) -> list[Access]:
        """The accesses of one kind, of one tensor, or of both."""
        return [a for a in self.accesses if kind in (None, a.kind) and tensor in (None, a.tensor)]

    def bytes(self, kind: str | None = None, tensor: str | None = None) -> int:
        """Bytes that the programs asked for; one that two of them load counts twice."""
        return sum(access.bytes for access in self.select(kind, tensor))


@contextlib.contextmanager
def record(strict: bool = False) -> Iterator[Tape]:
    """Note every load and store of every kernel that the interpreter runs meanwhile.

    `strict` raises an IndexError before something outside of the tensors is touched; otherwise
    such an access is noted under the tensor next to it. Raises RuntimeError where kernels are not
    interpreted: a GPU does not tell.
    """
    import triton
    import triton.runtime.interpreter as machine

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("only the interpreter can be recorded: set TRITON_INTERPRET=1 first")
    tape, spans, builder = Tape(), [], machine.interpreter_builder
    start = machine.GridExecutor._init_args_hst

    def starting(executor: Any, args: Any, kwargs: Any) -> Any:
        found = start(executor, args, kwargs)
        named = inspect.getcallargs(executor.fn, *found[0], **found[1])
        spans[:] = [(name, *_span(x)) for name, x in named.items() if hasattr(x, "data_ptr")]
        grid = executor.grid(named) if callable(executor.grid) else executor.grid
        tape.launches.append((executor.fn.__name__, tuple(grid)))
        return found

    def note(kind: str, pointers: Any, mask: Any) -> None:
        on = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses = pointers.data[on].astype(np.int64)
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        name, first, numbers = _owner(spans, addresses)
        places, program = (addresses - first) // itemsize, tuple(builder.grid_idx)
        if strict and len(places) and not 0 <= places.min() <= places.max() < numbers:
            raise IndexError(
                f"program {program} wants to {kind} {name} at places {places.min()} to "
                f"{places.max()}, but it has {numbers} numbers: is a mask missing, or wrong?"
            )
        tape.accesses.append(Access(program, kind, name, places, on.size, itemsize))

    def watch(kind: str, method: str, pointers: int, mask: int) -> None:
        before = getattr(builder, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            note(kind, args[pointers], args[mask])
            return before(*args, **kwargs)

        undo.callback(setattr, builder, method, before)
        setattr(builder, method, call)

    with contextlib.ExitStack() as undo:
        undo.callback(setattr, machine.GridExecutor, "_init_args_hst", start)
        machine.GridExecutor._init_args_hst = starting
        watch("load", "create_masked_load", pointers=0, mask=1)
        watch("store", "create_masked_store", pointers=0, mask=2)
        watch("atomic", "create_atomic_rmw", pointers=1, mask=3)
        yield tape


def _span(x: Any) -> tuple[int, int]:
    """Address of the first number, and how many there are up to the last."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (last + 1) * (x.numel() > 0)


def _owner(spans: list[tuple[str, int, int]], addresses: np.ndarray) -> tuple[str, int, int]:
    """The tensor that begins last before the lowest address; the first argument of several."""
    if not len(addresses):
        return "", 0, 0  # every lane is masked
    below = [span for span in spans if span[1] <= addresses.min()]
    return max(below or spans, key=lambda span: span[1])
