"""AdamW: parameters of one shape are stacked here; `tests/test_kernel_adamw.py` mixes shapes."""

import torch

from tests.kernel_cases import Case, Fault, shapes, strided


def _step(*shape, size=1.0, strided_grads=False, first=False, **options):
    """Numbers of one step: gradients and their running means of the given size."""

    def inputs(rng):
        def draw():
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        params, grads, means, squares = draw(), draw() * size, draw() * size, draw().square()
        if first:
            means, squares = torch.zeros_like(means), torch.zeros_like(squares)
        found = {"params": params, "grads": strided(grads) if strided_grads else grads}
        found |= {"exp_avgs": means, "exp_avg_sqs": squares * size**2}
        found |= {"step": 1 if first else 3, "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
        return found | {"weight_decay": 0.1} | options

    return inputs


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# About eight roundings to float32; one to a narrow type, half a unit of its last place, and no
# more: the interpreter, left alone, would cut digits off, which is a whole unit.
SLACK = {F32: 4.0, F16: 0.6, BF16: 0.6}


def _case(name, inputs, dtypes=(F32, F16, BF16)):
    return Case(name, "fused_adamw_", inputs, slack=SLACK, dtypes=dtypes)


CASES = [
    *(_case(f"width {n}", _step(2, n)) for n in shapes(2048)),
    _case("three blocks each", _step(3, 4100), dtypes=(F32, BF16)),
    _case("the first step", _step(3, 41, first=True)),
    _case("gradients scaled", _step(3, 41, size=8.0, scale=0.125)),
    _case("no decay", _step(3, 41, weight_decay=0.0)),
    _case("no momentum", _step(3, 41, betas=(0.0, 0.95))),
    # squares of these are no float16
    _case("large gradients", _step(3, 41, size=1e4), dtypes=(F32, BF16)),
    _case("gradients like eps", _step(3, 41, size=1e-8), dtypes=(F32, BF16)),
    _case("gradients zero", _step(3, 41, size=0.0)),
    _case("strided gradients", _step(3, 41, strided_grads=True)),
    _case("single numbers", _step(5)),
    _case("empty parameters", _step(3, 0)),
    _case("no parameters", _step(0, 8)),
]

FAULTS = [
    Fault("no decay", "p = decay * p - size", "p = p - size", "width 41"),
    Fault("the gradient's scale missing", " * tl.load(scale_ptr)", "", "gradients scaled"),
    Fault("no square", "a2 * g * g", "a2 * g", "width 41"),
    Fault(
        "eps inside of the root", "sqrt_rn(v) + small", "sqrt_rn(v + small)", "gradients like eps"
    ),
    Fault("eps uncorrected", "step), c * eps", "step), eps", "gradients like eps"),
    Fault("momentum uncorrected", "c * lr / (1 - b1**step)", "c * lr", "width 41"),
    Fault("squares uncorrected", "c = (1 - b2**step) ** 0.5", "c = 1.0", "width 41"),
    Fault("one step behind", "1 - b1**step", "1 - b1 ** (step + 1)", "the first step"),
    Fault(
        "every block is the first one's", "owner_ptr + program", "owner_ptr", "three blocks each"
    ),
    Fault("blocks of the list", "(program - tl.load(row + 6))", "program", "three blocks each"),
    Fault("one number too few", "place < n", "place < n - 1", "width 41"),
    Fault("running mean not kept", "m_ptr + place, m, ", "m_ptr + place, g, ", "width 41"),
    Fault("strides ignored", "[g.contiguous() for g in grads]", "grads", "strided gradients"),
]
