"""Rollouts: what generation noted is what the whole model says of each response alone."""

import dataclasses

import pytest
import torch

from minillm.align.objectives import KLControl
from minillm.align.ppo import KLTooLargeError, PPOConfig, ppo
from minillm.align.rollout import actor_critic, response_logp, response_values, roll_out
from minillm.align.value import ValueModel
from minillm.config import ModelConfig
from minillm.model import LM
from minillm.tokenizers import load_course_tokenizer
from minillm.train.optim import AdamW

END = 3
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 5], [6, 6]]
SHAPE = {"vocab_size": 13, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_len": 64}


@pytest.fixture(params=["rope", "learned", "alibi"])
def policy(request):
    cfg = ModelConfig(**SHAPE, position=request.param, norm="rms", tie_embeddings=False)
    model = LM(cfg, seed=0).double().eval()
    with torch.no_grad():  # a random model says everything alike: make it choose
        model.head.weight.mul_(15)
    return model


def sampled(policy, seed=0, new=9, temperature=1.0):
    generator = torch.Generator().manual_seed(seed)
    return roll_out(policy, PROMPTS, new, END, temperature=temperature, generator=generator)


def alone(model, prompt, response, temperature):
    """log-probabilities of a response, token by token, without batch, padding or cache."""
    ids, found = list(prompt), []
    for token in response:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1] / temperature
        found.append(logits.log_softmax(-1)[token].item())
        ids.append(token)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_each_response_alone(policy, temperature):
    rollout = sampled(policy, temperature=temperature)
    again = response_logp(policy, rollout, temperature)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        mask = rollout.mask[row]
        said = rollout.tokens[row, rollout.prompt :][mask].tolist()
        lengths.add(len(said))
        expected = torch.tensor(alone(policy, prompt, said, temperature))
        for found in (rollout.logp, again):
            torch.testing.assert_close(found[row][mask].float(), expected, atol=1e-5, rtol=0)
            assert (found[row][~mask] == 0).all()
    assert len(lengths) > 1  # otherwise nothing was padded on the right


def test_a_response_goes_up_to_its_first_end(policy):
    ended = set()
    for seed in range(6):
        rollout = sampled(policy, seed)
        for row, said in enumerate(rollout.responses()):
            whole = rollout.tokens[row, rollout.prompt :][rollout.mask[row]].tolist()
            assert END not in said
            assert whole == said + [END] * bool(rollout.ended[row])
            assert rollout.ended[row] or len(said) == 9
            prompt = rollout.tokens[row, : rollout.prompt][rollout.seen[row, : rollout.prompt]]
            assert prompt.tolist() == PROMPTS[row]
        ended |= set(rollout.ended.tolist())
    assert ended == {True, False}  # both happened


def test_padding_that_is_seen_would_be_noticed(policy):
    rollout = sampled(policy)
    blind = dataclasses.replace(rollout, seen=torch.ones_like(rollout.seen))
    wrong = response_logp(policy, blind).where(rollout.mask, 0.0)
    assert (wrong - rollout.logp).abs().max() > 1e-3


def test_a_minibatch_is_a_part_of_the_batch(policy):
    rollout, places = sampled(policy), torch.tensor([2, 0])
    critic = ValueModel(policy)
    with torch.no_grad():
        critic.value.weight.normal_()
        for read in (lambda r: response_logp(policy, r), lambda r: response_values(critic, r)):
            torch.testing.assert_close(read(rollout.rows(places)), read(rollout)[places])


def test_values_are_of_the_state_before_each_token(policy):
    """V_t may not know token t: it is what the critic says of prompt and t tokens."""
    rollout, critic = sampled(policy), ValueModel(policy, bias=0.5)
    with torch.no_grad():
        assert (response_values(critic, rollout)[rollout.mask] == 0.5).all()  # head of zeros
        critic.value.weight.normal_(generator=torch.Generator().manual_seed(1))
        values = response_values(critic, rollout)
        for row, prompt in enumerate(PROMPTS):
            said = rollout.tokens[row, rollout.prompt :][rollout.mask[row]].tolist()
            for t in range(len(said)):
                expected = critic(torch.tensor([prompt + said[:t]]))[0, -1]
                torch.testing.assert_close(values[row, t], expected, atol=1e-9, rtol=0)


def test_a_shared_body_gives_the_same_in_one_pass(policy):
    shared, apart = ValueModel(policy, share=True), ValueModel(policy)
    with torch.no_grad():
        shared.value.weight.normal_(generator=torch.Generator().manual_seed(1))
        apart.value.load_state_dict(shared.value.state_dict())
    rollout, passes = sampled(policy), []
    hidden, policy.hidden = policy.hidden, lambda *a: passes.append(1) or hidden(*a)
    one, two = (actor_critic(policy, critic, rollout) for critic in (shared, apart))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    assert len(passes) == 2  # one for each call; the separate critic has a body of its own
    assert shared.lm is policy and apart.lm is not policy


