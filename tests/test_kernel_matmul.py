"""Matrix multiplication beside the common suite: configurations, order, bytes, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import matmul as module
from kernels import runtime
from kernels.matmul import CONFIGS, cost, loads, matmul, order, reference, strips, worth_trying

DEVICE = "cuda" if runtime.MODE == "gpu" else "cpu"
FP8 = torch.float8_e4m3fn

needs_triton = pytest.mark.skipif(
    runtime.MODE not in ("gpu", "interpreter"), reason=f"kernels cannot run: {runtime.MODE}"
)
needs_interpreter = pytest.mark.skipif(runtime.MODE != "interpreter", reason="looks into it")


def normal(*shape, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(DEVICE, dtype)


def close(got, want, k):
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=4e-6 * (1 + k) ** 0.5)


# ---- any shape, any configuration


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 140),
    k=st.integers(0, 140),
    n=st.integers(1, 140),
    split=st.integers(1, 3),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(m, k, n, split, turned):
    a = normal(k, m).T if turned[0] else normal(m, k)
    b = normal(n, k, seed=1).T if turned[1] else normal(k, n, seed=1)
    close(matmul(a, b, split_k=split), reference(a.double(), b.double()), k)


def run_with(chosen, a, b, boxes, **launch):
    """The kernel at one configuration, where the copy engine may be used if `boxes`."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.full((m, n), 7.0, dtype=a.dtype, device=a.device)
    tiles = -(-m // chosen["BLOCK_M"]) * -(-n // chosen["BLOCK_N"])
    module._matmul.fn[(tiles, 1)](
        *(a, b, None, None, out, m, n, k, *a.stride(), *b.stride(), k),
        ACTIVATION=None,
        PRECISION="ieee",
        A_TURNED=a.stride(1) != 1,
        B_TURNED=b.stride(1) != 1,
        COPY_ENGINE=boxes,
        **{**chosen, **launch},
    )
    return out


@needs_triton
@pytest.mark.parametrize("row", range(len(CONFIGS)))
def test_every_configuration_gives_the_same(row):
    chosen = CONFIGS[row]
    kind = torch.float16 if DEVICE == "cuda" else torch.float32
    launch = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    if DEVICE == "cuda":  # so is each compiled as it is to be used
        matmul(normal(8, 8), normal(8, 8))  # which hands the allocator for descriptors over
        if chosen.kwargs["BLOCK_K"] == 128:
            pytest.skip("fits the shared memory in fp8 only")
    for turned in (False, True):
        # boxes want rows that start at multiples of 16 bytes
        a = normal(80, 272, dtype=kind).T if turned else normal(272, 80, dtype=kind)
        b = normal(144, 80, dtype=kind, seed=1).T if turned else normal(80, 144, dtype=kind, seed=1)
        got = run_with(chosen.kwargs, a, b, chosen.kwargs["BOXES"], **launch)
        unit = 2.0**-11 * 64 if kind == torch.float16 else 4e-5  # results reach 40 or so
        torch.testing.assert_close(
            got.double(), reference(a.double(), b.double()), rtol=0, atol=unit
        )


def test_boxes_and_large_tiles_are_tried_where_they_can_work():
    def tried(dtype, n=4096, **how):
        given = {"a_ptr": torch.empty(1, dtype=dtype), "b_ptr": None, "m": 64, "k": 128, "n": n}
        return worth_trying(CONFIGS, given, **how)

    if runtime.triton is None:
        pytest.skip("no configurations without Triton")
    half, full = torch.bfloat16, torch.float32
    assert tried(half, PRECISION="ieee", COPY_ENGINE=True) == CONFIGS
    assert tried(half, n=16, PRECISION="ieee", COPY_ENGINE=True) == CONFIGS[:1]
    without = tried(half, PRECISION="ieee", COPY_ENGINE=False)
    assert len(without) > 1 and not any(c.kwargs["BOXES"] for c in without)
    exact = tried(full, PRECISION="ieee", COPY_ENGINE=False)
    assert exact[0] is CONFIGS[0]
    assert all(c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] <= 2048 * c.num_warps for c in exact)
    assert len(tried(full, PRECISION="tf32", COPY_ENGINE=False)) > len(exact) > 1


# ---- numbers


@needs_triton
def test_one_row_repeated_and_a_gradient_that_is_one_number():
    a, b = normal(1, 41).expand(70, 41).detach().requires_grad_(), normal(41, 5, seed=1)
    b.requires_grad_()
    out = matmul(a, b)
    grads = torch.autograd.grad(out.sum(), (a, b))  # its gradient has no strides either
    wants = torch.autograd.grad(reference(a, b).sum(), (a, b))
    close(out, a.double() @ b.double(), 41)
    for got, want in zip(grads, wants, strict=True):
        close(got, want, 70)


@needs_triton
def test_what_is_not_finite_stays_in_its_row_and_column():
    a, b = normal(5, 41), normal(41, 70, seed=1)
    a[4, 40], b[3, 69] = float("nan"), float("inf")  # the last row is what tiles repeat
    out = matmul(a, b, activation="relu")
    assert out[4].isnan().all() and out[:4, :69].isfinite().all()
    torch.testing.assert_close(out, reference(a, b, activation="relu"), equal_nan=True)


