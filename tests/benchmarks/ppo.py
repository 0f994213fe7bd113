"""An iteration of PPO and GRPO: ours beside each other, plain generation, and trl's GRPOTrainer.

    python tests/benchmarks/ppo.py [--quick] [--threads 2]

The zoo's *cards* answers 64 prompts (8 requests, 8 times each, which is what GRPO needs) by at most
32 tokens and learns from them for 4 epochs of 4 minibatches. trl has the same weights, converted,
the same prompts, lengths, minibatches, loss, reference model and optimizer, without recomputation
and in float32, which are not its defaults on a GPU. The reward is the same few string operations
for all. The learning rate is next to nothing, so that all sides go on writing texts of one length.

The sides take turns, one iteration each, so that other work on the machine falls on all; a ratio is
the median of the ratios within a turn. Rates are in response tokens, each side's own. Writes
assets/benchmarks/ppo.json.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl
import tyro
from _record import record

from minillm import zoo
from minillm.align.grpo import grpo
from minillm.align.objectives import KLControl
from minillm.align.ppo import PPOConfig, PPOStep, ppo
from minillm.align.rollout import roll_out
from minillm.align.value import ValueModel
from minillm.data import cards
from minillm.infer import generate, prepare
from minillm.infer.batching import pad_left, prompt_ids
from minillm.model import LM
from minillm.model.load import save_pretrained
from minillm.tokenizers import BPE, to_huggingface_json
from minillm.tokenizers.chat import END

REQUESTS, GROUP, NEW, EPOCHS, MINIBATCHES = 8, 8, 32, 4, 4
UPDATES = EPOCHS * MINIBATCHES
LR, BETA = 1e-7, 0.04
Turn = Callable[[], tuple[float, int]]
"""one iteration -> seconds, response tokens"""


def words(requests: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """Different words of a response."""
    return torch.tensor([float(len(set(text.split()))) for text in responses])


def asked(turns: int) -> list[list[str]]:
    """The requests of each turn."""
    return [[x.text for x in cards.requests(REQUESTS, seed)] for seed in range(turns)]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As trl makes it."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


def steps_of(loop: Iterator[PPOStep], rows: int) -> Turn:
    """Timed iterations of a loop of ours."""

    def turn() -> tuple[float, int]:
        start = time.perf_counter()
        step = next(loop)
        seconds = time.perf_counter() - start
        if step.updates != UPDATES:
            raise RuntimeError(f"{step.updates} updates instead of {UPDATES}")
        return seconds, round(step.length * rows)

    return turn


def ours(model: LM, tokenizer: BPE, turns: int) -> dict[str, Turn]:
    """GRPO, PPO, rollouts and plain generation."""
    config = PPOConfig(NEW, epochs=EPOCHS, minibatches=MINIBATCHES, target_kl=None)
    end, rows = tokenizer.special_ids[END], REQUESTS * GROUP
    batches = [
        [(text, prompt_ids(tokenizer, text, chat=True)) for text in some] for some in asked(turns)
    ]
    repeated = [[x for x in batch for _ in range(GROUP)] for batch in batches]
    policies = [copy.deepcopy(model) for _ in range(2)]
    critic = ValueModel(model)
    optimizers = [adamw(policies[0]), adamw(policies[1]), adamw(critic)]
    sides = {"group": GROUP, "beta": BETA, "config": config}
    relative = grpo(policies[0], model, tokenizer, batches, words, optimizers[0], **sides)
    how = {"control": KLControl(BETA), "config": config}
    proximal = ppo(policies[1], model, critic, tokenizer, repeated, words, optimizers[1:], **how)

    def sampled(rollout: bool, prompts: Iterator[list[list[int]]]) -> tuple[float, int]:
        batch, rng = next(prompts), torch.Generator().manual_seed(0)
        start = time.perf_counter()
        if rollout:
            found = roll_out(model, batch, NEW, end, generator=rng)
            return time.perf_counter() - start, int(found.mask.sum())
        tokens, mask = pad_left(batch, end)
        new = list(generate(prepare(model), tokens, NEW, generator=rng, stop=end, mask=mask))
        seconds = time.perf_counter() - start
        said = torch.stack(new, 1)
        return seconds, int(((said == end).cumsum(-1) - (said == end).long() == 0).sum())

    prompts = [[ids for _, ids in batch] for batch in repeated]
    return {
        "GRPO": steps_of(relative, rows),
        "PPO": steps_of(proximal, rows),
        "rollout": partial(sampled, True, iter(prompts)),
        "generation": partial(sampled, False, iter(prompts)),
    }


class Alternate(transformers.TrainerCallback):
    """Before each of trl's iterations a turn of ours; the clock runs for trl's alone."""

    def __init__(self, sides: dict[str, Turn]) -> None:
        self.sides = sides
        self.turns: list[dict[str, tuple[float, int]]] = []
        self.tokens = 0
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % UPDATES == 0:
            self.turns.append({name: turn() for name, turn in self.sides.items()})
            self.start, self.tokens = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % UPDATES == 0:
            self.turns[-1]["trl"] = (time.perf_counter() - self.start, self.tokens)


def trainer(
    model: LM, tokenizer: BPE, turns: int, folder: Path, watch: Alternate
) -> trl.GRPOTrainer:
    """Theirs, from the same weights."""
    save_pretrained(model, folder)
    converted = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    probe = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(converted(probe).logits, model(probe), rtol=1e-3, atol=1e-3)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(to_huggingface_json(tokenizer)),
        eos_token=END,
        pad_token=END,
    )
    fast.save_pretrained(folder)
    prompts = [
        f"<|user|>{text}<|assistant|>" for some in asked(turns) for text in some
    ]  # its tokens are those of prompt_ids, see below
    if fast(prompts[0])["input_ids"] != prompt_ids(tokenizer, asked(1)[0][0], chat=True):
        raise RuntimeError("the two read prompts differently")

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        watch.tokens += sum(map(len, more["completion_ids"]))
        return words(prompts, completions).tolist()

    config = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=REQUESTS * GROUP // MINIBATCHES,
        steps_per_generation=MINIBATCHES,
        num_iterations=EPOCHS,
        num_generations=GROUP,
        max_completion_length=NEW,
        max_steps=turns * UPDATES,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=BETA,
        loss_type="grpo",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=fast,
        callbacks=[watch],
    )


def main(quick: bool = False, threads: int = 2, turns: int = 12) -> None:
    """Run, print, write JSON. `quick`: two turns, not written."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warm, turns = 1, 2 if quick else turns
    model, tokenizer = zoo.load("cards")
    watch = Alternate(ours(model, tokenizer, turns + warm))
    with tempfile.TemporaryDirectory() as folder:
        trainer(model, tokenizer, turns + warm, Path(folder), watch).train()
    runs = watch.turns[warm:]  # the first turn allocates
    rates = {
        name: [tokens / seconds for seconds, tokens in (turn[name] for turn in runs)]
        for name in runs[0]
    }

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    ratios = {
        "our GRPO over trl's": ratio("GRPO", "trl"),
        "our GRPO over our PPO": ratio("GRPO", "PPO"),
        "rollout over plain generation": ratio("rollout", "generation"),
    }
    for name, each in rates.items():
        seconds, tokens = zip(*(turn[name] for turn in runs), strict=True)
        print(
            f"{name:>10}: {statistics.median(each):7,.0f} response tokens/s, "
            f"{statistics.median(seconds):6.2f} s, {statistics.mean(tokens):6.0f} tokens"
        )
    for name, value in ratios.items():
        print(f"{value:5.2f}  {name}")
    result = {
        "model": "cards",
        "prompts": REQUESTS * GROUP,
        "new": NEW,
        "epochs": EPOCHS,
        "minibatches": MINIBATCHES,
        "threads": threads,
        "turns": turns,
        "ratios": ratios,
        "tokens_per_s": {name: statistics.median(each) for name, each in rates.items()},
        "seconds_and_tokens": {name: [turn[name] for turn in runs] for name in rates},
    }
    record("ppo", result, ("torch", "transformers", "trl"), quick)


if __name__ == "__main__":
    tyro.cli(main)
