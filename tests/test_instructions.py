"""Examples through a file and back, what a file may not hold, wordings, and what leaks."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.instructions import (
    TEMPLATES,
    Instruction,
    Template,
    conversation,
    inverted,
    leaked,
    read_jsonl,
    unique,
    write_jsonl,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SAID = TEXT.filter(str.strip)
EXAMPLES = st.lists(st.builds(Instruction, SAID, TEXT, SAID), max_size=6)
GOOD = '{"instruction": "Add.", "input": "1 2", "output": "3"}'


@given(EXAMPLES)
@settings(max_examples=100, deadline=None)
def test_a_file_gives_back_what_was_written(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    write_jsonl(path, examples)
    assert read_jsonl(path) == examples
    assert path.read_bytes().count(b"\n") == len(examples)


@pytest.mark.parametrize(
    "text", ["a\u2028b", "c\x85d", "e\x0bf\x0c", "f\r\ng", "é\U0001f600", '"\\']
)
def test_awkward_characters(tmp_path, text):
    """Also those that Python's splitlines takes for line ends: they do not end a line here."""
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [Instruction(text, text, text)] * 2)
    assert read_jsonl(path) == [Instruction(text, text, text)] * 2
    # another reader of the same format: line by line, as text
    with path.open(encoding="utf-8", newline="\n") as file:
        assert [json.loads(line)["output"] for line in file] == [text, text]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_last_line_may_end_or_not(tmp_path, ending):
    path = tmp_path / "x.jsonl"
    path.write_bytes((GOOD + "\r\n" + GOOD + ending).encode())
    assert read_jsonl(str(path)) == [Instruction("Add.", "1 2", "3")] * 2
    path.write_bytes(b"")
    assert read_jsonl(path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Expecting value"),
        ('{"instruction": "Add."', "delimiter"),
        (b"\xff", "utf-8"),
        ("[1]", r"an object .* is due, got \[1\]"),
        ('{"instruction": "Add.", "output": "3"}', r"missing: \['input'\], unknown: \[\]"),
        (GOOD[:-1] + ', "answer": "3"}', r"missing: \[\], unknown: \['answer'\]"),
        (GOOD.replace('"1 2"', "null"), r"must be strings, got \{'input': None\}"),
        (GOOD.replace('"3"', "3"), r"must be strings, got \{'output': 3\}"),
        (GOOD.replace('"3"', '" "'), "empty output"),
        (GOOD.replace('"Add."', '""'), "empty instruction"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "tasks.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([GOOD.encode(), GOOD.encode(), bad, GOOD.encode(), b""]))
    with pytest.raises(ValueError, match=rf"^tasks\.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_nothing_is_written_where_writing_fails(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [Instruction("a", "", "b")])
    with pytest.raises(UnicodeEncodeError):
        write_jsonl(path, [Instruction("c", "", "\ud800")])
    assert read_jsonl(path) == [Instruction("a", "", "b")]


@pytest.mark.parametrize(
    "fields", [("", "x", "y"), (" \n", "x", "y"), ("x", "", ""), ("x", "", "\t")]
)
def test_an_example_needs_something_to_follow_and_to_learn(fields):
    with pytest.raises(ValueError, match=r"with an empty (instruction|output)"):
        Instruction(*fields)


def test_every_wording_says_everything_and_differs():
    example = Instruction("DO {this} }{", "WITH {that} %s", "OUT")
    bare = Instruction("DO {this}", "", "OUT")
    said = [template.fill(example) for template in TEMPLATES]
    assert len(set(said)) == len(TEMPLATES) >= 4
    assert all(example.instruction in text and example.input in text for text in said)
    assert not any("OUT" in text for text in said)
    assert all("DO {this}" in template.fill(bare) for template in TEMPLATES)
    without = [template.fill(bare) for template in TEMPLATES]
    assert not any(re.search(r"input|text", text, re.IGNORECASE) for text in without)


@pytest.mark.parametrize(
    ("full", "bare", "used"),
    [
        ("{instruction}", "{instruction}", r"\['instruction'\]; it must use \['input', 'instr"),
        ("{input}", "{instruction}", r"\['input'\]; it must use"),
        ("{instruction} {input}", "Go on.", r"\[\]; it must use \['instruction'\]"),
        ("{instruction} {input}", "{instruction} {input}", r"knows \['instruction'\]"),
        ("{instruction} {input} {output}", "{instruction}", "'output'"),
        ("{instruction} {input} {}", "{instruction}", "''"),
        ("{instruction} {input.x}", "{instruction}", r"'input\.x'"),
        ("{instruction {input}", "{instruction}", "expected"),
    ],
)
def test_a_template_uses_its_fields_and_no_others(full, bare, used):
    with pytest.raises(ValueError, match=used):
        Template(full, bare)


def test_conversations_draw_their_wording():
    example = Instruction("Sort.", "b a", "a b")
    talks = [conversation(example, random.Random(seed)) for seed in range(60)]
    assert {talk[0] for talk in talks} == {("user", t.fill(example)) for t in TEMPLATES}
    assert all(talk[1:] == [("assistant", "a b")] for talk in talks)
    assert conversation(example, random.Random(3)) == talks[3]
    mine = Template("{input}: {instruction}", "{instruction}!")
    assert conversation(example, templates=[mine])[0] == ("user", "b a: Sort.")


def test_turned_round_and_back():
    example = Instruction("Sort.", "b a", "a b")
    turned = inverted(example, "Give something for which '{instruction}' has this answer.")
    ask = "Give something for which 'Sort.' has this answer."
    assert turned == Instruction(ask, "a b", "b a")
    assert inverted(turned, "Sort.") == example
    bare = Instruction("Name a color.", "", "red")
    assert inverted(bare, "Ask for it.") == Instruction("Ask for it.", "red", "Name a color.")
    with pytest.raises(ValueError, match=r"uses the fields \['instruction'\]"):
        inverted(bare, "Turn '{instruction}' round.")  # the answer stood in the question
    with pytest.raises(ValueError, match=r"knows \['instruction'\]"):
        inverted(example, "{output}?")


def test_every_question_once_and_none_in_both():
    first = Instruction("Sort the words.", "b a", "a b")
    again = Instruction("sort  the words.", "b A", "other")
    new = Instruction("Sort the words.", "c a", "a c")
    assert unique([first, new, again, new]) == [first, new]
    assert unique([again, first]) == [again]
    assert leaked([first], [new, again]) == [again]
    assert leaked([first], [new]) == [] == leaked([], [first])
