"""Make the course's tokenizer, assets/models/tokenizer.json: `python -m minillm.recipes.tokenizer`.

Three sorts of text, none of them from the network:

- the documentation of the running interpreter (`corpora.pydocs`, about 2.7 MB of English);
- 3,000 stories (`stories.generate`, about 2 MB);
- assets/data/chinese.txt, some 5,500 characters written for this course.

Unweighted, so little Chinese would get no token at all: byte pairs are chosen by how often they
occur. So the Chinese text counts `CHINESE_TEXT` times, and its characters, one to a line and
therefore without neighbors, `CHINESE_CHARACTERS` times more. The second part is what gives a token
to every character that occurs in it at least twice, and not to chance phrases or to a character
together with half of the next one. All Chinese together lengthens the documentation by about 5
percent in tokens and stories by 1 percent, against the same training without it; a Chinese
character takes about one token in this text, instead of almost three.

Every digit is a piece of its own: a number of n digits is n tokens, whatever its value. The five
special tokens come last. The documentation differs between versions of Python, and any change to
the grammar of the stories moves a few merges too. The shipped file says which version it was made
with; it stays as it is, since models are trained on its ids.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import tyro

from minillm.data import corpora, stories
from minillm.paths import ASSETS
from minillm.tokenizers import BPE, COURSE_TOKENIZER, train_bpe
from minillm.tokenizers.pretokenize import DIGITS_PATTERN

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
STORIES = 3000
CHINESE_TEXT = 5
CHINESE_CHARACTERS = 40
_CHINESE = ASSETS / "data" / "chinese.txt"


def texts(seed: int = 0) -> Iterator[str]:
    """The documents the tokenizer learns from, with repetition as their weight."""
    yield from corpora.pydocs()
    yield from stories.generate(STORIES, seed=seed)
    chinese = _CHINESE.read_text(encoding="utf-8")
    for _ in range(CHINESE_TEXT):
        yield chinese
    for _ in range(CHINESE_CHARACTERS):
        yield "\n".join(chinese)


def train(seed: int = 0, processes: int = 2) -> BPE:
    """Train the tokenizer; deterministic for one version of Python. Takes 10 to 20 seconds."""
    return train_bpe(texts(seed), VOCAB_SIZE, SPECIAL_TOKENS, DIGITS_PATTERN, processes)


def main(out: Path = COURSE_TOKENIZER, seed: int = 0, processes: int = 2) -> None:
    """Train the course's tokenizer and write it to `out`."""
    bpe = train(seed, processes)
    bpe.save(
        out,
        about=f"The course's tokenizer, made by minillm.recipes.tokenizer with seed {seed} from "
        f"the documentation of Python {platform.python_version()}, {STORIES:,} stories and a "
        "Chinese text. A token is its UTF-8 text; \\xhh is a byte that is no text on its own.",
    )
    print(f"{bpe.vocab_size:,} tokens written to {out}")


if __name__ == "__main__":
    tyro.cli(main)
