"""Every kernel against its reference in float64: all dtypes, awkward shapes, planted faults.

Where there is a GPU the same tests run on it; else in the interpreter.
"""

import importlib
import importlib.util
import inspect
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from kernels import runtime
from tests.kernel_cases import Case

KERNELS = Path(runtime.__file__).parent
FOLDER = Path(__file__).parent / "kernel_cases"
NAMES = sorted(p.stem for p in FOLDER.glob("[!_]*.py"))
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
ROUNDOFF |= {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def cases_of(name):
    return importlib.import_module(f"tests.kernel_cases.{name}")


def short(dtype):
    return str(dtype).removeprefix("torch.")


def every_case():
    for name in NAMES:
        for case in cases_of(name).CASES:
            for dtype in case.dtypes:
                # one dtype is a quick look; all of them, and the planted faults, take minutes
                marks = [] if dtype == case.dtypes[0] else [pytest.mark.slow]
                how = f"{name}-{case.name}-{short(dtype)}"
                yield pytest.param(name, case, dtype, id=how, marks=marks)


def every_fault():
    for name in NAMES:
        for fault in cases_of(name).FAULTS:
            yield pytest.param(name, fault, id=f"{name}-{fault.what}")


def test_every_kernel_file_is_tested():
    files = {p.stem for p in KERNELS.glob("*.py") if "\ndef reference" in p.read_text()}
    assert set(NAMES) == files
    for name in NAMES:
        named = [case.name for case in cases_of(name).CASES]
        assert len(set(named)) == len(named)
        assert len(cases_of(name).FAULTS) >= 3, f"{name}: plant faults"
        for fault in cases_of(name).FAULTS:
            assert fault.caught_by in named, f"{name}: no case {fault.caught_by!r}"


@needs_triton
@pytest.mark.parametrize(("name", "case", "dtype"), list(every_case()))
def test_a_kernel_equals_its_reference(name, case, dtype):
    verify(importlib.import_module(f"kernels.{name}"), case, dtype)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), list(every_fault()))
def test_a_planted_fault_is_caught(name, fault, tmp_path, monkeypatch):
    """The reference stays whole: only the faulty file's kernel is judged by it."""
    right, file = importlib.import_module(f"kernels.{name}"), fault.file or name
    text = (KERNELS / f"{file}.py").read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.old!r} stands {text.count(fault.old)} times"
    module = load_as(f"kernels.{file}", tmp_path, text.replace(fault.old, fault.new), monkeypatch)
    if file != name:
        own = (KERNELS / f"{name}.py").read_text(encoding="utf-8")
        module = load_as(f"kernels.{name}", tmp_path, own, monkeypatch)
    (case,) = (case for case in cases_of(name).CASES if case.name == fault.caught_by)
    if isinstance(case.reference, str):
        case = replace(case, reference=getattr(right, case.reference))
    try:
        verify(module, case, fault.dtype)
    except AssertionError:
        return
    pytest.fail(f"{fault.what}: case {case.name!r} did not notice")


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_right_or_refused_never_dropped(name):
    cases = [c for c in cases_of(name).CASES if c.gradients and torch.float32 in c.dtypes]
    if not cases:
        pytest.skip("nothing differentiates it")
    case, module = cases[0], importlib.import_module(f"kernels.{name}")
    given = {
        key: x.to(DEVICE, torch.float32) if getattr(x, "dtype", None) == torch.float64 else x
        for key, x in case.inputs(torch.Generator().manual_seed(0)).items()
    }
    leaves = [given[key].requires_grad_() for key in case.gradients]
    (out, *_) = as_tuple(getattr(module, case.function)(**given))
    way = torch.ones_like(out, requires_grad=True)
    try:
        grads = torch.autograd.grad(out, leaves, way, create_graph=True)
    except ValueError as error:
        assert "second derivative" in str(error)
    else:
        assert all(grad.requires_grad for grad in grads), "what came from above is forgotten"


