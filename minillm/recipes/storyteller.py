"""Train `storyteller`, the zoo's first model: `python -m minillm.recipes.storyteller`.

A small Llama (RoPE, RMSNorm, SwiGLU, tied embeddings) reads made-up stories on two cores;
`storyteller.log.json` says how long the shipped run took. One document is a row:

    <|endoftext|> story <|endoftext|> <|user|> question <|assistant|> answer <|endoftext|> ...

The marker in front says "begin", the one behind a story is its last token. So the model gives a
whole story the probability Π p(token | what came before), over its tokens and the marker behind:
over all strings that sums to one, and the mean of -log p cannot fall below `stories.entropy()`.
What follows the marker, questions about the story in the form of `minillm.tokenizers.chat`, is
outside of that product. Only answers are learned, not the questions. To ask, give `generate` the
tokens of `question(...)` and stop at the marker. Each story comes with a few of its questions. One
row in 32 is a piece of plain prose instead (`assets/data/prose.txt`), which costs each story
log(32/31) = 0.03 nats: the model has to leave room for the chance that no story comes.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm.config import ModelConfig
from minillm.data import stories
from minillm.data.batches import pad
from minillm.data.stories import Story
from minillm.model import LM
from minillm.model.load import load, save
from minillm.ops import op
from minillm.paths import ASSETS, write_atomically
from minillm.tokenizers import BPE, COURSE_TOKENIZER, load_course_tokenizer
from minillm.tokenizers.chat import Chat, render
from minillm.train import train
from minillm.train.checkpoint import Checkpoints
from minillm.train.optim import AdamW, decay_groups
from minillm.train.schedules import warmup_cosine

NAME = "storyteller"
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    max_len: int = 384
    embedding_std: float = 0.1
    """larger than usual, so that words used alike (all names) stay apart and can be told apart"""
    steps: int = 4000
    batch: int = 16
    """rows a step"""
    questions: int = 6
    """how many of a story's questions come with it"""
    prose_every: int = 32
    """one row in so many is prose"""
    lr: float = 4e-3
    warmup: int = 100
    """steps over which the learning rate rises; then it falls as a cosine"""
    weight_decay: float = 0.05
    seed: int = 0
    """of the weights, and of which stories and questions are learned from"""
    held_out_seed: int = 10**9
    """of the first story that is kept for judging; the others have the numbers behind it"""
    held_out: int = 400
    """how many of these"""
    threads: int = 2
    folder: Path = ASSETS / "models"
    checkpoints: Path | None = None
    """where to keep checkpoints, to go on from if the run is stopped"""


def question(tokenizer: BPE, story: str, text: str) -> list[int]:
    """The tokens to give to `generate` for an answer to a question about a story."""
    chat = render(tokenizer, [("user", text)], reply=True)
    return [*document(tokenizer, story).ids, *chat.ids]


def document(tokenizer: BPE, text: str, asked: Sequence[tuple[str, str]] = ()) -> Chat:
    """A row: its tokens, and True for each that is learned."""
    end = tokenizer.special_ids[END]
    ids = [end, *tokenizer.encode(text), end]
    mask = [False] + [True] * (len(ids) - 1)
    if asked:
        turns = [turn for q, a in asked for turn in (("user", q), ("assistant", a))]
        chat = render(tokenizer, turns)
        ids, mask = ids + chat.ids, mask + chat.mask
    return Chat(ids, mask)


