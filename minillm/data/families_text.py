"""What the families about texts draw: passages, sentences and stories; see `families_makers`."""

from __future__ import annotations

import random
from collections.abc import Mapping

from minillm.data import stories
from minillm.data.families_makers import WORDS, Drawn

VERBS = ("found", "lost", "carried", "saw")
DONE = {"found": "found", "lost": "lost", "carried": "carried", "saw": "seen"}
FEELINGS = ("happy", "proud", "thankful", "calm", "sad", "content")
TRAITS = ("brave", "shy", "kind", "clumsy", "honest", "cheerful", "stubborn", "dreamy")
SENTENCE = (
    r"(?P<name>\w+) the (?P<trait>\w+) (?P<kind>\w+) (?P<verb>\w+) an? (?P<color>\w+) "
    r"(?P<thing>\w+) at the (?P<place>\w+) and felt (?P<feeling>\w+)\."
)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _passage(rng: random.Random, sentences: int) -> tuple[list[dict[str, str]], str]:
    """So many sentences about different people, things, places and colors."""
    keys = {"name": "names", "thing": "things", "place": "places", "color": "colors"}
    columns = {key: rng.sample(WORDS[material], sentences) for key, material in keys.items()}
    facts = []
    for row in range(sentences):
        fact = {key: column[row] for key, column in columns.items()}
        facts.append(fact | {"verb": rng.choice(VERBS)})
    lines = (
        f"{f['name']} {f['verb']} {_a(f['color'])} {f['thing']} at the {f['place']}." for f in facts
    )
    return facts, " ".join(lines)


def who(rng: random.Random, material: str) -> Drawn:
    """Who did something with a thing."""
    facts, text = _passage(rng, rng.randint(2, 3))
    fact = rng.choice(facts)
    done = {"verb": fact["verb"], "done": DONE[fact["verb"]]}
    return done | {"thing": fact["thing"]}, text, fact["name"]


def where(rng: random.Random, material: str) -> Drawn:
    """Where somebody was."""
    facts, text = _passage(rng, rng.randint(2, 3))
    fact = rng.choice(facts)
    return {"name": fact["name"]}, text, f"at the {fact['place']}"


def what(rng: random.Random, material: str) -> Drawn:
    """What thing somebody had to do with."""
    facts, text = _passage(rng, rng.randint(2, 3))
    fact = rng.choice(facts)
    thing = f"{_a(fact['color'])} {fact['thing']}"
    done = {"verb": fact["verb"], "done": DONE[fact["verb"]]}
    return done | {"name": fact["name"]}, text, thing


def color(rng: random.Random, material: str) -> Drawn:
    """What color a thing has."""
    facts, text = _passage(rng, rng.randint(2, 3))
    fact = rng.choice(facts)
    return {"thing": fact["thing"]}, text, fact["color"]


def true_or_false(rng: random.Random, material: str) -> Drawn:
    """Whether somebody was at a place; a wrong one is where another was. Both equally often."""
    facts, text = _passage(rng, 2)
    true = rng.random() < 0.5
    at = rng.randrange(2)
    place = facts[at if true else 1 - at]["place"]
    return {"claim": f"{facts[at]['name']} was at the {place}."}, text, "true" if true else "false"


def rename(rng: random.Random, material: str) -> Drawn:
    """The sentence with another name."""
    (fact,), text = _passage(rng, 1)
    new = rng.choice([name for name in WORDS["names"] if name != fact["name"]])
    return {"old": fact["name"], "new": new}, text, text.replace(fact["name"], new)


def passive(rng: random.Random, material: str) -> Drawn:
    """From active to passive voice."""
    (fact,), _ = _passage(rng, 1)
    thing = f"{_a(fact['color'])} {fact['thing']}"
    text = f"{fact['name']} {fact['verb']} {thing}."
    return {}, text, f"{thing[0].upper()}{thing[1:]} was {DONE[fact['verb']]} by {fact['name']}."


def known_sentence(parts: Mapping[str, str]) -> bool:
    """Whether every part of a sentence is a word that belongs in its place."""
    return (
        parts["name"] in WORDS["names"]
        and parts["trait"] in TRAITS
        and parts["kind"] in WORDS["animals"]
        and parts["verb"] in VERBS
        and parts["color"] in WORDS["colors"]
        and parts["thing"] in WORDS["things"]
        and parts["place"] in WORDS["places"]
        and parts["feeling"] in FEELINGS
    )


def sentence(rng: random.Random, material: str) -> Drawn:
    """A sentence that has the two to four words of the request; the rest is free."""
    (fact,), _ = _passage(rng, 1)
    kind, trait = rng.choice(WORDS["animals"]), rng.choice(TRAITS)
    feeling = rng.choice(FEELINGS)
    text = (
        f"{fact['name']} the {trait} {kind} {fact['verb']} {_a(fact['color'])} {fact['thing']} "
        f"at the {fact['place']} and felt {feeling}."
    )
    free = [fact["name"], trait, kind, fact["thing"], fact["place"], feeling]
    return {}, ", ".join(rng.sample(free, rng.randint(2, 4))), text


PLOTS = {"lost": "treasure", "learn": "wish", "gift": "friend", "rescue": "task"}


def about(keys: Mapping[str, str]) -> tuple[str, str, str, str]:
    """What a story is about, from the choices that made it: name, kind, trait, plot."""
    return keys["name"], keys["kind"], keys["trait"], PLOTS[keys["plot"]]


def story(rng: random.Random, material: str) -> Drawn:
    """A whole story about one to four words: name, kind, trait of the hero, and the plot."""
    told = stories.grammar().sample(rng)
    words = about(told.keys)
    return {}, ", ".join(rng.sample(words, rng.randint(1, 4))), told.text


def story_question(rng: random.Random, material: str) -> Drawn:
    """A question about a whole story."""
    told = stories.parse(stories.grammar().sample(rng).text)
    question, answer = rng.choice(told.questions)
    return {"question": question}, told.text, answer
