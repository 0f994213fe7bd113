"""Checks for assignments, with messages that teach: what was expected, what came, where they part.

    check.equal(merge(pairs), [1, 2], "merge joins every occurrence of the pair")

Each function returns None when all is well and raises `AssertionError` otherwise, which is what
the grader counts.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def that(condition: object, message: str) -> None:
    """Raise AssertionError(message) unless `condition` is true.

    >>> that(1 + 1 == 2, "arithmetic still works")
    """
    if not bool(condition):
        raise AssertionError(message)


def equal(got: object, want: object, message: str = "") -> None:
    """Raise AssertionError unless `got` equals `want`, in type, shape, dtype kind and value.

    Takes numbers, strings, bytes, lists, tuples, dicts, sets, NumPy arrays and tensors, nested
    as well. NaN equals NaN here, since a test that expects NaN means it.

    >>> equal([1, 2, 3], [1, 5, 3], "doubled")
    Traceback (most recent call last):
        ...
    AssertionError: doubled
      at [1]: expected 5, got 2
    """
    _report(_difference(got, want, rtol=0.0, atol=0.0, at=""), message)


def close(
    got: object, want: object, message: str = "", rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Raise AssertionError unless |got - want| <= atol + rtol * |want| everywhere.

    Shapes must agree exactly (nothing is broadcast); dtypes may differ. Takes what `equal` takes.

    >>> close(0.1 + 0.2, 0.3)
    """
    if rtol < 0 or atol < 0:
        raise ValueError(f"rtol={rtol} and atol={atol} must not be negative")
    _report(_difference(got, want, rtol=rtol, atol=atol, at=""), message)


def raises(
    exception: type[BaseException] | tuple[type[BaseException], ...],
    fn: Callable[[], object],
    message: str = "",
) -> BaseException:
    """Call `fn()` and return the exception it raised, which must be of the given type.

    >>> str(raises(ValueError, lambda: int("x"), "not a number"))
    "invalid literal for int() with base 10: 'x'"
    """
    kinds = exception if isinstance(exception, tuple) else (exception,)
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        result = fn()
    except kinds as error:
        return error
    except Exception as error:
        _report(f"expected {names}, but {type(error).__name__} was raised: {error}", message, error)
    _report(f"expected {names} to be raised, but the call returned {_brief(result)}", message)
    raise RuntimeError("unreachable")


def _report(problem: str, message: str, cause: BaseException | None = None) -> None:
    if problem:
        text = f"{message}\n  {problem}" if message else problem
        raise AssertionError(text) from cause


def _brief(value: object) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 90
    return short.repr(value)


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _as_numpy(value: object) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor; NumPy has no bfloat16, float32 holds it exactly
        value = value.detach().cpu()
        return value.float().numpy() if "bfloat16" in str(value.dtype) else value.numpy()
    return np.asarray(value)


def _difference(got: object, want: object, rtol: float, atol: float, at: str) -> str:
    """One sentence about the first place where the two part, or ''."""
    where = f"at {at}: " if at else ""
    if got is None and want is not None:
        return f"{where}expected {_describe(want)}, got None: is a `return` missing?"
    if got is NotImplemented or got is Ellipsis:
        return f"{where}expected {_describe(want)}, got {got!r}: this part is still to be written"
    exact = rtol == atol == 0.0
    if _is_array(want) or _is_array(got):
        return _array_difference(got, want, rtol, atol, where)
    if isinstance(want, str | bytes) and isinstance(got, type(want)):
        return _text_difference(got, want, where)
    if isinstance(want, Mapping) and isinstance(got, Mapping):
        missing = [key for key in want if key not in got]
        extra = [key for key in got if key not in want]
        if missing or extra:
            return f"{where}keys differ: missing {_brief(missing)}, not expected {_brief(extra)}"
        pairs = ((got[key], want[key], f"{at}[{key!r}]") for key in want)
        return next(filter(None, (_difference(g, w, rtol, atol, p) for g, w, p in pairs)), "")
    if isinstance(want, list | tuple) and isinstance(got, list | tuple):
        return _sequence_difference(got, want, rtol, atol, at, where)
    number = (int, float, complex, np.number)
    if isinstance(got, number) and isinstance(want, number) and not isinstance(want, bool):
        if isinstance(got, bool):
            return f"{where}expected the number {want!r}, got {got!r}"
        if got == want or (got != got and want != want):
            return ""
        if not exact and abs(got - want) <= atol + rtol * abs(want):
            return ""
        allowed = (
            ""
            if exact
            else f" (off by {abs(got - want):.3g}, allowed {atol + rtol * abs(want):.3g})"
        )
        return f"{where}expected {want!r}, got {got!r}{allowed}"
    if type(got) is not type(want):
        return f"{where}expected {_describe(want)}, got {_describe(got)}"
    return "" if got == want else f"{where}expected {_brief(want)}, got {_brief(got)}"


