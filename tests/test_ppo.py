"""The loop as a whole: an iteration beside one that is written out for each response alone in
float64, faults that the comparison has to see, learning over seeds, and what bad input leads to."""

import copy
import dataclasses
import functools
import math
import types

import numpy as np
import pytest
import torch

from minillm.align import ppo as module
from minillm.align.objectives import KLControl
from minillm.align.ppo import KLTooLargeError, PPOConfig, ppo
from minillm.align.rollout import Rollout, response_logp, roll_out
from minillm.align.value import ValueModel
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.train.optim import AdamW

LETTERS = "abcdefg"
END = len(LETTERS)
SHAPE = ModelConfig(
    END + 1, 16, 1, 2, max_len=24, position="rope", norm="rms", tie_embeddings=False
)
TOKENIZER = types.SimpleNamespace(
    vocab_size=END + 1,
    special_ids={"<|endoftext|>": END},
    decode=lambda ids: "".join(LETTERS[i] for i in ids),
)


def language_model(seed=0, sharpness=1.0, **changes):
    """A model in float64; the sharper, the more it prefers some letters to others."""
    model = LM(dataclasses.replace(SHAPE, **changes), seed=seed).double()
    with torch.no_grad():
        model.head.weight.mul_(sharpness)
    return model


def critic_of(model, seed=0, share=False, scale=0.3):
    critic = ValueModel(model, bias=0.1, share=share)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.value.weight.normal_(std=scale, generator=generator)
    return critic


def parameters(*models):
    return list({id(p): p for model in models for p in model.parameters()}.values())


PROMPTS = [[0, 1, 2], [3], [4, 5, 6, 0, 1], [2, 2], [5, 4]]
SAID = [[0, 0, 5, END], [END], [3, 1, 6, 0, 3, 3, 2], [4, END], [6, 0, 1, 1, 0, END]]
BATCH = [(TOKENIZER.decode(ids), ids) for ids in PROMPTS]
SETTINGS = PPOConfig(
    max_new_tokens=7,
    temperature=0.8,
    gamma=0.97,
    lam=0.9,
    clip=0.1,
    value_clip=0.05,
    value_weight=0.7,
    entropy_weight=0.03,
    epochs=3,
    minibatches=2,
    max_norm=2.0,
    target_kl=None,
)
RATE, BETA = 0.05, 0.2


def points(requests, responses):
    """Different for different rows, so that a row may not be mistaken for another."""
    return torch.tensor(
        [
            response.count("a") - 0.4 * response.count("d") + 0.3 * len(request) - 0.5
            for request, response in zip(requests, responses, strict=True)
        ]
    )


# -- an iteration by hand --------------------------------------------------------------------------


def alone(policy, critic, prompt, said, temperature):
    """log π, entropy and V at each token of one response, in a row of its own without padding."""
    ids = torch.tensor([[*prompt, *said]])[:, :-1]
    logp = (policy(ids)[0, len(prompt) - 1 :] / temperature).log_softmax(-1)
    chosen = logp[torch.arange(len(said)), torch.tensor(said)]
    return chosen, -(logp.exp() * logp).sum(-1), critic(ids)[0, len(prompt) - 1 :]


