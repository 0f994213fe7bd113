"""Who the stories are about: heroes, homes, friends, days, and how a story ends."""

from __future__ import annotations

from collections.abc import Mapping

from minillm.data.storybook.nodes import Choice, Node, pick

_SHE = {"they": "she", "them": "her", "their": "her"}
_HE = {"they": "he", "them": "him", "their": "his"}
_GIRLS = "Mia Lily Rosa Nora Ida Clara Tilly Wren Poppy Greta Astrid Bea Lotte Yara"
_BOYS = "Tom Ben Finn Leo Max Hugo Oscar Jack Noah Emil Anton Paul Karl Ravi"
_NAMES = {
    name: (name, pronouns)
    for pair in zip(_GIRLS.split(), _BOYS.split(), strict=True)
    for name, pronouns in zip(pair, (_SHE, _HE), strict=True)
}
_CHILD = {"hand": "hands", "nature": "child"}
_ANIMAL = {"hand": "paws", "nature": "animal"}

_TRAITS = {
    "curious": ("a curious", {"mood": "bold"}),
    "shy": ("a shy", {"mood": "soft"}),
    "brave": ("a brave", {"mood": "bold"}),
    "kind": ("a kind", {"mood": "soft"}),
    "clumsy": ("a clumsy", {"mood": "soft"}),
    "stubborn": ("a stubborn", {"mood": "bold"}),
    "dreamy": ("a dreamy", {"mood": "soft"}),
    "honest": ("an honest", {"mood": "soft"}),
    "impatient": ("an impatient", {"mood": "bold"}),
    "cheerful": ("a cheerful", {"mood": "bold"}),
}
_KINDS = {
    "girl": ("girl", _CHILD),
    "fox": ("fox", _ANIMAL),
    "boy": ("boy", _CHILD),
    "rabbit": ("rabbit", _ANIMAL),
    "mouse": ("mouse", _ANIMAL),
    "bear": ("bear", _ANIMAL),
    "hedgehog": ("hedgehog", _ANIMAL),
    "squirrel": ("squirrel", _ANIMAL),
    "badger": ("badger", _ANIMAL),
    "dragon": ("dragon", {"hand": "claws", "nature": "animal"}),
}
_DWELLINGS = {
    "cottage": "a cottage with a blue door",
    "burrow": "a cozy burrow",
    "house": "a tall yellow house",
    "oak": "a hollow oak",
    "hut": "a hut with a crooked chimney",
    "cave": "a dry little cave",
    "tower": "a tower full of clocks",
    "wagon": "a wagon with green wheels",
}
_PLACES = {
    "river": ("by a slow river", {"kind": "water"}),
    "mill": ("near the old mill", {"kind": "land"}),
    "forest": ("at the edge of a deep forest", {"kind": "land"}),
    "market": ("behind the market square", {"kind": "town"}),
    "lake": ("on the shore of a quiet lake", {"kind": "water"}),
    "hill": ("on top of a green hill", {"kind": "land"}),
    "castle": ("under the castle wall", {"kind": "town"}),
    "sea": ("beside the gray sea", {"kind": "water"}),
    "orchard": ("in an apple orchard", {"kind": "land"}),
    "mountain": ("at the foot of a snowy mountain", {"kind": "land"}),
}
_FAMILIES = {
    "grandmother": ("{name.their} grandmother", {"who": "grandmother"}),
    "parents": ("{name.their} mother and father", {"who": "parents"}),
    "brothers": ("{name.their} three noisy brothers", {"who": "brothers"}),
    "uncle": ("{name.their} old uncle", {"who": "uncle"}),
    "sister": ("{name.their} big sister", {"who": "sister"}),
    "aunt": ("{name.their} two aunts", {"who": "aunts"}),
}
_DAYS = {
    "windy": ("One windy morning", {"weather": "wind"}),
    "sunny": ("One sunny afternoon", {"weather": "sun"}),
    "rainy": ("One rainy day", {"weather": "rain"}),
    "spring": ("On the first day of spring", {"weather": "sun"}),
    "foggy": ("One foggy evening", {"weather": "fog"}),
    "snowy": ("One snowy day", {"weather": "snow"}),
    "monday": ("On a perfectly ordinary Monday", {"weather": "sun"}),
    "storm": ("One stormy autumn day", {"weather": "wind"}),
}
_OPENINGS = (
    "Once upon a time|Long ago|Not so long ago|In a faraway valley|Beyond the seven hills|"
    "In a small green country|When the world was young"
)

