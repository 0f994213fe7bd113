"""Rotary positions beside the common suite: bad input, properties, strides, counted bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import runtime
from kernels.rope import cost, reference, rope
from minillm.model.position import convert_layout, rotate, rotation

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)


def angles(t, d):
    return tuple(x.to(DEVICE) for x in rotation(torch.arange(t), d))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_reference_is_the_models_rotation(layout):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for positions in (torch.arange(5), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])[:, None]):
        cos, sin = rotation(positions.double(), 8)
        torch.testing.assert_close(
            reference(x, cos, sin, layout),
            rotate(x, cos, sin, layout, impl="reference"),
            rtol=0,
            atol=0,
        )
    # one pair, by hand: a quarter turn takes (1, 2) to (-2, 1)
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    turned = reference(x, torch.zeros(1, 1), torch.ones(1, 1), layout)
    assert turned.flatten().tolist() == [-2.0, 1.0]


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 10),
    t=st.integers(1, 9),
    half=st.integers(1, 20),
    layout=st.sampled_from(["half", "interleaved"]),
    order=st.permutations([0, 1, 2]),
    seed=st.integers(0, 2**31),
)
def test_lengths_stay_and_turning_back_gives_the_input(b, h, t, half, layout, order, seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = [(b, h, t)[axis] for axis in order]
    back = [order.index(axis) for axis in range(3)]
    x = torch.randn(*sizes, 2 * half, generator=rng).to(DEVICE).permute(*back, 3)
    angle = torch.rand(t, half, generator=rng).to(DEVICE) * 100
    x.requires_grad_()
    y = rope(x, angle.cos(), angle.sin(), layout)
    torch.testing.assert_close(y, reference(x, angle.cos(), angle.sin(), layout))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert y.stride() == x.stride()
    # a rotation's gradient is the rotation back
    (again,) = torch.autograd.grad(y, x, y)
    torch.testing.assert_close(again, x.detach())


@needs_triton
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone(layout):
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64, generator=rng).to(DEVICE).expand(1, 1, 9, 64) for _ in "qk")
    q, k = (rope(x, *angles(9, 64), layout) for x in (q, k))
    scores = (q @ k.mT)[0, 0]
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)
    assert scores[:, 0].std() > 0.1


@needs_triton
def test_layouts_are_permutations_of_each_other():
    x = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    turn = angles(5, 12)
    to = convert_layout(torch.arange(12), 12, "interleaved").to(DEVICE)
    assert torch.equal(rope(x[..., to], *turn, "interleaved"), rope(x, *turn, "half")[..., to])


@needs_triton
def test_no_number_is_copied_or_changed_on_the_way(monkeypatch):
    projected = torch.randn(2, 5, 3, 4, 6, device=DEVICE)  # b t (q k v) h d
    before = projected.clone()
    q = projected[:, :, 0].transpose(1, 2).requires_grad_()
    dout = torch.randn(2, 4, 5, 6, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "contiguous", lambda x: x if x.ndim == 3 else pytest.fail("copy")
        )
        y = rope(q, *angles(5, 6))
        (grad,) = torch.autograd.grad(y, q, dout)
    assert y.shape == q.shape and torch.equal(projected, before)
    # heads side by side, as q has them, whatever the gradient's order that came in
    assert y.transpose(1, 2).is_contiguous() and grad.transpose(1, 2).is_contiguous()


@needs_triton
def test_repeated_numbers_and_gradients_from_a_sum():
    one = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cos, sin = angles(5, 6)
    odd = torch.randn(13, device=DEVICE).as_strided((1, 3, 4, 6), (1, 2, 0, 1))
    for x in (one.expand(2, 3, 5, 6), one.expand(2, 1, 5, 6).transpose(1, 2), odd):
        t = x.shape[2]
        torch.testing.assert_close(rope(x, cos[:t], sin[:t]), reference(x, cos[:t], sin[:t]))
    grads = []
    for turn in (rope, reference):
        x = one.expand(2, 3, 5, 6).clone().requires_grad_()
        grads.append(torch.autograd.grad(turn(x, cos, sin).sum(), x)[0])
    torch.testing.assert_close(*grads)


@needs_triton
def test_bad_input_is_refused_by_name():
    x, (cos, sin) = torch.zeros(2, 3, 5, 8, device=DEVICE), angles(5, 8)
    with pytest.raises(ValueError, match="layout='pairs' must be 'half' or 'interleaved'"):
        rope(x, cos, sin, "pairs")
    with pytest.raises(ValueError, match="layout='pairs' must be 'half' or 'interleaved'"):
        reference(x, cos, sin, "pairs")
    for wrong in (x[0], x[..., :7], x[..., :0], x.new_zeros(1, 1, 1, 1026)):
        with pytest.raises(ValueError, match="with an even d, at most 1024"):
            rope(wrong, cos, sin)
    for wrong in (cos[:4], cos[:, :3], cos.expand(2, 5, 4), cos.expand(2, 3, 5, 4), cos[:1]):
        with pytest.raises(ValueError, match=r"needs cos and sin of \(5, 4\) or \(2, 1, 5, 4\)"):
            rope(x, wrong, wrong)
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(1, 1, 5, 4\)"):
        rope(x, cos, sin[None, None])
    for one in (cos, sin):
        one.requires_grad_()
        with pytest.raises(ValueError, match="no gradient from this kernel: detach them"):
            rope(x, cos, sin)
        with torch.no_grad():
            assert rope(x, cos, sin).shape == x.shape
        one.requires_grad_(False)
    with pytest.raises(ValueError, match="float64"):
        rope(x.double(), cos, sin)
    with pytest.raises(ValueError, match="one device"):
        rope(x, cos.to("meta"), sin.to("meta"))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(rope(x, cos, sin).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_cost_counts_the_tensors_that_move():
    x, (cos, sin) = torch.zeros(2, 3, 5, 8, dtype=torch.bfloat16), rotation(torch.arange(5), 8)
    moved = (x, reference(x, cos, sin), cos, sin)
    assert cost(2, 3, 5, 8, itemsize=2).bytes == sum(m.nbytes for m in moved)
