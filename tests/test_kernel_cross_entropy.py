"""Cross-entropy beside the common suite: bad input, in place, against PyTorch and the course."""

import pytest
import torch
import torch.nn.functional as F

from kernels import runtime
from kernels.cross_entropy import cost, cross_entropy, launch, reference
from minillm.train import losses

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
NAN = float("nan")

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
FORMS = [reference, pytest.param(cross_entropy, marks=needs_triton)]


def inputs(n=13, v=41, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, v, generator=rng)
    targets = torch.randint(v, (n,), generator=rng)
    mask = torch.rand(n, generator=rng) > 0.4
    return logits.to(DEVICE, dtype).requires_grad_(), targets.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_equals_pytorch(form, smooth):
    logits, targets, _ = inputs()
    targets[::3] = -100
    up = torch.randn(len(targets), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for loss in (
        form(logits, targets, label_smoothing=smooth),
        F.cross_entropy(logits, targets, reduction="none", label_smoothing=smooth),
    ):
        results.append((loss.detach(), *torch.autograd.grad(loss, logits, up)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("smooth", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.1, 1e-3)])
def test_its_mean_is_the_loss_of_the_course(form, smooth, z):
    logits, targets, mask = inputs()
    mine = form(logits, targets, mask, label_smoothing=smooth, z_loss=z).sum() / mask.sum()
    want = losses.cross_entropy(logits, targets, mask, smooth, z)
    torch.testing.assert_close(mine, want)
    torch.testing.assert_close(torch.autograd.grad(mine, logits), torch.autograd.grad(want, logits))


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_32_bits_and_masks_of_numbers(form):
    logits, targets, mask = inputs()
    want = form(logits, targets, mask)
    assert torch.equal(form(logits, targets.int(), mask.float()), want)
    assert torch.equal(form(logits, targets.where(mask, -1), ignore_index=-1), want)
    strided = torch.stack([targets, targets.flip(0)], -1)[:, 0]
    assert torch.equal(form(logits, strided, mask), want)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_the_logits_become_their_gradient(dtype):
    logits, targets, mask = inputs(dtype=dtype)
    before = logits.detach().clone().requires_grad_()
    up = torch.linspace(-1, 2, len(targets), device=DEVICE)
    (want,) = torch.autograd.grad(cross_entropy(before, targets, mask), before, torch.ones_like(up))
    loss = cross_entropy(logits, targets, mask, inplace=True)
    assert torch.equal(loss, cross_entropy(before, targets, mask))
    tolerance = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits.detach(), want, **tolerance)
    assert not logits[~mask].any()
    (grad,) = torch.autograd.grad(loss, logits, up)
    torch.testing.assert_close(grad, want * up[:, None].to(dtype), **tolerance)
    assert grad.data_ptr() == logits.data_ptr()  # nothing of this size was allocated


@needs_triton
def test_in_place_inside_of_a_graph():
    _, targets, _ = inputs()
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(13, 5, generator=rng).to(DEVICE)
    weight = torch.randn(41, 5, generator=rng).to(DEVICE).requires_grad_()
    grads = []
    for inplace in (False, True):
        loss = cross_entropy(x @ weight.T, targets, inplace=inplace).mean()
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads)


@needs_triton
def test_in_place_is_refused_where_others_need_the_logits():
    logits, targets, _ = inputs()
    kept = logits.tanh()  # tanh keeps its result for its own backward
    loss = cross_entropy(kept, targets, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = cross_entropy(logits * 1.0, targets, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_triton
@pytest.mark.parametrize("change", ["transposed", "one row for all", "overlapping"])
def test_in_place_needs_rows_of_their_own(change):
    base = torch.zeros(64, device=DEVICE)
    logits = {
        "transposed": base.view(8, 8).T,
        "one row for all": base[:8].expand(8, 8),
        "overlapping": base.as_strided((8, 8), (4, 1)),
    }[change]
    targets = torch.zeros(8, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="strides are"):
        cross_entropy(logits, targets, inplace=True)
    assert not base.any()
    torch.testing.assert_close(cross_entropy(logits, targets), reference(logits, targets))
    cross_entropy(logits[:1, :1], targets[:1], inplace=True)  # a single number overlaps nothing


@needs_triton
@pytest.mark.parametrize("wrong", [-1, 41, 2**31 - 1, -(2**40), 2**62])
def test_on_a_gpu_a_target_outside_gives_nan_and_reads_nothing(wrong):
    """The kernel without the look at the targets that CPU tensors get before it."""
    around = torch.full((5, 41 + 2), 1e30, device=DEVICE)  # what a read outside would bring
    logits = around[:, 1:-1].copy_(inputs(5)[0].detach())
    before, (_, targets, _) = logits.clone(), inputs(5)
    want, _ = launch(logits, targets, -100)
    targets[2] = wrong
    loss, _ = launch(logits, targets, -100, in_place=True)
    assert loss[2].isnan() and logits[2].isnan().all()
    sound = [0, 1, 3, 4]
    assert torch.equal(loss[sound], want[sound]) and logits[sound].isfinite().all()
    assert (around[:, [0, -1]] == 1e30).all()
    if DEVICE == "cuda":
        before.requires_grad_()
        loss = cross_entropy(before, targets)
        (grad,) = torch.autograd.grad(loss.sum(), before)
        assert loss[2].isnan() and grad[2].isnan().all() and grad[sound].isfinite().all()


def bad(**change):
    logits, targets, mask = inputs()
    return {"logits": logits.detach(), "targets": targets, "mask": mask} | change


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"got \(2, 3, 4\) and \(13,\)"),
        ({"logits": torch.zeros(13, 0)}, r"v > 0 .* got \(13, 0\)"),
        ({"targets": torch.zeros(12, dtype=torch.long)}, r"\(13, 41\) and \(12,\)"),
        ({"targets": torch.zeros(13)}, "int64 or int32, not torch.float32"),
        ({"mask": torch.ones(12, dtype=torch.bool)}, r"mask \(12,\) and targets \(13,\)"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"z_loss": NAN}, "z_loss=nan"),
    ],
)
def test_bad_input_is_named(form, change, message):
    given = bad(**change)
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        form(**given)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody waits to look at the targets")
@pytest.mark.parametrize("form", FORMS)
def test_targets_outside_are_named_unless_left_out(form):
    logits, targets, mask = inputs()
    for wrong in (-1, 41, -100):
        targets[3], mask[3] = wrong, True
        with pytest.raises(ValueError, match=rf"(from|to) {wrong}\b.* vocabulary of 41"):
            form(logits, targets, mask, ignore_index=-7)
        mask[3] = False
        assert form(logits, targets, mask, ignore_index=-7).isfinite().all()


@needs_triton
def test_dtypes_and_devices_are_named():
    given = bad()
    for change, message in (
        ({"logits": given["logits"].double()}, "float64 must be one of"),
        ({"logits": given["logits"].int()}, "int32 must be one of"),
        ({"targets": given["targets"].to("meta")}, "one device"),
        ({"mask": given["mask"].to("meta")}, "one device"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(**given | change)


def test_cost_counts_what_passes_through_memory():
    logits = torch.zeros(7, 1000)
    assert cost(7, 1000).bytes == logits.nbytes
    assert cost(7, 1000, backward=True).bytes == cost(7, 1000, inplace=True).bytes
    assert cost(7, 1000, itemsize=2, inplace=True).bytes == logits.nbytes
    together = cost(7, 1000).flops + cost(7, 1000, backward=True).flops
    apart = cost(7, 1000, inplace=True).flops + cost(7, 1000, backward=True, inplace=True).flops
    assert together == apart
