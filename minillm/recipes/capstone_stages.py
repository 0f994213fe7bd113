"""The stages of the capstone: what each reads, does and leaves behind; see `capstone.py`.

A stage is a function of the run's folder and its settings. It writes into its own folder and
returns the numbers to report; "made" says them in a few words.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minillm.align.objectives import KLControl
from minillm.align.reward import accuracy, load_reward, save_reward
from minillm.align.sft import encode, sft_loss, sft_rows
from minillm.config import ModelConfig
from minillm.data import cards, stories
from minillm.data.batches import Packed
from minillm.data.instructions import conversation
from minillm.data.preferences import compare
from minillm.infer.quantize import load_int8, quantize_int8, save_int8, stored_bytes
from minillm.model import LM
from minillm.model.load import load, save
from minillm.recipes import align_stages as align
from minillm.recipes import report, storyteller
from minillm.recipes.capstone_settings import (
    Exam,
    Finetune,
    Improve,
    Judge,
    Pretrain,
    Shrink,
    Text,
    Tokenizer,
)
from minillm.recipes.tokenizer import SPECIAL_TOKENS
from minillm.recipes.training import Numbered
from minillm.tokenizers import BPE, train_bpe
from minillm.tokenizers.pretokenize import DIGITS_PATTERN
from minillm.train import AdamW, Checkpoints, decay_groups, train, warmup_cosine
from minillm.train.loop import Loss

HELD_OUT = 10**9
"""number of the first story that nothing is trained on"""


def tokenizer_of(folder: Path) -> tuple[BPE, Path]:
    """The run's tokenizer, and its file."""
    path = folder / "tokenizer" / "tokenizer.json"
    return BPE.load(path), path


def model_of(folder: Path, stage: str) -> LM:
    """The model that a stage left behind: "pretrain", "sft", "ppo", or "int8"."""
    read = load_int8 if stage == "int8" else load
    return read(folder / stage, "model", folder / "tokenizer" / "tokenizer.json")


def documents(folder: Path, part: str) -> list[str]:
    """The documents of "train" or "held_out"."""
    return (folder / "text" / f"{part}.txt").read_text(encoding="utf-8").split("\n\n")


def contents(folder: Path) -> str:
    """SHA-256 over the *.txt of a folder."""
    found = [path.read_bytes() for path in sorted(folder.rglob("*.txt"))]
    return hashlib.sha256(b"".join(hashlib.sha256(x).digest() for x in found)).hexdigest()


