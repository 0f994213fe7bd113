"""Output matrix and loss in one: against PyTorch in fp64, without a matrix of all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from kernels import runtime
from kernels.linear_cross_entropy import (
    _add_product,
    chunked,
    cost,
    linear_cross_entropy,
    reference,
    rows_of_a_chunk,
)
from minillm.ops import op

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
FAST = [chunked, pytest.param(linear_cross_entropy, marks=needs_triton)]
FORMS = [reference, chunked, lambda *a, **k: chunked(*a, chunk=3, **k)]


def inputs(n=13, v=29, d=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=rng)
    return x, weight, targets, torch.rand(n, generator=rng) > 0.4


def by_pytorch(x, weight, targets, mask=None, scale=1.0):
    """Gradients by autograd through one matrix of logits in fp64."""
    x, weight = (y.detach().double().requires_grad_() for y in (x, weight))
    if mask is not None:
        targets = targets.masked_fill(~mask.bool(), -100)
    loss = F.cross_entropy(F.linear(x, weight) * scale, targets, reduction="sum")
    return loss.detach(), *torch.autograd.grad(3 * loss, (x, weight))


def run(form, x, weight, *rest, **kwargs):
    loss = form(x, weight, *rest, **kwargs)
    return loss.detach(), *torch.autograd.grad(3 * loss, (x, weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("n", [1, 2, 3, 13])
def test_loss_and_gradients_in_fp64(form, scale, n):
    x, weight, targets, mask = inputs(n)
    mask[0] = True
    for m in (None, mask, mask.long()):
        want = by_pytorch(x, weight, targets, m, scale)
        torch.testing.assert_close(run(form, x, weight, targets, m, scale), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision_stays_as_near_as_the_plain_form(dtype, autocast):
    x, weight, targets, mask = inputs(200, 300, 32, dtype)
    want = by_pytorch(x, weight, targets, mask)
    errors = {}
    for form in (reference, chunked):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = run(form, x, weight, targets, mask)
        assert got[0].dtype == torch.float32 and got[0].ndim == 0
        assert [g.dtype for g in got[1:]] == [dtype, dtype]
        pairs = zip(got, want, strict=True)
        errors[form] = [((g.double() - w).norm() / w.norm()).item() for g, w in pairs]
    bound = 1e-6 if dtype == torch.float32 and not autocast else 2e-2
    assert max(errors[chunked]) < bound
    both = zip(errors[chunked], errors[reference], strict=True)
    assert all(ours < 1.5 * plain + 1e-6 for ours, plain in both)


def test_large_logits_neither_overflow_nor_vanish():
    weight = torch.tensor([[1e4], [0.0], [-1e4]], requires_grad=True)
    x = torch.ones(3, 1, requires_grad=True)
    targets = torch.arange(3)
    for form in FORMS:
        loss, grad_x, _ = run(form, x, weight, targets)
        assert loss.item() == 3e4
        assert torch.equal(grad_x, 3 * torch.tensor([[0.0], [1e4], [2e4]]))


def test_nothing_counts_and_one_side_needs_no_gradient():
    x, weight, targets, mask = inputs()
    for form in FORMS:
        loss, grad_x, grad_w = run(form, x, weight, targets, torch.zeros_like(mask))
        assert loss == 0 and not grad_x.any() and not grad_w.any()
        want = by_pytorch(x, weight, targets)
        (grad,) = torch.autograd.grad(3 * form(x.detach(), weight, targets), weight)
        torch.testing.assert_close(grad, want[2])
        (grad,) = torch.autograd.grad(3 * form(x, weight.detach(), targets), x)
        torch.testing.assert_close(grad, want[1])
        with torch.no_grad():
            torch.testing.assert_close(form(x, weight, targets), want[0])


def test_gradients_add_up_and_can_be_asked_for_twice():
    x, weight, targets, _ = inputs()
    loss = chunked(x, weight, targets, chunk=4)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert torch.autograd.gradcheck(lambda a, b: reference(a, b, targets), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: chunked(a, b, targets, chunk=5), (x, weight))


def test_what_is_kept_for_backward_are_the_gradients_not_the_logits():
    n, v, d = 600, 500, 8
    x, weight, targets, _ = inputs(n, v, d, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda y: kept.append(y.nbytes) or y, lambda y: y
    ):
        loss = chunked(x, weight, targets)
    del loss
    assert sum(kept) == 4 * (n * d + v * d)


def test_the_largest_matrix_holds_one_chunk():
    x, weight, targets, _ = inputs(64, 100, 8, torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        chunked(x, weight, targets, chunk=16).backward()
    assert max(sizes) == 16 * 100
    with Watch():
        reference(x, weight, targets)
    assert max(sizes) == 64 * 100


def test_cost_counts_three_products_and_the_logits():
    assert cost(10, 20, 4).flops == 3 * 2 * 10 * 20 * 4
    explicit, in_chunks = cost(4096, 4096, 128), cost(4096, 4096, 128, chunk=128)
    assert explicit.flops == in_chunks.flops and explicit.bytes > 3 * 4 * 4096**2
    assert in_chunks.bytes < explicit.bytes


def test_the_two_forms_are_registered():
    x, weight, targets = torch.randn(5, 4), torch.randn(7, 4), torch.arange(5)
    found = op("linear_cross_entropy", "auto")(x, weight, targets)
    assert torch.equal(found, chunked(x, weight, targets))
    assert op("linear_cross_entropy", "reference") is reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.float64)}, r"x \(3, 4\), weight \(29, 8\)"),
        ({"targets": torch.ones(2, dtype=torch.long)}, r"targets \(2,\), no mask"),
        ({"mask": torch.ones(2)}, r"mask \(2,\)"),
        ({"targets": torch.full((13,), 29)}, "targets run from 29 to 29, weight has 29 rows"),
        ({"targets": torch.full((13,), -100)}, "targets run from -100"),
    ],
)
@pytest.mark.parametrize("form", [reference, chunked])
def test_bad_input_is_named(form, change, message):
    x, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match=message):
        form(**{"x": x, "weight": weight, "targets": targets, "mask": None} | change)


def test_faults_of_the_chunked_form_are_named():
    x, weight, targets, mask = inputs()
    targets = targets.masked_fill(~mask, -100)
    assert math.isfinite(chunked(x, weight, targets, mask).item())  # what is left out may be bad
    with pytest.raises(ValueError, match="chunk=0"):
        chunked(x, weight, targets, mask, chunk=0)
    with pytest.raises(ValueError, match=r"x is torch.float64, weight torch.float32"):
        chunked(x, weight.float(), targets, mask)
    loss = chunked(x, weight, targets, mask)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def on_device(*given):
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in given]


@pytest.mark.slow
@pytest.mark.parametrize("form", FAST)
def test_many_small_gradients_add_up_in_float32(form):
    """In bf16 a sum stops growing where the next term is under half a unit of it."""
    x, weight, targets, _ = on_device(*inputs(256, 16, 8, torch.bfloat16))
    with torch.no_grad():
        x.abs_()  # all terms of one sign, or the sums would stay small
    _, _, want = by_pytorch(x.cpu(), weight.cpu(), targets.cpu())

    def error(grad):
        return ((grad.cpu().double() - want).norm() / want.norm()).item()

    _, _, got = run(form, x, weight, targets, chunk=2)
    _, _, plain = run(reference, x, weight, targets)
    narrow = torch.zeros_like(weight)
    for start in range(0, 256, 2):
        rows = slice(start, start + 2)
        narrow += run(reference, x[rows], weight, targets[rows])[2]
    assert error(narrow) > 4 * error(plain)  # what is to be noticed
    assert error(got) < 1.5 * error(plain)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_does_what_the_chunks_do(dtype, autocast):
    x, weight, targets, mask = on_device(*inputs(200, 300, 32, dtype))
    results = []
    for form in (linear_cross_entropy, chunked):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            results.append(run(form, x, weight, targets, mask, 0.3, chunk=33))
    low = autocast or dtype != torch.float32
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        largest = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=largest * (1e-2 if low else 1e-5))


@needs_triton
def test_the_kernel_where_one_side_needs_no_gradient_or_none_does():
    x, weight, targets, mask = on_device(*inputs(dtype=torch.float32))
    loss, grad_x, grad_w = run(linear_cross_entropy, x, weight, targets, mask)
    alone = linear_cross_entropy(x.detach(), weight, targets, mask)
    torch.testing.assert_close(torch.autograd.grad(3 * alone, weight)[0], grad_w)
    alone = linear_cross_entropy(x, weight.detach(), targets, mask)
    torch.testing.assert_close(torch.autograd.grad(3 * alone, x)[0], grad_x)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, mask), loss)
    loss, grad_x, grad_w = run(linear_cross_entropy, x, weight, targets, torch.zeros_like(mask))
    assert loss == 0 and not grad_x.any() and not grad_w.any()
    loss = linear_cross_entropy(x, weight, targets)
    with pytest.raises(ValueError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes at one time in matrices with so many columns, beside those in `given`."""

    def __init__(self, columns, *given):
        super().__init__()
        self.columns, self.alive, self.most = columns, {}, 0
        self.given = {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (self.columns,):
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.given:
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(n for _, n in self.alive.values()))
        return out


