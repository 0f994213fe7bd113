"""Conversations: whole characters, turns that fit, stopped answers; and the program around them."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import chat, zoo
from minillm.align.reward import RewardModel, save_reward
from minillm.config import ModelConfig
from minillm.infer.batching import complete
from minillm.infer.conversation import Answer, Conversation
from minillm.infer.quantize import Int8Linear, quantize_int8, save_int8
from minillm.model import LM, files
from minillm.teach.chat_view import chat_view, transcript
from minillm.tokenizers import COURSE_TOKENIZER, load_course_tokenizer, train_bpe
from minillm.tokenizers.chat import render

TOKENIZER = load_course_tokenizer()
END, USER = (TOKENIZER.special_ids[f"<|{name}|>"] for name in ("endoftext", "user"))
CONFIG = ModelConfig(4096, d_model=8, n_layers=1, n_heads=2, max_len=96, position="rope")


class Scripted(LM):
    """Says the tokens it was given, one after another, and then its end."""

    def __init__(self, ids, cfg=CONFIG):
        super().__init__(cfg, seed=0)
        self.script, self.asked = [*ids, END], []

    def embed(self, tokens, positions):
        if tokens.shape[1] > 1:
            self.asked.append(tokens[0].tolist())
        return super().embed(tokens, positions)

    def unembed(self, x):
        logits = torch.full((1, 1, self.cfg.vocab_size), -1e9)
        logits[..., self.script[0] if len(self.script) == 1 else self.script.pop(0)] = 0.0
        return logits


def single_bytes(text):
    """One token a byte, so that every longer character is cut."""
    data = text.encode() if isinstance(text, str) else text
    return [token for byte in data for token in TOKENIZER.encode_bytes(bytes([byte]))]


def talking(ids, **rest):
    return Conversation(Scripted(ids), TOKENIZER, **rest)


@given(st.text(min_size=1, max_size=20).filter(lambda t: len(t.encode()) < 60))
@settings(max_examples=40, deadline=None)
def test_pieces_are_whole_characters(text):
    talk = talking(single_bytes(text))
    pieces = list(talk.say("hi"))
    assert pieces == list(text)  # with a byte a token, each piece is one character
    assert talk.answers[0].text == text
    assert talk.answers[0].tokens == len(text.encode())
    assert talk.answers[0].ended == "end"


@given(st.binary(min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_bytes_that_are_no_text_come_as_the_tokenizer_shows_them(data):
    ids = single_bytes(data)
    assert "".join(talking(ids).say("hi")) == TOKENIZER.decode(ids)


def test_an_answer_that_is_cut_within_a_character_says_so():
    talk = talking(single_bytes("né"), max_new_tokens=2)
    assert list(talk.say("hi")) == ["n", "\ufffd"]
    assert talk.answers[0].ended == "length"
    assert "cut" in str(talk.answers[0])
    # a marker that is not the end gives the word back as well, and is not shown
    talk = talking([*single_bytes("ab"), USER, *single_bytes("c")])
    assert "".join(talk.say("hi")) == "ab"
    assert talk.answers[0].ended == "end"


def test_turns_are_read_as_complete_reads_them():
    model = LM(CONFIG, seed=3)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(8)  # so that it says different things
    settings = {"temperature": 0.0, "max_new_tokens": 8}
    talk, alone = Conversation(model, TOKENIZER, **settings), {"chat": True, "max_new_tokens": 8}
    first = "".join(talk.say("one"))
    assert [first] == complete(model, TOKENIZER, ["one"], **alone)
    second = "".join(talk.say("two"))
    said = [("user", "one"), ("assistant", first), ("user", "two")]
    assert [second] == complete(model, TOKENIZER, [said], **alone)
    forgetful = Conversation(model, TOKENIZER, turns=0, **settings)
    list(forgetful.say("one"))
    third = "".join(forgetful.say("two"))
    assert [third] == complete(model, TOKENIZER, ["two"], **alone)
    assert third != second
    assert forgetful.forgotten == 0
    talk.reset()
    assert "".join(talk.say("two")) == third
    drawn = [Conversation(model, TOKENIZER, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    texts = ["".join(each.say("one")) for each in drawn]
    assert texts[0] == texts[1] != texts[2]


def test_what_no_longer_fits_is_forgotten_oldest_first():
    answer = single_bytes("good")
    model = Scripted([])
    talk = Conversation(model, TOKENIZER, system="be kind", max_new_tokens=20)
    room, seen = 96 - 20, []
    for i in range(9):
        talk.model.script = [*answer, END]
        list(talk.say(f"question {i} of nine"))
        seen.append(talk.forgotten)
        # the most turns that fit, found by trying all of them
        past = [("system", "be kind"), *map(tuple, talk.messages[:-1])]
        fits = [
            k
            for k in range(0, len(past) - 1, 2)
            if len(render(TOKENIZER, [past[0], *past[1 + k :]], reply=True).ids) <= room
        ]
        assert talk.forgotten == fits[0]
        expected = render(TOKENIZER, [past[0], *past[1 + fits[0] :]], reply=True).ids
        assert talk.model.asked[-1] == expected
    assert seen[0] == 0 < seen[-1]
    assert seen == sorted(seen)
    assert len(talk.messages) == 18
    before = (list(talk.messages), talk.forgotten)
    with pytest.raises(ValueError, match=r"the message has \d+ tokens.*too many.*holds 96"):
        talk.say("long " * 90)
    with pytest.raises(ValueError, match="blank"):
        talk.say(" \n")
    assert before == (talk.messages, talk.forgotten)


@pytest.mark.parametrize("way", ["closed", "interrupted"])
def test_a_stopped_answer_stays_and_the_talk_goes_on(way, monkeypatch):
    talk = talking(single_bytes("abcdé"), reward=lambda q, a: torch.tensor([1.0]))
    pieces = talk.say("hi")
    assert [next(pieces), next(pieces)] == ["a", "b"]
    if way == "closed":
        pieces.close()
    else:
        monkeypatch.setattr(talk.model, "unembed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
        monkeypatch.undo()
    assert [m.content for m in talk.messages] == ["hi", "ab"]
    assert (talk.answers[0].ended, talk.answers[0].reward) == ("stopped", None)
    talk.model.script = [*single_bytes("xy"), END]
    assert list(talk.say("on")) == ["x", "y"]
    assert talk.answers[1].reward == 1.0
    # nothing came: it was not said
    monkeypatch.setattr(talk.model, "unembed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talk.say("lost"))
    assert len(talk.messages) == 4
    assert len(talk.answers) == 2


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_reward_is_of_the_last_message_and_its_answer():
    def reward(requests, responses):
        seen.append((requests, responses))
        if requests == ["bad"]:
            raise ValueError("asks for no card")
        return torch.tensor([float("nan") if requests == ["odd"] else 2.5])

    seen = []
    talk = talking(single_bytes("yes"), reward=reward)
    for text in ("good", "bad", "odd"):
        talk.model.script = [*single_bytes("yes"), END]
        list(talk.say(text))
    assert seen == [([text], ["yes"]) for text in ("good", "bad", "odd")]
    assert [a.reward for a in talk.answers] == [2.5, None, None]
    told = [str(a) for a in talk.answers]
    assert told[0].startswith("reward 2.50 · 3 tokens")
    assert told[1].startswith("no reward: asks for no card")
    assert told[2].startswith("no reward: it is nan")


def test_settings_that_mean_nothing_are_refused():
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature="):
            talking([], temperature=wrong)
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 96}, {"turns": -1}):
        with pytest.raises(ValueError, match="must"):
            talking([], **wrong)
    other = train_bpe("hi ho", 262, special_tokens=["<|endoftext|>"])
    with pytest.raises(ValueError, match="4096 tokens, the tokenizer has 2"):
        Conversation(Scripted([]), other)
    bare = ModelConfig(other.vocab_size, d_model=8, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="lacks the special tokens"):
        Conversation(LM(bare), other)


class Screen:
    """A terminal: lines that somebody types (or an error that comes instead), and what appears."""

    def __init__(self, lines, interrupt_at=None):
        self.lines, self.shown, self.interrupt_at = list(lines), "", interrupt_at

    def read(self, prompt):
        self.shown += prompt
        if not self.lines:
            raise EOFError
        if isinstance(line := self.lines.pop(0), type):
            raise line
        self.shown += f"{line}\n"
        return line

    def write(self, text):
        self.shown += text
        if text == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt


def test_the_terminal_answers_obeys_and_ends():
    talk, lines = talking(single_bytes("né\x1b[2J")), ["hi", "", "/temperature 0.25", "/reset"]
    screen = Screen(
        [*lines, "/temperature much", "/sing", "/help", KeyboardInterrupt, "/quit", "no"]
    )
    chat.talk(talk, screen.read, screen.write)
    shown = screen.shown.split("you> ")
    assert shown[1].startswith("hi\nné\ufffd[2J\n  [7 tokens")  # no escape code reaches a terminal
    assert talk.temperature == 0.25
    assert talk.messages == []
    assert shown[4] == "/reset\nforgotten\n"
    assert shown[5].startswith("/temperature much\n! could not convert")
    assert "no command" in shown[6]
    assert "/quit" in shown[7]
    assert shown[8] == "\n/quit or ctrl-D ends\n"
    assert shown[9] == "/quit\n"
    assert screen.lines == ["no"]


def test_an_interrupt_stops_the_answer_and_not_the_program():
    talk = talking(single_bytes("abcdef"))
    screen = Screen(["hi", "again"], interrupt_at="c")
    chat.talk(talk, screen.read, screen.write)
    assert "hi\nabc\n  [3 tokens · stopped" in screen.shown
    assert "again\ndef\n" in screen.shown
    assert [m.content for m in talk.messages] == ["hi", "abc", "again", "def"]


def test_the_terminal_says_when_it_forgets_and_when_a_message_is_too_long():
    talk = talking([], max_new_tokens=20)
    screen = Screen(["a question of some length, to fill it up"] * 9 + ["long " * 90])
    chat.talk(talk, screen.read, screen.write)
    assert screen.shown.count("(the context is full: the oldest 1 turn forgotten)") > 1
    assert "! the message has" in screen.shown


@pytest.fixture
def folder(tmp_path):
    """A model, its reward model, the model in int8, and the tokenizer."""
    (tmp_path / "tokenizer.json").write_bytes(COURSE_TOKENIZER.read_bytes())
    model = LM(CONFIG, seed=0)
    files.save(model, tmp_path, "tiny", COURSE_TOKENIZER)
    save_reward(RewardModel(model, TOKENIZER), tmp_path, "tiny_reward")
    return tmp_path


def test_models_are_found_and_their_rewards(folder):
    where = str(folder)
    assert chat.find("storyteller") == (zoo.MODELS, "storyteller")
    assert chat.find(where) == chat.find(f"{where}/tiny") == (folder, "tiny")
    talk = chat.open_conversation(chat.Settings(where, temperature=0.5, turns=3))
    assert isinstance(talk.reward, RewardModel)
    assert (talk.temperature, talk.turns) == (0.5, 3)
    assert chat.open_conversation(chat.Settings(where, reward="none")).reward is None
    eight = chat.open_conversation(chat.Settings(where, int8=True))
    assert isinstance(eight.model.head, Int8Linear)
    save_int8(quantize_int8(LM(CONFIG, seed=0)), folder, "small", COURSE_TOKENIZER)
    with pytest.raises(ValueError, match=r"holds \['small', 'tiny'\]"):
        chat.find(where)
    found = chat.open_conversation(chat.Settings(f"{where}/small", reward="tiny_reward"))
    assert isinstance(found.model.head, Int8Linear)
    assert isinstance(found.reward, RewardModel)
    list(found.say("hi"))
    assert found.answers[0].reward == 0.0  # a head that was never trained


def test_what_cannot_be_opened_says_why(folder, tmp_path_factory):
    empty, where = tmp_path_factory.mktemp("empty"), str(folder)
    for wrong, message in (
        (str(empty), "holds no model"),
        ("no such", "there is no model 'no such'.*'storyteller'"),
        (f"{where}/tiny_reward", "a reward model: it gives numbers"),
        ("icl_regression", "saved without a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.open_conversation(chat.Settings(wrong))
    with pytest.raises(ValueError, match="tiny is a language model, not a reward model"):
        chat.open_conversation(chat.Settings(where, reward="tiny"))
    card = (folder / "tiny_reward.json").read_text()
    (folder / "tiny_reward.json").write_text(
        card.replace('contents_sha256": "', 'contents_sha256": "0')
    )
    with pytest.raises(ValueError, match="tiny_reward was trained with a tokenizer"):
        chat.open_conversation(chat.Settings(where))
    weights = folder / "tiny.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"tiny\.safetensors cannot be read"):
        chat.open_conversation(chat.Settings(where))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"beside tiny there is no tokenizer\.json"):
        chat.open_conversation(chat.Settings(where))


@pytest.mark.slow
def test_the_program_streams_survives_ctrl_c_and_ends(folder):
    """As a process of its own, without a terminal; a model that would talk for an hour."""
    cfg = ModelConfig(4096, d_model=8, n_layers=1, n_heads=2, max_len=10**6, position="rope")
    model = LM(cfg, seed=0)
    with torch.no_grad():
        model.head.weight[END] = 0
    files.save(model, folder, "endless", COURSE_TOKENIZER)
    words = [f"{folder}/endless", "--max-new-tokens", "500000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm.chat", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    try:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        shown = b""
        while not shown.partition(b"you> ")[2][20:]:  # the answer has begun, and comes in pieces
            shown += os.read(process.stdout.fileno(), 100)
        process.send_signal(signal.SIGINT)
        while b"stopped" not in shown:
            shown += os.read(process.stdout.fileno(), 1000)
        out, errors = process.communicate(b"/temperature 0.5\n/quit\n")
    finally:
        process.kill()
    assert b"temperature 0.5" in out
    assert process.returncode == 0
    assert errors == b""
    wrong = [sys.executable, "-m", "minillm.chat", "no such model"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no model")
    assert "Traceback" not in done.stderr


def test_a_transcript_shows_markup_as_text_and_what_is_forgotten():
    answers = [Answer("<b>ok</b>", "end", 3, 0.1, 0.2, reward=-1.5)]
    messages = [("user", "<script>x</script>"), ("assistant", "<b>ok</b>"), ("user", "on")]
    shown = transcript(messages, answers, forgotten=2)
    assert "<script>" not in shown
    assert "<b>ok" not in shown
    assert shown.index("&lt;script&gt;") < shown.index("&lt;b&gt;ok") < shown.index("reward -1.50")
    assert (
        shown.index("reward -1.50") < shown.index("forgotten up to here") < shown.index("on</div>")
    )
    assert shown.count("border-left") == 3
    assert "forgotten" not in transcript(messages, answers)
    assert transcript([], []) == ""


def test_the_view_streams_scores_stops_and_forgets():
    talk = talking(single_bytes("né"), reward=lambda q, a: torch.tensor([0.25]))
    view, drawn = chat_view(talk, "hi"), []
    view.html.observe(lambda change: drawn.append(change["new"]), names="value")
    view.temperature.value = 1.5
    assert talk.temperature == 1.5
    view.send.click()  # without a running loop it is over on return
    assert [text.count("</div>") for text in drawn] == [2, 3, 3, 4]
    assert [">n<" in text or "n</div>" in text for text in drawn] == [False, True, False, False]
    assert "né</div>" in drawn[2]
    assert "reward 0.25 · 3 tokens" in drawn[-1]
    assert "né" in view._repr_mimebundle_()["text/html"]
    assert (view.text.value, view.stop.disabled, view.send.disabled) == ("", True, False)
    view.text.value = "long " * 90
    view.say()
    assert "too many" in view.html.value
    assert view.text.value.startswith("long")  # what was typed is not lost
    view.reset.click()
    assert talk.messages == []
    assert "né" not in view.html.value


def test_stop_is_heard_between_two_pieces():
    async def press_stop_while_it_talks():
        view = chat_view(talking(single_bytes("abcdefghij" * 3)), "hi")
        view.text._handle_custom_msg({"event": "submit"}, [])  # Enter
        while not view.html.value.count("abc"):
            await asyncio.sleep(0)
        assert not view.stop.disabled
        view.say()  # one answer at a time
        view.stop.click()
        await view._task
        return view

    view = asyncio.run(press_stop_while_it_talks())
    said = view.conversation.messages[1].content
    assert "abc" in said
    assert len(said) < 30
    assert "stopped" in view.html.value
    assert view.stop.disabled
