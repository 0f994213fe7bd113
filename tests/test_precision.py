"""Loss scaling and master weights against torch.amp and against a plain loop in float32."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.train import train
from minillm.train.precision import LossScaler, MasterWeights, OverflowRatio, prepare, simulate

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def with_gradient(*values, dtype=torch.float32):
    p = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    p.grad = torch.tensor(values, dtype=dtype)
    return p


# --- the loss scaler


def ours(scaler, overflows):
    scales = []
    for overflow in overflows:
        scaler.update(scaler.unscale([with_gradient(math.inf if overflow else 1.0)]))
        scales.append(scaler.scale)
    return scales


def theirs(overflows, scale, growth, backoff, window):
    scaler = torch.amp.GradScaler("cpu", scale, growth, backoff, window)
    p = nn.Parameter(torch.zeros(1))
    optimizer = SGD([p], lr=1.0)
    scales = []
    for overflow in overflows:
        scaler.scale(torch.zeros(1))  # what creates its state
        p.grad = torch.tensor([math.inf if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.sampled_from([1.0, 3.0, 2.0**16, 2.0**125, 2.0**-70]),
    st.sampled_from([(2.0, 0.5), (1.7, 0.3), (1.001, 0.9)]),
    st.integers(1, 7),
)
def test_the_scale_moves_as_pytorchs_does(overflows, scale, factors, window):
    growth, backoff = factors
    want = theirs(overflows, scale, growth, backoff, window)
    assert ours(LossScaler(scale, growth, backoff, window), overflows) == want


def test_pytorch_defaults_are_ours():
    overflows = [False] * 2000 + [True]
    scaler = torch.amp.GradScaler("cpu")
    settings = (scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor())
    settings += (scaler.get_growth_interval(),)
    assert ours(LossScaler(), overflows) == theirs(overflows, *settings)


def test_the_comparison_would_notice_a_counter_that_is_not_reset():
    class Forgetful(LossScaler):
        def update(self, overflow):
            before = self.clean_steps
            super().update(overflow)
            self.clean_steps = before if overflow else self.clean_steps

    overflows = [False, True, False, False, True, False] * 4
    assert ours(LossScaler(8.0, window=3), overflows) == theirs(overflows, 8.0, 2.0, 0.5, 3)
    assert ours(Forgetful(8.0, window=3), overflows) != theirs(overflows, 8.0, 2.0, 0.5, 3)


def test_the_scale_has_no_floor_and_stops_below_infinity():
    scaler = LossScaler(1.0, window=1)
    for _ in range(200):
        scaler.update(True)
    assert scaler.scale == 0.0
    assert scaler.unscale([with_gradient(0.0)]), "nothing can be divided by a scale of zero"
    assert LossScaler(2.0**-128).unscale([with_gradient(1.0)]), "1 / scale is infinite"
    assert not LossScaler(2.0**-127).unscale([with_gradient(2.0**-127)])
    scaler = LossScaler(2.0**127, window=1)
    scaler.update(False)
    assert scaler.scale == 2.0**127


def test_unscale_divides_in_place_and_sees_every_gradient():
    p, q, frozen = with_gradient(8.0, -2.0), with_gradient(1.0), nn.Parameter(torch.ones(1))
    assert LossScaler(4.0).unscale(iter([p, frozen, q])) is False
    assert (p.grad.tolist(), q.grad.tolist(), frozen.grad) == ([2.0, -0.5], [0.25], None)
    for bad in (math.inf, -math.inf, math.nan):
        good = with_gradient(1.0)
        assert LossScaler().unscale([good, with_gradient(0.0, bad)]) is True
        assert LossScaler().unscale([with_gradient(bad, 0.0), good]) is True


def test_unscaling_is_pytorchs_bit_for_bit():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).tolist()
    p, q = with_gradient(*values), with_gradient(*values)
    scaler = torch.amp.GradScaler("cpu", init_scale=3.7)
    scaler.scale(torch.zeros(1))
    scaler.unscale_(SGD([q], lr=1.0))
    LossScaler(scaler.get_scale()).unscale([p])
    assert torch.equal(p.grad, q.grad)


def test_a_scaler_continues_from_its_state():
    overflows = [False, False, True, False, False, False, True, False, False]
    one, two = LossScaler(64.0, window=3), LossScaler()
    ours(one, overflows[:5])
    two.load_state_dict(one.state_dict())
    assert ours(one, overflows[5:]) == ours(two, overflows[5:])
    without_counter = LossScaler(one.scale, window=3)
    assert ours(LossScaler(64.0, window=3), overflows)[5:] != ours(without_counter, overflows[5:])
    with pytest.raises(ValueError, match="clean_steps"):
        two.load_state_dict({"scale": 1.0})


def test_a_scaler_says_what_is_wrong():
    for bad in ({"scale": 0.0}, {"scale": math.inf}, {"growth": 1.0}, {"backoff": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LossScaler(**bad)
    with pytest.raises(ValueError, match="window=0"):
        LossScaler(window=0)
    with pytest.raises(ValueError, match="backward"):
        LossScaler().unscale([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="float16"):
        LossScaler().unscale([with_gradient(1.0, dtype=torch.float16)])


# --- the overflow ratio


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 20))
def test_the_ratio_is_the_share_of_the_last_steps(overflows, window):
    ratio = OverflowRatio(window)
    assert math.isnan(ratio.value)
    for i, overflow in enumerate(overflows):
        last = overflows[max(0, i + 1 - window) : i + 1]
        assert ratio(overflow) == ratio.value == sum(last) / len(last)


@pytest.mark.parametrize("window", [1, 4, 50])
def test_a_settled_scaler_overflows_once_in_window_plus_one(window):
    ratio = OverflowRatio(10 * (window + 1))
    scaler = LossScaler(2.0**20, window=window)
    scaler.hooks.append(ratio)
    for _ in simulate(scaler, [1000.0] * (40 * (window + 1))):
        pass
    assert ratio.value == 1 / (window + 1)


def test_simulated_steps_overflow_beyond_the_limit_and_at_nan():
    scaler = LossScaler(8.0, window=2)
    steps = list(simulate(scaler, [8.0, 7.9, 100.0, math.nan, 0.0, 1.0]))
    assert steps == [
        (8.0, False),
        (8.0, True),
        (4.0, False),
        (4.0, True),
        (2.0, True),
        (1.0, False),
    ]
    with pytest.raises(ValueError, match="window=0"):
        OverflowRatio(0)


# --- master weights


class Tied(nn.Module):
    """Embedding and output share a matrix; one layer between them is frozen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("shift", torch.full((8,), 0.1))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.frozen(self.embed(x) + self.shift))))


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (2, 16), generator=generator) for _ in range(n)]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_follow_a_plain_float32_loop(dtype):
    """The same by hand: weights in float32, rounded for each forward and backward pass."""
    options = {"lr": 0.01, "weight_decay": 0.1}
    model = Tied()
    optimizer = MasterWeights(model.parameters(), AdamW, dtype, **options)
    model.to(dtype)
    exact = {n: nn.Parameter(p.detach()) for n, p in Tied().named_parameters()}
    trained = {n: p for n, p in exact.items() if not n.startswith("frozen")}
    by_hand = AdamW(trained.values(), **options)
    for batch in batches(12):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        copied = Tied().to(dtype)
        for name, p in copied.named_parameters():
            p.data = exact[name].detach().to(dtype)
        copied.out.weight = nn.Parameter(copied.embed.weight.detach().clone())  # untied
        loss_of(copied, batch).backward()
        for name in trained:
            exact[name].grad = copied.get_parameter(name).grad.float()
        exact["embed.weight"].grad += copied.out.weight.grad.float()
        by_hand.step()
        for name, p in model.named_parameters():
            assert p.dtype == dtype and torch.equal(p, exact[name].to(dtype)), name
    masters = [m for group in optimizer.param_groups for m in group["params"]]
    assert len(masters) == len(trained) == 3, "one for the tied matrix, none for the frozen layer"
    assert all(torch.equal(m, e) for m, e in zip(masters, trained.values(), strict=True))
    assert model.out.weight is model.embed.weight


