"""What the recorded reward models were judged on, and a small run of the command."""

import json

import pytest
import torch

from minillm.align.reward import accuracy
from minillm.align.rules import ask
from minillm.data import cards
from minillm.recipes import preferences

ASKED = "Write a card for Mia about the kite."
SAID = [
    ["Dear Mia, You are kind. You are brave.", "Dear Mia, I saw a frog. You are rude."],
    ["Dear Ben, I miss you.", "Dear Mia, I miss you."],
    ["Dear Mia, I saw a frog.", "Dear Mia, It rained here today."],
]


def test_pairs_are_split_by_what_questions_can_see():
    true = cards.true_reward([ASKED] * 6, [x for two in SAID for x in two]).view(3, 2)
    found = preferences.parts(([ASKED] * 3, SAID, true))
    ranked = {kind: [c.responses for c in some] for kind, some in found.items()}
    assert ranked["clean"] == [tuple(SAID[0]), tuple(SAID[1][::-1])]  # the third pair is a tie
    assert ranked["seen"] == [tuple(SAID[1][::-1])]  # only the greeting differs
    assert ranked["unseen"] == [tuple(SAID[0])]  # only kindness differs

    def answers(asked, said):
        return ask(preferences.QUESTIONS, asked, said).float() @ weights

    weights = torch.tensor([question.weight for question in preferences.QUESTIONS])
    assert accuracy(answers, found["seen"]) == 1.0
    assert accuracy(answers, found["unseen"]) == 0.5  # a tie: the questions see no difference


@pytest.mark.slow
def test_a_small_run_is_recorded_and_goes_on(tmp_path):
    small = {"pairs": 24, "tested": 16, "pool": (2, 4), "comparisons": (8, 16), "noises": (0.3,)}
    recipe = preferences.Recipe(**small, shown=16, seeds=(0,), path=tmp_path / "preferences.json")
    preferences.main(recipe)
    first = json.loads(recipe.path.read_text())
    kinds = [(run["by"], run["comparisons"], run["noise"]) for run in first["runs"]]
    assert kinds == [
        ("clean", 8, 0.0),
        ("clean", 16, 0.0),
        ("clean", 16, 0.3),
        ("questions", 16, 0.0),
    ]
    assert all(0 <= run[kind] <= 1 for run in first["runs"] for kind in ("clean", "noisy", "seen"))
    assert [len(first["runs"][i]["scores"]) for i in (0, 1, 3)] == [2] * 3
    assert torch.tensor(first["pool"]["true"]).shape == (2, 4)
    lost = first["runs"].pop(1)  # as if it had been stopped before
    recipe.path.write_text(json.dumps(first))
    preferences.main(recipe)
    again = json.loads(recipe.path.read_text())
    assert again["runs"] == [*first["runs"], lost]  # done again, and with the same result
