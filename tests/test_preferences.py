"""Preferences drawn from rewards: frequencies against Bradley-Terry and Plackett-Luce."""

import itertools
import math
from collections import Counter

import pytest
import torch

from minillm.data.preferences import Comparison, compare


def draw(rewards, n, seed=0, **rest):
    """n rankings of responses "0", "1", ... with these rewards."""
    k = len(rewards)
    names = [[str(i) for i in range(k)]] * n
    rng = torch.Generator().manual_seed(seed)
    told = compare(["?"] * n, names, torch.tensor([rewards] * n), generator=rng, **rest)
    return Counter("".join(c.responses) for c in told)


def near(share, p, n):
    return abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-9


@pytest.mark.parametrize("difference, temperature", [(0.0, 1.0), (1.5, 1.0), (1.5, 3.0), (-4, 2.0)])
def test_of_two_the_better_wins_as_bradley_and_terry_say(difference, temperature):
    found = draw([difference + 1.0, 1.0], 8000, temperature=temperature)
    p = 1 / (1 + math.exp(-difference / temperature))
    assert near(found["01"] / 8000, p, 8000)
    assert not near(found["01"] / 8000, 0.5 * p + 0.1, 8000)  # the band can be missed


def test_rankings_are_drawn_by_plackett_and_luce():
    rewards, n = [1.0, 0.0, -0.5, 0.3], 12000
    found = draw(rewards, n)
    assert sum(found.values()) == n
    for order in itertools.permutations(range(4)):
        p, left = 1.0, list(order)
        while left:
            weights = [math.exp(rewards[i]) for i in left]
            p *= weights[0] / sum(weights)
            left = left[1:]
        assert near(found["".join(map(str, order))] / n, p, n)


def test_at_temperature_zero_the_order_is_exact():
    assert draw([0.1, 0.3, 0.2], 50, temperature=0) == {"120": 50}
    assert draw([0.1, 0.3, 0.2], 50, temperature=1e-300) == {"120": 50}


def test_equal_rewards_give_no_preference():
    assert draw([1.0, 1.0], 20, temperature=0) == {}  # nothing was preferred
    assert draw([1.0, 2.0, 1.0, 2.0], 20, temperature=0) == {"10": 20}  # the first of each kept
    assert near(draw([1.0, 1.0], 4000)["01"] / 4000, 0.5, 4000)  # a coin's toss


def test_noise_turns_whole_rankings():
    found = draw([3.0, 2.0, 1.0], 4000, temperature=0, noise=0.2)
    assert set(found) == {"012", "210"} and near(found["210"] / 4000, 0.2, 4000)
    assert draw([3.0, 2.0, 1.0], 50, temperature=0, noise=1.0) == {"210": 50}
    # of two with noise e, right labels are p (1 - e) + (1 - p) e
    found = draw([1.0, 0.0], 8000, noise=0.3)
    p = 1 / (1 + math.exp(-1))
    assert near(found["01"] / 8000, 0.7 * p + 0.3 * (1 - p), 8000)


def test_equal_seeds_draw_equal_preferences():
    assert draw([1.0, 0.5, 0.2], 100, seed=3) == draw([1.0, 0.5, 0.2], 100, seed=3)
    assert draw([1.0, 0.5, 0.2], 100, seed=3) != draw([1.0, 0.5, 0.2], 100, seed=4)


def test_requests_keep_their_own_responses():
    rng = torch.Generator().manual_seed(0)
    rewards = torch.tensor([[0.0, 1.0], [2.0, 2.0], [5.0, 1.0]])
    said = [["a", "b"], ["c", "d"], ["e", "f"]]
    found = compare(["p", "q", "r"], said, rewards, generator=rng, temperature=0)
    assert found == [Comparison("p", ("b", "a")), Comparison("r", ("e", "f"))]
    assert compare([], [], torch.zeros(0, 2), generator=rng) == []


def test_bad_input_is_refused():
    rng = torch.Generator()
    two = [["a", "b"]]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"rewards of requests \[0\] are not finite"):
            compare(["?"], two, torch.tensor([[value, 1.0]]), generator=rng)
    for rewards in (torch.zeros(1, 3), torch.zeros(2, 2), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"need rewards \[n, k\]"):
            compare(["?"], two, rewards, generator=rng)
    with pytest.raises(ValueError, match=r"lists of \[1, 2\] responses"):
        compare(["?", "!"], [["a", "b"], ["a"]], torch.zeros(2, 2), generator=rng)
    with pytest.raises(ValueError, match="k=1 must be at least 2"):
        compare(["?"], [["a"]], torch.zeros(1, 1), generator=rng)
    for rest in ({"noise": 1.5}, {"noise": math.nan}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=r"noise=.* in \[0, 1\], temperature="):
            compare(["?"], two, torch.zeros(1, 2), generator=rng, **rest)
    with pytest.raises(ValueError, match="at least two responses"):
        Comparison("?", ("alone",))
