"""Ways to adapt the storyteller, at equal steps: `python -m minillm.recipes.adapt`.

The task: read how a story opens and fill in a card of three words.

    Long ago, a shy little fox named Ann.<|user|>Card?<|assistant|>Ann lamp river<|endoftext|>

The name is copied, which the storyteller can do. Each kind of hero and each trait has a code word
of its own, drawn at random: that is new to it. So the task asks for a skill that is there to be
called and for knowledge that is not. A card counts if all three words and the end are right.

Every method gets the same batches for the same number of steps, and one of them also three times
as many. Its learning rate is the better of two, by the cards that are right after a run with a
seed that is not used again; the results are those of the other seeds, on stories that were in no
batch. Smaller bases are trained by the storyteller's recipe, for far fewer steps than it was.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import stories
from minillm.model import LM
from minillm.paths import ASSETS, write_atomically
from minillm.peft import adalora
from minillm.peft.adapters import AdapterConfig, apply_adapter
from minillm.peft.dylora import DyLoRAConfig, apply_dylora, set_rank
from minillm.peft.ia3 import apply_ia3
from minillm.peft.inject import trainable
from minillm.peft.llama_adapter import apply_llama_adapter
from minillm.peft.lora import LoRAConfig, apply_lora
from minillm.peft.prefix import PrefixConfig, apply_prefix
from minillm.peft.prompt import PromptConfig, apply_prompt, prompt_vectors
from minillm.peft.ptuning import PTuningConfig, apply_ptuning
from minillm.peft.qlora import QLoRAConfig, apply_qlora
from minillm.recipes import storyteller
from minillm.tokenizers import BPE
from minillm.tokenizers.chat import Chat, render
from minillm.train import AdamW, decay_groups, train, warmup_cosine

ALL = (r"re:blocks\..*\.(q|k|v|out|up|gate|down)",)
OPENING = re.compile(r"(.*?, an? (\w+) little (\w+) named (\w+)) ")
WORDS = """
brave cheerful clumsy curious dreamy honest impatient kind shy stubborn

badger bear boy dragon fox girl hedgehog mouse rabbit squirrel

apple basket bell boat bread bridge door drum garden hat honey key kite lamp lantern letter mill
moon river rope snow soup stone
"""
TRAITS, KINDS, CODES = map(str.split, WORDS.split("\n\n"))
PRETUNING, TUNING, TEST = 10**6, 2 * 10**6, 3 * 10**6
"""stories' numbers: where training on the card of plain words starts, and those kept to judge"""


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, apart from the machine."""

    steps: int = 60
    batch: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    judged: int = 100
    sizes: tuple[int, ...] = (32, 64)
    """widths of the bases that are trained here"""
    base_steps: int = 200
    base_batch: int = 8
    threads: int = 1
    path: Path = ASSETS / "benchmarks" / "adapt.json"
    """written after each run; a run that was stopped goes on from there"""


@dataclass(frozen=True)
class Method:
    """How to put a method into a model, and the learning rates to choose from."""

    apply: Callable[..., object]
    config: object
    rates: tuple[float, ...]
    times: int = 1
    """how many times the steps of the others"""


def everything(model: LM, config: None, *, seed: int) -> LM:
    """Full fine-tuning: all parameters train."""
    return model.requires_grad_(True)


def methods(steps: int, prompt: Tensor | None = None) -> dict[str, Method]:
    """All that are compared; SPoT only with the `prompt` of another task."""
    part = steps // 4
    ada = adalora.AdaLoRAConfig(8, 16, ALL, final_rank=4, steps=steps, warmup=part, settle=part)
    slow, middle, fast = (2e-3, 6e-3), (4e-3, 1.6e-2), (2e-2, 1e-1)
    found = {"full fine-tuning": Method(everything, None, slow)}
    for r in (1, 4, 16):
        found[f"LoRA r={r}"] = Method(apply_lora, LoRAConfig(r, 2 * r, ALL), middle)
    found |= {
        "LoRA r=16, 3 × steps": Method(apply_lora, LoRAConfig(16, 32, ALL), (4e-3, 8e-3), times=3),
        "LoRA r=4, q and v": Method(apply_lora, LoRAConfig(4, 8), middle),
        "AdaLoRA r=4": Method(adalora.apply_adalora, ada, middle),
        "DyLoRA r=8": Method(apply_dylora, DyLoRAConfig(8, 16, ALL), middle),
        "QLoRA r=4": Method(apply_qlora, QLoRAConfig(4, 8, ALL), middle),
        "serial adapter": Method(apply_adapter, AdapterConfig(16), middle),
        "parallel adapter": Method(apply_adapter, AdapterConfig(32, True, scale=4), middle),
        "prefix with MLP": Method(apply_prefix, PrefixConfig(10, hidden=64), middle),
        "P-tuning v2": Method(apply_prefix, PrefixConfig(10), fast),
        "prompt": Method(apply_prompt, PromptConfig(20), fast),
        "P-tuning v1": Method(apply_ptuning, PTuningConfig(20), middle),
        "(IA)³": Method(apply_ia3, None, fast),
        "LLaMA-Adapter": Method(apply_llama_adapter, None, fast),
    }
    if prompt is not None:
        found["SPoT"] = Method(partial(apply_prompt, start=prompt), PromptConfig(20), fast)
    return found


def card(story: str, codes: bool = True) -> tuple[str, list[str]]:
    """The opening of a story and what its card says: name, kind and trait, or their code words."""
    opening, trait, kind, name = OPENING.match(story).groups()
    if codes:
        words = random.Random(0).sample(CODES, len(KINDS) + len(TRAITS))
        code = dict(zip(KINDS + TRAITS, words, strict=True))
        kind, trait = code[kind], code[trait]
    return f"{opening}.", [name, kind, trait]


@cache
def rows(tokenizer: BPE, first: int, n: int, codes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and the mask of what is learned, [n, t] each, for n stories from `first`."""
    documents = []
    for number in range(first, first + n):
        opening, words = card(stories.sample(number).text, codes)
        end = tokenizer.special_ids[storyteller.END]
        chat = render(tokenizer, [("user", "Card?"), ("assistant", " ".join(words))])
        read = [end, *tokenizer.encode(opening), end]
        documents.append(Chat(read + chat.ids, [False] * len(read) + chat.mask))
    return storyteller.rows(tokenizer, documents, max_len=384)