def advantages_by_hand(rewards, values, gamma, lam):
    following = [*values[1:], 0.0]
    delta = [r + gamma * w - v for r, v, w in zip(rewards, values, following, strict=True)]
    n = len(delta)
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def iteration_by_hand(policy, reference, critic, talks, scores, config, beta=BETA):
    """One iteration of PPO with plain gradient descent; `talks` are (prompt, response) in ids."""
    numbers = []
    with torch.no_grad():
        for (prompt, said), score in zip(talks, scores, strict=True):
            logp, _, values = alone(policy, critic, prompt, said, config.temperature)
            ref = alone(reference, critic, prompt, said, config.temperature)[0]
            rewards = [-beta * x for x in (logp - ref).tolist()]
            rewards[-1] += score
            a = advantages_by_hand(rewards, values.tolist(), config.gamma, config.lam)
            numbers.append((logp, values, torch.tensor(a).double(), (logp - ref).sum().item()))
    every = np.concatenate([a.numpy() for _, _, a, _ in numbers])
    all_values = np.concatenate([v.numpy() for _, v, _, _ in numbers])
    told = {
        "kl": np.mean([kl for *_, kl in numbers]),
        "explained_variance": 1 - every.var() / (every + all_values).var(),
        "length": np.mean([len(said) for _, said in talks]),
        "reward": np.mean(scores),
    }
    seen = {"policy_loss": [], "value_loss": [], "entropy": [], "clip_share": []}
    actor, rest = parameters(policy), parameters(critic)
    rest = [p for p in rest if all(p is not q for q in actor)]
    generator, updates = torch.Generator().manual_seed(0), 0
    for _ in range(config.epochs):
        for rows in torch.randperm(len(talks), generator=generator).chunk(config.minibatches):
            terms = []
            for row in rows.tolist():
                old, before, a, _ = numbers[row]
                a = (a - every.mean()) / every.std() if config.whiten else a
                logp, entropy, now = alone(policy, critic, *talks[row], config.temperature)
                goal = numbers[row][2] + before
                for t in range(len(old)):
                    ratio = (logp[t] - old[t]).exp()
                    held = min(max(ratio, 1 - config.clip), 1 + config.clip)
                    gain = min(ratio * a[t], held * a[t])
                    near = before[t] + min(
                        max(now[t] - before[t], -config.value_clip), config.value_clip
                    )
                    error = max((now[t] - goal[t]) ** 2, (near - goal[t]) ** 2) / 2
                    x = (logp[t] - old[t]).item()
                    terms.append(
                        (-gain, error, entropy[t], held * a[t] < ratio * a[t], math.exp(x) - 1 - x)
                    )
            means = [sum(term[i] for term in terms) / len(terms) for i in range(5)]
            told["approximate_kl"] = means[4]
            if config.target_kl is not None and means[4] > 1.5 * config.target_kl:
                return told | {k: np.mean(v) for k, v in seen.items()} | {"updates": updates}
            loss = means[0] + config.value_weight * means[1] - config.entropy_weight * means[2]
            for group in (actor, rest):
                grads = torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True)
                norm = math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))
                factor = RATE * min(1.0, config.max_norm / norm)
                steps = [None if g is None else factor * g for g in grads]
                if group is actor:
                    first = steps
            with torch.no_grad():
                for p, step in zip([*actor, *rest], [*first, *steps], strict=True):
                    if step is not None:
                        p -= step
            updates += 1
            for name, value in zip(seen, means, strict=False):
                seen[name].append(float(torch.as_tensor(value).detach()))
    return told | {k: np.mean(v) for k, v in seen.items()} | {"updates": updates}


@pytest.fixture(scope="module")
def start():
    """Actor and reference, which differ, and a rollout: one response is empty, one has no end."""
    policy, reference = language_model(0, sharpness=8), language_model(5, sharpness=4)
    p, t = max(map(len, PROMPTS)), SETTINGS.max_new_tokens
    tokens, seen = torch.full((5, p + t), END), torch.zeros(5, p + t, dtype=torch.bool)
    logp = torch.zeros(5, t)
    for row, (prompt, said) in enumerate(zip(PROMPTS, SAID, strict=True)):
        here = slice(p - len(prompt), p + len(said))
        tokens[row, here], seen[row, here] = torch.tensor([*prompt, *said]), True
        with torch.no_grad():
            found = alone(policy, ValueModel(policy), prompt, said, SETTINGS.temperature)[0]
        logp[row, : len(said)] = found
    ended = torch.tensor([said[-1] == END for said in SAID])
    return policy, reference, Rollout(tokens, seen, logp, ended)


