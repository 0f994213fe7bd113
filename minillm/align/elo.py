"""Ratings from games: Elo's, which follow them one by one, and the maximum-likelihood ones.

Both believe that the first of two players wins with a probability that depends on the difference of
two numbers alone. A player may be a model, and a game a vote between two of its answers.
"""

# p players, g games

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Game = tuple[int, int, float]
"""first player, second player, points of the first: 1 won, 0 lost, 1/2 drawn"""
SCALE = 400 / math.log(10)
"""points of Elo to one unit of Bradley-Terry: 400 more is ten times the odds"""


def _check(games: Sequence[Game], players: int) -> None:
    for number, (i, j, points) in enumerate(games):
        if not (0 <= i < players and 0 <= j < players and i != j and 0 <= points <= 1):
            raise ValueError(
                f"game {number} is {(i, j, points)}: two different players of 0 to {players - 1} "
                "and points between 0 and 1 are due"
            )


def expected(difference: Tensor | float) -> Tensor:
    """Points that a player expects who is rated so much higher: 1 / (1 + 10^(-difference / 400)).

    >>> [round(expected(x).item(), 2) for x in (0.0, 100.0, 400.0)]
    [0.5, 0.64, 0.91]
    """
    return torch.sigmoid(torch.as_tensor(difference, dtype=torch.float64) / SCALE)


def elo(games: Sequence[Game], players: int, k: float = 16.0, start: float = 1000.0) -> Tensor:
    """Ratings before the first game and after each, [g + 1, p]; their sum never changes.

        R_i ← R_i + k (points - expected(R_i - R_j)),        R_j the same with the sign turned

    That is stochastic gradient ascent on the likelihood of Bradley and Terry, one game a step: it
    depends on the order of the games, and with a fixed k it never comes to rest. Raises ValueError
    for players or points that do not exist. Source: Elo, The Rating of Chessplayers, 1978.

    >>> elo([(0, 1, 1.0), (1, 0, 1.0)], players=2).round(decimals=2).tolist()
    [[1000.0, 1000.0], [1008.0, 992.0], [999.63, 1000.37]]
    """
    _check(games, players)
    if not k > 0:
        raise ValueError(f"k={k} must be above 0")
    ratings = torch.full((len(games) + 1, players), start, dtype=torch.float64)
    for number, (i, j, points) in enumerate(games):
        now = ratings[number].clone()
        moved = k * (points - expected(now[i] - now[j]))
        now[i] += moved
        now[j] -= moved
        ratings[number + 1] = now
    return ratings


def bradley_terry(games: Sequence[Game], players: int, tolerance: float = 1e-10) -> Tensor:
    """Strengths s [p] with mean 0 that make the games most likely if P(i beats j) = σ(s_i - s_j).

    All games at once, in no order; `SCALE * s` is comparable with ratings. Raises ValueError where
    there is no finite maximum: when the players fall into two parts of which one never took a
    point from the other. Newton's method on a concave function. Source: Ford, Solution of a Ranking
    Problem from Binary Comparisons, 1957 (when it exists).

    >>> bradley_terry([(0, 1, 1.0)] * 3 + [(0, 1, 0.0)], players=2).exp().round(decimals=3).tolist()
    [1.732, 0.577]
    """
    _check(games, players)
    table = [[0.0] * players for _ in range(players)]
    for i, j, won in games:
        table[i][j] += won
        table[j][i] += 1 - won
    points = torch.tensor(table, dtype=torch.float64)
    reach = (points > 0) | torch.eye(players, dtype=torch.bool)
    for _ in range(players):
        reach = (reach.double() @ reach.double()) > 0
    if cut := (~reach).any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"players {cut} have not even indirectly taken a point from everybody: no finite "
            "strengths make these games most likely"
        )
    played, s = points + points.T, torch.zeros(players, dtype=torch.float64)
    for _ in range(100):
        p = torch.sigmoid(s[:, None] - s)
        gradient = (points - played * p).sum(1)
        weight = played * p * (1 - p)
        hessian = weight.sum(1).diag() - weight + 1.0 / players  # the mean is held by the last
        step = torch.linalg.solve(hessian, gradient)
        s = s + step / max(1.0, step.abs().max().item())  # at most 1 at a time: no overshoot
        if step.abs().max() < tolerance:
            break
    return s - s.mean()
