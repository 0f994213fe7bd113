"""DPO, GRPO and best-of-n: losses beside NumPy in float64, loops beside their controls."""

import itertools
import math

import numpy as np
import pytest
import torch

from minillm.align.grpo import group_advantages, grpo, grpo_loss
from minillm.align.objectives import policy_loss
from minillm.align.ppo import KLTooLargeError, PPOConfig
from minillm.align.preference import (
    best_of_n,
    best_of_n_kl,
    dpo,
    dpo_loss,
    expected_best,
    implicit_rewards,
    written,
)
from minillm.align.reward import ranking_loss
from minillm.config import ModelConfig
from minillm.data.preferences import Comparison
from minillm.infer.batching import prompt_ids
from minillm.model import LM
from minillm.tokenizers.bpe_train import train_bpe
from minillm.tokenizers.chat import render

F64 = torch.float64
MARKS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
REQUESTS = ["ab", "b", "abba?", "aa"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe("ab ba", 260, special_tokens=MARKS)


def small(tokenizer, seed=0, sharp=15):
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=16,
        n_layers=1,
        n_heads=2,
        max_len=64,
        position="rope",
        norm="rms",
        tie_embeddings=False,
    )
    model = LM(cfg, seed=seed).eval()
    with torch.no_grad():  # a random model says everything alike: make it choose
        model.head.weight.mul_(sharp)
    return model


