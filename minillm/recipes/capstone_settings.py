"""What the stages of the capstone can be told; the whole run, and a quick one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """Where the text comes from: made-up stories, or a folder of one's own."""

    stories: int = 40_000
    folder: Path | None = None
    """read the *.txt in it instead: documents are what blank lines separate"""
    held_out: int = 200
    """documents to judge by; of one's own text at most one in ten"""
    contents: str = ""
    """SHA-256 of the folder's texts, filled in when the run is planned"""


@dataclass(frozen=True)
class Tokenizer:
    """Byte pairs, counted in the first `documents`."""

    size: int = 1536
    documents: int = 4000


@dataclass(frozen=True)
class Pretrain:
    """The model, and how it reads the text: each document once, then again from the start."""

    d_model: int = 96
    n_layers: int = 4
    n_heads: int = 4
    max_len: int = 640
    """also for stories with questions, which take more tokens where the text was another"""
    steps: int = 2500
    batch: int = 16
    lr: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class Finetune:
    """A step has so many cards, and so many stories with so many questions each."""

    cards: int = 24
    stories: int = 3
    questions: int = 6
    steps: int = 1200
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Judge:
    """For how many requests the reward model sees four cards ranked, and how often each."""

    requests: int = 400
    epochs: int = 3
    lr: float = 3e-4
    tested: int = 300
    """new pairs to test it by"""
    seed: int = 0


@dataclass(frozen=True)
class Improve:
    """PPO; the control aims at `target` nats a card between the policy and the SFT model."""

    iterations: int = 40
    prompts: int = 64
    lr: float = 2e-4
    target: float = 4.0
    max_kl: float = 60.0
    """the stage fails above it: what it made would be no good"""
    seed: int = 0


@dataclass(frozen=True)
class Shrink:
    """Int8: there is nothing to choose."""


@dataclass(frozen=True)
class Exam:
    """How many cards, and stories with questions, each model is judged by."""

    cards: int = 256
    stories: int = 100


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine; parts are named by stage."""

    text: Text
    tokenizer: Tokenizer
    pretrain: Pretrain
    sft: Finetune
    reward: Judge
    ppo: Improve
    int8: Shrink
    exam: Exam


FULL = Recipe(Text(), Tokenizer(), Pretrain(), Finetune(), Judge(), Improve(), Shrink(), Exam())
QUICK = Recipe(
    Text(stories=8000, held_out=60),
    Tokenizer(documents=2000),
    Pretrain(d_model=64, n_layers=3, steps=800, batch=8, lr=6e-3),
    Finetune(cards=32, stories=1, steps=450, lr=4e-3),
    Judge(requests=150, tested=200),
    Improve(iterations=24, prompts=48, lr=3e-4),
    Shrink(),
    Exam(cards=128, stories=40),
)
