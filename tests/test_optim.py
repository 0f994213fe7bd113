"""Optimizers, clipping, groups and schedules, against PyTorch and fp64 NumPy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minillm.train.optim import PIECE, Adafactor, AdamW, clip_grad_norm, decay_groups
from minillm.train.schedules import batch_ramp, constant, inverse_sqrt, warmup_cosine

SHAPES = [(7, 5), (3,), (), (2, 3, 4), (1, 1), (PIECE // 64, 70)]  # the last is cut into pieces


def parameters(dtype=torch.float64, seed=0, shapes=SHAPES):
    rng = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)) for s in shapes
    ]


def set_gradients(*lists, step, none=()):
    """The same random gradient for corresponding parameters, of very unequal sizes."""
    rng = torch.Generator().manual_seed(1000 + step)
    for i, same in enumerate(zip(*lists, strict=True)):
        g = torch.randn(same[0].shape, generator=rng, dtype=torch.float64) * 10.0 ** (i - 3)
        for p in same:
            p.grad = None if i in none else g.to(p.dtype)


def gap(ours, theirs):
    """Largest difference, relative to the largest number of each tensor."""
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)
    )


# --- AdamW


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("lr", "betas", "eps", "decay"),
    [(1e-2, (0.9, 0.95), 1e-8, 0.1), (3e-3, (0.0, 0.999), 1e-3, 0.0), (0.1, (0.8, 0.0), 1e-6, 1.0)],
)
def test_adamw_follows_torch_step_for_step(lr, betas, eps, decay, fused):
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, lr, betas, eps, decay, fused=fused)
    reference = torch.optim.AdamW(theirs, lr, betas, eps, decay, foreach=False)
    for step in range(20):
        # gradients that are missing for a while: these parameters' own steps count
        none = {1: {0, 5}, 2: {0}, 3: set(range(6))}.get(step, set())
        set_gradients(ours, theirs, step=step, none=none)
        mine.step()
        reference.step()
        assert gap(ours, theirs) < 1e-12, f"step {step}"
    for p, q in zip(ours, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[p][key], reference.state[q][key])


def test_adamw_is_the_formula_in_numpy():
    """Written out once more from the paper, so that it does not rest on PyTorch alone."""
    (p,) = ours = parameters(shapes=[(4, 3)])
    optimizer = AdamW(ours, lr=0.02, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3)
    x = p.detach().numpy().copy()
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t in range(1, 11):
        set_gradients(ours, step=t)
        g = p.grad.numpy()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.95**t)
        x = x - 0.02 * 0.3 * x - 0.02 * m_hat / (np.sqrt(v_hat) + 1e-4)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_in_fewer_bits(dtype):
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = AdamW(ours, 1e-2)
    reference = torch.optim.AdamW(theirs, 1e-2, (0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        set_gradients(ours, theirs, step=step)
        mine.step()
        reference.step()
    assert gap(ours, theirs) < 8 * torch.finfo(dtype).eps
    assert all(mine.state[p]["exp_avg"].dtype == dtype for p in ours)


def test_groups_have_options_of_their_own_and_a_schedule_can_change_them():
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [
            {"params": params[:2], "weight_decay": 0.0, "lr": 0.1},
            {"params": iter(params[2:]), "betas": (0.5, 0.6), "eps": 1e-2},
        ]

    mine = AdamW(groups(ours), lr=0.01, weight_decay=0.2)
    reference = torch.optim.AdamW(groups(theirs), 0.01, (0.9, 0.95), weight_decay=0.2)
    for step in range(6):
        set_gradients(ours, theirs, step=step)
        for optimizer in (mine, reference):
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
            optimizer.step()
    assert gap(ours, theirs) < 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_layouts_of_gradient_and_parameter_may_differ(fused):
    """Flat views and fused kernels pair numbers by address; the layouts must be made to agree."""
    for parameter_turned, gradient_turned in itertools.product((False, True), repeat=2):
        values = torch.randn(
            600, 130, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        p = nn.Parameter(values.T.clone().T if parameter_turned else values.clone())
        q = nn.Parameter(values.clone())
        gradient = torch.randn(600, 130, dtype=torch.float64)
        q.grad = gradient.clone()
        p.grad = gradient.T.contiguous().T if gradient_turned else gradient.clone()
        AdamW([p], 0.1, fused=fused).step()
        torch.optim.AdamW([q], 0.1, (0.9, 0.95), weight_decay=0.1, foreach=False).step()
        assert gap([p], [q]) < 1e-12, (parameter_turned, gradient_turned)


def halves(make, steps=6):
    """Parameters after 2 · steps, once in one go and once resumed from a state in the middle."""
    whole, first, second = parameters(), parameters(), parameters()
    one = make(whole)
    two = make(first)
    for step in range(2 * steps):
        if step == steps:
            saved = copy.deepcopy(two.state_dict())
            for p, q in zip(second, first, strict=True):
                p.data.copy_(q.data)
            two = make(second)
            two.load_state_dict(saved)
        set_gradients(whole, first, second, step=step)
        one.step()
        two.step()
    return whole, second


OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, 0.01),
    "fused": lambda p: AdamW(p, 0.01, fused=True),
    "adafactor": lambda p: Adafactor(p),
    "adafactor with everything": lambda p: Adafactor(p, 0.1, beta1=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_bit_for_bit(name, tmp_path):
    whole, resumed = halves(OPTIMIZERS[name])
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_survives_a_file_without_pickled_code(name, tmp_path):
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    set_gradients(params, step=0)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = OPTIMIZERS[name](params)
    again.load_state_dict(loaded)
    for p in params:
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(again.state[p][key], value, rtol=0, atol=0)


def test_states_are_exchanged_with_torch():
    def make_ours(p):
        return AdamW(p, 0.01)

    def make_theirs(p):
        return torch.optim.AdamW(p, 0.01, (0.9, 0.95), weight_decay=0.1)

    reference, _ = halves(make_ours)
    for first, second in ((make_ours, make_theirs), (make_theirs, make_ours)):
        makers = iter([first, first, second])  # halves() makes: the whole run, its half, the rest
        _, mixed = halves(lambda p, makers=makers: next(makers)(p))
        assert gap(mixed, reference) < 1e-12


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(50)]
    assert losses[-1] < 0.1 * losses[0]
    assert AdamW([p], 0.1).step() is None


BAD = [
    (AdamW, {"lr": 0.0}, r"lr=0\.0"),
    (AdamW, {"lr": -1e-3}, r"lr=-0\.001"),
    (AdamW, {"lr": math.nan}, "lr=nan"),
    (AdamW, {"lr": math.inf}, "lr=inf"),
    (AdamW, {"lr": 0.1, "betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
    (AdamW, {"lr": 0.1, "betas": (-0.1, 0.9)}, r"betas=\(-0\.1"),
    (AdamW, {"lr": 0.1, "betas": (0.9,)}, r"betas=\(0\.9,\)"),
    (AdamW, {"lr": 0.1, "eps": -1e-8}, "eps=-1e-08"),
    (AdamW, {"lr": 0.1, "weight_decay": -0.1}, r"weight_decay=-0\.1"),
    (Adafactor, {"lr": 0.0}, r"lr=0\.0"),
    (Adafactor, {"beta1": 1.0}, r"beta1=1\.0"),
    (Adafactor, {"eps": (0.0, 1e-3)}, r"eps=\(0\.0"),
    (Adafactor, {"eps": (1e-30,)}, r"eps=\(1e-30,\)"),
    (Adafactor, {"clip_threshold": 0.0}, r"clip_threshold=0\.0"),
    (Adafactor, {"decay_rate": -0.8}, r"decay_rate=-0\.8"),
    (Adafactor, {"weight_decay": math.nan}, "weight_decay=nan"),
    (Adafactor, {"lr": 0.1, "warmup_init": True}, "warmup_init=True"),
]


@pytest.mark.parametrize(("make", "options", "words"), BAD)
def test_options_out_of_range_are_named(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(parameters(), **options)
    with pytest.raises(ValueError, match=words):  # also for one group alone
        make([{"params": parameters(), **options}], **({"lr": 0.1} if make is AdamW else {}))


@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.1), lambda p: Adafactor(p, 0.1)])
def test_what_cannot_be_updated_is_refused_at_the_step(make):
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2)
    optimizer = make([p])
    for lr in (-0.1, math.nan):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(ValueError, match=f"lr={lr}"):
            optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.ones(4, 2).to_sparse()
    with pytest.raises(ValueError, match="dense"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 2)), "nothing was updated"


# --- Adafactor


def test_adafactor_is_the_algorithm_of_the_paper():
    """With sums instead of means, as the paper writes it; a matrix and a vector; fp64 NumPy."""
    ours = parameters(shapes=[(6, 4), (5,)])
    optimizer = Adafactor(ours)
    x = [p.detach().numpy().copy() for p in ours]
    row, column, full = np.zeros(6), np.zeros(4), np.zeros(5)
    for t in range(1, 9):
        set_gradients(ours, step=t)
        squares = [p.grad.numpy() ** 2 + 1e-30 for p in ours]
        keep = 1 - t**-0.8
        row = keep * row + (1 - keep) * squares[0].sum(1)
        column = keep * column + (1 - keep) * squares[0].sum(0)
        full = keep * full + (1 - keep) * squares[1]
        for i, v in enumerate((np.outer(row, column) / row.sum(), full)):
            u = ours[i].grad.numpy() / np.sqrt(v)
            u /= max(1.0, np.sqrt((u**2).mean()))
            rms = np.sqrt((x[i] ** 2).mean())
            x[i] = x[i] - max(1e-3, rms) * min(1e-2, t**-0.5) * u
        optimizer.step()
        for p, want in zip(ours, x, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-12)


def test_adafactor_moves_and_shrinks_in_proportion_to_the_parameter():
    """By hand: with g = 1 everywhere U = 1 (clipped at d), so a step is α, and the decay wd · α."""
    sizes = [4.0, 0.01, 0.0]
    params = [nn.Parameter(torch.full((3, 2), x, dtype=torch.float64)) for x in sizes]
    optimizer = Adafactor(params, lr=0.1, weight_decay=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, x in zip(params, sizes, strict=True):
        alpha = 0.1 * max(1e-3, x)  # a parameter at zero moves all the same
        want = x * (1 - 0.5 * alpha) - alpha
        torch.testing.assert_close(p.detach(), torch.full((3, 2), want, dtype=torch.float64))


@pytest.mark.parametrize(("n", "m"), [(100, 300), (1, 9), (64, 64)])
def test_adafactor_stores_rows_and_columns(n, m):
    p = nn.Parameter(torch.ones(n, m))
    p.grad = torch.ones(n, m)
    stored = {}
    for name, optimizer in (("adafactor", Adafactor([p])), ("adamw", AdamW([p], 0.1))):
        optimizer.step()
        tensors = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        stored[name] = sum(x.numel() for x in tensors if x.numel() > 1 or n + m == 10)
    assert stored["adafactor"] == n + m
    assert stored["adamw"] >= 2 * n * m


def test_a_product_of_two_vectors_is_factored_without_loss():
    """If g² has rank one, the factored second moment is exact: every step equals the vectors'."""
    u, v = torch.rand(5, dtype=torch.float64) + 0.1, torch.rand(3, dtype=torch.float64) + 0.1
    g = torch.outer(u, v)
    matrix, vector = (nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in ((5, 3), (15,)))
    matrix.grad, vector.grad = g, g.flatten()
    Adafactor([matrix, vector]).step()
    torch.testing.assert_close(matrix.detach().flatten(), vector.detach())


