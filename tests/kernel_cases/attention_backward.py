"""The backward pass by itself: gradients from what the forward pass saved."""

import torch

from tests.kernel_cases import FLOATS, Case, Fault
from tests.kernel_cases.attention import explicit, qkv

FP32, FP16, BF16 = FLOATS
C = {"causal": True}


def saved(make, dlse=False):
    """What `make` makes, with the output and the log-sum-exp that belong to it.

    All dtypes get the same numbers, of 8 bits, so that the saved ones fit them.
    """

    def inputs(rng):
        given = make(rng)
        for name in "qkv":
            given[name] = given[name].bfloat16().double()
        out, lse = explicit(**given, return_lse=True)
        dout = torch.randn(out.shape, generator=rng, dtype=torch.float64)
        given |= {"out": out, "lse": lse.float(), "dout": dout}
        if dlse:
            given["dlse"] = torch.randn(lse.shape, generator=rng)
        return given

    return inputs


def case(name, inputs, slack=None, terms=1.0, **rest):
    # as in the forward cases; the reference gets the same saved tensors, rounded as they are
    slack = {FP32: 32, FP16: 4, BF16: 4} | (slack or {})
    return Case(name, "attention_backward", inputs, (), slack=slack, terms=terms, **rest)


CASES = [
    case("causal", saved(qkv(130, d=41, **C))),
    case("not causal", saved(qkv(5, 131, h=2, g=2), dlse=True), dtypes=(FP32, FP16)),
    case("shared keys", saved(qkv(41, 70, h=4, g=2, b=2, **C), dlse=True)),
    case("window", saved(qkv(150, 200, window=40, **C))),
    case("window of 1", saved(qkv(41, window=1, **C)), dtypes=(FP32,)),
    case("queries before the first key", saved(qkv(130, 41, **C)), dtypes=(FP32,)),
    case("dropout", saved(qkv(41, 70, h=2, g=1, dropout=0.4, seed=3, **C))),
    case("scale", saved(qkv(41, scale=0.7)), dtypes=(FP32,)),
    case("width 128", saved(qkv(41, d=128, **C)), dtypes=(FP32, BF16)),
    case("large values", saved(qkv(41, size=(1, 1, 1e4), **C)), terms=1e4, dtypes=(FP32, BF16)),
    case("one token", saved(qkv(1, b=3, h=2)), dtypes=(FP32,)),
    case("no queries", saved(qkv(0, 5)), dtypes=(FP32,)),
]

FAULTS = [
    Fault("D without the lse's gradient", "d -= tl.load(dlse", "tl.load(dlse", "shared keys"),
    Fault("D missing in dQ", "(dp - d[:, None])", "dp", "causal"),
    Fault("D missing in dK", "(dp - d[None, :])", "dp", "causal"),
    Fault("scale missing in dQ", "dq * scale", "dq", "causal"),
    Fault("scale missing in dK", "dk * scale", "dk", "causal"),
    Fault("queries' mask", "m[:, None], n[None, :], s - t", "m[:, None], n[None, :], 0", "window"),
    Fault("keys' mask", "m[None, :], n[:, None], s - t", "m[None, :], n[:, None], 0", "window"),
    Fault("last queries left out", "edges[1], edges[3], edges[3]", "edges[1], edges[2], edges[3]",
          "causal"),
    Fault("window's end too early", "t - s + WINDOW - 1, B", "t - s + WINDOW - 40, B", "window"),
    Fault("causal start too late", "span(n0, t, t - s,", "span(n0 + BLOCK_M, t, t - s,", "causal"),
    Fault("one head of the group", "kv_head * group + group)", "kv_head * group + 1)",
          "shared keys"),
    Fault("another head's lse", "head_row = row + head * rows", "head_row = row", "shared keys"),
    Fault("dV without dropout", "left.to(dout.dtype)", "p.to(dout.dtype)", "dropout"),
    Fault("dK without dropout", "n[:, None], seed, DROPOUT)", "n[:, None], seed, 0.0)", "dropout"),
    Fault("dQ with another seed", "n[None, :], seed,", "n[None, :], seed + 1,", "dropout"),
    Fault("dV from dP", "dv = tl.dot(left", "dv = tl.dot(dp", "causal"),
]  # fmt: skip
