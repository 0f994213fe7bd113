"""Positions: each kind against matrices, complex numbers, brute force and other people's code."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config import CHOICES, ModelConfig
from minillm.model import LM, Attention, KVCache, Position, attend, causal_mask, rotate, rotation
from minillm.model.position import (
    alibi_slopes,
    convert_layout,
    hierarchical,
    sinusoidal,
    t5_bucket,
)

LAYOUTS = CHOICES["rope_layout"]
RELATIVE = ("rope", "alibi", "t5", "none")
BASE = ModelConfig(31, 24, 2, 4, max_len=40, impl="reference", rope_theta=100.0)
close = torch.testing.assert_close


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build(seed=0, **changes):
    """In fp64, with weights large enough for positions to matter."""
    lm = LM(dataclasses.replace(BASE, **changes), seed=seed).double().eval()
    with torch.no_grad():
        for i, p in enumerate(lm.parameters()):
            p.add_(randn(*p.shape, seed=seed + i) * 0.2)
    return lm


def frequencies(d, theta):
    return torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)


def pairs(x, layout):
    """The two members of every pair, by plain indexing: [..., d/2] each."""
    d = x.shape[-1]
    if layout == "half":
        return x[..., [*range(d // 2)]], x[..., [*range(d // 2, d)]]
    return x[..., [*range(0, d, 2)]], x[..., [*range(1, d, 2)]]


# --- RoPE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("d", "t"), [(2, 1), (4, 5), (6, 3), (64, 7)])
def test_rotation_multiplies_pairs_as_complex_numbers(layout, d, t):
    x, positions = randn(2, 3, t, d), torch.arange(t) * 17 + 3
    got = rotate(x, *rotation(positions.double(), d, 500.0), layout)
    turn = torch.polar(torch.ones(t, d // 2).double(), positions[:, None] * frequencies(d, 500.0))
    want = torch.complex(*pairs(x, layout)) * turn
    close(torch.complex(*pairs(got, layout)), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_is_a_block_diagonal_matrix(layout):
    d, theta = 6, 30.0

    def matrix(position):
        whole = torch.zeros(d, d, dtype=torch.float64)
        first, second = pairs(torch.arange(d), layout)
        for i, j, w in zip(first, second, frequencies(d, theta), strict=True):
            c, s = torch.cos(position * w), torch.sin(position * w)
            whole[i, i], whole[i, j], whole[j, i], whole[j, j] = c, -s, s, c
        return whole

    x = randn(1, 1, 1, d)
    for position in (0, 1, 9, -4):
        got = rotate(x, *rotation(torch.tensor([float(position)]).double(), d, theta), layout)
        close(got[0, 0, 0], matrix(position) @ x[0, 0, 0], rtol=1e-12, atol=1e-12)
        close(matrix(3).T @ matrix(3 + position), matrix(position), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotated_scores_depend_on_the_offset_and_lengths_stay(layout):
    q, k = randn(1, 2, 9, 8), randn(1, 2, 9, 8, seed=1)
    scores = []
    for shift in (0, 1, 1000):
        turn = rotation((torch.arange(9) + shift).double(), 8)
        scores.append(rotate(q, *turn, layout) @ rotate(k, *turn, layout).mT)
        close(rotate(q, *turn, layout).norm(dim=-1), q.norm(dim=-1))
    close(scores[0], scores[1], rtol=0, atol=1e-12)
    close(scores[0], scores[2], rtol=0, atol=1e-11)
    assert (scores[0] - q @ k.mT).abs().max() > 0.5  # control: it does something


def test_rows_may_have_positions_of_their_own():
    x, where = randn(3, 2, 5, 8), torch.randint(100, (3, 5))
    together = rotate(x, *rotation(where[:, None], 8))
    for row in range(3):
        close(together[row], rotate(x[row], *rotation(where[row], 8)))


def test_angles_are_float32_for_whole_positions_and_the_input_keeps_its_dtype():
    cos, sin = rotation(torch.arange(5), 8)
    assert cos.dtype == sin.dtype == torch.float32
    exact = rotation(torch.arange(5).double(), 8)
    assert exact[0].dtype == torch.float64
    close(cos.double(), exact[0], rtol=0, atol=1e-6)
    x = randn(1, 1, 5, 8).bfloat16()
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos, sin).bfloat16())  # rounded once, at the end
    close(rotation(torch.tensor([0.5]), 8)[0], rotation(torch.tensor([1]), 8, 1e4, "linear", 2)[0])


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_scaling_slows_all_pairs_or_all_but_the_fastest(factor):
    d, theta = 16, 10_000.0
    one = torch.tensor([1.0]).double()

    def speeds(*scaling):
        cos, sin = rotation(one, d, theta, *scaling)
        return torch.atan2(sin, cos)[0]

    plain = speeds()
    close(speeds("linear", factor), plain / factor)
    slowed = plain / speeds("ntk", factor)
    close(slowed[0].item(), 1.0)
    close(slowed[-1].item(), factor)
    close(slowed, factor ** (torch.arange(8).double() / 7))  # geometric in between
    close(speeds("linear", 1.0), plain)
    close(speeds("ntk", 1.0), plain)


@pytest.mark.parametrize(
    ("rope", "length", "ours"),
    [
        ({"rope_type": "default"}, 50, {}),
        ({"rope_type": "linear", "factor": 4.0}, 50, {"scaling": "linear", "factor": 4.0}),
        # up to its trained length the dynamic form does nothing, at 3 times it: 2 * 3 - (2 - 1)
        ({"rope_type": "dynamic", "factor": 2.0}, 64, {}),
        ({"rope_type": "dynamic", "factor": 2.0}, 192, {"scaling": "ntk", "factor": 5.0}),
        ({"rope_type": "dynamic", "factor": 1.0}, 256, {"scaling": "ntk", "factor": 4.0}),
    ],
)
def test_the_implementation_used_for_llama_weights(rope, length, ours):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    cfg = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10_000.0, **rope},
    )
    positions = torch.arange(length)[None]
    q, k = randn(1, 4, length, 16).float(), randn(1, 4, length, 16, seed=1).float()
    cos, sin = LlamaRotaryEmbedding(cfg)(q, positions)
    want = apply_rotary_pos_emb(q, k, cos, sin)
    turn = rotation(positions[0], 16, 10_000.0, **ours)
    close(turn[0], cos[0, :, :8], rtol=0, atol=3e-5)
    for x, y in zip((q, k), want, strict=True):
        close(rotate(x, *turn, "half"), y, rtol=1e-4, atol=1e-4)
        assert (rotate(x, *turn, "interleaved") - y).abs().max() > 0.1
    if not ours and rope["rope_type"] == "default":  # far out, rounding decides: the very same
        far = torch.tensor([[30_000]])
        theirs = LlamaRotaryEmbedding(cfg)(q, far)
        assert torch.equal(rotation(far[0], 16)[0], theirs[0][0, :, :8])
        assert torch.equal(rotation(far[0], 16)[1], theirs[1][0, :, :8])


# --- layouts


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_converted_weights_attend_alike(to, heads):
    """With q/k norms and biases too: weights of one layout, converted, in a layer of the other."""
    other = next(name for name in LAYOUTS if name != to)
    options = {"n_heads": heads[0], "n_kv_heads": heads[1], "head_dim": 8, "bias": True}
    options |= {"position": "rope", "qk_norm": True}
    cfg = dataclasses.replace(BASE, **options, rope_layout=other)
    old = Attention(cfg).double()
    for i, p in enumerate(old.parameters()):
        p.data = randn(*p.shape, seed=i)
    new = Attention(dataclasses.replace(cfg, rope_layout=to)).double()
    new.load_state_dict(old.state_dict())
    x, turn = randn(2, 7, 24), rotation(torch.arange(7).double(), 8)
    want = old(x, rotation=turn)
    assert (new(x, rotation=turn) - want).abs().max() > 0.01  # control: unconverted they differ
    for name in ("q", "k"):
        for p in (getattr(new, name).weight, getattr(new, name).bias):
            p.data = convert_layout(p.data, 8, to)
        norm = getattr(new, f"{name}_norm").weight
        norm.data = convert_layout(norm.data, 8, to)
    close(new(x, rotation=turn), want, rtol=1e-12, atol=1e-12)


def test_conversion_goes_there_and_back():
    weight = randn(24, 5)
    there = convert_layout(weight, 8, "interleaved")
    assert not torch.equal(there, weight)
    assert torch.equal(convert_layout(there, 8, "half"), weight)
    assert not torch.equal(convert_layout(there, 8, "interleaved"), weight)
    assert torch.equal(there[8 + 2], weight[8 + 1])  # row 2i of a head was row i
    assert torch.equal(there[8 + 3], weight[8 + 4 + 1])  # row 2i + 1 was row i + d/2
    assert torch.equal(convert_layout(weight, 2, "interleaved"), weight)  # one pair: the same


# --- ALiBi


def test_slopes_of_the_paper():
    paper = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == paper
    close(alibi_slopes(16), torch.tensor([2 ** (-0.5 * i) for i in range(1, 17)]))
    assert alibi_slopes(1).tolist() == [2**-8]
    # 12 heads: those of 8, then the first, third, fifth and seventh of 16
    close(alibi_slopes(12), torch.tensor([*paper, *(2 ** (-0.5 * i) for i in (1, 3, 5, 7))]))


@pytest.mark.parametrize("heads", range(1, 34))
def test_slopes_of_another_library(heads):
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)  # slope · key position
    close(alibi_slopes(heads), theirs[:, 0, 1])


def test_alibi_is_a_line_through_the_query():
    position = Position(dataclasses.replace(BASE, position="alibi"))
    bias = position.bias(torch.tensor([5, 9]), torch.tensor([0, 5, 9, 12]))
    assert bias.shape == (1, 4, 2, 4)
    for head in range(4):
        for i, query in enumerate((5, 9)):
            want = [-abs(query - key) * 2.0 ** (-2 * (head + 1)) for key in (0, 5, 9, 12)]
            assert bias[0, head, i].tolist() == want
    q, k, v = (randn(2, 4, 6, 8, seed=i) for i in range(3))
    row = torch.arange(6)
    got = attend(q, k, v, bias=position.bias(row, row), causal=True)
    # a softmax ignores what is the same for a whole row: slope · key position would do as well
    want = attend(q, k, v, bias=alibi_slopes(4)[:, None, None] * row, causal=True)
    close(got, want)


def test_alibi_is_exact_in_a_model_of_16_bits():
    position = Position(dataclasses.replace(BASE, position="alibi")).bfloat16()
    bias = position.bias(torch.tensor([2000]), torch.arange(2001))
    assert bias.dtype == torch.float32
    assert bias[0, 0, 0].unique().numel() == 2001


# --- T5


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.sampled_from([4, 8, 20, 32, 64]), st.sampled_from([65, 128, 500]))
def test_buckets_of_another_library(bidirectional, buckets, max_distance):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    theirs = modeling.T5Attention._relative_position_bucket
    distance = torch.cat([torch.arange(-3000, 3001), torch.tensor([-(10**6), 10**6])])
    got = t5_bucket(distance, bidirectional, buckets, max_distance)
    assert torch.equal(got, theirs(distance, bidirectional, buckets, max_distance))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_follow_their_definition(bidirectional):
    """Counted by comparing powers, without a logarithm: distance^n >= exact^n · ratio^k."""
    per_side = 16 if bidirectional else 32
    exact, limit = per_side // 2, 128

    def bucket(distance):
        first = per_side if bidirectional and distance > 0 else 0
        n = abs(distance) if bidirectional else max(0, -distance)
        if n < exact:
            return first + n
        steps = per_side - exact
        passed = sum(n**steps * exact**k >= exact**steps * limit**k for k in range(1, steps))
        return first + exact + passed

    for distance in range(-400, 401):
        got = t5_bucket(torch.tensor(distance), bidirectional).item()
        assert got == bucket(distance), distance


def test_buckets_are_exact_near_and_cover_everything():
    behind = t5_bucket(-torch.arange(2000))
    assert behind[:16].tolist() == list(range(16))
    assert (behind.diff() >= 0).all() and behind.unique().tolist() == list(range(32))
    assert (behind[128:] == 31).all()
    assert (t5_bucket(torch.arange(1, 50)) == 0).all()  # keys ahead, which a decoder never sees
    both = t5_bucket(torch.arange(-200, 201), bidirectional=True)
    assert both.unique().numel() == 31  # one of the 32 would be for distance 0 ahead
    assert torch.equal(both[201:] - 16, both[:200].flip(0))


# --- sinusoidal, learned, hierarchical


def test_sinusoids_by_the_formula():
    table = sinusoidal(torch.arange(50), 6)
    assert table.dtype == torch.float32
    for position in (0, 1, 49):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            close(table[position, 2 * i].item(), math.sin(angle), rtol=1e-4, atol=1e-5)
            close(table[position, 2 * i + 1].item(), math.cos(angle), rtol=1e-4, atol=1e-5)
    assert sinusoidal(torch.zeros(2, 3), 4).shape == (2, 3, 4)


def test_dot_products_of_sinusoids_depend_on_the_offset():
    table = sinusoidal(torch.arange(300).double(), 32)
    products = table @ table.T
    for offset in (0, 1, 7, 100):
        want = torch.cos(offset * frequencies(32, 10_000.0)).sum()
        close(products.diagonal(offset), want.expand(300 - offset), rtol=0, atol=1e-10)


def test_sinusoids_do_not_drown_the_tokens():
    lm = LM(dataclasses.replace(BASE, d_model=64, position="sinusoidal"), seed=0)
    x = randn(2, 5, 64).float()
    close(lm.position.add(x, torch.arange(5)) - sinusoidal(torch.arange(5), 64), 8 * x)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_hierarchical_rows_come_back_and_the_rest_are_new(n):
    table = randn(n, 16, seed=n)
    rows = hierarchical(table, torch.arange(n * n))
    close(rows[:n], table, rtol=1e-12, atol=1e-12)
    distances = torch.cdist(rows, rows) + torch.eye(n * n) * 9
    assert distances.min() > 1e-3
    u = [(table[i] - 0.4 * table[0]) / 0.6 for i in range(n)]
    for i in range(n):
        for j in range(n):
            close(rows[i * n + j], 0.4 * u[i] + 0.6 * u[j], rtol=1e-12, atol=1e-12)
    with pytest.raises(IndexError):
        hierarchical(table, torch.tensor([n * n]))
    with pytest.raises(IndexError):
        hierarchical(table, torch.tensor([-1]))


@pytest.mark.parametrize(("max_len", "rows"), [(1, 1), (2, 2), (4, 2), (5, 3), (40, 7), (49, 7)])
def test_hierarchical_models_learn_the_root_of_their_context(max_len, rows):
    cfg = dataclasses.replace(BASE, position="hierarchical", max_len=max_len)
    lm = LM(cfg, seed=0)
    assert lm.position.table.shape == (rows, 24)
    assert lm(torch.zeros(1, max_len, dtype=torch.long)).isfinite().all()


# --- the module


@pytest.mark.parametrize("kind", CHOICES["position"])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 7)])
def test_one_hook_acts(kind, shape):
    position = Position(dataclasses.replace(BASE, position=kind))
    for p in position.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    where = torch.randint(30, shape, generator=torch.Generator().manual_seed(1))
    x = randn(3, shape[-1], 24)
    added = not torch.equal(position.add(x, where), x)
    turn, bias = position.rotation(where), position.bias(where, where)
    table = kind in ("learned", "hierarchical", "sinusoidal")
    assert (added, turn is not None, bias is not None) == (
        table,
        kind == "rope",
        kind in ("t5", "alibi"),
    )
    b, t = (shape[0] if len(shape) == 2 else 1), shape[-1]
    if turn is not None:
        assert turn[0].shape == ((b, 1, t, 3) if len(shape) == 2 else (t, 3))
        assert rotate(randn(3, 4, t, 6), *turn).shape == (3, 4, t, 6)
    if bias is not None:
        assert bias.shape == (b, 4, t, t)


@pytest.mark.parametrize("kind", ["t5", "alibi"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_bias_place_by_place(kind, bidirectional):
    position = Position(dataclasses.replace(BASE, position=kind), bidirectional)
    if kind == "t5":
        position.buckets.data = randn(32, 4)
    queries, keys = torch.tensor([[4, 50], [0, 1]]), torch.tensor([[0, 4, 200], [7, 1, 0]])
    for q, k in ((queries, keys), (queries[0], keys), (queries, keys[0]), (queries[0], keys[0])):
        got = position.bias(q, k)
        q2, k2 = q.expand(len(got), 2), k.expand(len(got), 3)
        for row in range(len(got)):
            for i in range(2):
                for j in range(3):
                    distance = k2[row, j] - q2[row, i]
                    if kind == "alibi":
                        want = -alibi_slopes(4) * abs(distance.item())
                    else:
                        want = position.buckets[t5_bucket(distance, bidirectional)]
                    close(got[row, :, i, j], want)


@pytest.mark.parametrize("kind", CHOICES["position"])
def test_a_common_shift_is_invisible_to_relative_positions(kind):
    lm = build(position=kind)
    x = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    for shift in (1, 30):
        same = torch.allclose(lm(x, torch.arange(9) + shift), lm(x), rtol=1e-5, atol=1e-5)
        assert same == (kind in RELATIVE)
    # and all but "none" notice two tokens that change places, in an unmasked model
    swapped = x[:, [1, 0, *range(2, 9)]]
    everything = torch.ones(9, 9, dtype=torch.bool)
    moved = lm(swapped, mask=everything)[:, 2:] - lm(x, mask=everything)[:, 2:]
    assert (moved.abs().max() < 1e-9) == (kind == "none")


@pytest.mark.parametrize("kind", CHOICES["position"])
def test_a_cache_of_left_padded_rows_gives_what_each_row_alone_gives(kind):
    """Rows of 3, 5 and 8 tokens, right-aligned, then three more tokens of each, one by one."""
    lm, lengths, more, t = build(position=kind), [3, 5, 8], 3, 8
    rows = [torch.randint(31, (n + more,), generator=torch.Generator().manual_seed(n))
            for n in lengths]  # fmt: skip
    first = torch.zeros(3, t, dtype=torch.long)
    positions, real = torch.zeros(3, t, dtype=torch.long), torch.zeros(3, t + more).bool()
    for i, n in enumerate(lengths):
        first[i, t - n :], positions[i, t - n :] = rows[i][:n], torch.arange(n)
        real[i, t - n :] = True
    cache = KVCache.for_config(lm.cfg, batch=3, dtype=torch.float64)
    with torch.no_grad():
        mask = causal_mask(t)[None, None] & real[:, None, None, :t]
        outputs = [lm(first, positions, mask, cache)[:, -1:]]
        for step in range(more):
            new = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])
            where = torch.tensor(lengths)[:, None] + step
            mask = real[:, None, None, : t + step + 1]
            outputs.append(lm(new[:, None], where, mask, cache))
        for i, n in enumerate(lengths):
            alone = lm(rows[i][None])[0, n - 1 :]
            close(torch.cat([o[i] for o in outputs]), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["learned", "hierarchical", "t5"])
def test_gradients_reach_the_tables(kind, impl):
    """By differences, for two numbers in a row that is used; a row that is not used gets none."""
    lm = build(position=kind, impl=impl)
    table = lm.position.buckets if kind == "t5" else lm.position.table
    x = torch.randint(31, (2, 5), generator=torch.Generator().manual_seed(0))

    def loss():
        return lm(x).logsumexp(-1).sin().sum()

    loss().backward()
    used = table.grad.abs().sum(-1) > 0
    assert used.tolist() == [i < 5 for i in range(len(table))]
    for row, column in ((1, 0), (4, 3)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                table[row, column] += step
                sides.append(loss().item())
                table[row, column] -= step
        close(table.grad[row, column].item(), (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-7)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinusoidal(torch.arange(3), 5), "d=5 must be even"),
        (lambda: rotation(torch.arange(3), 0), "d=0 must be even and at least 2"),
        (lambda: rotation(torch.arange(3), 4, scaling="yarn", factor=2), "scaling='yarn' must be"),
        (lambda: rotation(torch.arange(3), 4, factor=2.0), "factor=2.0 then 1"),
        (lambda: rotation(torch.arange(3), 2, scaling="ntk", factor=2), "d=2 has no other"),
        (lambda: rotate(randn(1, 1, 3, 4), *rotation(torch.arange(3), 4), "pairs"), "'pairs'"),
        (lambda: rotate(randn(1, 1, 3, 8), *rotation(torch.arange(3), 2)), "turn 2 numbers, not 8"),
        (lambda: convert_layout(randn(8, 2), 4, "whole"), "layout='whole' must be"),
        (lambda: convert_layout(randn(10, 2), 4, "half"), "10 rows are not heads of d_head=4"),
        (lambda: convert_layout(randn(9, 2), 3, "half"), "d_head=3"),
        (lambda: alibi_slopes(0), "n_heads=0 must be at least 1"),
        (lambda: t5_bucket(torch.tensor(1), True, 2), "2 buckets|0 exact"),
        (lambda: t5_bucket(torch.tensor(1), False, 32, 16), "max_distance=16 must lie beyond"),
        (lambda: hierarchical(randn(3, 2), torch.arange(3), 0.5), "alpha=0.5"),
        (lambda: hierarchical(randn(3, 2), torch.arange(3), 1.0), "alpha=1.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
