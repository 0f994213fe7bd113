"""A plot: a wish to learn something, a mishap, and practice."""

from __future__ import annotations

from minillm.data.storybook.cast import ARRIVAL, REACTION, day, ending, feeling
from minillm.data.storybook.nodes import Case, Node, pick

# What can go wrong, and where one would dare to try.
_MISHAPS = {
    "swim": ("swallowed sank", "alone early everyone"),
    "skate": ("flowers soup", "alone early everyone eyes"),
    "ride": ("haystack fence", "alone early everyone shed eyes"),
    "dance": ("soup fence", "alone everyone shed eyes"),
    "juggle": ("eggs soup", "alone everyone shed eyes"),
    "whistle": ("kettle birds", "alone early everyone shed"),
    "flute": ("goose birds", "alone early everyone shed"),
    "sing": ("birds goose", "alone early everyone shed"),
    "bake": ("coal flour", "alone early everyone"),
    "knit": ("knot sock", "alone early everyone eyes"),
    "paint": ("nose potato", "alone early everyone shed eyes"),
}

LEARN: tuple[Node, ...] = (
    "to learn to ",
    pick(
        "skill",
        {
            "swim": ("swim", {"where": "out"}),
            "whistle": ("whistle", {"where": "in"}),
            "bake": ("bake bread", {"where": "in"}),
            "ride": ("ride a bicycle", {"where": "out"}),
            "dance": ("dance", {"where": "in"}),
            "flute": ("play the flute", {"where": "in"}),
            "juggle": ("juggle", {"where": "out"}),
            "paint": ("paint", {"where": "in"}),
            "sing": ("sing", {"where": "in"}),
            "skate": ("skate", {"where": "out"}),
            "knit": ("knit", {"where": "in"}),
        },
        {"place.kind": {"water": {"swim": 4.0}, "town": {"swim": 0.3, "dance": 3.0}}},
    ),
    ", ",
    pick(
        "why",
        {
            "all": "for everyone else could do it",
            "dream": "ever since it came to {name.them} in a dream",
            "show": "ever since a circus came to town",
            "winter": "for the winters there were long",
            "family": "just like {name.their} {family.who}",
        },
        {"skill.where": {"out": {"winter": 0.0}, "in": {"show": 0.3}}},
    ),
    ". ",
    day({"skill": {"swim": {"foggy": 0.0, "snowy": 0.0}}}),
    ", {name.they} tried it ",
    pick(
        "audience",
        {
            "alone": "all alone",
            "everyone": "in front of everyone",
            "shed": "behind the shed",
            "early": "before anyone was awake",
            "eyes": "with both eyes shut",
        },
        {
            "skill": {skill: audiences for skill, (_, audiences) in _MISHAPS.items()},
            "trait.mood": {"bold": {"everyone": 4.0}, "soft": {"everyone": 0.4}},
            "day": {day: {"early": 0.0} for day in ("sunny", "foggy")},
        },
    ),
    ", and ",
    pick(
        "mishap",
        {
            "swallowed": "swallowed half of the water.",
            "sank": "sank like a stone.",
            "flowers": "slid straight into a flower bed.",
            "haystack": "rode straight into a haystack.",
            "fence": "crashed into the fence.",
            "soup": "knocked over a pot of soup.",
            "eggs": "broke a dozen eggs.",
            "kettle": "sounded like a kettle.",
            "goose": "sounded like a goose with a cold.",
            "birds": "scared the birds out of the trees.",
            "coal": "burned everything as black as coal.",
            "flour": "was white with flour from head to toe.",
            "knot": "tied {name.their} own {kind.hand} together.",
            "sock": "made a sock with three holes.",
            "nose": "got more color on {name.their} nose than on the paper.",
            "potato": "made a horse that looked like a potato.",
        },
        {"skill": {skill: mishaps for skill, (mishaps, _) in _MISHAPS.items()}},
    ),
    REACTION,
    *ARRIVAL,
    ' "',
    pick(
        "advice",
        {
            "small": ("Start small", {"how": "one small step at a time"}),
            "slow": ("Not so fast", {"how": "very slowly"}),
            "again": ("Never stop after one try", {"how": "again and again"}),
            "fun": ("Do it for fun", {"how": "just for fun"}),
            "watch": ("Watch me first", {"how": "with wide open eyes"}),
            "quiet": ("Close your ears to the others", {"how": "without listening to anyone"}),
        },
        {
            "manner": {
                "sleepy": {"slow": 5.0},
                "old": {"slow": 2.0, "again": 3.0},
                "jolly": {"fun": 6.0},
                "clever": {"watch": 4.0},
            },
            "audience": {"everyone": {"quiet": 6.0}},
            "trait": {"impatient": {"slow": 5.0}},
        },
    ),
    ',"',
    pick("said", " said| advised| whispered| laughed"),
    " {friend}. So {name} practiced {advice.how} ",
    pick("duration", "for a week|for three days|all month long|until the moon was full"),
    ", ",
    pick(
        "result",
        {
            "success": ("and at last {name.they} could {skill}", {"mood": "good"}),
            "failure": (
                "but {name.they} never quite learned to {skill}",
                {"mood": "mixed"},
            ),
        },
        {
            "trait": {"stubborn": {"success": 3.0}, "impatient": {"success": 0.5}},
            "advice": {"again": {"success": 2.0}, "fun": {"failure": 1.5}},
            "duration": {"for three days": {"success": 0.6}, "all month long": {"success": 2.0}},
        },
    ),
    Case(
        "result",
        {
            "success": (
                pick(
                    "quality",
                    " better than anyone| without a single mistake|"
                    " well enough to make {friend} cheer| almost as well as {friend}",
                ),
                ".",
            ),
            "failure": (
                ". Instead, {name.they} found out how much {name.they} loved ",
                pick(
                    "hobby",
                    "telling jokes|watching clouds|growing pumpkins|building kites|cooking soup",
                ),
                ".",
            ),
        },
    ),
    " In the end, {name} felt ",
    feeling("result.mood"),
    ".",
    *ending(
        pick(
            "moral",
            {
                "try": '"Nobody is good at first,"',
                "slow": '"Good things take time,"',
                "other": '"There are many things to be good at,"',
            },
            {"result.mood": {"good": {"other": 0.0}, "mixed": {"other": 5.0}}},
        )
    ),
)
