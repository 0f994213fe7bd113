"""The shipped storyteller is what its log says, knows the stories, and answers questions."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import stories
from minillm.data.stories import Story
from minillm.infer import generate
from minillm.model import LM
from minillm.paths import ASSETS
from minillm.recipes import storyteller
from minillm.recipes.storyteller import Recipe, Rows
from minillm.tokenizers import load_course_tokenizer

TOKENIZER = load_course_tokenizer()
END = TOKENIZER.special_ids["<|endoftext|>"]


@pytest.fixture(scope="module")
def shipped():
    log = json.loads((zoo.MODELS / "storyteller.log.json").read_text(encoding="utf-8"))
    return zoo.load("storyteller")[0], log


@pytest.fixture(scope="module")
def told():
    """The held-out stories of the recipe, of which no training row holds any."""
    recipe = Recipe()
    assert recipe.seed * 10**8 + recipe.steps * recipe.batch < recipe.held_out_seed
    return [stories.sample(recipe.held_out_seed + i) for i in range(240)]


def small(**changes):
    cfg = ModelConfig(TOKENIZER.vocab_size, 16, 2, 2, max_len=384, position="rope", norm="rms")
    return LM(dataclasses.replace(cfg, **changes), seed=0).eval()


@pytest.fixture(scope="module")
def nll(shipped, told):
    """-log p of each whole story, in the plainest way: one row at a time, from the logits."""
    lm, found = shipped[0], []
    with torch.no_grad():
        for story in told:
            ids = torch.tensor([[END, *TOKENIZER.encode(story.text), END]])
            logits = lm(ids[:, :-1])[0].double()
            found.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return torch.stack(found)


@pytest.mark.slow
def test_nothing_beats_the_entropy_and_the_model_comes_near(nll, told):
    """-log p(story) + log P(story) has a mean of at least 0, and of at most a tenth of H."""
    paired = nll + torch.tensor([story.log_prob for story in told])
    assert len(paired) >= 200
    assert paired.mean() >= -3 * paired.std() / math.sqrt(len(paired))
    assert nll.mean() <= 1.1 * stories.entropy()
    assert paired.mean() <= 0.1 * stories.entropy()


@pytest.mark.slow
def test_the_loss_is_what_the_log_says(shipped, nll, told):
    lm, log = shipped
    recipe = Recipe(**log["recipe"])
    everything = [stories.sample(recipe.held_out_seed + i) for i in range(recipe.held_out)]
    found = storyteller.story_nll(lm, TOKENIZER, [story.text for story in everything])
    tokens = sum(len(TOKENIZER.encode(story.text)) + 1 for story in everything)
    assert tokens == log["held_out_tokens"]
    assert found.sum().item() / tokens == pytest.approx(log["held_out_loss"], rel=1e-4)
    torch.testing.assert_close(found[: len(told)], nll, rtol=1e-4, atol=1e-3)
    excess = found + torch.tensor([story.log_prob for story in everything])
    assert excess.mean().item() == pytest.approx(log["excess_per_story"], abs=1e-2)


def test_the_log_belongs_to_the_files_that_are_shipped(shipped):
    lm, log = shipped
    recipe = Recipe(**log["recipe"])
    assert recipe == dataclasses.replace(Recipe(), folder=recipe.folder)
    assert log["command"].startswith("python -m minillm.recipes.storyteller")
    assert log["steps"][-1]["step"] == recipe.steps
    assert log["entropy_per_story"] == stories.entropy()
    assert log["held_out_loss"] < 1.1 * stories.entropy() * recipe.held_out / log["held_out_tokens"]
    assert log["seconds"] > 0 and log["recipe"]["threads"] == 2
    assert 1e6 <= sum(p.numel() for p in lm.parameters()) <= 3e6
    assert (zoo.MODELS / "storyteller.safetensors").stat().st_size < 8e6
    cfg = lm.cfg
    assert (cfg.norm, cfg.position, cfg.mlp, cfg.tie_embeddings) == ("rms", "rope", "swiglu", True)


def test_training_took_at_most_half_an_hour(shipped):
    assert shipped[1]["seconds"] <= 1800


@pytest.mark.slow
def test_questions_about_stories_are_answered(shipped, told):
    right = storyteller.answered(shipped[0], TOKENIZER, told)
    assert len(right) == sum(len(story.questions) for story in told) > 2000
    assert sum(right) / len(right) >= 0.95


def say(lm, prompt, most=24):
    said = generate(lm, torch.tensor([prompt]), most, temperature=0, stop=END)
    return TOKENIZER.decode([t.item() for t in said]).removesuffix("<|endoftext|>")


@pytest.mark.slow
def test_generate_says_what_answered_counts(shipped, told):
    lm, few = shipped[0], told[:6]
    right = iter(storyteller.answered(lm, TOKENIZER, few, batch=4))
    for story in few:
        for asked, answer in story.questions:
            prompt = storyteller.question(TOKENIZER, story.text, asked)
            assert (say(lm, prompt) == answer) == next(right), (asked, answer)
    assert next(right, None) is None


def test_it_tells_stories_that_the_grammar_accepts(shipped):
    """Sampled, not learned by heart: stories of its own, most of them without a fault."""
    lm = shipped[0]
    rng = torch.Generator().manual_seed(0)
    prompts = torch.full((12, 1), END)
    said = torch.stack(list(generate(lm, prompts, 220, generator=rng, stop=END)), dim=1)
    sound = 0
    for row in said.tolist():
        text = TOKENIZER.decode(row[: row.index(END)]) if END in row else ""
        try:
            stories.parse(text)
        except ValueError:
            continue
        sound += 1
    assert sound >= 6, f"{sound} of 12 stories are stories"


def test_rows_hold_whole_documents_and_learn_answers_only():
    rows = Rows(Recipe(batch=4, questions=2, prose_every=4), TOKENIZER)
    inputs, targets, mask = next(rows)
    user, assistant = (TOKENIZER.special_ids[f"<|{role}|>"] for role in ("user", "assistant"))
    prose = (ASSETS / "data" / "prose.txt").read_text(encoding="utf-8")
    for i in range(4):
        ids = [*inputs[i].tolist(), targets[i, -1].item()]
        assert ids[0] == END and ids[1:] == targets[i].tolist()
        end = ids.index(END, 1)
        text, rest = TOKENIZER.decode(ids[1:end]), ids[end + 1 :]
        assert mask[i, :end].all()  # every token of the document, and the marker behind it
        if i == 3:
            assert text in prose and not mask[i, end:].any()
            continue
        story = stories.parse(text)
        asked = 0
        while rest and rest[0] == user:
            at, stop = rest.index(assistant), rest.index(END)
            pair = TOKENIZER.decode(rest[1:at]), TOKENIZER.decode(rest[at + 1 : stop])
            assert pair in story.questions
            first = len(ids) - len(rest)
            learned = mask[i, first - 1 : first + stop].tolist()
            assert learned == [False] * (at + 1) + [True] * (stop - at)
            rest, asked = rest[stop + 1 :], asked + 1
        assert asked == 2


def test_rows_go_on_where_they_stopped():
    recipe = Recipe(batch=2)
    one, other = Rows(recipe, TOKENIZER), Rows(recipe, TOKENIZER)
    next(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for x, y in zip(next(one), next(other), strict=True):
        assert torch.equal(x, y)
    assert one.row(0).ids != one.row(1).ids != Rows(Recipe(seed=1), TOKENIZER).row(1).ids


def test_the_loss_is_the_cross_entropy_of_what_is_learned():
    lm = small()
    inputs, targets, mask = next(Rows(Recipe(batch=2), TOKENIZER))
    total, count = storyteller.loss(lm, inputs, targets, mask)
    hidden = targets.masked_fill(~mask, -100)
    want = F.cross_entropy(lm(inputs).flatten(0, 1), hidden.flatten(), reduction="sum")
    torch.testing.assert_close(total, want)
    assert count == mask.sum()
    whole, _ = storyteller.loss(lm, inputs, targets)
    assert whole > total


def test_answered_agrees_with_asking_one_by_one():
    """On an untrained model with large weights, and "answers" that are what it says, or not."""
    lm = small(init="xavier")
    for p in lm.parameters():
        p.data *= 3 if p.ndim == 2 else 1
    text, asked = stories.sample(3).text, ("Who?", "Where is it?", "Why", "What was Ben?")
    said = {}
    for q in asked:
        prompt = torch.tensor([storyteller.question(TOKENIZER, text, q)])
        said[q] = [t.item() for t in generate(lm, prompt, 3, temperature=0)]
    questions = [(q, TOKENIZER.decode(ids[:2])) for q, ids in said.items()]
    group = [Story(text, tuple(questions), 0.0), Story("A cat.", questions[:1], 0.0)]
    right = storyteller.answered(lm, TOKENIZER, group)
    want = []
    for story in group:
        for q, a in story.questions:
            prompt = storyteller.question(TOKENIZER, story.text, q)
            ids = [*TOKENIZER.encode(a), END]
            new = generate(lm, torch.tensor([prompt]), len(ids), temperature=0)
            want.append([t.item() for t in new] == ids)
    assert right == want


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="does not fit a context of 8"):
        next(Rows(Recipe(batch=1, max_len=8), TOKENIZER))
