"""The capstone's report card: how its models are judged, and how that is shown.

A measure stands beside a control, which is what it would be without the skill: text beside a
compressor that has read the same text, answers beside answers about another story, cards beside
the same cards sent to somebody else.
"""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.align.ppo import Reward
from minillm.align.rollout import response_logp, roll_out
from minillm.data import cards
from minillm.data.stories import Story
from minillm.infer.batching import prompt_ids
from minillm.model import LM
from minillm.recipes import align_stages, storyteller
from minillm.recipes.stages import Done
from minillm.tokenizers import BPE
from minillm.tokenizers.chat import Chat

MODELS = {"pretrain": "pre-trained", "sft": "fine-tuned", "ppo": "PPO", "int8": "int8"}


def bits(nats: float, size: int) -> float:
    """Bits per byte of a text of `size` bytes that costs so many nats.

    >>> bits(math.log(256) * 10, size=10)
    8.0
    """
    return nats / math.log(2) / size


def naive(parts: Mapping[str, Sequence[str]], most: int = 2_000_000) -> dict[str, float]:
    """Bits per byte of "held_out" for who only counts the bytes of "train", and for LZMA.

    The first is the cross-entropy of byte frequencies (each byte counted once more than it occurs).
    The second: by how much `most` bytes of training text grow when the other is compressed behind.
    """
    train, held_out = ("\n\n".join(parts[name]).encode() for name in ("train", "held_out"))
    count, total = Counter(train), len(train) + 256
    nats = -sum(n * math.log((count[byte] + 1) / total) for byte, n in Counter(held_out).items())
    more = len(lzma.compress(train[:most] + held_out)) - len(lzma.compress(train[:most]))
    return {"unigram_bits": bits(nats, len(held_out)), "lzma_bits": 8 * more / len(held_out)}


def pieces(tokenizer: BPE, texts: Sequence[str], max_len: int) -> list[list[int]]:
    """The tokens of documents, in as many pieces as it takes to fit between two end markers."""
    longest = max_len - 1
    whole = (tokenizer.encode_ordinary(text) for text in texts)
    return [ids[i : i + longest] for ids in whole for i in range(0, len(ids), longest)]


def rows(
    tokenizer: BPE, cut: Sequence[Sequence[int]], max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of what is learned, [b, t] each: a piece is a row."""
    end = tokenizer.special_ids[storyteller.END]
    chats = [Chat([end, *ids, end], [False] + [True] * (len(ids) + 1)) for ids in cut]
    return storyteller.rows(tokenizer, chats, max_len)


@torch.no_grad()
def reading(model: LM, tokenizer: BPE, texts: Sequence[str], batch: int = 32) -> dict[str, float]:
    """Loss on whole documents, end markers included: nats a token and a document, bits a byte.

    A document that does not fit the context is read in pieces, each as if it stood alone.
    """
    cut, nats = pieces(tokenizer, texts, model.cfg.max_len), 0.0
    for start in range(0, len(cut), batch):
        some = rows(tokenizer, cut[start : start + batch], model.cfg.max_len)
        nats += storyteller.loss(model, *some)[0].item()
    return {
        "loss": nats / sum(len(ids) + 1 for ids in cut),
        "nats": nats / len(texts),
        "bits": bits(nats, sum(len(text.encode()) for text in texts)),
    }


def answering(model: LM, tokenizer: BPE, told: Sequence[Story]) -> dict[str, float]:
    """Share of questions about stories answered exactly, and of the same about another story."""
    others = [Story(told[i - 1].text, told[i].questions, 0.0) for i in range(len(told))]
    right, lucky = (storyteller.answered(model, tokenizer, some) for some in (told, others))
    return {"answered": sum(right) / len(right), "answered_by_chance": sum(lucky) / len(lucky)}


def writing(
    model: LM, reference: LM, tokenizer: BPE, asked: Sequence[str], judge: Reward
) -> dict[str, Any]:
    """What sampled cards are worth: the true reward, each and its mean, and the reward model's.

    `kl` estimates KL(model | reference) in nats a card. `in_place` is the share of cards that greet
    the right person and speak of the right thing; by chance: if each went to who asked next.
    """
    prompts = [prompt_ids(tokenizer, text, chat=True) for text in asked]
    end, rng = tokenizer.special_ids[storyteller.END], torch.Generator().manual_seed(0)
    rollout = roll_out(model, prompts, align_stages.LONGEST, end, generator=rng)
    said = [tokenizer.decode(ids) for ids in rollout.responses()]
    with torch.no_grad():
        kl = (rollout.logp - response_logp(reference, rollout)).sum(-1).mean().item()

    def in_place(requests: Sequence[str]) -> float:
        found = [cards.judge(*pair) for pair in zip(requests, said, strict=True)]
        return sum(one.greeting > 0 and one.topic > 0 for one in found) / len(found)

    true = cards.true_reward(asked, said)
    return {
        "true": true.mean().item(),
        "true_each": [round(x, 3) for x in true.tolist()],
        "proxy": judge(asked, said).mean().item(),
        "kl": kl,
        "in_place": in_place(asked),
        "in_place_by_chance": in_place([*asked[1:], asked[0]]),
        "samples": said[:4],
    }


def table(done: Sequence[Done]) -> str:
    """The report card as text: what each stage took, and what each model can do."""
    text, exam = done[0].numbers, done[-1].numbers
    lines = ["stage        wall s    CPU s  peak MB  tokens/s  what it made"]
    for one in done:
        speed = one.numbers.get("tokens_per_second")
        lines.append(
            f"{one.name:10} {one.seconds:8.1f} {one.cpu_seconds:8.1f} {one.peak_bytes / 1e6:8,.0f} "
            f"{f'{speed:,.0f}' if speed else '':>9}  {one.numbers['made']}"
            + (f" ({one.starts} starts)" if one.starts > 1 else "")
        )
    sums = [sum(getattr(one, key) for one in done) for key in ("seconds", "cpu_seconds")]
    lines += [f"{'together':10} {sums[0]:8.1f} {sums[1]:8.1f}", ""]
    lines.append("model           loss bits/byte  answered  in place  reward   proxy KL to SFT")
    for name, label in MODELS.items():
        x = exam[name]
        lines.append(
            f"{label:12} {x['loss']:7.3f} {x['bits']:9.3f} {x['answered']:9.1%} "
            f"{x['in_place']:9.1%} {x['true']:7.2f} {x['proxy']:7.2f} {x['kl']:9.2f}"
        )
    x = exam["sft"]
    lines.append(f"{'by chance':30} {x['answered_by_chance']:9.1%} {x['in_place_by_chance']:9.1%}")
    floor = f", of the stories' grammar {text['floor_bits']:.3f}" if "floor" in text else ""
    lines += [
        f"bits/byte of byte frequencies {text['unigram_bits']:.2f}, of LZMA "
        f"{text['lzma_bits']:.2f}{floor}",
        "",
        "loss: nats a token; answered: questions about stories; in place: cards that greet the",
        "right person and speak of the right thing; reward: the true one, of sampled cards;",
        "proxy: the reward model's; KL to SFT: nats a card",
    ]
    return "\n".join(lines)


def samples(done: Sequence[Done], n: int = 2) -> str:
    """The first cards of each model, with their true reward."""
    exam, lines = done[-1].numbers, []
    for i, request in enumerate(exam["asked"][:n]):
        lines.append(request)
        for name, label in MODELS.items():
            card = " ".join(exam[name]["samples"][i].split())
            lines.append(f"  {label:12} {exam[name]['true_each'][i]:5.1f}  {card}")
    return "\n".join(lines)
