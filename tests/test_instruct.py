"""The shipped `instruct` is what its log says; the sweeps' parts do what their names say."""

import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from itertools import islice

import matplotlib.pyplot as plt
import pytest
import torch

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import families, stories
from minillm.data.families import family
from minillm.data.instructions import conversation, leaked
from minillm.data.mixture import proportional_rates
from minillm.infer.batching import complete
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes import instruct, instruct_sweeps
from minillm.recipes.instruct import Recipe
from minillm.recipes.instruct_sweeps import HELD_OUT, RUNS, SIZES, TASKS, Small
from minillm.teach.mixture_view import picture, shares
from minillm.tokenizers import load_course_tokenizer
from minillm.tokenizers.chat import END, render

TOKENIZER = load_course_tokenizer()
SWEEPS = ASSETS / "benchmarks" / "instruct.json"


@pytest.fixture(scope="module")
def shipped():
    log = json.loads((zoo.MODELS / "instruct.log.json").read_text(encoding="utf-8"))
    return zoo.load("instruct")[0], log


@pytest.fixture(scope="module")
def tiny():
    cfg = ModelConfig(TOKENIZER.vocab_size, 16, 1, 2, max_len=384, position="rope", norm="rms")
    return LM(cfg, seed=0).eval()


def test_the_log_belongs_to_the_files_that_are_shipped(shipped):
    lm, log = shipped
    recipe = Recipe(**log["recipe"])
    assert recipe == dataclasses.replace(Recipe(), folder=recipe.folder)
    assert log["command"].startswith("python -m minillm.recipes.instruct")
    assert log["steps"][-1]["step"] == recipe.steps
    assert 0 < log["cpu_seconds"] < 1800
    assert (zoo.MODELS / "instruct.safetensors").stat().st_size < 6e6
    assert lm.cfg == zoo.load(recipe.base)[0].cfg
    for split in families.SPLITS[1:]:
        each = log["by_family"][split]
        assert set(each) == {one.name for one in families.in_split(split)}
        assert log[split] == pytest.approx(sum(each.values()) / len(each))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["inputs", "wordings", "materials", "families"])
def test_it_answers_as_the_log_says(shipped, split):
    """Other examples than those that the log counts, so within sampling error only."""
    lm, log = shipped
    one_answer = [one for one in families.in_split(split) if one.check is families.exact]
    found = []
    for one in one_answer:
        some = families.examples(one, split, 24, seed=7)
        found += instruct.exactly(lm, TOKENIZER, some)
    expected = [log["by_family"][split][one.name] for one in one_answer]
    mean = sum(expected) / len(expected)
    error = math.sqrt(sum(p * (1 - p) for p in expected)) / len(expected)
    slack = 4 * error * math.sqrt(1 / 24 + 1 / log["recipe"]["held_out"]) + 0.02
    assert abs(sum(found) / len(found) - mean) < slack
    assert mean > log["base"][split] - slack  # it has learned, and the base had not


@pytest.mark.slow
def test_it_still_tells_stories_and_answers_questions_about_them(shipped):
    lm, log = shipped
    found = instruct.excess(lm, TOKENIZER, log["recipe"]["told"])
    assert found == pytest.approx(log["excess_per_story"], rel=1e-2, abs=1e-2)
    assert 0 < found < 0.1 * stories.entropy()


@pytest.mark.slow
def test_it_writes_on_request(shipped):
    lm, log = shipped
    for name, low in (("sentence", 0.8), ("story", 0.3)):
        one = family(name)
        some = families.examples(one, "inputs", 16, seed=9)
        said = instruct.answers(lm, TOKENIZER, some, max_new_tokens=one.longest)
        right = [one.verify(x, text) for x, text in zip(some, said, strict=True)]
        assert sum(right) / len(right) >= low * log["by_family"]["inputs"][name]
        swapped = zip(some[1:] + some[:1], said, strict=True)  # control: another's request
        assert sum(one.verify(x, text) for x, text in swapped) < 0.5 * sum(right)


def test_exactly_is_greedy_decoding(tiny):
    """One pass over the known answer says the same as writing token by token."""
    some = families.examples(family("first"), "inputs", 6, 0)
    said = complete(tiny, TOKENIZER, [conversation(x)[0][1] for x in some], 5, chat=True)
    # an untrained model knows no answer, so its own answers are the second half of the test
    own = []
    for x, text in zip(some, said, strict=True):
        ids = render(TOKENIZER, [("user", conversation(x)[0][1])], reply=True).ids
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(tiny(torch.tensor([ids]))[0, -1].argmax()))
        ended = TOKENIZER.special_ids[END] in ids[-5:]
        own.append((dataclasses.replace(x, output=text or "?"), ended and bool(text)))
    assert instruct.exactly(tiny, TOKENIZER, [x for x, _ in own], batch=4) == [e for _, e in own]
    assert instruct.exactly(tiny, TOKENIZER, some) == [False] * 6