@pytest.fixture(scope="module")
def by_hand(start):
    """The right numbers and parameters, computed once: (share, target_kl) -> told, parameters."""
    policy, reference, _ = start
    texts = [TOKENIZER.decode(x for x in ids if x != END) for ids in SAID]
    scores = points([text for text, _ in BATCH], texts).tolist()
    talks = list(zip(PROMPTS, SAID, strict=True))

    @functools.cache
    def of(share=False, target_kl=None):
        actor = copy.deepcopy(policy)
        critic = critic_of(actor, 3, share)
        config = dataclasses.replace(SETTINGS, target_kl=target_kl)
        told = iteration_by_hand(actor, reference, critic, talks, scores, config)
        return told, parameters(actor, critic)

    return of


def difference(start, wanted, monkeypatch, share=False, target_kl=None):
    """Of the loop from what is wanted: largest of its numbers, and of its parameters; the step."""
    policy, reference, rollout = start
    monkeypatch.setattr(module, "roll_out", lambda *_, **__: rollout)
    actor = copy.deepcopy(policy)
    critic = critic_of(actor, 3, share)
    optimizer = torch.optim.SGD(parameters(actor, critic), lr=RATE)
    parts = (actor, copy.deepcopy(reference), critic, TOKENIZER, [BATCH], points, [optimizer])
    config = dataclasses.replace(SETTINGS, target_kl=target_kl)
    (step,) = ppo(*parts, control=KLControl(BETA), config=config)
    told, weights = wanted
    numbers = max(abs(getattr(step, name) - value) for name, value in told.items())
    pairs = zip(weights, parameters(actor, critic), strict=True)
    return numbers, max((a - b).abs().max().item() for a, b in pairs), step


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_an_iteration_is_what_the_formulas_say(start, by_hand, monkeypatch, share):
    """Losses, KL, entropy, explained variance, and every parameter after six updates."""
    numbers, moved, step = difference(start, by_hand(share), monkeypatch, share)
    assert numbers < 2e-6 and moved < 2e-6
    assert step.updates == 6 and step.clip_share > 0.05 and abs(step.kl) > 0.5


def test_an_early_stop_is_at_the_same_minibatch(start, by_hand, monkeypatch):
    counts = set()
    for target in (1e-5, 0.05, 0.3):
        wanted = by_hand(False, target)
        numbers, moved, step = difference(start, wanted, monkeypatch, target_kl=target)
        assert numbers < 2e-6 and moved < 2e-6
        assert (step.updates < 6) == (step.approximate_kl > 1.5 * target)
        counts.add(step.updates)
    assert len(counts) > 1 and min(counts) == 1  # the first minibatch is the policy that sampled


def on_the_first(score, logp, reference_logp, mask, beta):
    rewards = right["shaped_rewards"](0 * score, logp, reference_logp, mask, beta)
    rewards[:, 0] += score
    return rewards


def in_the_last_column(score, logp, reference_logp, mask, beta):
    rewards = right["shaped_rewards"](0 * score, logp, reference_logp, mask, beta)
    rewards[:, -1] += score
    return rewards


def of_another_row(*args):
    advantages, returns = right["gae"](*args)
    return advantages.roll(1, 0), returns


def by_response(x, mask):
    """Whitens each response by itself."""
    return torch.cat([right["whiten"](a[None], m[None]) for a, m in zip(x, mask, strict=True)])