def make_text(folder: Path, settings: Text) -> dict[str, Any]:
    """Raw text as two files; documents are separated by blank lines.

    Raises ValueError for a folder with fewer than two documents: one is learned, one held out.
    """
    if settings.folder is None:
        told = [stories.sample(HELD_OUT + i) for i in range(settings.held_out)]
        parts = {"train": stories.generate(settings.stories, seed=0)}
        parts["held_out"] = [story.text for story in told]
        nats = -sum(story.log_prob for story in told)
        size = sum(len(story.text.encode()) for story in told)
        known = {"floor": nats / len(told), "floor_bits": report.bits(nats, size)}
        known["entropy"] = stories.entropy()
    else:
        texts = [x.read_text(encoding="utf-8") for x in sorted(settings.folder.rglob("*.txt"))]
        found = [part.strip() for text in texts for part in text.split("\n\n") if part.strip()]
        if len(found) < 2:
            raise ValueError(f"{settings.folder}: {len(found)} documents in *.txt, 2 are needed")
        random.Random(0).shuffle(found)
        n = min(settings.held_out, max(1, len(found) // 10))
        parts, known = {"train": found[n:], "held_out": found[:n]}, {}
    for part, some in parts.items():
        (folder / "text" / f"{part}.txt").write_text("\n\n".join(some), encoding="utf-8")
    size = sum(len(text.encode()) for text in parts["train"])
    made = f"{len(parts['train']):,} documents, {size / 1e6:.1f} MB"
    return {"made": made, "bytes": size, **known, **report.naive(parts)}


def make_tokenizer(folder: Path, settings: Tokenizer) -> dict[str, Any]:
    """Byte-pair encoding; ValueError unless all held-out text comes back as it was."""
    texts = documents(folder, "train")[: settings.documents]
    tokenizer = train_bpe(texts, settings.size, SPECIAL_TOKENS, DIGITS_PATTERN)
    held_out = documents(folder, "held_out")
    rows = [tokenizer.encode_ordinary(text) for text in held_out]
    if [tokenizer.decode(row) for row in rows] != held_out:
        raise ValueError("the tokenizer does not give back what it was given")
    tokenizer.save(folder / "tokenizer" / "tokenizer.json")
    each = sum(len(text.encode()) for text in held_out) / sum(map(len, rows))
    made = f"{tokenizer.vocab_size:,} tokens, one for {each:.1f} bytes"
    return {"made": made, "tokens": tokenizer.vocab_size, "bytes_per_token": each}


def fit(
    model: LM,
    batch: Callable[[int], Sequence[Any]],
    place: Path,
    settings: Pretrain | Finetune,
    loss: Loss,
) -> dict[str, Any]:
    """Train `model` on batch(0), batch(1), ..., with checkpoints in `place`; curve and speed."""
    optimizer = AdamW(decay_groups(model, 0.05), lr=settings.lr, betas=(0.9, 0.98))
    history, kept = storyteller.History(), place / "checkpoints"
    loop = train(
        *(model, Numbered(batch), optimizer),
        warmup_cosine(settings.lr, min(50, settings.steps // 5), settings.steps, floor=0.01),
        clip=1.0,
        steps=settings.steps,
        loss_fn=loss,
        checkpoints=Checkpoints(kept, 50, 2, asdict(settings), history=history),
    )
    shown = max(1, settings.steps // 60)
    with tqdm(total=settings.steps, unit="step", desc=place.name) as bar:
        for step in loop:
            bar.update(step.step - bar.n)
            if step.step % shown == 0 or step.step in (1, settings.steps):
                history.steps.append({"step": step.step, "loss": round(step.loss, 4)})
                bar.set_postfix(loss=f"{step.loss:.3f}")
    shutil.rmtree(kept)
    curve = {key: [entry[key] for entry in history.steps] for key in ("step", "loss")}
    made = f"loss {curve['loss'][0]:.2f} -> {curve['loss'][-1]:.2f}"
    return {"made": made, "curve": curve, "tokens_per_second": step.tokens / step.seconds}


def pretrain(folder: Path, settings: Pretrain) -> dict[str, Any]:
    """Next-token prediction from random weights."""
    tokenizer, path = tokenizer_of(folder)
    shape = (tokenizer.vocab_size, settings.d_model, settings.n_layers, settings.n_heads)
    cfg = ModelConfig(*shape, max_len=settings.max_len, norm="rms", position="rope", mlp="swiglu")
    model = LM(cfg, seed=settings.seed)
    with torch.no_grad():  # see `storyteller.Recipe.embedding_std`
        model.tokens.weight.mul_(0.1 / model.tokens.weight.std())
    read = report.pieces(tokenizer, documents(folder, "train"), cfg.max_len)

    def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
        places = range(number * settings.batch, (number + 1) * settings.batch)
        return report.rows(tokenizer, [read[i % len(read)] for i in places], cfg.max_len)

    told = fit(model, batch, folder / "pretrain", settings, storyteller.loss)
    save(model, folder / "pretrain", "model", path)
    return {"parameters": sum(p.numel() for p in model.parameters()), **told}


def finetune(folder: Path, settings: Finetune) -> dict[str, Any]:
    """Demonstrations: cards, and stories with questions, which also keep the model telling."""
    (tokenizer, path), model = tokenizer_of(folder), model_of(folder, "pretrain")

    def batch(number: int) -> tuple[Packed, Tensor, Tensor]:
        rng = random.Random(f"{settings.seed} {number}")
        asked = cards.requests(settings.cards, rng.randrange(align.TRAINING))
        chats = [encode(conversation(cards.demonstration(x, rng)), tokenizer) for x in asked]
        for _ in range(settings.stories):
            story = stories.sample(rng.randrange(10**8, HELD_OUT))
            asks = rng.sample(story.questions, settings.questions)
            chats.append(storyteller.document(tokenizer, story.text, asks))
        rows = sft_rows(chats, tokenizer, model.cfg.max_len)
        return rows, rows.targets, rows.loss_mask

    told = fit(model, batch, folder / "sft", settings, sft_loss)
    save(model, folder / "sft", "model", path)
    return told


def learn_to_judge(folder: Path, settings: Judge) -> dict[str, Any]:
    """A reward model from comparisons of the SFT model's cards, tested on new pairs."""
    (tokenizer, _), policy = tokenizer_of(folder), model_of(folder, "sft")
    chosen = (settings.requests, settings.epochs, settings.seed, settings.lr)
    judge, _ = align.train_judge(policy, tokenizer, *chosen)
    save_reward(judge, folder / "reward", "model_reward")
    new = align.samples(policy, tokenizer, settings.tested, 2, settings.seed + 5000)
    pairs = compare(*new, generator=torch.Generator(), temperature=0)

    def length(asked: Sequence[str], said: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(card)) for card in said])

    right, longer = accuracy(judge, pairs), accuracy(length, pairs)
    made = f"{right:.0%} of {len(pairs)} new pairs right, by length {longer:.0%}"
    return {"made": made, "pairs": len(pairs), "accuracy": right, "accuracy_of_length": longer}


def improve(folder: Path, settings: Improve) -> dict[str, Any]:
    """PPO by the judgement of the reward model; the true reward is only watched."""
    (tokenizer, path), policy = tokenizer_of(folder), model_of(folder, "sft")
    judge = load_reward(folder / "reward", "model_reward", tokenizer)
    control = KLControl(0.1, settings.target, horizon=4 * settings.prompts)
    arm = align.Arm(replace(align.CONFIG, max_kl=settings.max_kl), control)
    size = {key: getattr(settings, key) for key in ("iterations", "prompts", "lr", "seed")}
    steps, start = [], time.perf_counter()
    bar = tqdm(align.improve(policy, judge, tokenizer, arm, **size), "ppo", settings.iterations)
    for step in bar:
        steps.append(step)
        bar.set_postfix(reward=f"{step.reward:.2f}", kl=f"{step.kl:.1f}")
    seconds = time.perf_counter() - start
    save(policy, folder / "ppo", "model", path)
    keys = ("reward", "true_reward", "kl", "beta", "length", "entropy", "clip_share")
    curve = {key: [round(getattr(step, key), 4) for step in steps] for key in keys}
    speed = settings.prompts * sum(curve["length"]) / seconds
    made = f"true reward {steps[0].true_reward:.2f} -> {steps[-1].true_reward:.2f}"
    return {"made": made, "curve": curve, "tokens_per_second": speed}


def shrink(folder: Path, settings: Shrink) -> dict[str, Any]:
    """Weights in eight bits, in a folder that `minillm.chat` can open."""
    model, (_, path) = model_of(folder, "ppo"), tokenizer_of(folder)
    small = quantize_int8(model)
    save_int8(small, folder / "int8", "model", path)
    for file in (path, *(folder / "reward").glob("model_reward.*")):
        shutil.copy(file, folder / "int8")
    before, after = stored_bytes(model), stored_bytes(small)
    made = f"{before / 1e6:.2f} -> {after / 1e6:.2f} MB"
    return {"made": made, "bytes_before": before, "bytes": after}


def examine(folder: Path, settings: Exam) -> dict[str, Any]:
    """Every model judged in the same way, on what none was trained on; see `report`."""
    (tokenizer, _), held_out = tokenizer_of(folder), documents(folder, "held_out")
    judge = load_reward(folder / "reward", "model_reward", tokenizer)
    told = [stories.sample(HELD_OUT + i) for i in range(settings.stories)]
    asked = [x.text for x in cards.requests(settings.cards, align.TESTING, "held_out")]
    found: dict[str, Any] = {"made": "the table below", "asked": asked[:4]}
    reference = model_of(folder, "sft")
    for stage in report.MODELS:
        model = model_of(folder, stage)
        found[stage] = report.reading(model, tokenizer, held_out)
        found[stage] |= report.answering(model, tokenizer, told)
        found[stage] |= report.writing(model, reference, tokenizer, asked, judge)
    return found