def test_exactly_finds_what_a_model_was_taught(tiny):
    """A model that learned two answers by heart is right about these and no others."""
    some = families.examples(family("first"), "inputs", 4, 0)
    model = LM(tiny.cfg, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    taught = [instruct.encode(conversation(x), TOKENIZER) for x in some[:2]]
    rows = instruct.sft_rows(taught, TOKENIZER, 64)
    for _ in range(120):
        total, count = instruct.sft_loss(model, rows, rows.targets, rows.loss_mask)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert instruct.exactly(model.eval(), TOKENIZER, some[:2]) == [True, True]
    assert instruct.exactly(model, TOKENIZER, some[2:]) != [True, True]


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    recipe = Recipe(batch=6, stories=1)
    one = list(islice(instruct.batches(recipe, TOKENIZER, 384), 3))
    two = list(islice(instruct.batches(recipe, TOKENIZER, 384), 3))
    other = next(instruct.batches(dataclasses.replace(recipe, seed=2), TOKENIZER, 384))
    for (a, *_), (b, *_) in zip(one, two, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask)
    assert not torch.equal(one[0][0].tokens[:, :40], other[0].tokens[:, :40])
    assert int(one[0][0].documents.max()) == 6  # six examples and a story
    none = next(instruct.batches(dataclasses.replace(recipe, stories=0), TOKENIZER, 384))
    assert int(none[0].documents.max()) == 5


def test_the_recipe_trains_on_nothing_that_is_held_out():
    among = families.in_split("train")
    assert not any(one.held_out for one in among)
    assert set(instruct.RATES) <= {one.name for one in among}
    train = [x for one in among for x in families.examples(one, "train", 60, 0)]
    held = [x for s in families.SPLITS[1:] for one in families.in_split(s)
            for x in families.examples(one, s, 30, 0)]  # fmt: skip
    assert leaked(train, held) == []


def test_small_runs_differ_in_what_they_are_named_for():
    base = dataclasses.asdict(RUNS["baseline"])
    for name, run in RUNS.items():
        changed = {k for k, v in dataclasses.asdict(run).items() if v != base[k]}
        key = {"baseline": None, "everything": "learn"}.get(name, name.split()[0])
        assert changed == ({key} if key else set())


def test_a_small_example_answers_what_it_asks():
    words = instruct_sweeps.VOCABULARY
    assert len(set(words)) == len(words)
    kind = {w: k for k, some in instruct_sweeps.KINDS.items() for w in some}
    rng = random.Random(0)
    for pair in (*TASKS, *HELD_OUT):
        for wordings in (instruct_sweeps.WORDINGS, instruct_sweeps.NEW_WORDINGS):
            chat = instruct_sweeps.example(rng, pair, wordings)
            said = [words[i] for i in chat.ids]
            given, request, answer = said[1:5], said[5:-4], said[-3:-1]
            assert said[0] == "<|user|>" and said[-4] == "<|assistant|>"
            assert [w for w in request if w in instruct_sweeps.KINDS] == list(pair)
            assert [w for k in pair for w in given if kind[w] == k] == answer
            assert len({kind[w] for w in given}) == 4  # so there is one right answer
            learned = [w for w, m in zip(said, chat.mask, strict=True) if m]
            assert learned == [*answer, "<|endoftext|>"]


def test_held_out_pairs_are_never_drawn_but_their_kinds_are():
    assert len(TASKS) == 24 and len(HELD_OUT) == 6 and not set(TASKS) & set(HELD_OUT)
    for seed in range(3):
        several = [instruct_sweeps.chosen_tasks(Small(tasks=n), seed) for n in (3, 6, 12, 24)]
        for few, more in itertools.pairwise(several):
            assert more[: len(few)] == few  # what is added is added to what was there
        assert set(several[-1]) == set(TASKS)
    for kind in instruct_sweeps.KINDS:
        for place in (0, 1):
            assert sum(pair[place] == kind for pair in TASKS) == 4


def rendered(run, batches=40):
    source = instruct_sweeps.small_batches(run, seed=0)
    rows = [x for inputs, *_ in islice(source, batches) for x in inputs.tolist()]
    return [[instruct_sweeps.VOCABULARY[i] for i in row] for row in rows]


def asked_for(row):
    return tuple(w for w in row if w in instruct_sweeps.KINDS)


def test_small_batches_draw_tasks_wordings_and_examples_as_told():
    assert {asked_for(row) for row in rendered(Small())} == set(TASKS)
    few = {asked_for(row) for row in rendered(Small(tasks=3))}
    assert few == set(instruct_sweeps.chosen_tasks(Small(tasks=3), 0))
    assert {row[5] for row in rendered(Small(wordings=1))} == {"Give"}
    assert len({row[5] for row in rendered(Small(), 4)}) == 6
    known = Counter(" ".join(row) for row in rendered(Small(examples=4), 20))
    assert len({text.replace("<|pad|>", "") for text in known}) <= 4 * len(TASKS)
    assert len({" ".join(row) for row in rendered(Small(), 20)}) > 900


@pytest.mark.slow
def test_the_mixture_is_drawn_at_the_rates_of_its_cap():
    drawn = Counter(" ".join(asked_for(row)) for row in rendered(Small(cap=512), 30))
    for name, rate in proportional_rates(SIZES, 512).items():
        expected = 30 * 48 * rate
        assert abs(drawn[name] - expected) < 5 * math.sqrt(expected) + 3
    assert set(SIZES.values()) == {64 * 2**i for i in range(8)}


def test_everything_learns_all_tokens_but_the_first():
    whole = next(instruct_sweeps.small_batches(Small(learn="everything"), 0))
    answers = next(instruct_sweeps.small_batches(Small(), 0))
    assert torch.equal(whole[0], answers[0]) and torch.equal(whole[1], answers[1])
    assert torch.equal(whole[2], whole[1] != instruct_sweeps.PAD)
    assert (answers[2].sum(1) == 3).all() and (whole[2] | ~answers[2]).all()


def test_judging_a_small_model_counts_whole_answers():
    """A model that says what the first word is, or that knows nothing, is right by chance only."""
    rng = random.Random(0)
    chats = [instruct_sweeps.example(rng, TASKS[0], instruct_sweeps.WORDINGS) for _ in range(30)]

    def oracle(inputs, wrong=0):
        """Knows each row's answer by looking it up; spoils the first `wrong` rows."""
        logits = torch.zeros(*inputs.shape, len(instruct_sweeps.VOCABULARY))
        targets = instruct_sweeps.small_rows(chats)[1]
        logits.scatter_(-1, targets[..., None], 1.0)
        logits[:wrong, :, instruct_sweeps.USER] = 2.0
        return logits

    assert instruct_sweeps.small_score(oracle, chats) == 1.0
    assert instruct_sweeps.small_score(lambda x: oracle(x, 6), chats) == pytest.approx(24 / 30)
    model = instruct_sweeps.small_model(0).eval()
    found = instruct_sweeps.judge_small(model, Small(tasks=6), 0, n=24)
    assert set(found) == {"inputs", "wordings", "tasks", "no request", "by_size"}
    assert found["inputs"] < 0.5


@pytest.mark.slow
def test_forgetting_is_measured_from_the_base_on():
    found = instruct_sweeps.forget(stories=0, batch=4, steps=4, seed=0, every=2, told=4)
    assert found["steps"] == [0, 2, 4]
    base, tokenizer = zoo.load("storyteller")
    assert found["excess"][0] == pytest.approx(instruct.excess(base, tokenizer, 4), abs=1e-6)
    assert found["excess"][-1] > found["excess"][0]


def test_the_sweeps_are_recorded_for_three_seeds():
    record = json.loads(SWEEPS.read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m minillm.recipes.instruct_sweeps")
    assert record["settings"] == {name: dataclasses.asdict(run) for name, run in RUNS.items()}
    assert record["sizes"] == SIZES and set(record["small"]) == set(RUNS)
    for seeds in record["small"].values():
        assert set(seeds) == {"0", "1", "2"}
        assert all(0 <= found["inputs"] <= 1 for found in seeds.values())


def test_shares_of_a_mixture_by_hand():
    found = shares({"a": 900, "b": 100, "c": 50}, cap=200, temperature=1, budget=700)
    assert found == [
        ("a", pytest.approx(200 / 350), pytest.approx(400 / 900)),
        ("b", pytest.approx(100 / 350), pytest.approx(2)),
        ("c", pytest.approx(50 / 350), pytest.approx(2)),
    ]
    equal = shares({"a": 900, "b": 100}, None, temperature=1e9, budget=1)
    assert [share for _, share, _ in equal] == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="budget=0 examples"):
        shares({"a": 1}, None, 1, 0)


def test_the_picture_draws_the_shares():
    figure = picture(SIZES, log_cap=3.0, temperature=2.0)
    left, right = figure.axes
    expected = shares(SIZES, 1000, 2.0, 38_400)
    drawn = [bar.get_width() for bar in left.patches]
    assert drawn[len(SIZES) :] == pytest.approx([share for _, share, _ in expected])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([e for *_, e in expected])
    assert "cap 1,000" in figure.get_suptitle()
    plt.close(figure)
