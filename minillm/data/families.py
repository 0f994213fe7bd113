"""Families of small tasks that a small model can learn, with held-out splits and exact verifiers.

A family is one thing to do ("reverse a list"), asked for in several wordings, with endlessly many
inputs. Operations on lists work on several *materials* (names, animals, digits, ...), so that what
was learned on one may carry over to another. Four things can be new, each held out by declaration:

    split        what is new
    train        nothing
    inputs       the input (one in eight, by a checksum, is never trained on)
    wordings     the input, and how the task is asked for
    materials    the input, and the material of a known operation (`Family.new_materials`)
    families     the whole family (`Family.held_out`)

Each split changes one thing against `inputs`. Nothing here is copied from a published collection;
the idea of clusters of tasks that are held out whole is from Wei et al., Finetuned Language Models
Are Zero-Shot Learners, 2022.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from minillm.data import families_makers as makers
from minillm.data import families_text as texts
from minillm.data import stories
from minillm.data.instructions import Instruction
from minillm.paths import ASSETS

SPLITS = ("train", "inputs", "wordings", "materials", "families")
LISTS = tuple(makers.WORDS)
HELD_OUT_WORDINGS = 2
"""so many wordings, the last ones of each family, are kept for judging"""


def exact(example: Instruction, answer: str) -> bool:
    """There is one right answer, letter by letter (spaces around it are ignored)."""
    return answer.strip() == example.output


def right_sentence(example: Instruction, answer: str) -> bool:
    """One sentence of the known form that has every word of the request in its place."""
    found = re.fullmatch(texts.SENTENCE, answer.strip())
    if found is None or not texts.known_sentence(found.groupdict()):
        return False
    return set(example.input.split(", ")) <= set(found.groupdict().values())


def right_story(example: Instruction, answer: str) -> bool:
    """A whole story that the grammar tells, about what was asked for."""
    try:
        chosen = stories.grammar().parse(answer.strip())
    except ValueError:
        return False
    return set(example.input.split(", ")) <= set(texts.about(chosen.keys))


@dataclass(frozen=True)
class Family:
    """One thing to do. `make(rng, material)` draws (what fills a wording, input, output)."""

    name: str
    cluster: str
    make: Callable[[random.Random, str], makers.Drawn]
    materials: tuple[str, ...] = ("",)
    """what is trained on"""
    new_materials: tuple[str, ...] = ()
    """what is kept for judging"""
    held_out: bool = False
    """True: the family is never trained on"""
    check: Callable[[Instruction, str], bool] = exact
    longest: int = 24
    """tokens that suffice for any of its answers, with the course tokenizer"""

    @property
    def instructions(self) -> tuple[str, ...]:
        """All wordings; the last two are held out (all, if the family is)."""
        return _wordings()[self.name]

    def words(self, new: bool = False) -> tuple[str, ...]:
        """The wordings to train on, or the new ones."""
        if self.held_out:
            return self.instructions
        known, held = self.instructions[:-HELD_OUT_WORDINGS], self.instructions[-HELD_OUT_WORDINGS:]
        return held if new else known

    def splits(self) -> tuple[str, ...]:
        """The splits that this family has examples in."""
        if self.held_out:
            return ("families",)
        return ("train", "inputs", "wordings", *(["materials"] if self.new_materials else []))

    def sample(
        self,
        rng: random.Random,
        split: str = "train",
        *,
        material: str | None = None,
        wordings: int | None = None,
    ) -> Instruction:
        """An example of `split`; of one `material`, or with only the first `wordings`.

        Raises ValueError for a split that this family is not part of.
        """
        if split not in self.splits():
            raise ValueError(f"family {self.name!r} has the splits {self.splits()}, not {split!r}")
        if material is None:
            material = rng.choice(self.new_materials if split == "materials" else self.materials)
        wording = rng.choice(self.words(split == "wordings")[:wordings])
        while True:  # one draw in eight is new, so this ends soon
            fields, given, output = self.make(rng, material)
            if split == "families" or is_new(self.name, fields, given) == (split != "train"):
                return Instruction(wording.format(**fields), given, output)

    def verify(self, example: Instruction, answer: str) -> bool:
        """Whether `answer` is right; exact, without a model."""
        return self.check(example, answer)


@functools.cache
def _wordings() -> dict[str, tuple[str, ...]]:
    """Family -> wordings, from a text: names at the margin, the wordings of each indented."""
    found: dict[str, tuple[str, ...]] = {}
    name = ""
    for line in (ASSETS / "data" / "wordings.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            found[name] = (*found.get(name, ()), line.strip())
        elif not line.startswith("#"):
            name = line
    return found


def is_new(name: str, fields: dict[str, str], given: str) -> bool:
    """Whether this input of a family is kept for judging: one in eight, by its CRC-32."""
    text = "|".join([name, given, *(f"{key}={fields[key]}" for key in sorted(fields))])
    return zlib.crc32(text.encode()) % 8 == 0


def _lists(name: str, make: Callable[[random.Random, str], makers.Drawn], new: str) -> Family:
    """An operation on lists that is trained on every material but `new`."""
    return Family(name, "lists", make, tuple(m for m in LISTS if m != new), (new,))


FAMILIES: tuple[Family, ...] = (
    _lists("copy", makers.copy, "colors"),
    _lists("reverse", makers.reverse, "animals"),
    _lists("first", makers.first, "places"),
    _lists("last", makers.last, "things"),
    _lists("nth", makers.nth, "names"),
    _lists("after", makers.after, "colors"),
    _lists("swap", makers.swap, "digits"),
    _lists("remove", makers.remove, "names"),
    _lists("count", makers.count, "things"),
    _lists("contains", makers.contains, "animals"),
    Family("sort", "lists", makers.sort, ("digits", "names")),
    Family("add", "numbers", makers.add),
    Family("subtract", "numbers", makers.subtract),
    Family("larger", "numbers", makers.larger),
    Family("count_up", "numbers", makers.count_up),
    Family("days", "dates", makers.days),
    Family("months", "dates", makers.months),
    Family("to_lodo", "language", makers.to_lodo),
    Family("from_lodo", "language", makers.from_lodo),
    Family("who", "text", texts.who),
    Family("where", "text", texts.where),
    Family("what", "text", texts.what),
    Family("true_or_false", "text", texts.true_or_false),
    Family("rename", "text", texts.rename),
    Family("passive", "text", texts.passive),
    Family("sentence", "writing", texts.sentence, check=right_sentence),
    Family("story", "writing", texts.story, check=right_story, longest=220),
    Family("story_question", "text", texts.story_question),
    Family("before", "lists", makers.before, LISTS, held_out=True),
    Family("first_and_last", "lists", makers.first_and_last, LISTS, held_out=True),
    Family("color", "text", texts.color, held_out=True),
    Family("count_down", "numbers", makers.count_down, held_out=True),
)


def family(name: str) -> Family:
    """The family of this name; ValueError lists the names.

    >>> family("reverse").cluster
    'lists'
    """
    for one in FAMILIES:
        if one.name == name:
            return one
    raise ValueError(f"no family {name!r}, there are {[one.name for one in FAMILIES]}")


def in_split(split: str, among: Sequence[Family] = FAMILIES) -> tuple[Family, ...]:
    """The families with examples in a split; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {SPLITS}")
    return tuple(one for one in among if split in one.splits())


def sampler(
    seed: int, split: str = "train", among: Sequence[Family] = FAMILIES
) -> Iterator[tuple[Family, Instruction]]:
    """Endless examples of a split, each family equally often; the same seed gives the same.

    >>> one, example = next(sampler(0, "inputs"))
    >>> one.verify(example, example.output)
    True
    """
    chosen = in_split(split, among)
    if not chosen:
        raise ValueError(f"none of {[one.name for one in among]} has a split {split!r}")
    rng = random.Random(seed)
    while True:
        one = rng.choice(chosen)
        yield one, one.sample(rng, split)


def examples(one: Family, split: str, n: int, seed: int) -> list[Instruction]:
    """`n` examples of one family and split; the same seed gives the same."""
    rng = random.Random(f"{one.name} {split} {seed}")
    return [one.sample(rng, split) for _ in range(n)]
