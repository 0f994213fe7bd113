"""Elo against its definition, maximum likelihood against its own equations and a plain ascent."""

import math
import random

import numpy as np
import pytest
import torch

from minillm.align.elo import SCALE, bradley_terry, elo, expected


def play(strengths, n, seed):
    """n games between players drawn at random, won as Bradley and Terry say."""
    rng = random.Random(seed)
    games = []
    for _ in range(n):
        i, j = rng.sample(range(len(strengths)), 2)
        p = 1 / (1 + math.exp(strengths[j] - strengths[i]))
        games.append((i, j, float(rng.random() < p)))
    return games


def test_four_hundred_points_are_ten_to_one():
    assert abs(expected(400.0).item() - 10 / 11) < 1e-12
    assert abs(expected(torch.tensor(-400.0)).item() - 1 / 11) < 1e-12


def test_ratings_follow_the_definition():
    games = [*play([0.0, 0.5, -1.0, 2.0], 200, seed=0), (0, 1, 0.5)]
    found = elo(games, 4, k=24.0, start=1500.0)
    ratings = np.full(4, 1500.0)
    for number, (i, j, points) in enumerate(games, start=1):
        before = ratings.copy()
        ratings[i] += 24 * (points - 1 / (1 + 10 ** ((before[j] - before[i]) / 400)))
        ratings[j] += 24 * ((1 - points) - 1 / (1 + 10 ** ((before[i] - before[j]) / 400)))
        np.testing.assert_allclose(found[number].numpy(), ratings, rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1).numpy(), 6000.0)


def test_maximum_likelihood_expects_the_points_that_were_made():
    games = [*play([0.3, 0.0, -1.0, 1.0, 0.1], 300, seed=1), (0, 1, 0.5)]
    s = bradley_terry(games, 5)
    assert abs(s.mean()) < 1e-12
    made, due = np.zeros(5), np.zeros(5)
    for i, j, points in games:
        p = 1 / (1 + math.exp(s[j] - s[i]))
        made[i], made[j] = made[i] + points, made[j] + 1 - points
        due[i], due[j] = due[i] + p, due[j] + 1 - p
    np.testing.assert_allclose(made, due, atol=1e-8)  # the gradient is zero: it is the maximum
    assert (
        abs(bradley_terry([(0, 1, 1.0)] * 9 + [(1, 0, 1.0)], 2).diff().item() + math.log(9)) < 1e-9
    )


def test_both_recover_known_strengths():
    strengths = torch.tensor([-1.2, -0.4, 0.4, 1.2])
    games = play(strengths.tolist(), 6000, seed=2)
    s = bradley_terry(games, 4)
    assert (s - strengths).abs().max() < 0.12
    late = elo(games, 4, k=8.0)[3000:].mean(0)  # the mean over time: the last alone is noisy
    assert ((late - 1000) / SCALE - strengths).abs().max() < 0.15
    assert (elo(games, 4, k=8.0)[0] == 1000).all()


def test_lopsided_results_are_still_solved():
    games = [(0, 1, 1.0)] * 5000 + [(1, 0, 1.0)]  # Newton alone would overshoot
    assert abs(bradley_terry(games, 2).diff().item() + math.log(5000)) < 1e-6


def test_what_has_no_answer_is_refused():
    with pytest.raises(ValueError, match=r"players \[1\] have not even indirectly"):
        bradley_terry([(0, 1, 1.0)] * 3, 2)  # 1 never won: infinitely weaker
    with pytest.raises(ValueError, match="no finite"):
        bradley_terry([(0, 1, 1.0), (1, 0, 1.0)], 3)  # nobody played 2
    for game in ((0, 0, 1.0), (0, 3, 1.0), (-1, 0, 1.0), (0, 1, 2.0), (0, 1, math.nan)):
        for rate in (elo, bradley_terry):
            with pytest.raises(ValueError, match="game 0 is"):
                rate([game], 3)
    with pytest.raises(ValueError, match="k=0 must be above 0"):
        elo([], 2, k=0)
