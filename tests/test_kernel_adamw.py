"""AdamW's kernel: many tensors at once against other optimizers, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import adamw as file
from kernels.adamw import cost, fused_adamw_, reference
from minillm.train.optim import AdamW
from tests.test_kernels import DEVICE, needs_triton

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# one number, none, a multiple of 16 and not, a last block that is full and one that is not
SHAPES = [(1,), (0,), (3, 5), (64, 48), (2048,), (41,), (), (4099,), (2, 0, 3), (16,)]


def draw(shapes, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(DEVICE, dtype) for shape in shapes]


def zeros(tensors, dtype=None):
    return [torch.zeros_like(x, dtype=dtype) for x in tensors]


def copies(tensors):
    return [x.clone() for x in tensors]


@needs_triton
@pytest.mark.parametrize("options", [OPTIONS, {**OPTIONS, "betas": (0.0, 0.999), "eps": 1e-3}])
def test_ten_steps_equal_those_of_pytorch_and_of_the_course(options):
    ours = draw(SHAPES)
    means, squares = zeros(ours), zeros(ours)
    others = [torch.optim.AdamW, AdamW]
    others = [(make, [p.clone().requires_grad_() for p in ours]) for make in others]
    others = [(make(params, **options), params) for make, params in others]
    for step in range(1, 11):
        grads = draw(SHAPES, seed=step)
        fused_adamw_(ours, grads, means, squares, step, **options)
        for optimizer, params in others:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for optimizer, params in others:
        for p, m, v, other in zip(ours, means, squares, params, strict=True):
            state = optimizer.state[other]
            # a few roundings in each step; v is a sum of squares, so its error is relative
            torch.testing.assert_close(p, other.detach(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(m, state["exp_avg"], rtol=1e-6, atol=3e-7)
            torch.testing.assert_close(v, state["exp_avg_sq"], rtol=2e-6, atol=0)


@needs_triton
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    block=st.sampled_from([16, 32, 64]),
    step=st.integers(1, 1000),
    seed=st.integers(0, 1000),
)
def test_a_list_of_any_sizes_is_each_tensor_by_itself(sizes, block, step, seed):
    shapes = [(n,) for n in sizes]
    params, grads, means = (draw(shapes, seed + i) for i in range(3))
    squares = [x.square() for x in draw(shapes, seed + 3)]
    given = list(zip(copies(params), grads, copies(means), copies(squares), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "BLOCK", block)
        fused_adamw_(params, grads, means, squares, step, **OPTIONS)
    for before, *after in zip(given, params, means, squares, strict=True):
        for found, expected in zip(after, reference(*before, step, **OPTIONS), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@needs_triton
def test_numbers_beside_a_parameter_stay():
    """Parameters that are parts of one buffer, most of them not at multiples of 16 bytes."""
    buffers = draw([(100,)] * 4)
    buffers[3].square_()
    before = copies(buffers)
    cuts = [(0, 16), (16, 17), (17, 40), (48, 64), (71, 99)]
    pieces = [[x[a:b] for a, b in cuts] for x in buffers]
    fused_adamw_(*pieces, 2, **OPTIONS)
    expected = reference(*before, 2, **OPTIONS)
    touched = torch.zeros(100, dtype=torch.bool, device=DEVICE)
    for a, b in cuts:
        touched[a:b] = True
    for i, wanted in zip((0, 2, 3), expected, strict=True):
        torch.testing.assert_close(buffers[i][touched], wanted[touched], rtol=1e-6, atol=1e-6)
        assert torch.equal(buffers[i][~touched], before[i][~touched])
    assert torch.equal(buffers[1], before[1])  # gradients are read only


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_with_wide_state_are_rounded_once(dtype):
    params, grads = draw(SHAPES, 0, dtype), draw(SHAPES, 1, dtype)
    means, squares = zeros(params, torch.float32), zeros(params, torch.float32)
    given = list(zip(copies(params), grads, copies(means), copies(squares), strict=True))
    fused_adamw_(params, grads, means, squares, 1, **OPTIONS)
    for before, p, m, v in zip(given, params, means, squares, strict=True):
        exact, *running = reference(*(x.double() for x in before), 1, **OPTIONS)
        unit = torch.finfo(dtype).eps / 2 * exact.abs()  # half a unit in the last place, at most
        assert ((p.double() - exact).abs() <= 1.001 * unit + 1e-7).all()
        for found, expected in zip((m, v), running, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-12)


@needs_triton
def test_masters_keep_the_updates_that_bf16_would_lose():
    """At a learning rate of 1e-4 a parameter of 1 in bf16 never moves; its master does."""
    options = {**OPTIONS, "lr": 1e-4, "weight_decay": 0.0}
    masters = [torch.ones(50, device=DEVICE), torch.ones(33, device=DEVICE)]
    alone, beside = ([x.bfloat16() for x in masters] for _ in range(2))
    states = [zeros(masters) for _ in range(4)]
    wide, state = copies(masters), [zeros(masters) for _ in range(2)]
    for step in range(1, 31):
        grads = [torch.ones_like(x) for x in alone]
        fused_adamw_(alone, grads, *states[:2], step, **options)
        fused_adamw_(beside, grads, *states[2:], step, **options, masters=masters)
        fused_adamw_(wide, [g.float() for g in grads], *state, step, **options)
    for a, b, master, w in zip(alone, beside, masters, wide, strict=True):
        assert (a == 1).all()
        assert torch.equal(master, w)
        assert torch.equal(b, master.bfloat16()) and (b < 1).all()


@needs_triton
def test_dtypes_in_any_mixture():
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    shapes = [(33,), (16,), (20,), (7, 7)]
    lists = [[x.to(k) for x, k in zip(draw(shapes, i), kinds, strict=True)] for i in range(3)]
    squares = [x.square() for x in draw(shapes, 3)]
    lists[2] = [x.float() for x in lists[2]]
    given = list(zip(*(copies(x) for x in lists), copies(squares), strict=True))
    fused_adamw_(*lists, squares, 5, **OPTIONS)
    for before, *after in zip(given, lists[0], lists[2], squares, strict=True):
        for found, expected in zip(after, reference(*before, 5, **OPTIONS), strict=True):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected)


@needs_triton
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_scale_multiplies_gradients_and_leaves_them(as_tensor):
    params, grads = draw(SHAPES), draw(SHAPES, 1)
    two, large = copies(params), [g * 1024 for g in grads]
    states = [zeros(params) for _ in range(4)]
    fused_adamw_(params, grads, *states[:2], 1, **OPTIONS)
    scale = torch.tensor(1 / 1024, dtype=torch.float64, device=DEVICE) if as_tensor else 1 / 1024
    before = copies(large)
    fused_adamw_(two, large, *states[2:], 1, **OPTIONS, scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(params, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(large, before, strict=True))


@needs_triton
def test_the_returned_tensors_are_those_given():
    lists = [draw([(4,)]) for _ in range(4)]
    lists[3][0].square_()
    found = fused_adamw_(*lists, 1, **OPTIONS)
    assert found[0] is lists[0] and found[1] is lists[2] and found[2] is lists[3]
    assert fused_adamw_([], [], [], [], 1, **OPTIONS) == ([], [], [])


@needs_triton
def test_a_backward_pass_through_overwritten_parameters_fails():
    p = torch.ones(4, device=DEVICE, requires_grad=True)
    loss = p.square().sum()
    fused_adamw_([p], *([torch.ones(4, device=DEVICE)] for _ in range(3)), 1, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def with_one_parameter(**replaced):
    """Arguments, some of them replaced."""
    lists = {k: [torch.ones(4, 4)] for k in ("params", "grads")}
    lists |= {k: [torch.zeros(4, 4)] for k in ("exp_avgs", "exp_avg_sqs")} | replaced
    for name, value in lists.items():
        if isinstance(value, list):
            lists[name] = [
                x.to(DEVICE) if x is not None and x.is_cpu and x.is_contiguous() else x
                for x in value
            ]
    return {"step": 1, **OPTIONS, **lists}


@needs_triton
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"step": 0}, "step=0 must be a whole number, 1 or more"),
        ({"step": 1.5}, r"step=1\.5"),
        ({"lr": -1e-3}, r"lr=-0\.001 must be at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) must be two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0\.9,\) must be two"),
        ({"eps": -1}, "eps=-1"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"grads": []}, "1 params, but 0 grads"),
        ({"grads": [None]}, r"grads\[0\] is None, params\[0\] is \(4, 4\)"),
        ({"exp_avgs": [torch.zeros(4)]}, r"exp_avgs\[0\] is \(4,\), params\[0\] is \(4, 4\)"),
        ({"masters": [torch.zeros(4, 4).half()]}, r"masters\[0\] must be float32"),
        ({"params": [torch.ones(4, 8)[:, ::2]]}, r"params\[0\] is overwritten and must be contig"),
        ({"scale": torch.ones(2)}, r"scale \(2,\) must be one number"),
        ({"scale": torch.ones((), device="meta")}, r"scale \(\) must be one number on"),
        ({"grads": [torch.ones(4, 4).double()]}, "dtype float64 must be one of"),
        ({"params": [torch.ones(4, 4).long()]}, "dtype int64"),
        ({"grads": [torch.ones(4, 4, device="meta")]}, "on one device"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(replaced, message):
    arguments = with_one_parameter(**replaced)
    before = [x.clone() for x in arguments["exp_avg_sqs"]]
    with pytest.raises(ValueError, match=message):
        fused_adamw_(**arguments)
    assert torch.equal(arguments["exp_avg_sqs"][0], before[0])


@needs_triton
def test_memory_that_is_shared_is_refused():
    p, buffer = torch.ones(4, device=DEVICE), torch.zeros(10, device=DEVICE)
    lists = [[x, x.clone()] for x in torch.zeros(3, 4, device=DEVICE)]
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share memory"):
        fused_adamw_([p, p], *lists, 1, **OPTIONS)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] and exp_avg_sqs\[0\] share memory"):
        fused_adamw_([p], [p], [buffer[:4]], [buffer[3:7]], 1, **OPTIONS)


def test_bytes_of_a_step():
    assert cost(10).bytes == 280  # 4 read, 3 written
    assert cost(10, param=2, grad=2, state=2).bytes == 140
    assert cost(10, param=2, grad=2, master=4).bytes == 280