def test_adafactor_refuses_parameters_of_16_bits():
    p = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"bfloat16 .*master"):
        Adafactor([p]).step()


# --- clipping and groups


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.floats(1e-6, 1e6),
    limit=st.floats(1e-3, 1e3),
)
def test_clipping_scales_and_never_turns(seed, size, limit):
    ours = parameters(seed=seed, shapes=[(3, 4), (5,), (1,), ()])
    theirs = parameters(seed=seed, shapes=[(3, 4), (5,), (1,), ()])
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = p.detach() * size, p.detach() * size
    ours.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    before = torch.cat([p.grad.flatten() for p in theirs])
    norm = clip_grad_norm(ours, limit)
    reference = nn.utils.clip_grad_norm_(theirs, limit)
    after = torch.cat([p.grad.flatten() for p in ours[:-1]])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(norm, reference)
    torch.testing.assert_close(after, torch.cat([p.grad.flatten() for p in theirs]))
    torch.testing.assert_close(
        after, before * min(1.0, limit / before.norm().item()), rtol=2e-3, atol=0
    )
    assert after.norm() <= limit * (1 + 1e-6)
    if before.norm() < 0.999 * limit:
        assert torch.equal(after, before), "a small gradient is not touched"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_nothing_changed(bad):
    ours = parameters(shapes=[(2, 2), (3,)])
    for p in ours:
        p.grad = torch.ones_like(p)
    ours[1].grad[1] = bad
    before = [p.grad.clone() for p in ours]
    norm = clip_grad_norm(ours, 1.0)
    assert not norm.isfinite()
    assert all(
        torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(ours, before, strict=True)
    )


