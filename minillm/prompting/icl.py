"""In-context learning: a prompt of demonstrations, an answer among labels, and what skews it.

    score = partial(log_probs, model, tokenizer)
    template = Template("{text} -> {label}", words={"even": "yes", "odd": "no"})
    probs = label_probs(score, template, demonstrations, ["4 1 6"], ["even", "odd"])

Which demonstrations to show, and in which order, is the business of `minillm.prompting.icl_order`;
the heads that make it possible are measured by `minillm.prompting.induction`.
"""

# n texts, k labels, m prompts, p places of demonstrations; b batch, l layers, h heads, t tokens

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.prompting import Score

Encode = Callable[[str], Sequence[int]]
"""a text -> its tokens, such as `tokenizer.encode_ordinary`"""
CONTENT_FREE = ("N/A", "[MASK]", "")
"""the inputs without content of Zhao et al., 2021"""


class Demonstration(NamedTuple):
    """A text and the label that goes with it."""

    text: str
    label: str


Shown = Sequence[Demonstration] | Sequence[Sequence[Demonstration]]
"""demonstrations for all texts, or a list of them for each"""


@dataclass(frozen=True)
class Template:
    """How demonstrations and a question become one text.

    `form` holds {text} and then {label}, each once; `separator` stands behind every demonstration
    and behind the `instruction`, if there is one. `words` says how labels are written (the
    verbalizer); without it a label is its own word. The blanks before {label} are not part of the
    prompt but of the options: tokenizers put a blank into the token of the word behind it.

    Raises ValueError for a form without both places and for an empty separator; its methods raise
    it for a text that holds the separator (it would read as two demonstrations) and for a label
    without a word.

    >>> template = Template(words={"+": "good", "-": "bad"})
    >>> template.prompt([Demonstration("a fine day", "+")], "no luck")
    'a fine day -> good\\nno luck ->'
    >>> template.options(["+", "-"])
    [' good', ' bad']
    """

    form: str = "{text} -> {label}"
    separator: str = "\n"
    instruction: str = ""
    words: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        places = [self.form.count(place) for place in ("{text}", "{label}")]
        if places != [1, 1] or self.form.index("{text}") > self.form.index("{label}"):
            raise ValueError(f"form={self.form!r} must hold {{text}} and then {{label}}, each once")
        if not self.separator:
            raise ValueError("an empty separator would glue demonstrations together")

    @property
    def parts(self) -> tuple[str, str, str]:
        """What stands before the text, between text and label, and behind the label."""
        before, rest = self.form.split("{text}")
        between, after = rest.split("{label}")
        return before, between, after

    def word(self, label: str) -> str:
        """How a label is written."""
        if self.words is not None and label not in self.words:
            raise ValueError(f"label {label!r} has no word; there are {dict(self.words)}")
        return label if self.words is None else self.words[label]

    def context(self, demonstrations: Sequence[Demonstration]) -> str:
        """Instruction and demonstrations, ready for a further example to follow."""
        before, between, after = self.parts
        shown = [before + self._one(x) + between + self.word(y) + after for x, y in demonstrations]
        blocks = [self.instruction, *shown] if self.instruction else shown
        return "".join(block + self.separator for block in blocks)

    def prompt(self, demonstrations: Sequence[Demonstration], text: str) -> str:
        """The whole prompt, up to where the label of `text` is due."""
        before, between, _ = self.parts
        return self.context(demonstrations) + before + self._one(text) + between.rstrip(" ")

    def options(self, labels: Sequence[str]) -> list[str]:
        """What may follow a prompt, a text for each label; ValueError if two are the same."""
        between = self.parts[1]
        blank = between[len(between.rstrip(" ")) :]
        words = [blank + self.word(label) for label in labels]
        if len(set(words)) < len(words):
            raise ValueError(f"labels {list(labels)} share words: {words}")
        return words

    def parse(self, said: str) -> str | None:
        """The text of the first example in what a model wrote behind `context`; None if none is.

        >>> Template().parse("some text -> some label\\nand more")
        'some text'
        """
        before, between, after = map(re.escape, self.parts)
        first, separator, _ = said.partition(self.separator)
        found = re.fullmatch(f"{before}(.+?){between}(.+?){after}", first, re.DOTALL)
        return found[1] if found and separator else None

    def _one(self, text: str) -> str:
        if self.separator in text:
            raise ValueError(f"the text {text!r} holds the separator {self.separator!r}")
        return text


def check_length(prompts: Sequence[str], encode: Encode, limit: int, room: int = 0) -> None:
    """Raise ValueError, saying by how much, if a prompt and `room` more tokens exceed `limit`.

    >>> check_length(["one two", "one two three"], str.split, limit=3, room=1)
    Traceback (most recent call last):
        ...
    ValueError: prompt 1 has 3 tokens: with 1 more it exceeds the context of 3 by 1
    """
    for place, prompt in enumerate(prompts):
        length = len(encode(prompt))
        if length + room > limit:
            raise ValueError(
                f"prompt {place} has {length} tokens: with {room} more it exceeds the context of "
                f"{limit} by {length + room - limit}"
            )


def first_tokens(options: Sequence[str], encode: Encode) -> list[int]:
    """The first token of each option; ValueError if two options share it, or one has none."""
    tokens = [encode(option) for option in options]
    if empty := [option for option, ids in zip(options, tokens, strict=True) if not ids]:
        raise ValueError(f"options {empty} have no token")
    first = [ids[0] for ids in tokens]
    if shared := [option for option, i in zip(options, first, strict=True) if first.count(i) > 1]:
        raise ValueError(
            f"among the label words {shared} some share their first token: its probability cannot "
            "tell them apart. Choose other words, or score the whole words"
        )
    return first


