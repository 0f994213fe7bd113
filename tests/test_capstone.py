"""Stages that are killed, changed and spoiled; the report card's numbers against their controls."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.config import ModelConfig
from minillm.data import cards, stories
from minillm.model import LM
from minillm.paths import ROOT
from minillm.recipes import capstone, capstone_stages, report, storyteller
from minillm.recipes.capstone_settings import FULL, QUICK, Text
from minillm.recipes.stages import Done, Stage, StageError, run
from minillm.tokenizers import load_course_tokenizer

TOKENIZER = load_course_tokenizer()


@dataclasses.dataclass(frozen=True)
class Number:
    value: float = 2.0
    size: int = 0
    """megabytes to hold for a moment"""


def first(folder, settings):
    note = folder / "calls.txt"
    note.write_text((note.read_text() if note.exists() else "") + "first\n")
    (folder / "first" / "x.txt").write_text(str(settings.value))
    return {"held": int(np.ones(settings.size * 2**17).sum())}


def second(folder, settings):
    with (folder / "calls.txt").open("a") as note:
        note.write("second\n")
    x = float((folder / "first" / "x.txt").read_text())
    (folder / "second" / "y.txt").write_text(str(math.copysign(x * settings.value, 1)))
    return {"product": x * settings.value}


def dies_once(folder, settings):
    """Keeps what it has done so far, as a training run keeps checkpoints."""
    place = folder / "frail"
    seen = sorted(path.name for path in place.iterdir())
    if not (place / "part.txt").exists():
        (place / "part.txt").write_text("half")
        (place / ".part.txt.rest").write_text("torn")
        os.kill(os.getpid(), signal.SIGKILL)
    return {"seen": seen}


def refuses(folder, settings):
    raise ValueError(f"value={settings.value} is wrong")


def two(value=2.0, factor=3.0, size=0):
    return [Stage("first", first, Number(value, size)), Stage("second", second, Number(factor))]


def calls(folder):
    return (folder / "calls.txt").read_text().split()


def reasons(stages, folder):
    return [why for _, why in run(stages, folder)]


@pytest.mark.slow
def test_what_is_finished_is_not_done_again_and_what_changed_is(tmp_path):
    start = list(run(two(), tmp_path))
    assert [why for _, why in start] == ["new", "new"] and calls(tmp_path) == ["first", "second"]
    assert start[1][0].numbers == {"product": 6.0} and start[1][0].starts == 1
    again = list(run(two(), tmp_path))
    assert [why for _, why in again] == ["", ""] and len(calls(tmp_path)) == 2
    assert [one for one, _ in again] == [one for one, _ in start]
    # the second alone
    assert reasons(two(factor=4.0), tmp_path) == ["", "settings changed: value=4.0, was 3.0"]
    assert calls(tmp_path)[2:] == ["second"]
    # the first, and so what is made from it
    why = reasons(two(value=5.0, factor=4.0), tmp_path)
    assert why == ["settings changed: value=5.0, was 2.0", "what it is made from changed"]
    assert (tmp_path / "second" / "y.txt").read_text() == "20.0"
    # a file was spoiled; done again it is as it was, so the second is still true
    (tmp_path / "first" / "x.txt").write_text("7")
    assert reasons(two(value=5.0, factor=4.0), tmp_path) == ["files changed: x.txt", ""]
    (tmp_path / "second" / "y.txt").unlink()
    assert reasons(two(value=5.0, factor=4.0), tmp_path) == ["", "files changed: y.txt"]
    assert reasons(two(value=5.0, factor=4.0), tmp_path) == ["", ""]


@pytest.mark.slow
def test_a_killed_stage_goes_on_with_what_it_kept(tmp_path):
    stages = [two()[0], Stage("frail", dies_once, Number())]
    with pytest.raises(StageError, match="frail was killed"):
        list(run(stages, tmp_path))
    done = list(run(stages, tmp_path))
    assert [why for _, why in done] == ["", "goes on"] and calls(tmp_path) == ["first"]
    assert done[1][0].starts == 2 and "part.txt" in done[1][0].numbers["seen"]
    assert list(done[1][0].files) == ["part.txt"]  # what was torn is no result
    # with other settings it must not go on with the parts of before: it dies again
    with pytest.raises(StageError):
        list(run([two()[0], Stage("frail", dies_once, Number(9.0))], tmp_path))


@pytest.mark.slow
def test_errors_come_through_and_names_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"value=2\.0 is wrong"):
        list(run([two()[0], Stage("bad", refuses, Number())], tmp_path))
    assert (tmp_path / "first" / "done.json").exists()
    assert not (tmp_path / "bad" / "done.json").exists()
    with pytest.raises(ValueError, match="a name of its own"):
        list(run([two()[0], two()[0]], tmp_path))


@pytest.mark.slow
def test_memory_is_that_of_the_stage(tmp_path):
    large, small = (one for one, _ in run(two(size=400), tmp_path))
    assert large.peak_bytes - small.peak_bytes > 350e6
    assert small.peak_bytes > 50e6  # Python and PyTorch


@pytest.mark.slow
def test_no_stage_outlives_the_run(tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
from minillm.recipes.stages import Stage, run
from test_capstone import Number

def sleeps(folder, settings):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    list(run([Stage("sleeps", sleeps, Number())], Path({str(tmp_path)!r})))
"""
    (tmp_path / "script.py").write_text(script)
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=paths)
    deadline = time.monotonic() + 300
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child = int((tmp_path / "pid").read_text())
    assert child != parent.pid and alive(child)
    parent.kill()
    parent.wait()
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bits_of_frequencies_and_of_a_compressor():
    rng = np.random.default_rng(0)
    train = ["".join(rng.choice(list("ab"), 400, p=[0.9, 0.1])) for _ in range(20)]
    found = report.naive({"train": train, "held_out": train[:2]})
    size = len("\n\n".join(train)) + 256
    count = {c: "\n\n".join(train).count(c) + 1 for c in "ab\n"}
    text = "\n\n".join(train[:2])
    by_hand = -sum(math.log2(count[c] / size) for c in text) / len(text)
    assert found["unigram_bits"] == pytest.approx(by_hand)
    assert found["lzma_bits"] < 0.3  # it has seen this very text...
    other = ["".join(rng.choice(list("ab"), 800, p=[0.9, 0.1]))]
    assert report.naive({"train": train, "held_out": other})["lzma_bits"] > 0.4  # ...but not this
    assert report.bits(8 * math.log(2), 1) == pytest.approx(8)