def test_clipping_without_a_limit_or_a_gradient_and_with_one_tensor():
    p = nn.Parameter(torch.zeros(2))
    assert clip_grad_norm([p], 1.0).item() == 0 == clip_grad_norm([], 1.0).item()
    p.grad = torch.tensor([3e10, 4e10])
    assert clip_grad_norm(p, math.inf).item() == pytest.approx(5e10)
    assert p.grad.tolist() == torch.tensor([3e10, 4e10]).tolist()
    assert clip_grad_norm((x for x in [p]), 1.0).item() == pytest.approx(5e10)
    assert p.grad.norm().item() == pytest.approx(1.0)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm={limit}"):
            clip_grad_norm([p], limit)


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 7))
    model[3].weight = model[0].weight  # tied
    model[2].weight.requires_grad_(False)
    decays, rests = decay_groups(model, 0.3)
    assert decays["weight_decay"] == 0.3 and rests["weight_decay"] == 0.0
    assert [id(p) for p in decays["params"]] == [id(model[0].weight)]
    want = {id(model[1].weight), id(model[1].bias), id(model[2].bias), id(model[3].bias)}
    assert {id(p) for p in rests["params"]} == want and len(rests["params"]) == 4
    optimizer = AdamW(decay_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # without a gradient only the decay acts
    for name, p in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name])