def test_small_updates_vanish_without_masters_and_add_up_with_them():
    plain = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    without, master = SGD([plain], lr=1e-3), MasterWeights([p], SGD, lr=1e-3)
    for _ in range(500):
        plain.grad, p.grad = -torch.ones_like(plain), -torch.ones(3)
        without.step()
        master.step()
    assert plain.tolist() == [1.0] * 3
    assert p.tolist() == [1.5] * 3


def test_gradients_are_float32_and_add_up_there():
    p = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = MasterWeights([p], SGD, lr=1.0)
    for _ in range(3000):  # in float16 a sum of ones ends at 2048
        p.sum().backward()
    assert p.grad.dtype == torch.float32 and p.grad.item() == 3000
    assert LossScaler(2.0).unscale([p]) is False and p.grad.item() == 1500
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.item() == 0
    optimizer.zero_grad()
    assert p.grad is None


def test_groups_and_schedules_reach_the_masters():
    model = Tied()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.5},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.5},
        {"params": list(model.frozen.parameters())},
    ]
    optimizer = MasterWeights(groups, SGD, torch.bfloat16, lr=0.25)
    model.to(torch.bfloat16)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (2, 0.25, 0.5),
        (1, 0.5, 0),
    ]
    assert len(groups[0]["params"]) == 3, "the caller's groups are left as they were"
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    schedule.step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items()), "lr is 0"
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step(lambda: None)
    changed = {n for n, p in model.state_dict().items() if not torch.equal(before[n], p)}
    assert changed == {"embed.weight", "out.weight", "hidden.weight", "hidden.bias"}