right = dict(vars(module))
FAULTS = {
    "score on the first token": ("shaped_rewards", on_the_first),
    "score in the last column": ("shaped_rewards", in_the_last_column),
    "sign of the KL": (
        "shaped_rewards",
        lambda s, l, r, m, beta: right["shaped_rewards"](s, l, r, m, -beta),
    ),
    "no KL": ("shaped_rewards", lambda s, l, r, m, beta: right["shaped_rewards"](s, l, l, m, beta)),
    "no mask in the policy's loss": (
        "policy_loss",
        lambda l, o, a, m, c: right["policy_loss"](l, o, a, torch.ones_like(m), c),
    ),
    "no mask in the critic's loss": (
        "value_loss",
        lambda v, o, r, m, c: right["value_loss"](v, o, r, torch.ones_like(m), c),
    ),
    "advantages of another row": ("gae", of_another_row),
    "returns as advantages": ("gae", lambda *args: (right["gae"](*args)[1],) * 2),
    "lambda forgotten": ("gae", lambda r, v, m, gamma, lam: right["gae"](r, v, m, gamma, 1.0)),
    "gamma forgotten": ("gae", lambda r, v, m, gamma, lam: right["gae"](r, v, m, 1.0, lam)),
    "values of the state after": (
        "response_values",
        lambda c, r: right["response_values"](c, r).roll(-1, 1),
    ),
    "temperature of the reference": (
        "response_logp",
        lambda model, r, temperature: right["response_logp"](model, r),
    ),
    "not whitened": ("whiten", lambda x, mask: x),
    "whitened without the mask": (
        "whiten",
        lambda x, m: right["whiten"](x, torch.ones_like(m)).where(m, 0.0),
    ),
    "whitened by response": ("whiten", by_response),
    "ratio always one": (
        "policy_loss",
        lambda l, o, a, m, c: right["policy_loss"](l, l.detach(), a, m, c),
    ),
    "not clipped": ("policy_loss", lambda l, o, a, m, c: right["policy_loss"](l, o, a, m, 1e9)),
    "sign of the advantages": (
        "policy_loss",
        lambda l, o, a, m, c: right["policy_loss"](l, o, -a, m, c),
    ),
    "values not clipped": (
        "value_loss",
        lambda v, o, r, m, c: right["value_loss"](v, o, r, m, None),
    ),
    "gradients not clipped": (
        "clip_grad_norm",
        lambda group, most: right["clip_grad_norm"](group, math.inf),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_planted_fault(start, by_hand, monkeypatch, fault):
    monkeypatch.setattr(module, *FAULTS[fault])
    assert difference(start, by_hand(), monkeypatch)[1] > 1e-3


# -- the loop on a task that can be learned --------------------------------------------------------


def echo(requests, responses):
    """How often a response has the letter of its request."""
    pairs = zip(requests, responses, strict=True)
    return torch.tensor([float(answer.count(letter)) for letter, answer in pairs])


def learn(seed=0, share=False, steps=25, reward=echo, rate=1e-2, control=None, away=0.0, **config):
    """A run on one-letter requests from a policy so far `away` from its reference; all steps, and
    the policy."""
    policy = language_model(seed, sharpness=3).float()
    reference, rng = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.head.weight += away * torch.randn(policy.head.weight.shape, generator=rng)
    critic = ValueModel(policy, share=share)
    letters = torch.randint(3, (steps, 48), generator=rng).tolist()
    batches = [[(LETTERS[i], [i]) for i in row] for row in letters]
    actor = AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    rest = [p for p in critic.parameters() if all(p is not q for q in policy.parameters())]
    both = [actor, AdamW(rest, lr=1e-2, weight_decay=0.0)]
    settings = {"max_new_tokens": 5, "minibatches": 2, "unended": 0.0, "target_kl": None} | config
    parts = (policy, reference, critic, TOKENIZER, batches, reward, both)
    known = {"control": control or KLControl(0.05), "config": PPOConfig(**settings), "seed": seed}
    return list(ppo(*parts, **known)), policy


def gain(steps):
    """Mean reward of the last five steps less that of the first."""
    return np.mean([step.reward for step in steps[-5:]]) - steps[0].reward


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_a_policy_learns_what_is_rewarded(share):
    for seed in range(2):
        steps, _ = learn(seed, share)
        assert gain(steps) > 0.4, f"seed {seed}"
        assert 0.5 < steps[-1].kl < 12  # it has left the reference, and not for anywhere


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "score on the first token",
        "score in the last column",
        "advantages of another row",
        "sign of the advantages",
    ],
)
def test_with_a_fault_it_learns_less(monkeypatch, fault):
    """The equality above sees these at once; here is what they do to learning."""
    monkeypatch.setattr(module, *FAULTS[fault])
    assert gain(learn()[0]) < 0.3


