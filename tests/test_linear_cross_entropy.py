"""Output matrix and loss in one: against PyTorch in fp64, without a matrix of all logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.linear_cross_entropy import chunked, cost, reference
from minillm.ops import op

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
    assert op("linear_cross_entropy", "auto") is chunked
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