@pytest.fixture
def rows():
    """Six responses of at most five tokens, noise behind their ends."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]

    def draw():
        return (torch.randn(6, 5, generator=rng, dtype=F64) - 1).where(mask, math.nan)

    return {"mask": mask, "logp": draw(), "old": draw(), "ref": draw()}


# -- DPO -------------------------------------------------------------------------------------------


def test_dpo_equals_numpy_and_its_gradient_the_formula(rows):
    mask, beta = rows["mask"], 0.3
    logp = rows["logp"].clone().requires_grad_()
    loss, rewards = dpo_loss(logp, rows["ref"], mask, beta)
    loss.backward()
    n = [5, 1, 3, 4, 2, 5]
    a, b = rows["logp"].numpy(), rows["ref"].numpy()
    want = [beta * sum(a[i, t] - b[i, t] for t in range(n[i])) for i in range(6)]
    np.testing.assert_allclose(rewards, want, rtol=1e-12)
    margins = [want[i] - want[i + 3] for i in range(3)]
    expected = np.mean([math.log1p(math.exp(-m)) for m in margins])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for i in range(6):
        up = beta / (1 + math.exp(margins[i % 3])) / 3  # β σ(-margin), a mean over three pairs
        for t in range(5):
            slope = (-up if i < 3 else up) if t < n[i] else 0.0
            assert logp.grad[i, t].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_dpo_is_the_ranking_loss_of_the_implicit_rewards(rows):
    loss, rewards = dpo_loss(rows["logp"], rows["ref"], rows["mask"], 0.7)
    chosen, rejected = rewards.chunk(2)
    torch.testing.assert_close(loss, ranking_loss(torch.stack([chosen, rejected], 1)))


def test_equal_responses_teach_nothing(rows):
    half = {name: x[:3].repeat(2, 1) for name, x in rows.items()}
    logp = torch.nn.Parameter(rows["logp"][:3].clone())
    loss, _ = dpo_loss(logp.repeat(2, 1), half["ref"], half["mask"])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.equal(logp.grad, torch.zeros_like(logp))


def test_what_dpo_refuses(rows):
    sides = (rows["logp"], rows["ref"], rows["mask"])
    with pytest.raises(ValueError, match="5 rows are no pairs"):
        dpo_loss(*(x[:5] for x in sides))
    with pytest.raises(ValueError, match="beta=0 must be above 0"):
        implicit_rewards(*sides, beta=0)
    with pytest.raises(ValueError, match=r"responses \[2\] are empty"):
        empty = rows["mask"].clone()
        empty[2] = False
        dpo_loss(*sides[:2], empty)


def test_the_optimum_is_the_reference_times_exp_of_the_reward():
    """With the Bradley-Terry shares of a known reward, DPO finds π = π_ref exp(r / β) / Z."""
    reward = torch.tensor([0.0, 1.0, -0.5, 0.3], dtype=F64)
    reference = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=F64).log()
    beta, logits = 0.5, torch.zeros(4, dtype=F64, requires_grad=True)
    pairs = list(itertools.permutations(range(4), 2))
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", max_iter=100)

    def total():
        optimizer.zero_grad()
        logp, loss = logits.log_softmax(-1), 0.0
        for i, j in pairs:
            pick = [i, j]
            found, _ = dpo_loss(
                logp[pick][:, None], reference[pick][:, None], torch.ones(2, 1), beta
            )
            loss = loss + torch.sigmoid(reward[i] - reward[j]) * found
        loss.backward()
        return loss

    optimizer.step(total)
    best = (reference + reward / beta).softmax(-1)
    np.testing.assert_allclose(logits.softmax(-1).detach(), best, atol=1e-5)
    assert (best - reference.exp()).abs().max() > 0.2  # the reference is no answer


def test_written_responses_are_read_as_the_conversation_is(tokenizer):
    model = small(tokenizer).double()
    said = ["ba", "", "a b a b", "bab"]
    found = written(model, tokenizer, REQUESTS, said)
    assert found.mask.sum(-1).tolist() == [len(tokenizer.encode_ordinary(x)) + 1 for x in said]
    for row, (request, response) in enumerate(zip(REQUESTS, said, strict=True)):
        ids = render(tokenizer, [("user", request), ("assistant", response)]).ids
        assert found.tokens[row][found.seen[row]].tolist() == ids
        with torch.no_grad():
            alone = model(torch.tensor([ids]))[0].log_softmax(-1)
        start = len(prompt_ids(tokenizer, request, chat=True))
        want = [alone[t - 1, ids[t]].item() for t in range(start, len(ids))]
        np.testing.assert_allclose(found.logp[row][found.mask[row]], want, atol=2e-6)
    assert found.responses() == [tokenizer.encode_ordinary(x) for x in said]
    with pytest.raises(ValueError, match="exceeds the context of 64"):
        written(model, tokenizer, ["a"], ["ab" * 40])


def taught(tokenizer, turned=False, seed=0, epochs=6):
    """Steps of DPO on "a is better than b", or turned round, and the policy."""
    better = [(r, ("aaa", "bbb")[:: -1 if turned else 1]) for r in REQUESTS]
    reference, policy = small(tokenizer, sharp=1), small(tokenizer, sharp=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    comparisons = [Comparison(*each) for each in better]
    generator = torch.Generator().manual_seed(seed)
    how = {"batch": 2, "epochs": epochs, "generator": generator}
    return list(dpo(policy, reference, tokenizer, comparisons, optimizer, **how)), policy


def test_dpo_teaches_the_preferred_and_turned_round_the_other(tokenizer):
    liked = {}
    for turned in (False, True):
        steps, policy = taught(tokenizer, turned)
        assert len(steps) == 12
        assert steps[0].loss == pytest.approx(math.log(2), abs=1e-6)  # it is the reference yet
        assert steps[0].chosen == pytest.approx(0, abs=1e-6)
        assert steps[-1].accuracy == 1 and steps[-1].loss < 0.6
        assert steps[-1].chosen > steps[-1].rejected
        a, b = written(policy, tokenizer, ["ab", "ab"], ["aaa", "bbb"]).logp.sum(-1)
        liked[turned] = (a - b).item()
    assert liked[False] > 1 > -1 > liked[True]
    assert taught(tokenizer)[0] == taught(tokenizer)[0]


def test_dpo_refuses_other_vocabularies_no_comparisons_and_broken_models(tokenizer):
    policy = small(tokenizer)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    rng, some = torch.Generator(), [Comparison("a", ("b", "a"))]
    other = LM(ModelConfig(vocab_size=99, d_model=8, n_layers=1, n_heads=1))
    with pytest.raises(ValueError, match=r"\[260, 99\] tokens, the tokenizer 260"):
        next(dpo(policy, other, tokenizer, some, optimizer, generator=rng))
    with pytest.raises(ValueError, match="0 comparisons"):
        next(dpo(policy, policy, tokenizer, [], optimizer, generator=rng))
    reference = small(tokenizer)
    policy.head.weight.data[0, 0] = math.nan
    before = policy.tokens.weight.clone()
    with pytest.raises(ValueError, match="nothing was updated"):
        next(dpo(policy, reference, tokenizer, some, optimizer, generator=rng))
    assert torch.equal(policy.tokens.weight, before)


# -- GRPO ------------------------------------------------------------------------------------------


def test_group_advantages_equal_numpy():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=F64)
    groups = scores.numpy().reshape(3, 4)
    centered = groups - groups.mean(1, keepdims=True)
    want = centered / (groups.std(1, keepdims=True, ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(scores, 4), want.ravel(), rtol=1e-12)
    np.testing.assert_allclose(group_advantages(scores, 4, scale=False), centered.ravel())


@pytest.mark.parametrize("score", [0.0, 0.1, -12345.678])
def test_groups_of_equal_scores_have_no_advantage(score):
    found = group_advantages(torch.tensor([score] * 7 + [1.0, 2.0, 3, 4, 5, 6, 7]), 7)
    assert torch.equal(found[:7], torch.zeros(7))
    assert found[7:].abs().min() < 1e-6 < 1 < found[7:].max()


def test_what_group_advantages_refuse():
    for scores, group in ((torch.ones(6), 4), (torch.ones(4), 1), (torch.ones(2, 2), 2)):
        with pytest.raises(ValueError, match="in groups of"):
            group_advantages(scores, group)
    with pytest.raises(ValueError, match=r"responses \[1, 3\] are not finite: \[nan, inf\]"):
        group_advantages(torch.tensor([0.0, math.nan, 1.0, math.inf]), 2)


@pytest.mark.parametrize("normalize", ["sequence", "token", 30.0])
def test_grpo_loss_equals_numpy(rows, normalize):
    clip, beta, n = 0.2, 0.1, [5, 1, 3, 4, 2, 5]
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.3, 0.0, 1.5], dtype=F64)
    sides = [rows["logp"], rows["logp"] + 0.3 * (rows["old"] - rows["logp"]), rows["ref"]]
    found = grpo_loss(*sides, advantages, rows["mask"], clip, beta, normalize)
    logp, old, ref = (x.numpy() for x in sides)
    each = []
    for i in range(6):
        each.append([])
        for t in range(n[i]):
            ratio, a = math.exp(logp[i, t] - old[i, t]), advantages[i].item()
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            x = ref[i, t] - logp[i, t]
            each[-1].append(-min(ratio * a, clipped * a) + beta * (math.exp(x) - x - 1))
    sums = [sum(row) for row in each]
    want = {
        "sequence": np.mean([s / k for s, k in zip(sums, n, strict=True)]),
        "token": sum(sums) / sum(n),
        30.0: sum(sums) / 30,
    }
    assert found.loss.item() == pytest.approx(want[normalize], rel=1e-12)
    assert 0 < found.clip_share < 1


def test_grpo_without_kl_is_the_policy_loss_and_the_kl_pulls_back(rows):
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.3, 0.0, 1.5], dtype=F64)
    sides = (rows["logp"], rows["old"], rows["ref"], advantages, rows["mask"])
    bare = policy_loss(*sides[:2], *sides[3:], 0.2, "sequence")
    assert grpo_loss(*sides, beta=0.0).loss == bare.loss
    logp = (rows["ref"] + 0.5).requires_grad_()
    nothing = torch.zeros(6, dtype=F64)
    grpo_loss(logp, logp.detach(), rows["ref"], nothing, rows["mask"], beta=1.0).loss.backward()
    assert (logp.grad[rows["mask"]] > 0).all()  # too likely: descent makes it less so
    assert (logp.grad[~rows["mask"]] == 0).all()


def even(requests, responses):
    """The share of letters with an even number, and nothing for silence."""
    return torch.tensor([sum(ord(x) % 2 == 0 for x in a) / max(1, len(a)) for a in responses])


def improved(tokenizer, reward=even, steps=15, seed=0, **settings):
    policy, reference = small(tokenizer, sharp=4), small(tokenizer, sharp=4)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    batch = [(request, prompt_ids(tokenizer, request, chat=True)) for request in REQUESTS]
    config = PPOConfig(max_new_tokens=6, epochs=2, minibatches=2, target_kl=None)
    how = {"config": config, "group": 8, "beta": 0.0, "true_reward": even, "seed": seed}
    how |= settings
    sides = (policy, reference, tokenizer, [batch] * steps, reward, optimizer)
    return list(grpo(*sides, **how))


@pytest.mark.slow
def test_grpo_improves_what_is_rewarded_and_not_what_is_not(tokenizer):
    rng = torch.Generator().manual_seed(0)

    def chance(requests, responses):
        return torch.randn(len(responses), generator=rng)

    gain = {}
    for name, reward in (("even", even), ("chance", chance)):
        steps = improved(tokenizer, reward)
        gain[name] = steps[-1].true_reward - steps[0].true_reward
        assert [step.step for step in steps] == list(range(1, 16))
        assert steps[0].kl == pytest.approx(0, abs=1e-5) and steps[-1].kl > 0.05
    assert gain["even"] > 0.4 > 0.2 > abs(gain["chance"])


def test_a_step_of_grpo_tells_what_happened(tokenizer):
    first, second = improved(tokenizer, steps=2), improved(tokenizer, steps=2)
    assert repr(first) == repr(second)  # the same seed; NaN is not equal to itself
    step = first[0]
    assert step.reward == pytest.approx(step.true_reward)
    assert math.isnan(step.value_loss) and math.isnan(step.explained_variance)
    assert step.updates == 4 and step.beta == 0 and 0 < step.length <= 6
    assert len(step.samples) == 4 and step.samples[0][0] == "ab"
    stopped = improved(tokenizer, steps=1, config=PPOConfig(6, epochs=50, target_kl=1e-4))
    assert 1 <= stopped[0].updates < 200 and stopped[0].approximate_kl > 1.5e-4


def test_only_differences_within_a_group_count(tokenizer):
    """Requests that are worth more than others, whatever is answered, teach nothing."""

    def by_request(requests, responses):
        return torch.tensor([float(len(request)) for request in requests])

    steps = improved(tokenizer, by_request, steps=3)
    assert [step.kl for step in steps] == pytest.approx([0, 0, 0], abs=1e-5)


def test_what_grpo_refuses(tokenizer):
    def broken(requests, responses):
        return torch.tensor([math.nan] + [1.0] * (len(responses) - 1))

    with pytest.raises(ValueError, match=r"responses \[0\] are not finite"):
        improved(tokenizer, broken)
    with pytest.raises(ValueError, match="minibatches=33 of a batch of 32 responses"):
        improved(tokenizer, config=PPOConfig(6, minibatches=33))
    config = PPOConfig(6, epochs=2, target_kl=None, max_kl=0.05)
    with pytest.raises(KLTooLargeError, match=r"more than max_kl=0\.05"):
        improved(tokenizer, config=config)
    for scores in (1.0, [1.0] * 31):  # one score for all would be spread over all
        with pytest.raises(ValueError, match=r"must be \[32\], one a response"):
            improved(
                tokenizer, lambda q, a, s=scores: torch.tensor(s), config=PPOConfig(6, unended=0.0)
            )


def test_unended_responses_get_the_score_they_are_given(tokenizer):
    config = PPOConfig(1, epochs=1, minibatches=1, unended=-5.0)
    step = improved(tokenizer, lambda q, a: torch.zeros(len(a)), steps=1, config=config)[0]
    assert 0 <= step.ended < 1 and step.reward == pytest.approx(-5 * (1 - step.ended))


# -- best of n -------------------------------------------------------------------------------------


def test_best_of_n_keeps_the_best_of_each_request(tokenizer):
    policy = small(tokenizer, sharp=4)
    batch = [(request, prompt_ids(tokenizer, request, chat=True)) for request in REQUESTS]
    asked, heard = [], []

    def reward(requests, responses):
        asked.extend(requests)
        heard.extend(responses)
        return even(requests, responses)

    generator = torch.Generator().manual_seed(0)
    best, scores = best_of_n(policy, tokenizer, batch, reward, 6, 8, generator=generator)
    assert scores.shape == (4, 6) and asked == [request for request in REQUESTS for _ in range(6)]
    for row in range(4):
        own = heard[6 * row : 6 * row + 6]
        assert best[row] == max(own, key=lambda text: even([""], [text]).item())
    assert (scores.amax(-1) > scores.mean(-1)).all()
    assert best_of_n(policy, tokenizer, batch, lambda q, a: torch.zeros(len(a)), 1)[1].shape[1] == 1
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        best_of_n(policy, tokenizer, batch, even, 0)
    with pytest.raises(ValueError, match=r"responses \[0, 1.*are not finite"):
        best_of_n(policy, tokenizer, batch, lambda q, a: torch.full((len(a),), math.nan), 2)


def kl_of_best(p, n):
    """KL of best-of-n from p, whose outcomes are in the order of their scores: exact."""
    below = np.concatenate([[0.0], np.cumsum(p)])
    q = below[1:] ** n - below[:-1] ** n
    return float((q * np.log(q / p)).sum())


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_bound_on_kl_is_reached_by_many_outcomes_and_no_few(n):
    many, few = np.full(20_000, 1 / 20_000), np.array([0.5, 0.2, 0.3])
    assert kl_of_best(many, n) == pytest.approx(best_of_n_kl(n), abs=2e-3)
    assert kl_of_best(few, n) <= best_of_n_kl(n) + 1e-12
    if n > 1:
        assert kl_of_best(few, n) < 0.9 * best_of_n_kl(n)


def test_the_expected_best_is_the_mean_over_all_subsets():
    rng = torch.Generator().manual_seed(0)
    proxy, wanted = (torch.randn(2, 7, generator=rng) for _ in range(2))
    for n in range(1, 8):
        want = [
            np.mean(
                [
                    wanted[row][max(subset, key=lambda i: proxy[row, i])].item()
                    for subset in itertools.combinations(range(7), n)
                ]
            )
            for row in range(2)
        ]
        np.testing.assert_allclose(expected_best(proxy, wanted, n), want, rtol=1e-5)
    for n in (0, 8):
        with pytest.raises(ValueError, match="samples"):
            expected_best(proxy, wanted, n)
