"""Talk to a model in the terminal: `python -m minillm.chat [MODEL] [--reward NAME]`.

MODEL is a model of the zoo, or a folder with the files of one model and the `tokenizer.json` that
it was trained with (where there are several models: FOLDER/NAME). Models stored in int8 are
recognized. With a reward model, each answer is followed by what that thinks of it; one called
NAME_reward beside the model NAME is taken by itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import tyro

from minillm import zoo
from minillm.align.reward import RewardModel, load_reward
from minillm.infer.conversation import Conversation
from minillm.infer.quantize import load_int8, quantize_int8, stored_bytes
from minillm.model import files
from minillm.model.lm import LM
from minillm.tokenizers import BPE

HELP = """\
  /temperature X   how freely the next answers are drawn: 0 always says the likeliest, 1 what the
                   model thinks; without X: what it is now
  /reset           forget the conversation
  /help            this
  /quit            end (so does ctrl-D); ctrl-C stops an answer
Anything else is said to the model. It knows what it was trained on, for example:
  Write a card for Mia about the kite.
"""
TOKENIZER, REWARD = "tokenizer.json", "_reward"


@dataclass(frozen=True)
class Settings:
    """Whom to talk to, and how."""

    model: tyro.conf.Positional[str] = "cards"
    """a name of the zoo, FOLDER or FOLDER/NAME"""
    reward: str | None = None
    """a reward model, named like a model or by its name beside it; "none": not even NAME_reward"""
    temperature: float = 0.7
    max_new_tokens: int = 64
    """an answer is cut there"""
    turns: int | None = 0
    """earlier questions and answers that the model reads as well; None: as many as fit. The zoo's
    models know single requests only: what was said before confuses them"""
    system: str | None = None
    """said to the model before everything else, and never forgotten"""
    int8: bool = False
    """store the weights in eight bits"""
    seed: int = 0


def find(where: str) -> tuple[Path, str]:
    """Folder and name of the model that `where` means: one of the zoo, FOLDER or FOLDER/NAME.

    Of the models in a folder those called *_reward do not count. Raises ValueError, listing what
    there is, when `where` means no model or more than one.
    """
    if where in zoo.names():
        return zoo.MODELS, where
    path = Path(where)
    if path.is_dir():
        there = [name for name in zoo.names(path) if not name.endswith(REWARD)]
        if len(there) != 1:
            raise ValueError(f"{where} holds {there or 'no model'}: one is needed, or FOLDER/NAME")
        return path, there[0]
    name = path.name.removesuffix(".safetensors")
    if name not in zoo.names(path.parent):
        raise ValueError(
            f"there is no model {where!r}: choose one of the zoo, {zoo.names()}, or a folder"
        )
    return path.parent, name


def open_model(folder: Path, name: str) -> tuple[LM, BPE]:
    """A model, in float32 or stored in int8, and its tokenizer, the `tokenizer.json` beside it.

    Raises ValueError for a file that is missing, torn, of another kind or changed since.
    """
    if name.endswith(REWARD):
        raise ValueError(f"{name} is a reward model: it gives numbers and cannot talk")
    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"beside {name} there is no {TOKENIZER}: it was trained with some")
    path = folder / f"{name}.safetensors"
    try:
        with safetensors.safe_open(path, "pt") as file:
            load = load_int8 if "config" in (file.metadata() or {}) else files.load
        return load(folder, name, folder / TOKENIZER), BPE.load(folder / TOKENIZER)
    except (OSError, KeyError, safetensors.SafetensorError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}") from problem


def open_reward(given: str | None, folder: Path, name: str, tokenizer: BPE) -> RewardModel | None:
    """The reward model that is asked for; if none is, NAME_reward where it lies beside NAME."""
    if given == "none" or (given is None and name + REWARD not in zoo.names(folder)):
        return None
    given = name + REWARD if given is None else given
    beside = given in zoo.names(folder)
    return load_reward(*((folder, given) if beside else find(given)), tokenizer)


def open_conversation(settings: Settings) -> Conversation:
    """The conversation that `settings` describe; ValueError where that cannot be had."""
    folder, name = find(settings.model)
    model, tokenizer = open_model(folder, name)
    rest = {key: getattr(settings, key) for key in Settings.__annotations__}
    del rest["model"], rest["int8"]
    rest["reward"] = open_reward(settings.reward, folder, name, tokenizer)
    model = quantize_int8(model) if settings.int8 else model
    return Conversation(model, tokenizer, **rest)


def command(conversation: Conversation, line: str) -> str | None:
    """Carry out a line that begins with a slash; what to tell, or None to end.

    Raises ValueError for an unknown command and for a temperature that is none.
    """
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return None
    if word == "/help":
        return HELP
    if word == "/reset":
        conversation.reset()
        return "forgotten\n"
    if word != "/temperature":
        raise ValueError(f"{word} is no command; these are: /temperature, /reset, /help, /quit")
    if rest.strip():
        conversation.temperature = float(rest)
    return f"temperature {conversation.temperature:g}\n"


def answer(conversation: Conversation, text: str, write: Callable[[str], object]) -> None:
    """Say `text` and write the answer as it comes, then what there is to tell about it.

    An interrupt (ctrl-C) ends the answer, not the conversation.
    """
    before, count = conversation.forgotten, len(conversation.answers)
    with closing(conversation.say(text)) as pieces:
        if (turns := (conversation.forgotten - before) // 2) > 0:
            write(f"  (the context is full: the oldest {turns} turn{'s'[: turns > 1]} forgotten)\n")
        with suppress(KeyboardInterrupt):
            for piece in pieces:
                write("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece))
    told = conversation.answers[count:] or ["stopped before anything was said"]
    write(f"\n  [{told[0]}]\n")


def talk(
    conversation: Conversation, read: Callable[[str], str], write: Callable[[str], object]
) -> None:
    """Read lines and answer them until /quit or the end of the input.

    `read` is given the prompt and raises EOFError at the end, as `input` does.
    """
    while True:
        try:
            line = read("you> ").strip()
            if line.startswith("/"):
                if (told := command(conversation, line)) is None:
                    return
                write(told)
            elif line:
                answer(conversation, line, write)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n/quit or ctrl-D ends\n")
        except ValueError as problem:
            write(f"! {problem}\n")


def main(settings: Settings) -> None:
    """Open the model and talk until the user ends."""
    torch.set_flush_denormal(True)
    try:
        conversation = open_conversation(settings)
    except ValueError as problem:
        sys.exit(f"error: {problem}")
    with suppress(ImportError):  # arrow keys and a history, where there is a terminal for them
        importlib.import_module("readline")
    size = stored_bytes(conversation.model) / 1e6
    print(f"{settings.model}, {size:.1f} MB; /help tells what can be done here")
    talk(conversation, input, lambda text: print(text, end="", flush=True))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
