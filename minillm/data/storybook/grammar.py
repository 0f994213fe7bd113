"""The grammar put together, and the questions that its stories answer."""

from __future__ import annotations

from collections.abc import Mapping

from minillm.data.storybook.cast import OPENING
from minillm.data.storybook.engine import Derivation, Grammar
from minillm.data.storybook.gift import GIFT
from minillm.data.storybook.learn import LEARN
from minillm.data.storybook.lost import LOST
from minillm.data.storybook.nodes import Case, Node, pick
from minillm.data.storybook.rescue import RESCUE

NODES: tuple[Node, ...] = (
    *OPENING,
    " {name} had ",
    pick(
        "plot",
        {
            "lost": "one great treasure: ",
            "learn": "one great wish: ",
            "gift": "a very good friend, ",
            "rescue": "a task: ",
        },
        {
            "trait": {
                "curious": {"learn": 2.0},
                "shy": {"gift": 2.0},
                "brave": {"rescue": 3.0},
                "kind": {"gift": 2.0, "rescue": 2.0},
                "clumsy": {"lost": 2.0},
                "stubborn": {"learn": 3.0},
                "dreamy": {"lost": 2.0},
                "honest": {"rescue": 2.0},
            }
        },
    ),
    Case("plot", {"lost": LOST, "learn": LEARN, "gift": GIFT, "rescue": RESCUE}),
)

_ANYONE = (
    ("What was the hero's name?", "{name}"),
    ("What was {name}?", "{trait} little {kind}"),
    ("Where did {name} live?", "{dwelling} {place}"),
    ("What was {friend}?", "{manner} {friend_kind}"),
    ("How did {name} feel in the end?", "{feeling}"),
    ("Whom did {name} tell about it?", "{name.their} {family.who}"),
)
_BY_PLOT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "lost": (
        ("Who lost the {treasure}?", "{name}"),
        ("Who helped to look for the {treasure}?", "{friend}"),
        ("Who gave {name} the {treasure}?", "{name.their} {giver}"),
        ("Where did {name} take the {treasure}?", "the {outing}"),
        ("What did they find first?", "{junk}"),
        ("Where was the {treasure} found?", "{found}"),
    ),
    "learn": (
        ("What did {name} want to learn?", "to {skill}"),
        ("Who gave {name} advice?", "{friend}"),
        ("How long did {name} practice?", "{duration}"),
    ),
    "gift": (
        ("Whose birthday was near?", "{friend}'s"),
        ("What did {name} make for {friend}?", "{gift}"),
        ("What was there none left of?", "{gift.needs}"),
        ("Who gave {name} the {gift.needs}?", "the {source.keeper}"),
    ),
    "rescue": (
        ("What did {name} carry?", "{cargo}"),
        ("For whom was the {cargo.short}?", "the {receiver}"),
        ("Who was in trouble?", "{friend}"),
        ("Who rescued {friend}?", "{name}"),
    ),
}


def questions(story: Derivation) -> tuple[tuple[str, str], ...]:
    """Questions about a story with the answers that can be read off it."""
    asked = (*_BY_PLOT[story.keys["plot"]], *_ANYONE)
    return tuple((story.fill(question), story.fill(answer)) for question, answer in asked)


def story_grammar() -> Grammar:
    """The grammar of ``minillm.data.stories``."""
    return Grammar(NODES)