@pytest.mark.slow
def test_the_penalty_holds_the_policy_near_the_reference(monkeypatch):
    """Nothing is rewarded but staying: started away from its reference, a policy comes back, stays
    where it is without a penalty, and runs away if the sign is wrong."""

    def same(requests, responses):
        return torch.zeros(len(responses))

    far = {}
    for name, beta in (("free", 0.0), ("held", 1.0), ("wrong", 1.0)):
        if name == "wrong":
            monkeypatch.setattr(module, *FAULTS["sign of the KL"])
        control = KLControl(beta)
        steps, _ = learn(reward=same, control=control, steps=12, away=0.3)
        far[name] = steps[-1].kl
    assert far["held"] < 0.5 * far["free"] < 0.5 * far["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_a_critic_comes_to_know_what_its_actor_earns(share):
    """What is earned depends on the request alone, whatever the actor says."""

    def by_request(requests, responses):
        return torch.tensor([{"a": 1.0, "b": -1.0, "c": 0.5}[letter] for letter in requests])

    known = {"reward": by_request, "unended": None, "value_clip": None}
    steps, _ = learn(share=share, steps=10, **known)
    assert steps[0].explained_variance == pytest.approx(0, abs=1e-6)  # it begins with no idea
    assert steps[-1].explained_variance > 0.5


def test_only_a_shared_body_feels_the_critic():
    """Bit for bit the same actor, whatever the critic's loss weighs, if it has a body of its own:
    advantages are those of the critic before the update. (The second pass shows it: the head starts
    at zero, through which nothing reaches a shared body.)"""

    def actor(share, weight):
        _, policy = learn(share=share, steps=1, value_weight=weight, epochs=2, minibatches=1)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    assert torch.equal(actor(False, 0.1), actor(False, 2.0))
    assert not torch.equal(actor(True, 0.1), actor(True, 2.0))


def test_the_weight_of_the_penalty_is_steered_by_what_was_measured():
    control = KLControl(0.3, target=0.4, horizon=480)
    steps, *_ = learn(steps=4, control=control)
    for step in steps:
        assert step.beta == control.beta
        control = control.after(step.kl, 48)
    assert steps[-1].beta != 0.3


# -- bad input -------------------------------------------------------------------------------------


def bad(value, place=1):
    def reward(requests, responses):
        scores = points(requests, responses)
        scores[place] = value
        return scores

    return reward


def run(
    reward=points,
    batches=1,
    policy=None,
    critic=None,
    tokenizer=TOKENIZER,
    batch=BATCH,
    reference=None,
    **config,
):
    """A short run on BATCH, as a generator."""
    policy = policy or language_model(0, sharpness=8)
    critic = critic or ValueModel(policy)
    optimizer = AdamW(parameters(policy, critic), lr=1e-2, weight_decay=0.0)
    reference = reference or language_model(0, sharpness=8)
    settings = PPOConfig(**{"max_new_tokens": 5, "minibatches": 2} | config)
    parts = (policy, reference, critic, tokenizer, [batch] * batches, reward, [optimizer])
    return ppo(*parts, control=KLControl(0.1), config=settings)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (bad(math.nan), r"scores of responses \[1\] are not finite: \[nan\]"),
        (bad(-math.inf, 4), r"scores of responses \[4\] are not finite: \[-inf\]"),
        (lambda q, a: points(q, a)[:4], r"score \(4,\) must be \[5\], one a response"),
        (lambda q, a: points(q, a)[:, None], r"score \(5, 1\) must be \[5\]"),
        (lambda q, a: points(q, a).mean(), r"score \(\) must be \[5\]"),
    ],
    ids=["nan", "inf", "too few", "a column", "one number"],
)
def test_bad_scores_are_named_and_nothing_is_learned_from_them(reward, message):
    policy = language_model(0, sharpness=8)
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(ValueError, match=message):
        list(run(reward, policy=policy))
    assert all(torch.equal(before[name], p) for name, p in policy.state_dict().items())