def test_float32_parameters_need_no_master():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4))
    optimizer = MasterWeights(model.parameters(), AdamW, lr=1e-3)
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    assert [a is b for a, b in zip(mine, model.parameters(), strict=True)] == [False] * 2 + [
        True
    ] * 2
    assert len(optimizer.state_dict()["masters"]) == 2


def test_resuming_continues_bit_for_bit():
    def start():
        model = Tied()
        optimizer, scaler = prepare(model, "fp16", AdamW, lr=1e-3)
        return model, optimizer, scaler

    def go_on(model, optimizer, scaler, data):
        for batch in data:
            optimizer.zero_grad()
            (loss_of(model, batch) * scaler.scale).backward()
            scaler.unscale(model.parameters())
            optimizer.step()

    data = batches(10)
    through = start()
    go_on(*through, data)
    first = start()
    go_on(*first, data[:4])
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    go_on(*second, data[4:])
    for a, b in zip(
        through[1].state_dict()["masters"], second[1].state_dict()["masters"], strict=True
    ):
        assert torch.equal(a, b)
    # What would be lost: masters made anew from the 16-bit weights end elsewhere.
    third = start()
    third[0].load_state_dict(saved[0])
    with pytest.raises(ValueError, match=r"masters of shapes \[\], the model needs \[\(11, 8\)"):
        third[1].load_state_dict({k: v for k, v in saved[1].items() if k != "masters"})
    rounded = saved[1] | {"masters": [m.half().float() for m in saved[1]["masters"]]}
    third[1].load_state_dict(rounded)
    go_on(*third, data[4:])
    ends = zip(through[1].state_dict()["masters"], third[1].state_dict()["masters"], strict=True)
    assert any(not torch.equal(a, b) for a, b in ends)


def test_a_schedule_still_reaches_the_masters_after_loading():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterWeights([p], SGD, lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == 0.75


def test_prepare_converts_everything_but_the_masters():
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = Tied()
        start = model.hidden.weight.detach().clone()
        optimizer, scaler = prepare(model, precision, AdamW, lr=1e-3)
        assert {t.dtype for t in model.state_dict().values()} == {dtype}
        assert (scaler is None) == (precision == "bf16")
        assert torch.equal(optimizer.param_groups[0]["params"][1], start), "not rounded to 16 bits"
    model = Tied()
    optimizer, scaler = prepare(model, "fp32", AdamW, [model.hidden.weight], lr=1e-3)
    assert type(optimizer) is AdamW and scaler is None
    assert optimizer.param_groups[0]["params"] == [model.hidden.weight]
    with pytest.raises(ValueError, match="'fp8' must be one of"):
        prepare(Tied(), "fp8", AdamW)
    with pytest.raises(ValueError, match="bfloat16"):
        prepare(Tied().bfloat16(), "fp16", AdamW)


def test_master_weights_say_what_is_wrong():
    with pytest.raises(ValueError, match="nothing to train"):
        MasterWeights(Tied().frozen.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="nothing to train"):
        MasterWeights([], SGD, lr=0.1)
    optimizer = MasterWeights(Tied().bfloat16().parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="all groups at once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


# --- in the loop


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loop_trains_in_16_bits_as_in_32(precision):
    cfg = ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=2, max_len=16)
    row = torch.arange(17) * 5 % 16  # the next token follows from the last
    data = [(row[None, :-1], row[None, 1:])] * 40
    curves = {}
    for name in ("fp32", precision):
        model = LM(cfg, seed=0)
        optimizer, scaler = prepare(model, name, AdamW, lr=3e-3)
        curves[name] = torch.tensor(
            [s.loss for s in train(model, data, optimizer, clip=1.0, scaler=scaler)]
        )
    assert curves["fp32"][-1] < 0.5 < 2.5 < curves["fp32"][0]
    assert (curves["fp32"] - curves[precision]).abs().max() < 0.1


def test_the_loop_skips_overflowed_steps():
    cfg = ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=2, max_len=16)
    model = LM(cfg, seed=0)
    optimizer, scaler = prepare(model, "fp16", AdamW, lr=3e-3)
    scaler.scale = 2.0**40
    row = torch.arange(17) * 5 % 16
    before, scales = copy.deepcopy(model.state_dict()), []
    for step in train(model, [(row[None, :-1], row[None, 1:])] * 40, optimizer, scaler=scaler):
        unchanged = all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert unchanged == step.skipped
        if not step.skipped:
            break
        scales.append(scaler.scale)
    assert len(scales) > 15 and scales == [2.0 ** (39 - i) for i in range(len(scales))]