def test_reading_is_the_sum_over_single_documents():
    cfg = ModelConfig(TOKENIZER.vocab_size, 16, 1, 2, max_len=48, position="rope", norm="rms")
    lm, texts = (
        LM(cfg, seed=0).eval(),
        [story[:n] for n, story in zip((30, 90, 700), stories.generate(3, 1), strict=True)],
    )
    found = report.reading(lm, TOKENIZER, texts, batch=2)
    end, nats, count = TOKENIZER.special_ids["<|endoftext|>"], 0.0, 0
    for text in texts:
        ids = TOKENIZER.encode_ordinary(text)
        for start in range(0, len(ids), 47):
            row = torch.tensor([[end, *ids[start : start + 47], end]])
            assert row.shape[1] <= 49
            logp = lm(row[:, :-1])[0].double().log_softmax(-1)
            nats -= logp[torch.arange(row.shape[1] - 1), row[0, 1:]].sum().item()
            count += row.shape[1] - 1
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["nats"] == pytest.approx(nats / 3, rel=1e-5)
    assert found["bits"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    cut = report.pieces(TOKENIZER, texts, 48)
    assert TOKENIZER.decode([i for ids in cut for i in ids]) == "".join(texts)


def test_cards_that_are_right_are_in_place_and_by_chance_hardly(monkeypatch):
    asked = cards.requests(40, 3, "held_out")
    said = [f"Dear {x.name}, I like your {x.thing}." for x in asked]
    lm = LM(ModelConfig(TOKENIZER.vocab_size, 16, 1, 2, max_len=96, position="rope"), seed=0).eval()

    class Oracle(report.roll_out(lm, [[0]], 1, 1).__class__):
        def responses(self):
            return [TOKENIZER.encode_ordinary(card) for card in said]

    def oracle(model, prompts, longest, end, generator):
        real = rollout(model, prompts, 2, end, generator=generator)
        return Oracle(*(getattr(real, f.name) for f in dataclasses.fields(real)))

    rollout = report.roll_out
    monkeypatch.setattr(report, "roll_out", oracle)
    found = report.writing(lm, lm, TOKENIZER, [x.text for x in asked], cards.true_reward)
    assert found["in_place"] == 1 and found["in_place_by_chance"] < 0.2
    assert found["true"] == found["proxy"] == pytest.approx(2.4, abs=1e-5)
    assert found["true_each"] == [2.4] * 40 and found["samples"] == said[:4]
    assert found["kl"] == pytest.approx(0, abs=1e-4)  # from itself
    other = LM(lm.cfg, seed=1).eval()
    apart = report.writing(other, lm, TOKENIZER, [x.text for x in asked], cards.true_reward)
    assert apart["kl"] != pytest.approx(0, abs=1e-4)


def test_settings_reach_their_stages_and_a_folder_of_texts_is_looked_into(tmp_path):
    names = ["text", "tokenizer", "pretrain", "sft", "reward", "ppo", "int8", "exam"]
    for recipe in (FULL, QUICK):
        stages = capstone.plan(recipe)
        assert [stage.name for stage in stages] == names
        assert [stage.settings for stage in stages] == [getattr(recipe, name) for name in names]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree", encoding="utf-8")
    own = dataclasses.replace(QUICK, text=Text(folder=tmp_path))
    before = capstone.plan(own)[0].settings
    assert before.contents and before == capstone.plan(own)[0].settings
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nfour", encoding="utf-8")
    assert capstone.plan(own)[0].settings.contents != before.contents


def test_text_of_ones_own(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    (folder / "text").mkdir(parents=True)
    with pytest.raises(ValueError, match="0 documents"):
        capstone_stages.make_text(folder, Text(folder=source))
    texts = [f"Document {i}: ü {'x' * i}" for i in range(1, 31)]
    (source / "a.txt").write_text("\n\n".join(texts[:20]) + "\n\n", encoding="utf-8")
    (source / "b.txt").write_text("\n\n\n\n".join(texts[20:]), encoding="utf-8")
    told = capstone_stages.make_text(folder, Text(folder=source))
    parts = {part: capstone_stages.documents(folder, part) for part in ("train", "held_out")}
    assert sorted(parts["train"] + parts["held_out"]) == sorted(texts)
    assert len(parts["held_out"]) == 3 and "floor" not in told
    assert told["bytes"] == sum(len(text.encode()) for text in parts["train"])


def test_stories_that_are_held_out_are_those_of_the_exam(tmp_path):
    (tmp_path / "text").mkdir()
    told = capstone_stages.make_text(tmp_path, Text(stories=20, held_out=5))
    held_out = capstone_stages.documents(tmp_path, "held_out")
    known = [stories.sample(capstone_stages.HELD_OUT + i) for i in range(5)]
    assert held_out == [story.text for story in known]
    assert told["floor"] == pytest.approx(-sum(s.log_prob for s in known) / 5)
    size = sum(len(text.encode()) for text in held_out)
    assert told["floor_bits"] == pytest.approx(told["floor"] * 5 / math.log(2) / size)
    assert not set(held_out) & set(capstone_stages.documents(tmp_path, "train"))


def small(recipe=QUICK):
    """Seconds instead of minutes: enough steps for a checkpoint."""
    return dataclasses.replace(
        recipe,
        text=Text(stories=300, held_out=8),
        tokenizer=dataclasses.replace(recipe.tokenizer, size=700, documents=100),
        pretrain=dataclasses.replace(recipe.pretrain, d_model=16, n_layers=1, n_heads=2, steps=60),
    )


@pytest.mark.slow
def test_killed_while_it_trains_and_resumed_it_is_the_same_to_the_last_bit(tmp_path):
    """Signal 9 to everything behind the first checkpoint; then compared by SHA-256."""
    stages = capstone.plan(small())[:3]
    whole = [one for one, _ in run(stages, tmp_path / "whole")]
    folder = tmp_path / "killed"
    code = (
        "from pathlib import Path\n"
        "from minillm.recipes import capstone\n"
        "from minillm.recipes.stages import run\n"
        "from test_capstone import small\n"
        f"list(run(capstone.plan(small())[:3], Path({str(folder)!r})))\n"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=paths, stderr=subprocess.DEVNULL)
    checkpoints = folder / "pretrain" / "checkpoints"
    while not list(checkpoints.glob("step_*.json")):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert not (folder / "pretrain" / "done.json").exists()
    time.sleep(1)
    resumed = list(run(stages, folder))
    assert [why for _, why in resumed] == ["", "", "goes on"]
    assert resumed[2][0].starts == 2 and not checkpoints.exists()
    assert [one.output for one, _ in resumed] == [one.output for one in whole]
    assert resumed[2][0].numbers["curve"] == whole[2].numbers["curve"]
    other = dataclasses.replace(small().pretrain, seed=1)  # the comparison can fail
    changed = [
        one for one, _ in run([*stages[:2], dataclasses.replace(stages[2], settings=other)], folder)
    ]
    assert changed[2].files["model.safetensors"] != whole[2].files["model.safetensors"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """`make capstone-quick`, on one thread."""
    folder = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "-m", "minillm.recipes.capstone", "--quick", "--threads", "1"]
    said = subprocess.run(
        [*command, "--folder", folder], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return folder, said, {x["name"]: Done(**x) for x in card["stages"]}


@pytest.mark.slow
def test_the_quick_run_improves_stage_by_stage(quick):
    _, said, done = quick
    text, exam = done["text"].numbers, done["exam"].numbers
    # pre-training: from nothing toward the entropy, far below a compressor, never below the floor
    base = exam["pretrain"]
    assert text["floor_bits"] < base["bits"] < text["lzma_bits"] < text["unigram_bits"]
    assert base["nats"] < 2.2 * text["floor"]
    curve = done["pretrain"].numbers["curve"]["loss"]
    assert curve[0] > math.log(1000) and curve[-1] < 0.15 * curve[0]
    # fine-tuning: cards that reach who asked; the base wrote none
    sft = exam["sft"]
    assert base["in_place"] < 0.05 and sft["in_place"] > sft["in_place_by_chance"] + 0.1
    assert sft["true"] > base["true"] + 1
    assert sft["bits"] < 1.3 * base["bits"]  # and it still tells stories
    # reward: better than a coin, by three standard errors
    judge = done["reward"].numbers
    assert judge["accuracy"] > 0.5 + 3 * 0.5 / math.sqrt(judge["pairs"])
    # PPO: for the same requests, by what nothing has learned from
    gain = np.subtract(exam["ppo"]["true_each"], sft["true_each"])
    assert gain.mean() > 2 * gain.std(ddof=1) / math.sqrt(len(gain))
    assert 0 < exam["ppo"]["kl"] < 30 and sft["kl"] == pytest.approx(0, abs=1e-3)
    # int8: a quarter of the bytes, nearly the same model
    small = done["int8"].numbers
    assert small["bytes"] < 0.32 * small["bytes_before"]
    assert exam["int8"]["bits"] == pytest.approx(exam["ppo"]["bits"], rel=0.05)
    assert all(one.peak_bytes > 1e8 and one.starts == 1 for one in done.values())
    for name in (*done, *report.MODELS.values(), "Write a card" if "Write a card" in said else ""):
        assert name in said


@pytest.mark.slow
def test_what_comes_out_can_be_talked_to(quick):
    folder, _, _ = quick
    command = [sys.executable, "-m", "minillm.chat", folder / "int8"]
    asked = "Write a card for Mia about the kite.\n/quit\n"
    said = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True).stdout
    assert "Dear" in said


def test_the_recorded_card_has_what_the_lecture_draws():
    path = ROOT / "assets" / "benchmarks" / "capstone.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    done = [Done(**one) for one in card["stages"]]
    assert [one.name for one in done] == [stage.name for stage in capstone.plan(FULL)]
    assert card["command"].startswith("python -m minillm.recipes.capstone")
    assert "stages" in card and "torch" in card
    exam = done[-1].numbers
    assert set(report.MODELS) <= set(exam)
    for line in (report.table(done), report.samples(done)):
        assert all(label in line for label in report.MODELS.values())
    assert storyteller.END  # the same marker in both recipes