def test_a_model_of_another_vocabulary_is_refused():
    other = LM(dataclasses.replace(SHAPE, vocab_size=50), seed=0)
    with pytest.raises(ValueError, match=r"have \[8, 8, 50\] tokens, the tokenizer 8"):
        next(run(critic=ValueModel(other)))
    foreign = types.SimpleNamespace(**vars(TOKENIZER) | {"vocab_size": 9})
    with pytest.raises(ValueError, match=r"have \[8, 8, 8\] tokens, the tokenizer 9"):
        next(run(tokenizer=foreign))


def test_above_the_limit_nothing_more_is_learned():
    """The run ends in the step that finds it, with the weights that the step before it left."""
    free = list(run(batches=4, target_kl=None))
    limit = (free[1].kl + free[2].kl) / 2
    assert free[0].kl < free[1].kl < limit < free[2].kl
    policy, done = language_model(0, sharpness=8), []
    loop = run(batches=4, policy=policy, target_kl=None, max_kl=limit)
    with pytest.raises(KLTooLargeError, match=rf"step 3: .* more than max_kl={limit}"):
        for step in loop:
            done.append(step)
            left = copy.deepcopy(policy.state_dict())
    assert done == free[:2]
    assert all(torch.equal(left[name], p) for name, p in policy.state_dict().items())


def always(token):
    """A policy that says one token, whatever it has read."""
    policy = language_model(bias=True, norm="layer")
    with torch.no_grad():
        policy.norm.weight.zero_()
        policy.norm.bias.fill_(1.0)
        policy.head.weight.zero_()
        policy.head.weight[token] = 2.0  # 32 nats above the others
    return policy


def assert_finite(step):
    numbers = [x for x in dataclasses.astuple(step) if isinstance(x, float)]
    assert len(numbers) >= 10 and all(map(math.isfinite, numbers))


def test_empty_responses_are_scored_and_learned_from():
    """An end marker alone is one token, which gets the score; its text is empty."""
    heard = []

    def reward(requests, responses):
        heard.extend(responses)
        return torch.tensor([float(len(request)) for request in requests])

    (step,) = run(reward, policy=always(END))
    assert heard == [""] * 5 and step.length == step.ended == 1
    assert step.reward == pytest.approx(np.mean([len(text) for text, _ in BATCH]))
    assert_finite(step)


def test_responses_without_an_end_are_cut_and_scored():
    (step,) = run(policy=always(2))
    assert step.ended == 0 and step.length == 5
    assert all(answer == "ccccc" for _, answer, _ in step.samples)
    assert_finite(step)
    (judged,) = run(bad(math.nan), policy=always(2), unended=-3.0)  # then nobody asks the reward
    assert judged.reward == -3