OPENING: tuple[Node, ...] = (
    pick("opening", _OPENINGS),
    ", ",
    pick("trait", _TRAITS),
    " little ",
    pick("kind", _KINDS, {"trait": {"shy": {"mouse": 3.0}, "clumsy": {"bear": 3.0}}}),
    " named ",
    pick("name", _NAMES, {"kind": {"girl": _GIRLS, "boy": _BOYS}}),
    " lived in ",
    pick(
        "dwelling",
        _DWELLINGS,
        {"kind.nature": {"child": {"burrow": 0.0, "oak": 0.0, "cave": 0.0}}},
    ),
    " ",
    pick(
        "place",
        _PLACES,
        {
            "dwelling": {
                "oak": "river mill forest lake hill orchard",
                "cave": "river forest lake hill sea mountain",
            }
        },
    ),
    " with ",
    pick("family", _FAMILIES),
    ".",
)


def day(given: Mapping[str, Mapping[str, Mapping[str, float] | str]] | None = None) -> Choice:
    """When it happens, and in what weather; ``given`` as in ``pick``."""
    return pick("day", _DAYS, given)


_FRIENDS = {
    "Otto": ("Otto", _HE),
    "Hazel": ("Hazel", _SHE),
    "Pip": ("Pip", _HE),
    "Willow": ("Willow", _SHE),
    "Bruno": ("Bruno", _HE),
    "Olive": ("Olive", _SHE),
    "Gus": ("Gus", _HE),
    "Ruby": ("Ruby", _SHE),
    "Felix": ("Felix", _HE),
    "Maple": ("Maple", _SHE),
    "Barnaby": ("Barnaby", _HE),
    "Juniper": ("Juniper", _SHE),
    "Waldo": ("Waldo", _HE),
    "Stella": ("Stella", _SHE),
    "Rufus": ("Rufus", _HE),
    "Dot": ("Dot", _SHE),
}
_FRIEND_KINDS = "owl|hedgehog|beaver|lizard|crow|frog|mole|turtle|squirrel|cat|goose|donkey"

# "an old owl named Otto": the friend is never of the hero's own kind.
FRIEND: tuple[Node, ...] = (
    pick(
        "manner",
        {
            "old": "an old",
            "friendly": "a friendly",
            "sleepy": "a sleepy",
            "clever": "a clever",
            "grumpy": "a grumpy",
            "jolly": "a jolly",
            "tiny": "a tiny",
            "elegant": "an elegant",
        },
    ),
    " ",
    pick(
        "friend_kind",
        _FRIEND_KINDS,
        {
            "kind": {kind: {kind: 0.0} for kind in ("hedgehog", "squirrel")},
            "manner": {"tiny": {"donkey": 0.0, "lizard": 3.0}, "clever": {"crow": 3.0}},
        },
    ),
    " named ",
    pick("friend", _FRIENDS),
)

ARRIVAL: tuple[Node, ...] = (
    pick("arrival", " Just then| Soon after| Before long| After a while| Luckily"),
    ", ",
    *FRIEND,
    pick("approach", " came by.| peeked in.| stopped to listen.| came to see."),
)

REACTION = pick(
    "reaction",
    {
        "cried": " {name} cried so hard that {name.they} got the hiccups.",
        "stone": " {name} sat down on a stone and sighed.",
        "stamped": " {name} stamped and shouted at the sky.",
        "brave": " {name} took a deep breath and did not cry.",
        "silent": " {name} did not say a word for a long time.",
        "circles": " {name} ran in circles.",
    },
    {
        "trait.mood": {"bold": {"stamped": 4.0, "brave": 3.0}, "soft": {"silent": 4.0}},
        "trait": {"brave": {"brave": 6.0, "cried": 0.0}},
    },
)


def feeling(of: str) -> Choice:
    """How the hero feels in the end: it follows from the outcome, whose form ``of`` names."""
    return pick(
        "feeling",
        {
            "happy": "happy",
            "thankful": "thankful",
            "proud": "proud",
            "light": "as light as a feather",
            "warm": "warm inside",
            "content": "tired but content",
            "sad": "a little sad, but hopeful",
            "calm": "quiet and calm",
        },
        {
            of: {
                "good": "happy thankful proud light warm",
                "mixed": "thankful content sad calm",
            },
            "trait.mood": {"bold": {"proud": 3.0}, "soft": {"thankful": 2.0}},
        },
    )


def ending(moral: Choice) -> tuple[Node, ...]:
    """The evening after: what the hero makes of it all, as ``moral`` says."""
    return (
        " ",
        moral,
        " {name.they} told {name.their} {family.who} ",
        pick("evening", "that night|at supper|before bed|under the stars|by the fire"),
        ", and ",
        pick(
            "bedtime",
            "fell asleep smiling.|blew out the candle.|dreamed of {friend}.|everyone agreed.|"
            "hummed a little tune.",
        ),
    )
