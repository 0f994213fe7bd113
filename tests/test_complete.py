"""Answering and scoring many prompts at once: each as if it were alone."""

import random

import pytest
import torch

from minillm import zoo
from minillm.config import ModelConfig
from minillm.data import stories
from minillm.infer.batching import by_length, check_fits, complete, pad_left, prompt_ids
from minillm.infer.generate import generate
from minillm.infer.scoring import embeddings, log_probs
from minillm.model import LM
from minillm.tokenizers import load_course_tokenizer


@pytest.fixture(scope="module")
def zoo_model():
    return zoo.load("storyteller")


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    told = [stories.sample(10**6 + i).text for i in range(24)]
    return [text[: rng.randrange(0, 200)] for text in told]


def alone(model, tokenizer, ids, new):
    """One prompt, greedy, without cache, batch or padding: the whole text again for each token."""
    ids, end, said = list(ids), tokenizer.special_ids["<|endoftext|>"], []
    for _ in range(new):
        with torch.no_grad():
            best = int(model(torch.tensor([ids]))[0, -1].argmax())
        if best == end:
            break
        said.append(best)
        ids.append(best)
    return tokenizer.decode(said)


def test_a_batch_says_what_each_prompt_gets_alone(zoo_model, prompts):
    model, tokenizer = zoo_model
    expected = [alone(model, tokenizer, prompt_ids(tokenizer, p), 10) for p in prompts[:12]]
    assert complete(model, tokenizer, prompts[:12], 10, batch=5) == expected


def test_without_the_padding_mask_answers_change(zoo_model, prompts):
    """The comparison above can fail: padding that is seen changes what is said."""
    model, tokenizer = zoo_model
    rows = [prompt_ids(tokenizer, p) for p in prompts[:12]]
    tokens, mask = pad_left(rows, tokenizer.special_ids["<|pad|>"])
    right = torch.stack(list(generate(model, tokens, 10, 0.0, mask=mask)))
    wrong = torch.stack(list(generate(model, tokens, 10, 0.0)))
    assert not torch.equal(right, wrong)


@pytest.mark.slow
def test_answers_of_a_chat_end_at_the_marker(zoo_model):
    model, tokenizer = zoo_model
    told = [stories.sample(10**9 + i) for i in range(8)]
    # the storyteller is asked behind a story, which is no chat: questions go in by hand
    chats = [[("user", s.questions[0][0])] for s in told]
    answers = complete(model, tokenizer, chats, 24, chat=True)
    texts = complete(model, tokenizer, [c[0][1] for c in chats], 24, chat=True)
    assert answers == texts  # a text is what the user says
    expected = [alone(model, tokenizer, prompt_ids(tokenizer, c, True), 24) for c in chats]
    assert answers == expected
    assert not any("<|" in answer for answer in answers)


def test_until_cuts_and_max_new_tokens_ends(zoo_model, prompts):
    model, tokenizer = zoo_model
    long = complete(model, tokenizer, prompts[:6], 30)
    cut = complete(model, tokenizer, prompts[:6], 30, until=" a")
    assert [text.partition(" a")[0] for text in long] == cut
    assert cut != long
    short = complete(model, tokenizer, prompts[:6], 3)
    assert all(text.startswith(start) for text, start in zip(long, short, strict=True))


def test_samples_repeat_with_the_same_generator(zoo_model, prompts):
    model, tokenizer = zoo_model

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return complete(model, tokenizer, prompts[:6], 8, temperature=1.0, generator=generator)

    assert drawn(0) == drawn(0) != drawn(1)


def test_too_long_says_by_how_much(zoo_model):
    model, tokenizer = zoo_model
    most = model.cfg.max_len
    text = "a" + " a" * (most - 21)
    assert len(prompt_ids(tokenizer, text)) == most - 19
    complete(model, tokenizer, [text], 1)
    with pytest.raises(ValueError, match=rf"prompt 1 has {most - 19} tokens.*{most} by 1$"):
        complete(model, tokenizer, ["a", text], 20)
    with pytest.raises(ValueError, match=r"by 1$"):
        log_probs(model, tokenizer, [text], [" a" * 20])
    with pytest.raises(ValueError, match=r"by \d+$"):
        embeddings(model, tokenizer, [text + " a" * 30])
    assert complete(model, tokenizer, [], 20) == []


def test_bad_input_is_refused(zoo_model):
    model, tokenizer = zoo_model
    with pytest.raises(ValueError, match="needs chat=True"):
        complete(model, tokenizer, [[("user", "hi")]], 4)
    with pytest.raises(ValueError, match="'assistant' where 'user'"):
        complete(model, tokenizer, [[("assistant", "hi")]], 4, chat=True)
    with pytest.raises(ValueError, match="batch=0"):
        complete(model, tokenizer, ["hi"], 4, batch=0)
    with pytest.raises(ValueError, match="empty option"):
        log_probs(model, tokenizer, ["hi"], [" a", ""])
    with pytest.raises(ValueError, match="2 prompts need one list of options"):
        log_probs(model, tokenizer, ["hi", "ho"], [[" a"], [" b", " c"]])


def test_groups_and_padding():
    rows = [[1], [1, 2, 3], [1, 2], [1, 2, 3, 4]]
    groups = list(by_length(rows, 3))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3]
    assert [len(rows[i]) for group in groups for i in group] == [4, 3, 2, 1]
    tokens, mask = pad_left(rows, 9)
    for row, kept, real in zip(rows, tokens.tolist(), mask.tolist(), strict=True):
        assert kept == [9] * (4 - len(row)) + row
        assert real == [False] * (4 - len(row)) + [True] * len(row)
    check_fits(rows, 1, 5)


@pytest.fixture(scope="module")
def small():
    """A random model in float64, to compare to many digits."""
    tokenizer = load_course_tokenizer()
    cfg = ModelConfig(tokenizer.vocab_size, 16, 2, 2, max_len=64, position="rope", norm="rms")
    return LM(cfg, seed=0).double().eval(), tokenizer


def test_log_probs_equal_the_chain_rule(small):
    model, tokenizer = small
    prompts = ["Once upon a time", "", "A kind old fox named Otto was"]
    options = [" a", " the slow river", " Max 42"]
    with torch.no_grad():
        for row, prompt in zip(log_probs(model, tokenizer, prompts, options), prompts, strict=True):
            for value, option in zip(row, options, strict=True):
                ids, expected = prompt_ids(tokenizer, prompt), 0.0
                for token in tokenizer.encode(option):
                    expected += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
                    ids.append(token)
                assert value.item() == pytest.approx(expected, abs=1e-10)


def test_options_of_each_prompt(small):
    model, tokenizer = small
    prompts = ["Once", "A kind old fox"]
    both = log_probs(model, tokenizer, prompts, [" a", " the", " fox", " river"])
    own = log_probs(model, tokenizer, prompts, [[" a", " the"], [" fox", " river"]])
    expected = torch.stack([both[0, :2], both[1, 2:]])
    torch.testing.assert_close(own, expected, atol=1e-12, rtol=0)


def test_embeddings_are_means_over_the_tokens_of_a_text(small):
    model, tokenizer = small
    texts = ["A kind old fox", "Once upon a time there was a slow river", ""]
    found = embeddings(model, tokenizer, texts, batch=2)
    for vector, text in zip(found, texts, strict=True):
        with torch.no_grad():
            expected = model.hidden(torch.tensor([prompt_ids(tokenizer, text)]))[0].mean(0)
        torch.testing.assert_close(vector, expected, atol=1e-12, rtol=0)