@pytest.mark.parametrize("changes", [{"window": 3}, {"window": 4, "position": "alibi"}])
def test_a_window_is_a_window_in_training_too(changes):
    """A mask that is given replaces the model's own: what was sampled must be what is learned."""
    policy = language_model(0, sharpness=20, **changes)
    rng = torch.Generator().manual_seed(0)
    rollout = roll_out(policy, PROMPTS, 7, END, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(response_logp(policy, rollout), rollout.logp, atol=1e-5, rtol=0)
        whole = language_model(0, sharpness=20, **changes | {"window": None})
        assert (response_logp(whole, rollout) - rollout.logp).abs().max() > 1e-3


def test_dropout_is_off():
    policy = language_model(0, sharpness=8, dropout=0.3)
    (step,) = run(policy=policy, epochs=1, minibatches=1)
    assert step.approximate_kl == pytest.approx(0, abs=1e-6)  # nothing has been updated yet
    assert abs(step.kl) < 1e-5 and not policy.training


def test_a_prompt_that_leaves_no_room_is_refused():
    long = ("abc", [0] * 20)
    with pytest.raises(ValueError, match=r"prompt 1 has 20 tokens: with 5 more it exceeds .* 24"):
        next(run(batch=[BATCH[0], long]))
    assert next(run(batch=[BATCH[0], ("abc", [0] * 19)])).step == 1


def test_there_are_as_many_minibatches_as_asked_for():
    for count in (1, 2, 3, 4, 5):
        (step,) = run(epochs=2, minibatches=count, target_kl=None)
        assert step.updates == 2 * count


def test_the_reference_stays_and_the_actor_learns():
    policy, reference = language_model(0), language_model(0)
    known = {"control": KLControl(0.1), "config": PPOConfig(max_new_tokens=5, minibatches=2)}

    def steps(reference, critic, learned):
        optimizers = [AdamW(learned, lr=1e-2)] if learned else []
        parts = (policy, reference, critic, TOKENIZER, [BATCH], points, optimizers)
        return list(ppo(*parts, **known))

    apart, shared = ValueModel(policy), ValueModel(reference, share=True)
    for critic, other in ((apart, policy), (shared, reference)):
        with pytest.raises(ValueError, match="an optimizer holds parameters of the reference"):
            steps(other, critic, parameters(policy, critic))
    for learned, count in (([], 0), (parameters(apart), 1)):
        with pytest.raises(ValueError, match=f"{count} optimizers hold no parameter of the actor"):
            steps(reference, apart, learned)


@pytest.mark.parametrize("unended", [None, -1.0])
def test_one_score_for_all_is_refused_with_a_penalty_too(unended):
    for scores, message in ((lambda q, a: torch.tensor(1.0), r"\(\)"), (one_less, r"\(4,\)")):
        with pytest.raises(ValueError, match=rf"score {message} must be \[5\], one a response"):
            next(run(scores, unended=unended))


def one_less(requests, responses):
    return points(requests, responses)[:4]


def test_probabilities_that_are_none_are_named():
    spoiled = language_model(0, sharpness=8)
    with torch.no_grad():
        spoiled.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="step 1: the KL from the reference is nan"):
        next(run(reference=spoiled, max_kl=5.0))


def test_one_token_is_a_batch(recwarn):
    (step,) = run(batch=BATCH[1:2], max_new_tokens=1, minibatches=1)
    assert step.updates == 4 and step.length == 1
    assert math.isnan(step.explained_variance)  # of one return there is no variance
    assert not [w for w in recwarn if "degrees of freedom" in str(w.message)]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("temperature", 0.0, "above 0"),
        ("clip", -0.1, "above 0"),
        ("max_norm", math.nan, "above 0"),
        ("value_clip", 0.0, "above 0, or None"),
        ("value_weight", -1.0, "at least 0"),
        ("entropy_weight", math.nan, "at least 0"),
    ],
)
def test_settings_are_checked_before_anything_runs(name, value, rule):
    with pytest.raises(ValueError, match=rf"'{name}': .* must be {rule}"):
        PPOConfig(**{name: value})


def test_a_control_that_could_not_steer_is_refused():
    with pytest.raises(ValueError, match="beta=0 stays 0"):
        KLControl(0.0, target=3.0)
    assert KLControl(0.0).after(5.0, 64).beta == 0  # without a target it is a choice
    with pytest.raises(ValueError, match="target=nan above 0 or None"):
        KLControl(0.1, target=math.nan)
    control = KLControl(0.1, target=3.0, horizon=12)
    with pytest.raises(ValueError, match="horizon=12 above a fifth of the 64 responses"):
        control.after(0.0, 64)
    with pytest.raises(ValueError, match="kl=nan must be a number"):
        control.after(math.nan, 5)
    assert KLControl(0.1, target=3.0, horizon=13).after(0.0, 64).beta > 0
