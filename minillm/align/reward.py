"""Reward models: a number for a response, learned from rankings.

People rank responses; a language model with a head of one number learns to give the better one the
higher number. What is left to learn from is only the order, so the numbers have no zero and no
unit until `normalize` gives them some. (Rewards that are written down: `minillm.align.rules`.)
"""

# b comparisons, k responses to each (best first), n texts, t tokens

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.align.value import ValueModel
from minillm.config import ModelConfig
from minillm.data.batches import pad
from minillm.data.preferences import Comparison
from minillm.infer.batching import by_length, check_fits
from minillm.model import files
from minillm.model.lm import LM
from minillm.paths import write_atomically
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.chat import END, render
from minillm.train.optim import clip_grad_norm


def _pairs(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Differences better - worse of all pairs [b, k(k-1)/2], and each pair's share of its row."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if scores.ndim != 2 or mask.shape != scores.shape or not (mask.sum(-1) > 1).all():
        raise ValueError(
            f"scores {list(scores.shape)} and mask {list(mask.shape)} must be [b, k], with at "
            "least two responses in each row: one alone cannot be better"
        )
    if bad := (mask & ~scores.isfinite()).any(-1).nonzero().flatten().tolist():
        raise ValueError(f"the scores of comparisons {bad} are not finite: they rank nothing")
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    real = (mask[:, i] & mask[:, j]).to(scores.dtype)
    scores = scores.where(mask, 0.0)
    share = real.to(scores.dtype) / real.sum(-1, keepdim=True)
    return scores[:, i] - scores[:, j], share


def ranking_loss(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """-log σ(s_i - s_j), i better than j: mean over a row's k(k-1)/2 pairs, then over rows.

    scores [b, k] of responses ranked best first; `mask` [b, k] is True where there is a response,
    so that rows may be of different lengths. Every comparison weighs the same, however many it
    ranks. For pairs it is the negative log-likelihood of Bradley and Terry, in nats.

    Raises ValueError for scores that are not finite or not [b, k], and rows of fewer than two.
    Source: Ouyang et al., Training Language Models to Follow Instructions with Human Feedback,
    2022, equation 1.

    >>> round(ranking_loss(torch.tensor([[2.0, 1.0, 1.0]])).item(), 3)  # two pairs right, one tied
    0.44
    """
    better, share = _pairs(scores, mask)
    return (F.softplus(-better) * share).sum(-1).mean()


def ranking_accuracy(scores: Tensor, mask: Tensor | None = None) -> float:
    """Share of pairs in the right order, taken as in `ranking_loss`; a tie counts half."""
    better, share = _pairs(scores, mask)
    return (better.sign().add(1).div(2) * share).sum(-1).mean().item()


class RewardModel(nn.Module):
    """A score for a response to a request; called, it is a reward for `minillm.align.ppo`.

    The body starts as a copy of `lm`, the head at zero (see `ValueModel`). A text is read as
    `render` writes the conversation, and the score stands at the end marker behind the response,
    where all of it has been seen. The marker is put there whether the policy wrote one or not
    (`PPOConfig.unended` is for those), markers inside a response are plain text, and an empty
    response is scored like any other.

    Raises ValueError for a tokenizer of another size than the model's vocabulary.
    """

    def __init__(self, lm: LM, tokenizer: BPE, share: bool = False) -> None:
        super().__init__()
        if lm.cfg.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model reads {lm.cfg.vocab_size} tokens, the tokenizer has "
                f"{tokenizer.vocab_size}: a reward model reads with the tokenizer it was made for"
            )
        self.value = ValueModel(lm, share=share)
        self.tokenizer = tokenizer
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, requests: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """The tokens of each conversation; ValueError where one exceeds the context."""
        pairs = zip(requests, responses, strict=True)
        said = [[("user", request), ("assistant", response)] for request, response in pairs]
        rows = [render(self.tokenizer, talk).ids for talk in said]
        if rows:
            check_fits(rows, 0, self.value.lm.cfg.max_len)
        return rows

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores [n] of encoded conversations, with gradients, before they are normalized."""
        # a text ends its row, so what stands behind it (padding) is seen by no token of it
        tokens, real = pad(rows, self.tokenizer.special_ids[END])
        places = torch.arange(len(rows)), real.sum(-1) - 1
        return self.value.read(self.value.lm.hidden(tokens)[places])

    @torch.no_grad()
    def score(self, requests: Sequence[str], responses: Sequence[str], batch: int = 64) -> Tensor:
        """(score - mean) / scale for n texts, [n] in float32.

        A score does not depend on the other texts. Raises ValueError where it is not finite, naming
        the responses, and where a text exceeds the context.
        """
        rows, training = self.encode(requests, responses), self.training
        found = torch.zeros(len(rows))
        self.eval()
        for group in by_length(rows, batch):
            found[torch.tensor(group)] = self.read([rows[i] for i in group]).float()
        self.train(training)
        if bad := (~found.isfinite()).nonzero().flatten().tolist():
            raise ValueError(f"the scores of responses {bad} are not finite: {found[bad].tolist()}")
        return (found - self.mean) / self.scale

    forward = score


def normalize(model: RewardModel, requests: Sequence[str], responses: Sequence[str]) -> None:
    """Set mean and scale so that these responses have scores of mean 0 and variance 1.

    The loss leaves a constant free, and the unit depends on how long the model was trained; with
    this, a weight of a KL penalty means the same for every reward model. Raises ValueError for
    fewer than two responses, and where all scores are equal: such a model prefers nothing.
    """
    raw = model.score(requests, responses).double() * model.scale + model.mean
    if len(raw) < 2 or not raw.std() > 1e-6 * (1 + raw.abs().max()):
        raise ValueError(
            f"{len(raw)} responses with scores {raw[:4].tolist()}: there must be some that differ, "
            "or there is no unit to measure in; was the model trained?"
        )
    model.mean.copy_(raw.mean())
    model.scale.copy_(raw.std(correction=0))


@dataclasses.dataclass(frozen=True)
class RewardStep:
    """One update of a reward model."""

    step: int
    """counts from 1"""
    epoch: int
    """counts from 1"""
    loss: float
    """nats a pair, of the batch before the update; log 2 is guessing"""
    accuracy: float
    """of the batch before the update: in the first epoch, on comparisons not seen before"""
    grad_norm: float
    """before clipping"""


def train_reward(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    optimizer: torch.optim.Optimizer,
    *,
    batch: int = 16,
    epochs: int = 1,
    generator: torch.Generator,
    max_norm: float = 1.0,
) -> Iterator[RewardStep]:
    """Fit `model` to rankings, in place; yields after each update.

    A comparison's responses stay in one batch: taken apart, its pairs would show each of them k - 1
    times an epoch and be learned by heart; for the same reason one epoch is the usual number
    (Ouyang et al., 2022, section 3.5). Equal seeds of `generator` give equal runs.

    Raises ValueError without comparisons (responses that are all worth the same give none), for
    texts that exceed the context, and for a loss or gradient that is not finite (then nothing is
    updated).
    """
    if not comparisons or batch < 1 or epochs < 1:
        raise ValueError(
            f"{len(comparisons)} comparisons, batch={batch}, epochs={epochs}: all must be at least "
            "1; where all responses are worth the same there is nothing to learn"
        )
    rows = [model.encode([c.request] * len(c.responses), c.responses) for c in comparisons]
    number = 0
    for epoch in range(1, epochs + 1):
        for places in torch.randperm(len(rows), generator=generator).split(batch):
            model.train()
            chosen = [rows[i] for i in places.tolist()]
            scores = model.read([ids for some in chosen for ids in some])
            scores, mask = _side_by_side(scores, [len(some) for some in chosen])
            loss = ranking_loss(scores, mask)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = clip_grad_norm(model.parameters(), max_norm)
            if not norm.isfinite():
                raise ValueError(f"step {number + 1}: the gradient's norm is {norm.item()}")
            optimizer.step()
            number += 1
            right = ranking_accuracy(scores.detach(), mask)
            yield RewardStep(number, epoch, loss.item(), right, norm.item())
    model.eval()


def _side_by_side(scores: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores of comparisons, one after another, as [b, k] with a mask."""
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores), mask