def load_as(name, folder, text, monkeypatch):
    """A module from this text, which until the end of the test is what `import name` finds."""
    path = folder / f"faulty_{name.split('.')[-1]}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, name.split(".")[-1], module, raising=False)
    spec.loader.exec_module(module)
    return module


def verify(module, case: Case, dtype):
    """Raise AssertionError where results or gradients are further off than the case allows."""
    rng = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    given = case.inputs(rng)
    low, wide = {}, {}
    for key, value in given.items():
        low[key] = wide[key] = value
        if isinstance(value, torch.Tensor):
            low[key] = value.to(DEVICE)
            if value.dtype == torch.float64:
                low[key] = rounded(value, dtype).to(DEVICE)
                wide[key] = low[key].detach().cpu().double()
    for key in case.gradients:
        low[key].requires_grad_()
        wide[key].requires_grad_()
    exact = case.reference
    exact = getattr(module, exact) if isinstance(exact, str) else exact
    got, want = as_tuple(getattr(module, case.function)(**low)), as_tuple(exact(**wide))
    assert len(got) == len(want)
    pairs = [(f"result {i}", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    if case.gradients:
        ways = [torch.randn(w.shape, generator=rng, dtype=w.dtype) for w in want]
        # the reference gets what the kernel gets: the rounded gradient
        ways = [w.to(g.dtype) for w, g in zip(ways, got, strict=True)]
        sides = ((got, low, [w.to(DEVICE) for w in ways]), (want, wide, [w.double() for w in ways]))
        grads = []
        for outputs, inputs, upstream in sides:
            leaves = [inputs[key] for key in case.gradients]
            real = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
            results, ways_back = zip(*real, strict=True)
            grads.append(torch.autograd.grad(results, leaves, ways_back))
        pairs += [
            (f"gradient of {k}", g, w) for k, g, w in zip(case.gradients, *grads, strict=True)
        ]
    for what, g, w in pairs:
        compare(what, g.detach().cpu(), w.detach(), case, dtype)


def rounded(value, dtype):
    """The same numbers and strides in another dtype; what lies between them is 7."""
    span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    flat = torch.full((max(span, 0),), 7.0, dtype=dtype)
    return flat.as_strided(value.shape, value.stride()).copy_(value)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def compare(what, got, want, case, dtype):
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.is_floating_point():
        assert torch.equal(got, want.to(got.dtype)), what
        return
    if want.numel() == 0:
        return
    slack = case.slack[dtype] if isinstance(case.slack, dict) else case.slack
    got = got.double()
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    assert torch.equal(got[want.isinf()], want[want.isinf()]), f"{what}: infinities differ"
    size = want.abs().where(finite, 0.0)
    largest = size.amax(-1, keepdim=True) if case.norm_over == "row" and want.ndim else size.amax()
    allowed = slack * ROUNDOFF[dtype] * (size + largest + case.terms)
    off = ((got - want).abs() - allowed).where(finite, -1.0)
    worst = int(off.argmax())
    assert off.flatten()[worst] <= 0, (
        f"{what}: {got.flatten()[worst]:.6g} instead of {want.flatten()[worst]:.6g} at number "
        f"{worst} of {tuple(want.shape)}; allowed ±{allowed.expand_as(want).flatten()[worst]:.2g}"
    )


def test_the_comparison_sees_what_it_should():
    case = Case("x", "f", lambda rng: {}, slack=1)
    want = torch.tensor([[1.0, 100.0]], dtype=torch.float64)
    compare("fine", want + 100 * 2.0**-24, want, case, torch.float32)
    for wrong in (want + 300 * 2.0**-24, want * float("nan"), want[:, :1]):
        with pytest.raises(AssertionError):
            compare("wrong", wrong, want, case, torch.float32)


def test_kernel_files_have_the_order_that_a_reader_expects():
    """reference, kernels, autograd function, public function, cost."""
    for name in NAMES:
        module = importlib.import_module(f"kernels.{name}")
        text = inspect.getsource(module)
        first = text.index("def reference")
        assert first < text.index("@jit") < text.rindex("\ndef cost("), name