@needs_triton
def test_a_split_sum_is_the_same_every_time_and_close_to_the_whole():
    a, b = normal(5, 600, dtype=torch.float16), normal(600, 70, seed=1, dtype=torch.float16)
    first, again = (matmul(a, b, split_k=3, out_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, again)
    close(first, matmul(a, b, out_dtype=torch.float32), 600)


@needs_triton
def test_no_more_is_saved_than_the_way_back_needs():
    a, b = normal(8, 16).requires_grad_(), normal(16, 8, seed=1)
    for activation, more in ((None, 0), ("relu", 64), ("silu", 64), ("gelu_tanh", 64)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            matmul(a, b, activation=activation)
        assert sum(saved) == a.numel() + b.numel() + more


@needs_triton
def test_gradients_only_where_they_are_wanted():
    a, b, bias = normal(5, 7), normal(7, 3, seed=1), normal(3, seed=2).requires_grad_()
    matmul(a, b, bias).sum().backward()
    assert a.grad is None and b.grad is None
    assert torch.equal(bias.grad, torch.full((3,), 5.0, device=DEVICE))


# ---- the order of the tiles, and what they read


@given(m=st.integers(1, 30), n=st.integers(1, 30), group=st.integers(1, 40))
def test_order_walks_groups_of_rows_column_by_column(m, n, group):
    by_hand = [
        (i, j)
        for top in range(0, m, group)
        for j in range(n)
        for i in range(top, min(top + group, m))
    ]
    assert order(m, n, group) == by_hand  # so each tile once
    assert sum(strips(order(m, n, group), together=m * n)) == m + n


def test_groups_read_fewer_strips_than_rows():
    """64 × 64 tiles, 128 at a time, as an H100 would run them."""
    rows, groups = (strips(order(64, 64, group), together=128) for group in (1, 8))
    assert rows == [2 + 64] * 32
    assert groups == [8 + 16] * 32


@given(*(st.integers(1, 200) for _ in range(3)), st.integers(1, 64), st.integers(1, 64))
def test_loads_are_what_the_programs_ask_for(m, n, k, block_m, block_n):
    by_hand = sum(
        (min(block_m, m - i) + min(block_n, n - j)) * k * 2
        for i in range(0, m, block_m)
        for j in range(0, n, block_n)
    )
    assert loads(m, n, k, block_m, block_n, 2) == by_hand
    assert loads(m, n, k, m, n, 2) + m * n * 2 == cost(m, n, k, 2).bytes


@needs_interpreter
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 16), (64, 64)])
def test_loads_are_what_the_kernel_reads(monkeypatch, block_m, block_n):
    """Counted in the interpreter, number by number."""
    from triton.runtime.interpreter import interpreter_builder as builder

    read, original = [], builder.create_masked_load

    def counting(ptrs, mask, *rest):
        read.append(int(mask.data.sum()) * 4)
        return original(ptrs, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting)
    a, b = normal(64, 40), normal(40, 128, seed=1)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 16, "GROUP": 2, "BOXES": False}
    close(run_with(tiles, a, b, False), a.double() @ b.double(), 40)
    # a tile of a is read once for each of its rows and steps of k: the mask says which steps exist
    assert sum(read) == loads(64, 128, 40, block_m, block_n, 4)


# ---- bad input

A, B = torch.zeros(3, 5), torch.zeros(5, 4)


@needs_triton
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a": torch.zeros(3, 6)}, r"a \(3, 6\) @ b \(5, 4\)"),
        ({"a": torch.zeros(5)}, r"a \(5,\)"),
        ({"b": torch.zeros(2, 5, 4)}, r"\(2, 5, 4\)"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\) must be \[4\]"),
        ({"bias": torch.zeros(1, 4)}, r"bias \(1, 4\)"),
        ({"a": A.half()}, "float16.*float32.*alike"),
        ({"a": A.int(), "b": B.int()}, "int32 must be one of float32, float16"),
        ({"a": A.double(), "b": B.double()}, "float64 must be one of"),
        ({"a": A.to("meta")}, "one device"),
        ({"bias": torch.zeros(4, device="meta")}, "one device"),
        ({"activation": "tanh"}, "activation='tanh' must be one of"),
        ({"precision": "fp32"}, "precision='fp32' must be one of"),
        ({"split_k": 0}, "split_k=0"),
        ({"split_k": 1.5}, r"split_k=1\.5"),
        ({"out_dtype": torch.float64}, "out_dtype=torch.float64 must be one of"),
        ({"a": A.to(FP8), "b": B.to(FP8)}, "out_dtype=torch.float8_e4m3fn must be one of"),
        ({"a": A.to(FP8)}, "alike"),
        ({"a": A.to(FP8).requires_grad_(), "b": B.to(FP8)}, "no gradient"),
    ],
)
def test_bad_input_is_refused(changes, says):
    given = {"a": A, "b": B, **changes}
    given = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for key, value in given.items()
    }
    with pytest.raises(ValueError, match=says):
        matmul(**given)


@pytest.mark.parametrize("sizes", [(0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_an_order_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="1 at least"):
        order(*sizes)