def _describe(value: object) -> str:
    if _is_array(value):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"the {type(value).__name__} {_brief(value)}"


def _text_difference(got: str | bytes, want: str | bytes, where: str) -> str:
    if got == want:
        return ""
    pairs = enumerate(zip(got, want, strict=False))
    i = next((i for i, (g, w) in pairs if g != w), min(len(got), len(want)))
    start = max(0, i - 20)
    cut = slice(start, i + 20)
    return (
        f"{where}the texts part at position {i}: expected …{want[cut]!r}…, got …{got[cut]!r}… "
        f"(lengths {len(want)} and {len(got)})"
    )


def _sequence_difference(
    got: Sequence, want: Sequence, rtol: float, atol: float, at: str, where: str
) -> str:
    if isinstance(got, list) != isinstance(want, list):
        return (
            f"{where}expected a {type(want).__name__}, got the {type(got).__name__} {_brief(got)}"
        )
    for i, (g, w) in enumerate(zip(got, want, strict=False)):
        problem = _difference(g, w, rtol, atol, f"{at}[{i}]")
        if problem:
            return problem
    if len(got) != len(want):
        return f"{where}expected {len(want)} entries, got {len(got)}: {_brief(got)}"
    return ""


def _array_difference(got: object, want: object, rtol: float, atol: float, where: str) -> str:
    if not _is_array(got) and not (np.isscalar(got) and not isinstance(got, str | bytes)):
        return f"{where}expected {_describe(want)}, got {_describe(got)}"
    g, w = _as_numpy(got), _as_numpy(want)
    if g.shape != w.shape:
        return f"{where}expected shape {w.shape}, got shape {g.shape}"
    if rtol == atol == 0.0 and g.dtype.kind != w.dtype.kind:
        return f"{where}expected dtype {w.dtype}, got {g.dtype}"
    if w.dtype.kind in "biufc" and g.dtype.kind in "biufc":
        wide = complex if "c" in (w.dtype.kind, g.dtype.kind) else float
        both_integer = w.dtype.kind in "biu" and g.dtype.kind in "biu"
        g, w = (g, w) if both_integer else (g.astype(wide), w.astype(wide))
        with np.errstate(invalid="ignore", over="ignore"):
            same = (g == w) | (np.isnan(g) & np.isnan(w))
            if rtol or atol:
                same |= np.isfinite(w) & (np.abs(g - w) <= atol + rtol * np.abs(w))
    else:
        same = np.asarray(g == w)
    if same.all():
        return ""
    first = tuple(int(i) for i in np.argwhere(~same)[0])
    place = f" at index {first if len(first) != 1 else first[0]}" if first else ""
    values = (
        f"expected {w[first]:.6g}, got {g[first]:.6g}"
        if w.dtype.kind == "f"
        else (f"expected {w[first]}, got {g[first]}")
    )
    return (
        f"{where}{int((~same).sum())} of {same.size} values differ (shape {w.shape}); "
        f"the first{place}: {values}"
    )