def accuracy(model: Callable[..., Tensor], comparisons: Sequence[Comparison]) -> float:
    """Share of pairs that a reward (a `RewardModel` or any other) orders as the comparisons do.

    Mean over each comparison's pairs, then over comparisons; a tie counts half. ValueError without
    comparisons.
    """
    if not comparisons:
        raise ValueError("there are no comparisons to agree with")
    asked = [c.request for c in comparisons for _ in c.responses]
    scores = model(asked, [text for c in comparisons for text in c.responses])
    return ranking_accuracy(*_side_by_side(scores, [len(c.responses) for c in comparisons]))


def save_reward(
    model: RewardModel, folder: Path, name: str, dtype: torch.dtype = torch.float16
) -> None:
    """Write `name`.safetensors (the body in `dtype`, the rest in float32) and `name`.json.

    The latter has the config, the SHA-256 of the weights and that of the tokenizer's contents.
    """
    lm = model.value.lm
    state = {
        key: x.detach().to("cpu", dtype if key.startswith("value.lm.") else torch.float32)
        for key, x in model.state_dict().items()
        if not (lm.cfg.tie_embeddings and key == "value.lm.head.weight")  # the same tensor twice
    }
    weights = safetensors.torch.save({key: x.contiguous() for key, x in state.items()})
    card = {
        "reward": {"mean": model.mean.item(), "scale": model.scale.item()},
        "config": dataclasses.asdict(lm.cfg),
        "parameters": sum(x.numel() for x in state.values()),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "tokenizer_contents_sha256": _contents(model.tokenizer),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.safetensors", weights)
    write_atomically(folder / f"{name}.json", (json.dumps(card, indent=2) + "\n").encode())


def load_reward(folder: Path, name: str, tokenizer: BPE) -> RewardModel:
    """The model that `save_reward` wrote, in float32 and evaluation mode.

    Raises ValueError when it was saved with another tokenizer, when its weights were changed since,
    and when `name` is no reward model.
    """
    card = files.read_card(folder, name)
    if "reward" not in card:
        raise ValueError(f"{name} is a language model, not a reward model: it has no score")
    if (found := _contents(tokenizer)) != card["tokenizer_contents_sha256"]:
        raise ValueError(
            f"{name} was trained with a tokenizer of SHA-256 {card['tokenizer_contents_sha256']}, "
            f"this one has {found}: its tokens mean other texts"
        )
    weights = (folder / f"{name}.safetensors").read_bytes()
    if (found := hashlib.sha256(weights).hexdigest()) != card["sha256"]:
        raise ValueError(
            f"{name}.safetensors has SHA-256 {found}, written down was {card['sha256']}: it was "
            "changed since it was saved"
        )
    state = {key: x.float() for key, x in safetensors.torch.load(weights).items()}
    body = {key: x for key, x in state.items() if key.startswith("value.lm.")}
    lm = files.build(
        ModelConfig(**card["config"]), {k.removeprefix("value.lm."): x for k, x in body.items()}
    )
    model = RewardModel(lm, tokenizer, share=True)
    model.load_state_dict({k: x for k, x in state.items() if k not in body}, strict=False)
    return model.eval()


def _contents(tokenizer: BPE) -> str:
    """SHA-256 of all that decides which tokens a text has."""
    parts = (
        [[i, text.hex()] for i, text in tokenizer.vocab.items()],
        [[left.hex(), right.hex()] for left, right in tokenizer.merges],
        sorted(tokenizer.special_ids.items()),
        tokenizer.pattern,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
