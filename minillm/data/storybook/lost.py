"""A plot: a treasure is lost, looked for, and found."""

from __future__ import annotations

from minillm.data.storybook.cast import ARRIVAL, REACTION, day, ending, feeling
from minillm.data.storybook.nodes import Node, pick

LOST: tuple[Node, ...] = (
    pick(
        "color",
        "a red|a blue|an old|a golden|a striped|an orange|a tiny|a spotted",
    ),
    " ",
    pick(
        "treasure",
        {
            "kite": ("kite", {"kind": "light"}),
            "ball": ("ball", {"kind": "round"}),
            "boat": ("toy boat", {"kind": "hard"}),
            "scarf": ("scarf", {"kind": "light"}),
            "drum": ("drum", {"kind": "round"}),
            "bell": ("bell", {"kind": "hard"}),
            "bird": ("paper bird", {"kind": "light"}),
            "box": ("music box", {"kind": "hard"}),
            "hat": ("hat", {"kind": "light"}),
            "marble": ("marble", {"kind": "round"}),
        },
    ),
    ", a present from {name.their} ",
    pick("giver", "grandfather|cousin|teacher|godmother|neighbor|best friend"),
    ". ",
    day(),
    ", {name.they} took it to the ",
    pick(
        "outing",
        {
            "meadow": ("meadow", {"kind": "land"}),
            "fair": ("fair", {"kind": "town"}),
            "beach": ("beach", {"kind": "water"}),
            "bridge": ("bridge", {"kind": "water"}),
            "playground": ("playground", {"kind": "town"}),
            "hilltop": ("hilltop", {"kind": "land"}),
            "pier": ("pier", {"kind": "water"}),
            "market": ("market", {"kind": "town"}),
        },
        {
            "place.kind": {
                "water": {"beach": 6.0, "bridge": 4.0, "pier": 6.0},
                "town": {"fair": 4.0, "market": 6.0},
                "land": {"meadow": 3.0, "hilltop": 4.0},
            }
        },
    ),
    pick("alas", ". Suddenly|. All at once|. Without warning|. A moment later"),
    ", ",
    pick(
        "cause",
        {
            "gust": "a gust of wind tore the {treasure} out of {name.their} {kind.hand}.",
            "slip": "the {treasure} slipped and rolled down a slope.",
            "splash": "the {treasure} fell into the water and drifted away.",
            "puppy": "a puppy grabbed the {treasure} and ran off.",
            "magpie": "a magpie carried off the {treasure}.",
            "crowd": "the {treasure} got lost in the crowd.",
        },
        {
            "day.weather": {"wind": {"gust": 5.0}},
            "treasure": {"boat": {"magpie": 0.0}, "box": {"magpie": 0.0}},
            "treasure.kind": {
                "light": {"slip": 0.0},
                "round": {"gust": 0.0, "slip": 4.0, "magpie": 0.0},
                "hard": {"gust": 0.0, "magpie": 2.0, "slip": 0.0},
            },
            "outing.kind": {
                "water": {"splash": 5.0, "crowd": 0.0},
                "town": {"splash": 0.0, "crowd": 6.0},
                "land": {"splash": 0.0, "crowd": 0.0},
            },
        },
    ),
    REACTION,
    *ARRIVAL,
    pick(
        "speech",
        {
            "eyes": ' "Four eyes see more than two," said {friend}.',
            "help": ' "I will help you look," said {friend}.',
            "noise": ' "Stop that noise and look with me," grumbled {friend}.',
            "lost": ' "I lost something once, too," sighed {friend}.',
            "wise": ' "Begin where it began," advised {friend}.',
        },
        {
            "manner": {
                "grumpy": {"noise": 9.0},
                "old": {"wise": 6.0, "noise": 0.0},
            }
            | {
                manner: {"noise": 0.0}
                for manner in ("friendly", "sleepy", "clever", "jolly", "tiny", "elegant")
            }
        },
    ),
    " They looked ",
    pick(
        "decoy",
        "under the benches|behind every bush|inside a hollow log|"
        "between the cabbages|in an empty barn",
    ),
    " and found only ",
    pick(
        "junk",
        "an old boot|three snails|a rusty spoon|one green sock|a surprised toad|a broken comb",
    ),
    pick(
        "spotter",
        {
            "friend": ". At last {friend} spotted",
            "hero": ". Quite by chance {name} noticed",
        },
    ),
    " the {treasure} ",
    pick(
        "found",
        {
            "tree": "high up in a tree",
            "haystack": "half buried in a haystack",
            "roof": "on the roof of a shed",
            "reeds": "caught in the reeds",
            "leaves": "under a pile of leaves",
            "net": "in a fishing net",
            "nest": "in a nest full of eggs",
            "chimney": "on top of a chimney",
            "basket": "in a dog basket",
            "stall": "on a stall among the pumpkins",
            "child": "in the arms of a small child",
        },
        {
            "cause": {
                "gust": "tree roof chimney",
                "slip": "haystack leaves",
                "splash": "reeds net",
                "puppy": "haystack leaves basket",
                "magpie": "tree nest chimney",
                "crowd": "stall child",
            }
        },
    ),
    ", ",
    pick(
        "state",
        {
            "new": ("as good as new", {"mood": "good"}),
            "torn": ("but sadly broken", {"mood": "mixed"}),
            "wet": ("dripping wet but whole", {"mood": "good"}),
            "muddy": ("a little dirty but whole", {"mood": "good"}),
        },
        {
            "found": {
                # Water makes wet, whatever the weather; the weather weighs against it below.
                "reeds": {"wet": 400.0, "new": 0.2, "muddy": 0.3},
                "net": {"wet": 400.0, "new": 0.2, "muddy": 0.3},
                "stall": {"wet": 0.0, "muddy": 0.3},
                "child": {"wet": 0.0, "muddy": 0.3, "torn": 0.3},
                "basket": {"torn": 4.0},
                "chimney": {"muddy": 8.0},
            },
            "day.weather": {
                "rain": {"new": 0.3},
                "sun": {"wet": 0.02},
                "wind": {"wet": 0.02},
                "fog": {"wet": 0.02},
            },
        },
    ),
    ".",
    " In the end, {name} felt ",
    feeling("state.mood"),
    ".",
    *ending(
        pick(
            "moral",
            {
                "friend": '"A friend is worth more than any {treasure},"',
                "found": '"What is lost is only waiting,"',
                "hold": '"Next time I will hold on tighter,"',
            },
            {"state.mood": {"mixed": {"friend": 3.0, "found": 0.0}}},
        )
    ),
)
