"""The zoo: small trained models that come with the course, each made by a recipe beside it."""

from __future__ import annotations

from pathlib import Path

from minillm.model import files
from minillm.model.lm import LM
from minillm.paths import ASSETS
from minillm.tokenizers import BPE, COURSE_TOKENIZER, load_course_tokenizer

MODELS = ASSETS / "models"


def names(folder: Path = MODELS) -> list[str]:
    """The models there are; those called ..._reward are opened by `align.reward.load_reward`.

    >>> "storyteller" in names()
    True
    """
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def load(name: str, folder: Path = MODELS) -> tuple[LM, BPE | None]:
    """A trained model, in float32 and evaluation mode, and the tokenizer it was trained with.

    A model that reads no text (linear regressions, say) has None in its place.

    Weights and tokenizer must have the SHA-256 that were written down when the model was saved.

    Raises ValueError for an unknown name, listing the known ones, for a reward model, and for a
    changed file.

    >>> model, tokenizer = load("storyteller")
    >>> model.cfg.vocab_size == tokenizer.vocab_size
    True
    """
    if name not in names(folder):
        raise ValueError(f"there is no model {name!r}; choose one of {names(folder)}")
    card = files.read_card(folder, name)
    if "reward" in card:
        raise ValueError(f"{name} is a reward model: minillm.align.reward.load_reward opens it")
    if card["tokenizer_sha256"] is None:
        return files.load(folder, name, None), None
    return files.load(folder, name, COURSE_TOKENIZER), load_course_tokenizer()