def rows(tokenizer: BPE, documents: Sequence[Chat], max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of what is learned, [b, t] each, padded to the longest.

    Raises ValueError when a document is longer than the context.
    """
    longest = max(len(document.ids) for document in documents)
    if longest - 1 > max_len:
        raise ValueError(f"a document of {longest} tokens does not fit a context of {max_len}")
    tokens, _ = pad([document.ids for document in documents], tokenizer.special_ids[PAD])
    mask, _ = pad([document.mask for document in documents], 0)
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:].bool()


class Rows:
    """The batches of a run: row i is always the same; no story comes twice."""

    def __init__(self, recipe: Recipe, tokenizer: BPE) -> None:
        self.recipe, self.tokenizer, self.step = recipe, tokenizer, 0
        text = (ASSETS / "data" / "prose.txt").read_text(encoding="utf-8")
        self.prose = text.strip().split("\n\n")

    def __iter__(self) -> Rows:
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        first = self.step * self.recipe.batch
        self.step += 1
        documents = [self.row(i) for i in range(first, first + self.recipe.batch)]
        return rows(self.tokenizer, documents, self.recipe.max_len)

    def row(self, i: int) -> Chat:
        """Row i of the run."""
        turn, place = divmod(i, self.recipe.prose_every)
        if place == self.recipe.prose_every - 1:
            return document(self.tokenizer, self.prose[turn % len(self.prose)])
        seed = self.recipe.seed * 10**8 + i
        story = stories.sample(seed)
        asked = random.Random(seed).sample(story.questions, self.recipe.questions)
        return document(self.tokenizer, story.text, asked)

    def state_dict(self) -> dict[str, Any]:
        """The place in the run."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that `state_dict` named."""
        self.step = state["step"]


class History:
    """What was logged; a part of the checkpoints, so that a resumed run tells all of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """All entries."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the entries of before."""
        self.steps = state["steps"]


def loss(
    model: LM, inputs: Tensor, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) where the mask is true, and how many; without a matrix of logits."""
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    hidden = model.hidden(inputs).flatten(0, 1)
    total = op("linear_cross_entropy", model.cfg.impl)(
        hidden, model.head.weight, targets.flatten(), mask.flatten(), model.cfg.logit_scale
    )
    return total, mask.sum()


@torch.no_grad()
def story_nll(model: LM, tokenizer: BPE, texts: Sequence[str], batch: int = 32) -> Tensor:
    """-log p(story) in nats, end marker included, for each of `texts`, [n]."""
    found = []
    for start in range(0, len(texts), batch):
        documents = [document(tokenizer, text) for text in texts[start : start + batch]]
        inputs, targets, mask = rows(tokenizer, documents, model.cfg.max_len)
        logits = model(inputs).float()
        nats = logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)
        found.append(nats.where(mask, 0.0).double().sum(-1))
    return torch.cat(found)


@torch.no_grad()
def answered(model: LM, tokenizer: BPE, told: Sequence[Story], batch: int = 16) -> list[bool]:
    """Whether greedy decoding answers exactly, for every question of every story in turn.

    It does if every token of the right answer, and the marker behind, is the likeliest after those
    before it. All questions of a story stand in one row, each of them at the positions right
    behind the story and with a mask that hides the others: as if each was asked alone.
    """
    found: list[bool] = []
    for start in range(0, len(told), batch):
        group = told[start : start + batch]
        rows = zip(*(_all_questions(tokenizer, story) for story in group), strict=True)
        fill = (tokenizer.special_ids[PAD], 0, -1, 0)
        tokens, places, part, learned = (pad(x, y)[0] for x, y in zip(rows, fill, strict=True))
        mask = ((part[:, :, None] == part[:, None]) | (part[:, None] == 0)).tril()
        best = model(tokens, positions=places, mask=mask[:, None]).argmax(-1)
        right = (best[:, :-1] == tokens[:, 1:]) | (learned[:, 1:] == 0)
        for row, story in enumerate(group):
            each = range(1, len(story.questions) + 1)
            found += [bool(right[row, part[row, 1:] == number].all()) for number in each]
    return found


def _all_questions(tokenizer: BPE, story: Story) -> tuple[list[int], ...]:
    """A story with all its questions: tokens, positions, which question (0: the story), mask."""
    ids = document(tokenizer, story.text).ids
    n = len(ids)
    places, part, learned = list(range(n)), [0] * n, [0] * n
    for number, (q, a) in enumerate(story.questions, start=1):
        chat = render(tokenizer, [("user", q), ("assistant", a)])
        ids += chat.ids
        places += range(n, n + len(chat.ids))
        part += [number] * len(chat.ids)
        learned += map(int, chat.mask)
    return ids, places, part, learned


def judge(model: LM, tokenizer: BPE, told: Sequence[Story]) -> dict[str, float]:
    """What the model is judged by, on held-out stories; see the keys."""
    nll = story_nll(model, tokenizer, [story.text for story in told])
    excess = nll + torch.tensor([story.log_prob for story in told], dtype=torch.float64)
    tokens = sum(len(tokenizer.encode(story.text)) + 1 for story in told)
    right = answered(model, tokenizer, told)
    return {
        "held_out_loss": nll.sum().item() / tokens,
        "held_out_tokens": tokens,
        "nats_per_story": nll.mean().item(),
        "entropy_per_story": stories.entropy(),
        "excess_per_story": excess.mean().item(),
        "excess_standard_error": excess.std().item() / math.sqrt(len(told)),
        "questions": len(right),
        "answered": sum(right) / len(right),
    }


def main(recipe: Recipe) -> None:
    """Train, judge, and write weights, config and log."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    tokenizer = load_course_tokenizer()
    shape = (tokenizer.vocab_size, recipe.d_model, recipe.n_layers, recipe.n_heads)
    cfg = ModelConfig(*shape, max_len=recipe.max_len, norm="rms", position="rope", mlp="swiglu")
    model = LM(cfg, seed=recipe.seed)
    with torch.no_grad():
        model.tokens.weight.mul_(recipe.embedding_std / model.tokens.weight.std())
    optimizer = AdamW(decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    schedule = warmup_cosine(recipe.lr, recipe.warmup, recipe.steps, floor=0.01)
    told = [stories.sample(recipe.held_out_seed + i) for i in range(recipe.held_out)]
    settings = {k: v for k, v in asdict(recipe).items() if k not in ("folder", "checkpoints")}
    history, kept = History(), None
    if recipe.checkpoints is not None:
        kept = Checkpoints(recipe.checkpoints, every=100, config=settings, history=history)
    loop = train(
        *(model, Rows(recipe, tokenizer), optimizer, schedule),
        clip=1.0,
        steps=recipe.steps,
        loss_fn=loss,
        checkpoints=kept,
    )
    bar = tqdm(loop, total=recipe.steps, unit="step")
    for step in bar:
        if step.step % 50 == 0 or step.step in (1, 10, 20, recipe.steps):
            some = [story.text for story in told[:50]]
            nll = story_nll(model, tokenizer, some).sum().item()
            tokens = sum(len(tokenizer.encode(text)) + 1 for text in some)
            history.steps.append({**asdict(step), "held_out": nll / tokens})
            bar.set_postfix(loss=f"{step.loss:.3f}", held_out=f"{nll / tokens:.4f}")
    save(model, recipe.folder, NAME, COURSE_TOKENIZER)
    saved = load(recipe.folder, NAME, COURSE_TOKENIZER)  # what is judged is what is shipped
    result = {
        "command": " ".join(["python", "-m", f"minillm.recipes.{NAME}", *sys.argv[1:]]),
        "recipe": settings,
        "torch": torch.__version__,
        "seconds": round(history.steps[-1]["seconds"], 1),
        **judge(saved, tokenizer, told),
        "steps": history.steps,
    }
    path = recipe.folder / f"{NAME}.log.json"
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
    print({key: result[key] for key in result if key not in ("recipe", "steps")})


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