def by_first_token(next_log_probs: Callable[[Sequence[str]], Tensor], encode: Encode) -> Score:
    """A `Score` from the log-probabilities [n, v] of the next token alone.

    This is what a server usually offers. It refuses options that share their first token.
    """
    return lambda prompts, options: next_log_probs(prompts)[:, first_tokens(options, encode)]


def label_probs(
    score: Score,
    template: Template,
    demonstrations: Shown,
    texts: Sequence[str],
    labels: Sequence[str],
) -> Tensor:
    """p(label | demonstrations, text), normalized over the labels: [n, k] in float64.

    `demonstrations` are the same for all texts, or one list for each. Source: Brown et al.,
    Language Models are Few-Shot Learners, 2020. Raises ValueError where `Template` does, and for
    lists of another number than texts.
    """
    same = all(one and isinstance(one[0], str) for one in demonstrations)
    each = [demonstrations] * len(texts) if same else demonstrations
    if len(each) != len(texts):
        raise ValueError(f"{len(each)} lists of demonstrations for {len(texts)} texts")
    prompts = [template.prompt(shown, text) for shown, text in zip(each, texts, strict=True)]
    return score(prompts, template.options(labels)).double().softmax(-1)


def accuracy(probs: Tensor, labels: Sequence[str], truth: Sequence[str]) -> float:
    """The share of the n rows of `probs` [n, k] in which the likeliest label is the true one."""
    right = [labels[i] == true for i, true in zip(probs.argmax(-1).tolist(), truth, strict=True)]
    return sum(right) / len(right)


def content_free_prior(
    score: Score,
    template: Template,
    demonstrations: Sequence[Demonstration],
    labels: Sequence[str],
    inputs: Sequence[str] = CONTENT_FREE,
) -> Tensor:
    """What the model answers to inputs that say nothing: the mean of their p(label), [k].

    With `domain_texts` as inputs this is domain-context calibration (Fei et al., Mitigating Label
    Biases for In-context Learning, 2023); with no demonstrations and one short phrase of the
    domain, what PMI divides by (Holtzman et al., Surface Form Competition, 2021).
    """
    return label_probs(score, template, demonstrations, inputs, labels).mean(0)


def calibrate(probs: Tensor, prior: Tensor) -> Tensor:
    """p / prior, normalized again: [n, k]. `prior` is [k], or [n, k] for one a text.

    The label that says most beyond what the prompt alone makes likely. Its logarithm is the
    pointwise mutual information of text and label, up to a constant in each row. Source: Zhao et
    al., Calibrate Before Use, 2021 (W = diag(prior)⁻¹, b = 0; their softmax of W p chooses the
    same label). Raises ValueError unless the prior is positive and has k entries.
    """
    if prior.shape[-1] != probs.shape[-1] or not (prior > 0).all():
        raise ValueError(f"a prior over {probs.shape[-1]} labels must be positive, got {prior}")
    lifted = probs / prior
    return lifted / lifted.sum(-1, keepdim=True)


def domain_texts(texts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` texts of random words from `texts`, as long as these are on average: no content.

    Source: Fei et al., Mitigating Label Biases for In-context Learning, 2023.
    """
    words = [word for text in texts for word in text.split()]
    if not words:
        raise ValueError(f"the {len(texts)} texts hold no word to draw from")
    length = max(1, round(len(words) / len(texts)))
    drawn = torch.randint(len(words), (count, length), generator=generator)
    return [" ".join(words[i] for i in row) for row in drawn.tolist()]


def relabel(
    demonstrations: Sequence[Demonstration],
    labels: Sequence[str],
    rate: float,
    generator: torch.Generator,
    wrong: bool = False,
) -> list[Demonstration]:
    """A share `rate` of the demonstrations, drawn at random, gets a label drawn from `labels`.

    The draw may hit the old label, unless `wrong`. With the task's labels these are random labels,
    with foreign ones a wrong label space. Source: Min et al., Rethinking the Role of
    Demonstrations, 2022. Raises ValueError for a rate outside [0, 1], or nothing to draw from.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate={rate} must lie in [0, 1]")
    noisy = [Demonstration(*one) for one in demonstrations]
    order = torch.randperm(len(noisy), generator=generator).tolist()
    for i in order[: round(rate * len(noisy))]:
        pool = [label for label in labels if not (wrong and label == noisy[i].label)]
        if not pool:
            raise ValueError(f"there is no label but {noisy[i].label!r} in {list(labels)}")
        noisy[i] = noisy[i]._replace(label=pool[torch.randint(len(pool), (), generator=generator)])
    return noisy


def place_bias(shown: Sequence[Sequence[str]], predicted: Sequence[str]) -> Tensor:
    """How much a demonstration's place draws the answer to its label: [p], the last the nearest.

    `shown` are the labels in each of m prompts in order, `predicted` the m answers. For each place
    the share of prompts whose answer is the label there, less the share expected if answer and
    label there were independent: 0 where the place does not matter. Recency bias (Zhao et al.,
    Calibrate Before Use, 2021) is a positive last entry; let the queries be the same for all
    orders. Raises ValueError unless all prompts have as many places.
    """
    places = {len(row) for row in shown}
    if len(places) != 1 or len(shown) != len(predicted):
        raise ValueError(
            f"{len(shown)} prompts of {sorted(places)} demonstrations, {len(predicted)} answers: "
            "there must be one answer a prompt, and one number of demonstrations"
        )
    names = sorted({*predicted, *(label for row in shown for label in row)})
    hot = torch.tensor([[[x == name for name in names] for x in row] for row in shown]).double()
    answer = torch.tensor([[x == name for name in names] for x in predicted]).double()
    together = (hot * answer[:, None]).sum(-1).mean(0)  # hot [m, p, k], answer [m, k]
    return together - hot.mean(0) @ answer.mean(0)