def test_bad_input_is_refused(policy):
    with pytest.raises(ValueError, match="each with a token"):
        roll_out(policy, [[1], []], 4, END)
    with pytest.raises(ValueError, match="0 prompts"):
        roll_out(policy, [], 4, END)
    with pytest.raises(ValueError, match="temperature=0"):
        roll_out(policy, PROMPTS, 4, END, temperature=0)


# -- the loop --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A tiny policy over the course's tokens, and a reward for one letter."""
    tokenizer = load_course_tokenizer()
    cfg = ModelConfig(tokenizer.vocab_size, 16, 1, 2, max_len=32, position="rope", norm="rms")
    batch = [(text, tokenizer.encode(text)) for text in ("Once", "a fox", "the river", "Mia")]
    return LM(cfg, seed=0), tokenizer, [batch] * 3


def run(world, reward, seed=0, control=None, batches=None, **config):
    policy, tokenizer, some = world
    policy, reference = LM(policy.cfg, seed=0), LM(policy.cfg, seed=0)
    critic = ValueModel(policy)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = AdamW(parameters, lr=1e-2, weight_decay=0.0)  # so that only gradients move it
    settings = PPOConfig(max_new_tokens=6, minibatches=2, **config)
    control = control or KLControl(0.05)
    loop = ppo(
        *(policy, reference, critic, tokenizer, batches or some, reward, [optimizer]),
        control=control,
        config=settings,
        seed=seed,
    )
    return list(loop), policy


def letters(requests, responses):
    return torch.tensor([float(text.count("e")) for text in responses])


def test_the_loop_moves_the_policy_and_tells_what_it_did(world):
    steps, policy = run(world, letters, target_kl=None)
    first, *_, last = steps
    assert [step.step for step in steps] == [1, 2, 3]
    assert abs(first.kl) < 1e-4 < last.kl  # it starts at the reference, and leaves
    assert all(step.updates == 4 * 2 and 1 <= step.length <= 6 for step in steps)
    assert first.beta == last.beta == 0.05 and len(first.samples) == 4
    assert any(
        not torch.equal(a, b)
        for a, b in zip(policy.parameters(), world[0].parameters(), strict=True)
    )


def test_the_same_seed_gives_the_same_run(world):
    one, other, third = (run(world, letters, seed)[0] for seed in (1, 1, 2))
    assert one == other and one[-1].samples != third[-1].samples


def test_an_update_stops_when_the_policy_has_moved_far(world):
    near, far = (run(world, letters, target_kl=kl)[0][0] for kl in (1e-6, 1e6))
    assert near.updates < far.updates == 8


def test_what_goes_wrong_is_said(world):
    def nan(requests, responses):
        return torch.full((len(responses),), float("nan"))

    with pytest.raises(ValueError, match=r"scores of responses \[0, 1, 2, 3\] are not finite"):
        run(world, nan)
    with pytest.raises(KLTooLargeError, match=r"nats a response.*max_kl=1e-05"):
        run(world, letters, max_kl=1e-5, target_kl=None)
    with pytest.raises(ValueError, match="minibatches=2 of a batch of 1"):
        run(world, letters, batches=[world[2][0][:1]])
    with pytest.raises(ValueError, match="epochs"):
        PPOConfig(epochs=0)
    policy, tokenizer, some = world
    other = LM(dataclasses.replace(policy.cfg, vocab_size=50), seed=0)
    parts = (policy, other, ValueModel(policy), tokenizer, some, letters, [])
    with pytest.raises(ValueError, match="4096, 50, 4096"):
        next(ppo(*parts, control=KLControl(0.1)))


def test_all_equal_rewards_move_nothing_but_the_critic(world):
    """Nothing is preferred, so with β = 0 and a perfect critic the policy has no reason to move."""

    def same(requests, responses):
        return torch.zeros(len(responses))

    steps, _ = run(world, same, control=KLControl(0.0))
    assert all(abs(step.kl) < 1e-3 and step.reward == 0 for step in steps)


def test_responses_without_an_end_can_have_a_score_of_their_own(world):
    seen = []

    def reward(requests, responses):
        seen.append(len(responses))
        return torch.ones(len(responses))

    steps, _ = run(world, reward, unended=-2.0)
    for step in steps:
        assert step.reward == pytest.approx(step.ended * 1 + (1 - step.ended) * -2)
    assert seen == [4, 4, 4]
