"""Counted traffic against algorithms that really compute, from nothing but what they loaded."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from minillm.accounting import hbm


class Slow:
    """An array in slow memory: every number that is taken out or put in is counted."""

    def __init__(self, values, counter):
        self.values, self.counter = values, counter

    def __getitem__(self, place):
        part = np.array(self.values[place])
        self.counter["read"] += part.size
        return part

    def __setitem__(self, place, part):
        self.values[place] = part
        self.counter["written"] += np.asarray(part).size


def visible(n, causal):
    return np.tril(np.ones((n, n), bool)) if causal else np.ones((n, n), bool)


def setup(n, d, *names, causal=False):
    rng = np.random.default_rng(n * d)
    q, k, v = (rng.standard_normal((n, d)) for _ in range(3))
    scores = np.where(visible(n, causal), q @ k.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    counter = {"read": 0, "written": 0}
    made = [Slow(np.zeros(shape), counter) for shape in names]
    slow = [Slow(x, counter) for x in (q, k, v)]
    return counter, slow, made, weights / weights.sum(1, keepdims=True) @ v


def counted(counter, traffic):
    return (counter["read"], counter["written"]) == (traffic.read, traffic.written)


@pytest.mark.parametrize(("n", "d", "m"), [(12, 4, 40), (17, 3, 60), (9, 4, 1000), (1, 1, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_outside_moves_what_the_real_algorithm_moves(n, d, m, causal):
    counter, (q, k, v), (out, lse), want = setup(n, d, (n, d), (n,), causal=causal)
    high, wide = hbm.tiles(n, d, m)
    seen = visible(n, causal)
    for i in range(0, n, high):
        a = slice(i, min(i + high, n))
        rows, top, total, part = q[a], np.full((a.stop - i, 1), -np.inf), 0.0, 0.0
        for j in range(0, n, wide):
            b = slice(j, min(j + wide, n))
            if not seen[a, b].any():
                continue
            scores = np.where(seen[a, b], rows @ k[b].T, -np.inf)
            new = np.maximum(top, scores.max(1, keepdims=True))
            p = np.exp(scores - new)
            shrink = np.exp(top - new)
            top, total = new, shrink * total + p.sum(1, keepdims=True)
            part = shrink * part + p @ v[b]
        out[a], lse[a] = part / total, (top + np.log(total))[:, 0]
    np.testing.assert_allclose(out.values, want, atol=1e-12)
    assert counted(counter, hbm.flash(n, d, m, causal=causal))


@pytest.mark.parametrize(("n", "d", "m"), [(12, 4, 40), (17, 3, 60), (9, 4, 1000), (1, 1, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_outside_moves_what_the_real_algorithm_moves(n, d, m, causal):
    counter, slow, made, want = setup(n, d, (n, d), (n, 1), (n, 1), causal=causal)
    (q, k, v), (out, top, total), seen = slow, made, visible(n, causal)
    high, wide = hbm.tiles(n, d, m, outer="keys")
    for j in range(0, n, wide):
        b = slice(j, min(j + wide, n))
        keys, values = k[b], v[b]
        for i in range(0, n, high):
            a = slice(i, min(i + high, n))
            if not seen[a, b].any():
                continue
            scores = np.where(seen[a, b], q[a] @ keys.T, -np.inf)
            past = (out[a], top[a], total[a]) if j else (0.0, -np.inf, 0.0)
            new = np.maximum(past[1], scores.max(1, keepdims=True))
            p, shrink = np.exp(scores - new), np.exp(past[1] - new)
            denominator = shrink * past[2] + p.sum(1, keepdims=True)
            out[a] = (shrink * past[2] * past[0] + p @ values) / denominator
            top[a], total[a] = new, denominator
    np.testing.assert_allclose(out.values, want, atol=1e-12)
    assert counted(counter, hbm.flash(n, d, m, outer="keys", causal=causal))


def product(a, b, c, m):
    """c = a b in tiles of c that stay, beside one column of a and one row of b."""
    wide = max(w for w in range(1, b.values.shape[1] + 1) if w == 1 or w * w + 2 * w <= m)
    high = (m - wide) // (wide + 1)
    for i in range(0, len(a.values), high):
        for j in range(0, b.values.shape[1], wide):
            tile = 0.0
            for x in range(len(b.values)):
                column, row = a[i : i + high, x], b[x, j : j + wide]
                assert np.size(column) * np.size(row) + np.size(column) + np.size(row) <= m
                tile = tile + np.outer(column, row)
            c[i : i + high, j : j + wide] = tile


@pytest.mark.parametrize(("n", "d", "m"), [(12, 4, 40), (17, 3, 12), (9, 4, 1000), (1, 1, 3)])
def test_standard_moves_what_the_real_algorithm_moves(n, d, m):
    counter, (q, k, v), (scores, p, out), want = setup(n, d, (n, n), (n, n), (n, d))
    product(q, Slow(k.values.T, counter), scores, m)
    for i in range(n):
        if n + 2 <= m:
            row = scores[i]
            p[i] = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            continue
        top, total = -np.inf, 0.0
        for j in range(0, n, m - 2):
            part = scores[i, j : j + m - 2]
            new = max(top, part.max())
            top, total = new, total * np.exp(top - new) + np.exp(part - new).sum()
        for j in range(0, n, m - 2):
            p[i, j : j + m - 2] = np.exp(scores[i, j : j + m - 2] - top) / total
    product(p, v, out, m)
    np.testing.assert_allclose(out.values, want, atol=1e-12)
    assert counted(counter, hbm.standard(n, d, m))


def slope(f, low, high):
    return math.log(f(high) / f(low)) / math.log(high / low)


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["queries", "keys"])
def test_exponents_of_the_theorem(outer):
    def moved(n=1024, d=16, m=1024):
        return hbm.flash(n, d, m, outer).total

    assert slope(lambda m: moved(m=m), 512, 2048) == pytest.approx(-1, abs=0.08)
    assert slope(lambda n: moved(n=n), 512, 2048) == pytest.approx(2, abs=0.08)
    assert slope(lambda d: moved(d=d, m=2048), 8, 32) == pytest.approx(2, abs=0.2)
    assert slope(lambda m: hbm.standard(1024, 8, m).total, 256, 2048) > -0.2  # hardly changes


def test_queries_outside_closed_form():
    """q read and out written once, k and v once per block of queries, one number a row for lse."""
    for n, d, m in ((100, 8, 200), (64, 4, 500), (33, 5, 10_000)):
        traffic = hbm.flash(n, d, m)
        visits = math.ceil(Fraction(n, hbm.tiles(n, d, m)[0]))
        assert traffic[:2] == (n * d + visits * 2 * n * d, n * d + n)


def test_never_more_than_fits_and_never_less_than_the_inputs():
    for outer in ("queries", "keys"):
        for m in (19, 50, 300, 5000):
            traffic = hbm.flash(40, 4, m, outer)
            assert traffic.total >= 4 * 40 * 4 and traffic.peak <= m
            assert hbm.flash(40, 4, m, outer, causal=True).total <= traffic.total
    assert hbm.flash(40, 4, 5000).total == 4 * 40 * 4 + 40
    assert hbm.standard(40, 4, 30).peak <= 30


def test_default_tiles_are_the_best_ones():
    n, d = 24, 3
    for outer, m in itertools.product(("queries", "keys"), (15, 20, 23, 29, 36, 50)):
        totals = []
        for high, wide in itertools.product(range(1, n + 1), repeat=2):
            if 2 * d * (high + wide) + 2 * high + high * wide <= m:
                totals.append(hbm.flash(n, d, m, outer, (high, wide)).total)
        assert hbm.flash(n, d, m, outer).total == min(totals)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="m=18 cannot hold a row each of q, k, v and output: 19"):
        hbm.flash(8, 4, 18)
    with pytest.raises(ValueError, match="cannot hold"):
        hbm.flash(64, 16, 512, block=(8, 8))  # q, k, v and out fill it: no room for scores
    for bad in ((0, 4, 99), (4, 0, 99), (4, 4, 2)):
        with pytest.raises(ValueError, match="at least"):
            hbm.standard(*bad)
    for bad in ((0, 4, 99), (4, 0, 99)):
        with pytest.raises(ValueError, match="at least 1"):
            hbm.tiles(*bad)
    with pytest.raises(ValueError, match="'queries' or 'keys'"):
        hbm.flash(8, 4, 99, outer="heads")
    with pytest.raises(ValueError, match="'queries' or 'keys'"):
        hbm.flash(8, 4, 99, outer="heads", block=(1, 1))
    with pytest.raises(ValueError, match="at least \\(1, 1\\)"):
        hbm.flash(8, 4, 99, block=(0, 1))


def test_a_name_loaded_again_replaces_what_it_held():
    fast = hbm.FastMemory(10)
    fast.load(x=6)
    fast.load(x=9)
    fast.make(x=1)
    assert fast.traffic == (15, 0, 9)
    with pytest.raises(ValueError, match="m=10 numbers"):
        fast.make(x=11)
    fast.clear()
    fast.make(y=10)
    fast.store("y", "y")
    assert fast.traffic == (15, 20, 10) and fast.traffic.total == 35
