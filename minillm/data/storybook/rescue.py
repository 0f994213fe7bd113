"""A plot: an errand, somebody in trouble, and what became of the errand."""

from __future__ import annotations

from minillm.data.storybook.cast import FRIEND, day, ending, feeling
from minillm.data.storybook.nodes import Case, Node, pick

RESCUE: tuple[Node, ...] = (
    "to carry ",
    pick(
        "cargo",
        {
            "eggs": ("a basket of eggs", {"short": "basket"}),
            "letter": ("an urgent letter", {"short": "letter"}),
            "soup": ("a pot of soup", {"short": "pot"}),
            "flour": ("a sack of flour", {"short": "sack"}),
            "clock": ("a ticking clock", {"short": "clock"}),
            "buns": ("a tray of warm buns", {"short": "tray"}),
            "lantern": ("a brass lantern", {"short": "lantern"}),
        },
    ),
    " to the ",
    pick(
        "receiver",
        "baker|schoolteacher|lighthouse keeper|mayor|old sailor|watchmaker|queen's cook",
        {
            "cargo": {
                "eggs": {"baker": 3.0},
                "flour": {"baker": 4.0, "watchmaker": 0.2},
                "clock": {"watchmaker": 9.0},
                "buns": {"baker": 0.0},
                "lantern": {"lighthouse keeper": 8.0},
            },
            "place.kind": {"water": {"lighthouse keeper": 3.0, "old sailor": 3.0}},
        },
    ),
    ". ",
    day(),
    ", on the way, {name.they} heard ",
    pick("cry", "a tiny voice|somebody crying|a faint knocking|a long sigh"),
    " ",
    pick(
        "spot",
        {
            "ditch": "from a deep ditch",
            "branch": "from under a fallen branch",
            "barrel": "from inside an empty barrel",
            "thorns": "from behind a thorn bush",
            "well": "from the bottom of a dry well",
            "drift": "from inside a snowdrift",
        },
        {
            "day.weather": {
                "wind": {"branch": 5.0, "drift": 0.0},
                "sun": {"drift": 0.0},
                "rain": {"ditch": 3.0, "drift": 0.0},
                "fog": {"well": 3.0, "drift": 0.0},
                "snow": {"drift": 30.0},
            }
        },
    ),
    ". It was ",
    *FRIEND,
    ", ",
    pick(
        "trouble",
        {
            "fallen": "who had fallen in and could not get out.",
            "stuck": "who was stuck fast.",
            "hurt": "who had twisted a foot.",
            "cold": "who was shivering with cold.",
            "lost": "who had lost the way.",
        },
        {
            "spot": {
                "ditch": "fallen hurt cold",
                "branch": "stuck hurt",
                "barrel": "fallen stuck lost",
                "thorns": "stuck hurt lost",
                "well": "fallen hurt",
                "drift": "cold lost stuck",
            },
            "day.weather": {"sun": {"cold": 0.3}, "fog": {"lost": 5.0}},
        },
    ),
    pick(
        "doubt",
        {
            "once": " At once",
            "look": " After a quick look around",
            "while": " After thinking for a while",
            "brave": " With trembling {kind.hand}",
            "late": " Although it was late",
        },
        {
            "trait.mood": {
                "bold": {"once": 5.0, "look": 3.0, "brave": 0.3},
                "soft": {"while": 3.0, "brave": 4.0},
            }
        },
    ),
    ", {name} put down the {cargo.short} and ",
    pick(
        "deed",
        {
            "rope": "let down a rope",
            "lift": "pushed with both {kind.hand}",
            "ladder": "made a ladder out of sticks",
            "carried": "carried {friend.them} into the sun",
            "called": "called for help until a farmer came",
            "dug": "dug with both {kind.hand}",
        },
        {
            "spot": {
                "ditch": "rope ladder called",
                "branch": "lift called",
                "barrel": "lift carried",
                "thorns": "lift dug called",
                "well": "rope ladder called",
                "drift": "dug called",
            },
            "trait.mood": {"soft": {"called": 2.0}},
            "trouble": {"hurt": {"carried": 4.0}},
            "day.weather": {day: {"carried": 0.0} for day in ("rain", "fog", "snow")},
        },
    ),
    ". Soon {friend} was ",
    pick("freed", "free|safe and sound|out|laughing again"),
    ".",
    pick(
        "cargo_state",
        {
            "there": (" The {cargo.short} was still there", {"mood": "good"}),
            "gone": (" But the {cargo.short} was gone", {"mood": "mixed"}),
            "over": (" But the {cargo.short} had tipped over", {"mood": "mixed"}),
            "wet": (" But the {cargo.short} was soaking wet", {"mood": "mixed"}),
            "safe": (" The {cargo.short} had not moved an inch", {"mood": "good"}),
        },
        {
            "cargo": {
                "letter": {"gone": 3.0, "over": 0.0},
                "eggs": {"over": 3.0},
                "soup": {"over": 3.0, "wet": 0.0},
                "clock": {"over": 0.4},
            },
            "day.weather": {
                "rain": {"wet": 6.0},
                "snow": {"wet": 2.0},
                "wind": {"over": 2.0, "wet": 0.2},
                "sun": {"wet": 0.0},
                "fog": {"gone": 2.0},
            },
        },
    ),
    Case(
        "cargo_state.mood",
        {
            "good": (
                ", so together they brought it to the {receiver} and got ",
                pick(
                    "reward",
                    "a cup of cocoa|two silver coins|a slice of cake|a ride on a pony|"
                    "a bag of cherries",
                ),
                " as thanks.",
            ),
            "mixed": (
                ", so together they told the truth to the {receiver}, who ",
                pick(
                    "answer",
                    "only smiled.|laughed and made tea for three.|"
                    "was angry at first, but not for long.|gave them cherries all the same.",
                ),
            ),
        },
    ),
    " In the end, {name} felt ",
    feeling("cargo_state.mood"),
    ".",
    *ending(
        pick(
            "moral",
            {
                "stop": '"There is always time to stop and help,"',
                "truth": '"The truth is lighter than a lie,"',
                "small": '"Nobody is too small to be a hero,"',
            },
            {
                "cargo_state.mood": {"good": {"truth": 0.0}, "mixed": {"truth": 3.0}},
                "trait": {"honest": {"truth": 4.0}},
            },
        )
    ),
)