def loss(model: LM, inputs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `next_token_loss`, but only the answers pass the output matrix."""
    logits = model.head(model.hidden(inputs)[mask])
    return F.cross_entropy(logits, targets[mask], reduction="sum"), mask.sum()


@torch.no_grad()
def judge(model: LM, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Shares of cards that are right: whole, the name, the two words; and the loss of a card.

    A word counts if greedy decoding would write it behind the right words.
    """
    inputs, targets, mask = batch
    model.eval()
    logits = model.head(model.hidden(inputs)[mask])
    right = torch.ones_like(mask)
    right[mask] = logits.argmax(-1) == targets[mask]
    left = mask.flip(1).cumsum(1).flip(1)  # of the answer, from here on: the words and the end
    name, words = (right | (left <= 3)).all(1), (right | (left > 3) | (left == 1)).all(1)
    nats = F.cross_entropy(logits, targets[mask], reduction="sum") / len(inputs)
    shares = {"card": right.all(1), "name": name, "words": words}
    return {k: x.float().mean().item() for k, x in shares.items()} | {"nats": nats.item()}


def run(
    base: LM, tokenizer: BPE, method: Method, rate: float, seed: int, recipe: Recipe, **task: Any
) -> tuple[LM, dict[str, Any]]:
    """A copy of `base` adapted, and what came of it."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    method.apply(model, method.config, seed=seed)
    ada = isinstance(method.config, adalora.AdaLoRAConfig)
    allocator = adalora.Allocator(model, method.config) if ada else None
    first = task.pop("first", seed * 10**4)
    steps = recipe.steps * method.times
    batches = (
        rows(tokenizer, first + i * recipe.batch, recipe.batch, **task) for i in range(steps)
    )
    optimizer = AdamW(trainable(model), lr=rate, weight_decay=0.0)
    schedule = warmup_cosine(rate, 10, steps)
    start = time.process_time()
    loss_fn = adalora.with_orthogonality(loss, 0.1) if ada else loss
    for step in train(model, batches, optimizer, schedule, clip=1.0, loss_fn=loss_fn):
        if allocator:
            allocator.step(step.step)
    seconds = time.process_time() - start
    state = [x for s in optimizer.state.values() for x in s.values() if getattr(x, "ndim", 0)]
    more: dict[str, Any] = {"ranks": adalora.ranks(model)} if ada else {}
    batch = rows(tokenizer, TUNING if seed == recipe.tuning_seed else TEST, recipe.judged)
    if isinstance(method.config, DyLoRAConfig):
        for r in range(1, method.config.rank):
            set_rank(model, r)
            more.setdefault("card_by_rank", {})[r] = judge(model, batch)["card"]
        set_rank(model, method.config.rank)
    return model, {
        "seed": seed,
        "rate": rate,
        "cpu_seconds": round(seconds, 2),
        "parameters": sum(p.numel() for p in trainable(model)),
        "optimizer_bytes": sum(x.nbytes for x in state),
        **judge(model, batch),
        **more,
    }


def compare(
    base: LM, tokenizer: BPE, table: dict[str, Method], recipe: Recipe, found: dict[str, Any]
) -> Iterator[str]:
    """Fill `found`, method -> {"tuning": runs to choose the rate by, "runs": those with it}.

    Methods take turns, seed by seed; what is in `found` is not run again. Yields each outcome.
    """
    jobs = [("tuning", name, i, recipe.tuning_seed) for name in table for i in (0, 1)]
    jobs += [("runs", name, None, seed) for seed in recipe.seeds for name in table]
    for part, name, which, seed in jobs:
        entry = found.setdefault(name, {"tuning": [], "runs": []})
        if which is None:
            rate = max(entry["tuning"], key=lambda r: (r["card"], -r["nats"]))["rate"]
        else:
            rate = table[name].rates[which]
        if not any((r["rate"], r["seed"]) == (rate, seed) for r in entry[part]):
            entry[part].append(run(base, tokenizer, table[name], rate, seed, recipe)[1])
        yield f"{name}: {entry[part][-1]['card']:.2f}"


def train_base(width: int, recipe: Recipe, tokenizer: BPE) -> LM:
    """A storyteller of another width, by its recipe, for `base_steps` steps."""
    plan = storyteller.Recipe(d_model=width, steps=recipe.base_steps, batch=recipe.base_batch)
    shape = (tokenizer.vocab_size, width, plan.n_layers, plan.n_heads)
    model = LM(ModelConfig(*shape, max_len=384, norm="rms", position="rope", mlp="swiglu"), seed=0)
    with torch.no_grad():
        model.tokens.weight.mul_(plan.embedding_std / model.tokens.weight.std())
    optimizer = AdamW(decay_groups(model, plan.weight_decay), lr=plan.lr, betas=(0.9, 0.98))
    schedule = warmup_cosine(plan.lr, plan.warmup, plan.steps, floor=0.01)
    batches = storyteller.Rows(plan, tokenizer)
    rest = {"steps": plan.steps, "loss_fn": storyteller.loss}
    loop = train(model, batches, optimizer, schedule, 1.0, **rest)
    for _ in tqdm(loop, total=plan.steps, unit="step", desc=f"base of width {width}"):
        pass
    return model.eval()


def main(recipe: Recipe) -> None:
    """Run everything and write the file."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(recipe.threads)
    base, tokenizer = zoo.load("storyteller")
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "minillm.recipes.adapt", *sys.argv[1:]]),
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "path"},
        "torch": torch.__version__,
        "base": judge(copy.deepcopy(base), rows(tokenizer, TEST, recipe.judged)),
        "cpu_seconds": 0.0,
        "methods": {},
        "widths": {},
    }
    if recipe.path.exists():  # go on, if it is the same run
        last = json.loads(recipe.path.read_text(encoding="utf-8"))
        same = json.loads(json.dumps(result["recipe"])) == last["recipe"]
        result = last if same else result
    teacher = Method(apply_prompt, PromptConfig(20), (2e-2,))
    words = {"first": PRETUNING, "codes": False}
    source, _ = run(base, tokenizer, teacher, 2e-2, recipe.tuning_seed, recipe, **words)
    table = methods(recipe.steps, prompt_vectors(source))
    two = {name: table[name] for name in ("full fine-tuning", "prompt")}
    parts = [(table, None), *((two, width) for width in recipe.sizes)]
    total = sum(len(these) * (len(recipe.seeds) + 2) for these, _ in parts)
    start = time.process_time() - result["cpu_seconds"]
    with tqdm(total=total, unit="run", smoothing=0) as bar:
        for these, width in parts:
            model, found = base, result["methods"]
            if width is not None:
                model = train_base(width, recipe, tokenizer)
                found = result["widths"].setdefault(str(width), {})
            for told in compare(model, tokenizer, these, recipe, found):
                result["cpu_seconds"] = round(time.process_time() - start, 1)
                write_atomically(recipe.path, (json.dumps(result, indent=1) + "\n").encode())
                bar.update()
                bar.set_postfix_str(told)


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
