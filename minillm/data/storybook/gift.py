"""A plot: a present for a friend's birthday, and the long way to its last ingredient."""

from __future__ import annotations

from minillm.data.storybook.cast import FRIEND, day, ending, feeling
from minillm.data.storybook.nodes import Node, pick

GIFT: tuple[Node, ...] = (
    *FRIEND,
    ". {friend}'s birthday was near, and {name} wanted to make {friend.them} ",
    pick(
        "gift",
        {
            "cake": ("a honey cake", {"short": "cake", "needs": "honey"}),
            "pie": ("an apple pie", {"short": "pie", "needs": "cinnamon"}),
            "blanket": ("a warm blanket", {"short": "blanket", "needs": "wool"}),
            "flute": ("a wooden flute", {"short": "flute", "needs": "wood"}),
            "lamp": ("a little lamp", {"short": "lamp", "needs": "oil"}),
            "crown": ("a crown of flowers", {"short": "crown", "needs": "daisies"}),
            "chair": ("a rocking chair", {"short": "chair", "needs": "wood"}),
            "pillow": ("a thick pillow", {"short": "pillow", "needs": "wool"}),
        },
    ),
    ", but there was no {gift.needs} left. ",
    day(),
    ", {name.they} set out for ",
    pick(
        "source",
        {
            "shop": ("the village shop", {"keeper": "shopkeeper"}),
            "farm": ("the farm behind the hill", {"keeper": "farmer"}),
            "garden": ("the walled garden", {"keeper": "gardener"}),
            "cabin": ("the cabin in the woods", {"keeper": "hermit"}),
            "ship": ("the ship in the harbor", {"keeper": "captain"}),
            "fair": ("the summer fair", {"keeper": "fiddler"}),
        },
        {
            "gift.needs": {
                "honey": {"garden": 6.0, "ship": 0.2},
                "wool": {"farm": 8.0, "garden": 0.0},
                "wood": {"cabin": 8.0, "garden": 2.0},
                "oil": {"shop": 3.0, "garden": 0.0},
                "cinnamon": {"ship": 9.0, "farm": 0.0, "cabin": 0.2},
                "daisies": {"garden": 4.0, "farm": 2.0, "ship": 0.0},
            },
            "day": {"snowy": {"fair": 0.0}, "storm": {"fair": 0.0}, "spring": {"fair": 0.0}},
            "place.kind": {"water": {"ship": 3.0}},
        },
    ),
    ". On the way, ",
    pick(
        "obstacle",
        {
            "goat": "a stubborn goat blocked the road",
            "bridge": "the bridge was broken",
            "tree": "a fallen tree lay across the path",
            "flood": "the road was under water",
            "fog": "nobody could see farther than an arm's length",
            "snow": "the snow came up to {name.their} chin",
            "geese": "seven angry geese came running",
        },
        {
            "day.weather": {
                "wind": {"tree": 8.0, "fog": 0.0, "snow": 0.0},
                "rain": {"flood": 9.0, "fog": 0.0, "snow": 0.0},
                "fog": {"fog": 20.0, "snow": 0.0},
                "snow": {"snow": 20.0, "fog": 0.0, "flood": 0.0},
                "sun": {"flood": 0.3, "fog": 0.0, "snow": 0.0},
            }
        },
    ),
    ", but {name} ",
    pick(
        "solution",
        {
            "sang": "sang a song until it calmed down.",
            "shared": "shared {name.their} sandwich and was let through.",
            "waded": "waded through, holding {name.their} shoes high.",
            "raft": "built a raft out of two old doors.",
            "climbed": "climbed right over it.",
            "crawled": "crawled under it.",
            "tunnel": "dug a tunnel.",
            "bells": "followed the sound of the church bells.",
            "bowed": "bowed politely and walked on.",
            "long": "took the long way around.",
        },
        {
            "obstacle": {
                "goat": "sang shared bowed long",
                "bridge": "waded raft long",
                "tree": "climbed crawled long",
                "flood": "waded raft",
                "fog": "bells",
                "snow": "tunnel long",
                "geese": "shared bowed long",
            },
            "trait": {
                "shy": {"long": 3.0, "sang": 0.3},
                "kind": {"shared": 4.0},
                "brave": {"climbed": 3.0, "long": 0.2},
                "honest": {"bowed": 3.0},
                "impatient": {"long": 0.2},
            },
        },
    ),
    " The {source.keeper} gave {name.them} some {gift.needs} in return for ",
    pick(
        "price",
        "a song|a good joke|two shiny buttons|a whole hour of sweeping|"
        "a promise to come back|a big hug",
        {"source": {"fair": {"a song": 5.0}, "shop": {"two shiny buttons": 4.0}}},
    ),
    ". {name} worked ",
    pick("effort", "all night|for two days|without a rest|until {name.their} {kind.hand} hurt"),
    ", ",
    pick(
        "made",
        {
            "perfect": ("and the {gift.short} was perfect", {"mood": "good"}),
            "crooked": ("but the {gift.short} came out crooked", {"mood": "mixed"}),
            "grand": ("and the {gift.short} was fit for a queen", {"mood": "good"}),
            "small": ("but the {gift.short} came out much too small", {"mood": "mixed"}),
        },
        {
            "trait": {
                "clumsy": {"crooked": 5.0},
                "impatient": {"small": 4.0},
                "stubborn": {"perfect": 2.0, "grand": 2.0},
            },
            "effort": {"for two days": {"perfect": 2.0}},
        },
    ),
    ". When {friend} saw it, {friend.they} ",
    pick(
        "thanks",
        {
            "hugged": "hugged {name} for a long time.",
            "danced": "danced around the table.",
            "laughed": "laughed until the windows shook.",
            "like": "liked it all the same.",
            "cried": "wept for joy.",
            "speech": "could not find any words.",
        },
        {"made.mood": {"good": {"like": 0.0}, "mixed": {"like": 6.0, "laughed": 3.0}}},
    ),
    " In the end, {name} felt ",
    feeling("made.mood"),
    ".",
    *ending(
        pick(
            "moral",
            {
                "heart": '"A present comes from the heart,"',
                "way": '"The long way was worth it,"',
                "year": '"Next year I will start earlier,"',
            },
            {"made.mood": {"good": {"way": 2.0}, "mixed": {"year": 4.0}}},
        )
    ),
)