@needs_triton
def test_logits_take_under_a_twentieth_of_the_memory():
    n, v = 6144, 130
    x, weight, targets, _ = on_device(*inputs(n, v, 8, torch.float32))
    most = {}
    for form in (reference, linear_cross_entropy):
        with Live(v, weight) as live:
            form(x, weight, targets).backward()
        most[form] = live.most
    assert most[reference] >= 2 * 4 * n * v
    assert most[linear_cross_entropy] == 4 * rows_of_a_chunk(n) * v
    assert most[linear_cross_entropy] < 0.05 * most[reference]


@pytest.mark.parametrize("tokens", [5120, 8192, 10_000, 65_536, 1_000_000])
def test_the_default_chunk_is_under_a_twentieth_of_the_rows(tokens):
    assert 256 <= rows_of_a_chunk(tokens) <= tokens / 20


def test_products_are_added_where_they_are():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=rng), torch.randn(7, 3, generator=rng)
    for low in (torch.float32, torch.bfloat16):
        total = torch.ones(5, 3)
        _add_product(total, a.to(low), b.to(low))
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if low == torch.bfloat16 else {}
        torch.testing.assert_close(total, 1 + a @ b, **tolerance)
    # what runs on a GPU is at least an operation that PyTorch knows, of these types and shapes
    total = torch.ones(5, 3, device="meta")
    _add_product(total, a.bfloat16().to("meta"), b.bfloat16().to("meta"))
    assert total.shape == (5, 3) and total.dtype == torch.float32


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(13, 8, dtype=torch.float64)}, "float64 must be one of"),
        ({"weight": torch.ones(29, 7)}, r"x \(13, 8\), weight \(29, 7\)"),
        ({"weight": torch.ones(29, 8).half()}, "x is torch.float32, weight torch.float16"),
        ({"targets": torch.ones(2, dtype=torch.long)}, r"targets \(2,\), no mask"),
        ({"mask": torch.ones(2)}, r"mask \(2,\)"),
        ({"chunk": 0}, "chunk=0"),
        ({"weight": torch.ones(29, 8, device="meta")}, "one device"),
    ],
)
def test_bad_input_of_the_kernel_is_named(change, message):
    x, weight, targets, _ = inputs(dtype=torch.float32)
    given = {"x": x, "weight": weight, "targets": targets, "mask": None} | change
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            given[name] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)


@needs_triton
@pytest.mark.parametrize("wrong", [29, -1, -100])
def test_targets_outside_are_an_error_or_nan(wrong):
    x, weight, targets, mask = on_device(*inputs(dtype=torch.float32))
    targets[2], mask[2] = wrong, False
    assert linear_cross_entropy(x, weight, targets, mask).isfinite()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"(from|to) {wrong}"):
            linear_cross_entropy(x, weight, targets)
    else:
        assert linear_cross_entropy(x, weight, targets).isnan()