def test_groups_that_make_no_sense():
    with pytest.raises(ValueError, match=r"weight_decay=-0\.1"):
        decay_groups(nn.Linear(2, 2), -0.1)
    with pytest.raises(ValueError, match="Linear has no parameter"):
        decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    only_vectors = decay_groups(nn.LayerNorm(3), 0.1)
    AdamW(only_vectors, 0.1)  # a group may be empty


# --- schedules


@given(
    peak=st.floats(1e-8, 1e3),
    warmup=st.integers(0, 300),
    more=st.integers(1, 1000),
    floor=st.floats(0, 1),
)
def test_warmup_cosine_rises_falls_and_stays(peak, warmup, more, floor):
    total = warmup + more
    rate = warmup_cosine(peak, warmup, total, floor)
    rates = [rate(step) for step in range(1, total + 5)]
    assert all(0 <= r <= peak * (1 + 1e-12) for r in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(rates[max(warmup - 1, 0) :]))
    assert rates[total - 1 :] == [pytest.approx(floor * peak)] * 5
    if warmup:
        assert rates[warmup - 1] == peak and rates[0] == pytest.approx(peak / warmup)


def test_warmup_cosine_follows_torch():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=3.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.3)
    ours = warmup_cosine(3.0, 10, 50)
    for step in range(10, 50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(ours(step))
        optimizer.step()
        theirs.step()


@given(peak=st.floats(1e-8, 1e3), warmup=st.integers(1, 1000), step=st.integers(1, 10**6))
def test_inverse_sqrt_is_the_formula_of_the_transformer(peak, warmup, step):
    """d^-0.5 · min(step^-0.5, step · warmup^-1.5), scaled so that the peak is `peak`."""
    want = peak * warmup**0.5 * min(step**-0.5, step * warmup**-1.5)
    assert inverse_sqrt(peak, warmup)(step) == pytest.approx(want)
    assert constant(peak, warmup)(step) == pytest.approx(peak * min(1, step / warmup))


def test_constant_without_warmup_is_constant():
    assert {constant(0.5)(step) for step in (1, 2, 1000)} == {0.5}


@given(
    rows=st.integers(1, 50),
    more=st.integers(0, 500),
    multiple=st.integers(1, 4096),
    over=st.integers(1, 10**13),
    seen=st.integers(0, 2 * 10**13),
)
def test_batch_ramp_is_a_line_in_steps(rows, more, multiple, over, seen):
    start, full = rows * multiple, (rows + more) * multiple
    size = batch_ramp(start, full, over, multiple)
    assert size(0) == start and size(over) == size(10 * over) == full
    got = size(seen)
    assert isinstance(got, int) and start <= got <= full and got % multiple == 0
    line = start + (full - start) * min(seen / over, 1.0)
    assert line - multiple * (1 + 1e-9) - 1 <= got <= line * (1 + 1e-9)
    assert size(seen + over // 7) >= got


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: warmup_cosine(0.0, 1, 10), r"peak=0\.0"),
        (lambda: warmup_cosine(-1.0, 1, 10), r"peak=-1\.0"),
        (lambda: warmup_cosine(1.0, -1, 10), "warmup=-1"),
        (lambda: warmup_cosine(1.0, 10, 10), "total=10 must exceed warmup=10"),
        (lambda: warmup_cosine(1.0, 1, 10, floor=1.5), r"floor=1\.5"),
        (lambda: warmup_cosine(1.0, 1, 10)(0), "step=0"),
        (lambda: inverse_sqrt(1.0, 0), "warmup=0"),
        (lambda: inverse_sqrt(math.nan, 1), "peak=nan"),
        (lambda: constant(1.0)(-3), "step=-3"),
        (lambda: batch_ramp(0, 8, 10), "start=0"),
        (lambda: batch_ramp(16, 8, 10), "start=16 <= full=8"),
        (lambda: batch_ramp(3, 8, 10, multiple=2), "start=3"),
        (lambda: batch_ramp(2, 8, 0), "over=0"),
        (lambda: batch_ramp(2, 8, 9)(-1), "seen=-1"),
    ],
)
def test_schedules_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
