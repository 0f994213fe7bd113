"""Rollouts: what a policy says to prompts, with the probabilities and values of every token."""

# b responses, p prompt tokens (padded on the left), t tokens of a response, v vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minillm.align.objectives import entropy
from minillm.align.value import ValueModel
from minillm.infer.batching import check_fits, pad_left
from minillm.infer.generate import generate
from minillm.infer.prepare import prepare
from minillm.model.lm import LM
from minillm.model.mask import sliding_window_mask
from minillm.tokenizers.bpe import BPE


@dataclass(frozen=True)
class Rollout:
    """A batch of prompts with responses. What is not `seen` is padding, left and right."""

    tokens: Tensor
    """[b, p + t]"""
    seen: Tensor
    """[b, p + t], True at tokens of prompt and response, end marker included"""
    logp: Tensor
    """[b, t], log π of each token of the response when it was sampled, 0 behind the end"""
    ended: Tensor
    """[b], True where the response came to its end marker"""

    @property
    def prompt(self) -> int:
        """p, the width of the prompts."""
        return self.tokens.shape[1] - self.logp.shape[1]

    @property
    def mask(self) -> Tensor:
        """[b, t], True at the tokens of a response: those that are rewarded and learned."""
        return self.seen[:, self.prompt :]

    @property
    def positions(self) -> Tensor:
        """[b, p + t], counted from the first token of each prompt."""
        return (self.seen.cumsum(-1) - 1).clamp(min=0)

    @property
    def sight(self) -> Tensor:
        """[b, 1, p + t, p + t]: a token sees those before it and itself, but no padding."""
        t = self.tokens.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=self.tokens.device).tril()
        return (causal & self.seen[:, None])[:, None]

    def rows(self, places: Tensor) -> Rollout:
        """Some of the responses, such as a minibatch; columns that are padding in all stay."""
        return Rollout(*(getattr(self, field.name)[places] for field in fields(self)))

    def responses(self) -> list[list[int]]:
        """The tokens of each response, without the end marker."""
        said = self.tokens[:, self.prompt :]
        rows = zip(said, self.mask, self.ended.tolist(), strict=True)
        return [ids[mask].tolist()[: -1 if ended else None] for ids, mask, ended in rows]


def roll_out(
    policy: LM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample a response of at most `max_new_tokens` to each prompt, up to the marker `end`.

    The log-probabilities come out of generation itself, at no cost; they are those of the policy
    at that temperature. Gradients are not kept. Raises ValueError without prompts, for an empty
    one, for prompts that with their responses exceed the context, and for temperature 0: a policy
    has to try things.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"{len(prompts)} prompts: there must be some, each with a token")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: a policy is sampled from")
    check_fits(prompts, max_new_tokens, policy.cfg.max_len)
    tokens, seen = pad_left(prompts, end)
    said: list[Tensor] = []
    found: list[Tensor] = []

    def note(logits: Tensor, new: Tensor) -> None:
        logp = (logits.float() / temperature).log_softmax(-1)
        found.append(logp.gather(-1, new[:, None]).squeeze(-1))

    settings = {"generator": generator, "stop": end, "mask": seen, "observe": note}
    for new in generate(prepare(policy), tokens, max_new_tokens, temperature, **settings):
        said.append(new)
    response, logp = torch.stack(said, 1), torch.stack(found, 1)
    ends = (response == end).cumsum(-1)
    mask = (ends == 0) | ((ends == 1) & (response == end))
    return Rollout(
        torch.cat([tokens, response.where(mask, end)], 1),
        torch.cat([seen, mask], 1),
        logp.where(mask, 0.0),
        ends[:, -1] > 0,
    )


def hidden(model: LM, rollout: Rollout) -> Tensor:
    """The last vectors of the states in which the tokens of the responses were chosen: [b, t, d],
    with gradients; one pass of the whole model instead of t of generation."""
    sight = rollout.sight
    if model.cfg.window is not None:  # a mask that is given stands in the place of the model's own
        sight = sight & sliding_window_mask(sight.shape[-1], model.cfg.window, device=sight.device)
    found = model.hidden(rollout.tokens, rollout.positions, sight)
    return found[:, rollout.prompt - 1 : -1]


def read_logp(
    model: LM, vectors: Tensor, rollout: Rollout, temperature: float = 1.0, bonus: bool = False
) -> tuple[Tensor, Tensor]:
    """log π of the sampled tokens and the policy's entropy at each, in nats, from `hidden`: [b, t].

    0 behind the end of a response. Only with `bonus` does the entropy carry gradients: these cost
    as much as those of the log-probabilities.
    """
    mask = rollout.mask
    logits = model.head(vectors[mask]).float()  # what is behind the end needs no probabilities
    if (scale := model.cfg.logit_scale / temperature) != 1:
        logits = logits * scale
    every = logits.log_softmax(-1)
    chosen = every.gather(-1, rollout.tokens[:, rollout.prompt :][mask][:, None]).squeeze(-1)
    with torch.set_grad_enabled(bonus and torch.is_grad_enabled()):
        undecided = entropy(every)
    empty = chosen.new_zeros(mask.shape)
    return empty.masked_scatter(mask, chosen), empty.masked_scatter(mask, undecided)


def response_logp(model: LM, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """log-probabilities of the sampled tokens under `model`, [b, t]."""
    return read_logp(model, hidden(model, rollout), rollout, temperature)[0]


def response_values(critic: ValueModel, rollout: Rollout) -> Tensor:
    """V of the state in which each token of the response was chosen, [b, t]."""
    return critic.read(hidden(critic.lm, rollout)).where(rollout.mask, 0.0)


def actor_critic(
    policy: LM, critic: ValueModel, rollout: Rollout, temperature: float = 1.0, bonus: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities, entropies and values, [b, t] each; of one pass if the body is shared."""
    vectors = hidden(policy, rollout)
    logp, undecided = read_logp(policy, vectors, rollout, temperature, bonus)
    if critic.lm is not policy:
        vectors = hidden(critic.lm, rollout)
    return logp, undecided, critic.read(vectors).where(rollout.mask, 0.0)


def check_vocabulary(tokenizer: BPE, *models: LM) -> None:
    """ValueError for models of another number of tokens."""
    sizes = [model.cfg.vocab_size for model in models]
    if set(sizes) != {tokenizer.vocab_size}:
        raise ValueError(
            f"the models have {sizes} tokens, the tokenizer {tokenizer.vocab_size}: all must "
            "speak of the same ones"
        )


def check_owners(policy: LM, reference: LM, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise ValueError if the actor would not learn, or the reference would move along."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    if not any(id(p) in held for p in policy.parameters()):
        raise ValueError(f"{len(optimizers)} optimizers hold no parameter of the actor")
    if any(id(p) in held for p in reference.parameters()):
        raise ValueError(
            "an optimizer holds parameters of the reference: it must be a copy that stays as it is"
        )
