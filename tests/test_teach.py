"""The teaching kit: what it shows, draws, checks and audits, each with a planted fault."""

import asyncio
import base64
import csv
import functools
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.paths import ROOT
from minillm.teach import check, claims, coursemap, doctor, plots, quiz, show, viewers, widgets
from minillm.teach.doctor import Machine, examine, read_pins, report, triton_mode

pytestmark = pytest.mark.usefixtures("closed_figures")


@pytest.fixture
def closed_figures():
    yield
    plt.close("all")


# --- the package ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "imports",
    [
        "from minillm.teach import show, doctor",
        "import minillm.teach.show, minillm.teach.doctor; from minillm.teach import show, doctor",
        "from minillm.teach.show import Source; from minillm.teach import show, doctor",
    ],
)
def test_show_and_doctor_are_callable_whichever_way_they_were_imported_first(imports):
    code = f"{imports}; assert show(len.__class__ and __import__('json').dumps).name == 'dumps'; "
    code += "assert callable(doctor) and doctor.Finding('a', 'b').ok"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_doctor_needs_nothing_but_python():
    """It must run where the course's packages are missing: block them all and see."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch','triton','matplotlib','psutil','ipywidgets'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import minillm.teach.doctor as d\n"
        "m = d.Machine((3, 9, 0), 'Linux', 'x86_64', 2, None, 9.0, None, None, None)\n"
        "print(d.report(d.examine(m)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "PyTorch    not installed" in done.stdout


# --- doctor --------------------------------------------------------------------------------------

PACKAGES = dict.fromkeys((*doctor.PACKAGES, *doctor.TOOLS, *doctor.JUPYTER), "1.0")
HEALTHY = Machine(
    python=(3, 12, 1),
    system="Linux",
    architecture="x86_64",
    cores=2,
    ram_gb=8.0,
    disk_gb=50.0,
    torch="2.13.0+cpu",
    gpu=None,
    triton="3.7.1",
    packages=PACKAGES,
)


def problems(machine, pins=None):
    return {finding.name: finding.fix for finding in examine(machine, pins) if not finding.ok}


def test_a_healthy_machine_has_no_problem_and_needs_neither_gpu_nor_browser():
    assert problems(HEALTHY) == {}
    assert report(examine(HEALTHY)).endswith("This machine is ready.")
    assert "FIX" not in report(examine(HEALTHY))


@pytest.mark.parametrize(
    ("change", "name", "fix"),
    [
        ({"python": (3, 10, 4)}, "Python", "PYTHON=python3.11"),
        ({"torch": None}, "PyTorch", "pip install torch==2.13.0"),
        ({"torch": "2.6.0"}, "PyTorch", "pip install torch==2.13.0"),
        ({"triton": "3.6.0"}, "Triton", "triton==3.7"),
        ({"triton": None}, "Triton", "pip install triton==3.7.1"),
        ({"ram_gb": 1.9}, "memory", "4 GB"),
        ({"ram_gb": None}, "memory", "psutil"),
        ({"disk_gb": 0.3}, "disk", "make clean"),
        ({"packages": {**PACKAGES, "einops": None}}, "packages", "pip install einops"),
        ({"packages": {**PACKAGES, "ipywidgets": None}}, "Jupyter", "pip install ipywidgets"),
    ],
)
def test_each_planted_fault_is_found_alone_with_the_line_that_fixes_it(change, name, fix):
    found = problems(replace(HEALTHY, **change), {"torch": "2.13.0", "triton": "3.7.1"})
    assert list(found) == [name]
    assert fix in found[name]
    assert fix in report(
        examine(replace(HEALTHY, **change), {"torch": "2.13.0", "triton": "3.7.1"})
    )


def test_older_pair_of_torch_and_triton_is_fine():
    assert problems(replace(HEALTHY, torch="2.11.0", triton="3.6.0")) == {}


def test_triton_is_not_missed_where_it_does_not_exist():
    mac = replace(
        HEALTHY, system="Darwin", architecture="arm64", triton=None, gpu="Apple GPU (Metal)"
    )
    assert problems(mac) == {}
    assert triton_mode(mac) == "absent"


@pytest.mark.parametrize(
    ("gpu", "environ", "mode"),
    [
        (None, {}, "interpreter"),
        ("1 × NVIDIA H200, 151 GB", {}, "GPU"),
        ("1 × NVIDIA H200, 151 GB", {"TRITON_INTERPRET": "1"}, "interpreter"),
        ("1 × NVIDIA H200, 151 GB", {"TRITON_INTERPRET": "0"}, "GPU"),
    ],
)
def test_triton_mode(gpu, environ, mode):
    assert triton_mode(replace(HEALTHY, gpu=gpu, environ=environ)) == mode


def test_doctor_on_this_machine(capsys):
    findings = doctor({})
    printed = capsys.readouterr().out
    assert [f.name for f in findings][:2] == ["Python", "PyTorch"]
    assert torch.__version__.split("+")[0] in printed and len(printed.splitlines()) >= len(findings)
    assert read_pins(ROOT / "requirements.txt")["torch"] in torch.__version__


# --- show ----------------------------------------------------------------------------------------


def documented(x: int) -> int:
    """Twice x."""

    # the reason
    return 2 * x


@functools.wraps(documented)
def wrapper(x):
    return documented(x)


class Thing:
    """A thing."""

    @property
    def size(self):
        return 3

    @classmethod
    def make(cls):
        """Only this."""


def test_show_displays_the_source_with_file_and_line():
    shown = show(documented)
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "def documented" in text)
    assert repr(shown).startswith(f"# tests/test_teach.py, line {line}\ndef documented(x: int)")
    assert '"""Twice x."""' in shown.code
    bundle = shown._repr_mimebundle_()
    assert f"tests/test_teach.py, line {line}" in bundle["text/html"]
    text = html.unescape(re.sub(r"<!--.*?-->|<[^>]+>", "", bundle["text/html"]))
    assert shown.code in text, "the HTML without its tags is the source"


def test_what_is_compared_does_not_move_with_the_lines():
    """A comparison of stored outputs sees text/plain, and html without the sanitized block."""
    shown = show(documented)
    moved = replace(shown, line=shown.line + 17)
    assert shown._repr_mimebundle_()["text/plain"] == moved._repr_mimebundle_()["text/plain"]
    block = r"(?s)<!-- source -->.*?<!-- /source -->"
    assert re.sub(block, "", shown.to_html()) == re.sub(block, "", moved.to_html()) == ""
    assert shown.to_html() != moved.to_html()
    assert str(ROOT) not in repr(shown) + shown.to_html()


def test_show_without_docstring_keeps_comments_and_stays_python():
    shown = show(documented, docstring=False)
    assert "Twice" not in shown.code and "# the reason" in shown.code
    names = {}
    exec(shown.code, names)
    assert names["documented"](4) == 8
    bare = show(Thing, docstring=False).code
    assert "A thing" not in bare and "Only this" not in bare
    exec(bare, names)
    assert names["Thing"]().size == 3


def test_show_unwraps():
    want = show(documented).code
    for obj in (wrapper, functools.partial(documented, 1), functools.lru_cache(documented)):
        assert show(obj).code == want
    assert "return 3" in show(Thing.size).code
    assert "def make(cls)" in show(Thing.make).code
    assert "def test_show_unwraps" in show(sys.modules[__name__]).code


def test_show_unwraps_triton_functions():
    """A jit function keeps the Python function in `.fn`, an autotuned one a jit function there."""

    class Jit:
        def __init__(self, fn):
            self.fn = fn

        def __call__(self):
            raise RuntimeError("not on the host")

    assert show(Jit(documented)).code == show(Jit(Jit(documented))).code == show(documented).code


@pytest.mark.parametrize("obj", [len, 3, "text", np.add])
def test_show_refuses_what_has_no_source(obj):
    with pytest.raises(ValueError, match="no Python source"):
        show(obj)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_inks_read_on_light_and_on_dark():
    """WCAG 2 asks for 3 for large text and 4.5 for small; both at once cannot exceed 4.6."""
    assert round(contrast("#000000", "#ffffff")) == 21
    for ink in show.INKS.values():
        assert contrast(ink, "#ffffff") > 3.7 and contrast(ink, "#111111") > 3.7, ink
    for background in viewers.TOKEN_COLORS:
        assert contrast(background, viewers.TOKEN_INK) > 7


# --- plots ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=7), st.floats(0, 10))
def test_spread_keeps_order_and_gap(positions, gap):
    moved = plots.spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(np.array(moved)[order]) >= gap - 1e-6).all()


@pytest.mark.parametrize("seed", range(5))
def test_spread_moves_as_little_as_possible(seed):
    """The problem is convex: if no allowed point nearby costs less, none anywhere does."""
    rng = np.random.default_rng(seed)
    x, gap = np.sort(rng.uniform(0, 4, size=5)), 1.1
    best = np.array(plots.spread(list(x), gap))
    nearby = best + rng.normal(size=(20_000, 5)) * 10.0 ** rng.uniform(-3, 0, size=(20_000, 1))
    for i in range(1, 5):
        nearby[:, i] = np.maximum(nearby[:, i], nearby[:, i - 1] + gap)
    costs = ((nearby - x) ** 2).sum(-1)
    assert costs.min() >= ((best - x) ** 2).sum() - 1e-9
    pushed = [x[0]]  # the control: pushing everything to the right keeps the gap, at a cost
    for value in x[1:]:
        pushed.append(max(value, pushed[-1] + gap))
    assert ((np.array(pushed) - x) ** 2).sum() > costs.min()


def test_spread_refuses_a_negative_gap():
    with pytest.raises(ValueError, match="gap=-1"):
        plots.spread([1.0], -1)


def test_line_labels_do_not_overlap():
    plots.use_style()
    fig, ax = plt.subplots()
    for i in range(5):
        ax.plot([0, 1], [0, 1 + 0.001 * i], label=f"line {i}")
    texts = plots.label_lines(ax)
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = fig.bbox
    assert all(box.x1 <= inside.x1 and box.y1 <= inside.y1 for box in boxes), "room was made"


def simulate(color, kind):
    """Color under a deficiency of red or green vision (Machado et al., 2009, severity 1)."""
    matrix = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }[kind]
    linear = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
    return np.clip(matrix @ linear, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_colors_can_be_told_apart(kind):
    seen = [simulate(color, kind) for color in plots.COLORS]
    gaps = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 0.1
    red_green = [simulate(color, kind) for color in ("#c05050", "#6f8a3f")]
    assert np.abs(red_green[0] - red_green[1]).max() < 0.35, "the control: a bad pair comes closer"


def test_bound_refuses_an_unknown_axis():
    _, ax = plt.subplots()
    assert plots.bound(ax, 2.0, "limit").get_linestyle() == "--"
    with pytest.raises(ValueError, match="'z'"):
        plots.bound(ax, 2.0, "limit", axis="z")


# --- check ---------------------------------------------------------------------------------------

T = torch.tensor


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (1, 1), (1, 1.0), ("a", "a"), ([1, (2, "b")], [1, (2, "b")]), ({"a": [1]}, {"a": [1]}),
        (T([1, 2]), T([1, 2])), (T([1, 2], dtype=torch.int32), T([1, 2])),
        (float("nan"), float("nan")),
        (T([1.0, float("nan")]), T([1.0, float("nan")])), (T(3.0), 3.0), ({1, 2}, {2, 1}),
        (torch.zeros(0), torch.zeros(0)), (T([1.5], dtype=torch.bfloat16), T([1.5])), (True, True),
    ],
)  # fmt: skip
def test_equal_accepts(got, want):
    check.equal(got, want)
    check.close(got, want)


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (None, [1], "`return` missing"),
        (..., 3, "still to be written"),
        (1, 2, "expected 2, got 1"),
        (True, 1, "expected the number 1, got True"),
        (1, True, "expected the bool True, got the int 1"),
        ("cat", "cut", "position 1"),
        ("ca", "cat", "position 2"),
        ([1, 2], (1, 2), "expected a tuple, got the list"),
        ([1, 2], [1, 2, 3], "expected 3 entries, got 2"),
        ([1, [5, 6]], [1, [5, 7]], "at [1][1]: expected 7, got 6"),
        ({"a": 1}, {"b": 1}, "missing ['b'], not expected ['a']"),
        ({"a": [1]}, {"a": [2]}, "at ['a'][0]"),
        (T([1.0, 2.0]), T([[1.0, 2.0]]), "expected shape (1, 2), got shape (2,)"),
        (T([1.0, 0.0]), T([True, False]), "expected dtype bool, got float32"),
        ([1, 2], T([1, 2]), "expected a Tensor of shape (2,)"),
        (T([[0, 1], [2, 4]]), T([[0, 1], [2, 3]]),
         "1 of 4 values differ (shape (2, 2)); the first at index (1, 1): expected 3, got 4"),
        (T([1.0, float("nan")]), T([1.0, 2.0]), "index 1: expected 2, got nan"),
        (T(1.0), T(2.0), "the first: expected 2, got 1"),
        (b"a", "a", "expected the str 'a', got the bytes"),
    ],
)  # fmt: skip
def test_equal_says_where_they_part(got, want, says):
    with pytest.raises(AssertionError) as caught:
        check.equal(got, want, "the task's own words")
    assert str(caught.value).startswith("the task's own words\n")
    assert says in str(caught.value)


def test_close_uses_both_tolerances_and_never_broadcasts():
    check.close(T([100.0]), T([100.0009]))
    check.close(1.0, 1.05, rtol=0.1)
    check.close(np.float64(2.0), 2)
    for got, want, options in [
        (T([100.0]), T([100.1]), {}),
        (1.0, 1.05, {"rtol": 0.01}),
        (T([1.0]), T([1.0, 1.0]), {}),
        (T([float("inf")]), T([1.0]), {"rtol": 1e9}),
        (T([1.0]), T([float("inf")]), {"rtol": 0.5}),
        (float("nan"), 1.0, {}),
    ]:
        with pytest.raises(AssertionError):
            check.close(got, want, **options)
    with pytest.raises(ValueError, match="rtol=-1"):
        check.close(1.0, 1.0, rtol=-1)


def test_raises():
    error = check.raises(ValueError, lambda: int("x"))
    assert isinstance(error, ValueError)
    with pytest.raises(AssertionError, match="call returned 3"):
        check.raises(ValueError, lambda: 3)
    with pytest.raises(AssertionError, match="expected ValueError, but ZeroDivisionError"):
        check.raises(ValueError, lambda: 1 / 0, "bad input is refused")


def test_that():
    check.that(T([True]).all(), "fine")
    with pytest.raises(AssertionError, match="not fine"):
        check.that([], "not fine")


# --- claims --------------------------------------------------------------------------------------

GOOD = "# claim 03.1: one is one\nx = 1\nassert x == 1"
ROW = ("03.1", "one is one", "Peano, Arithmetices principia, 1889", "holds", "")


def course(folder, rows=(ROW,), cells=((GOOD, ["claim"]),), header=claims.COLUMNS, count=1):
    """A small repository with one chapter, as the audit sees it."""
    chapter = folder / "03_attention"
    chapter.mkdir(parents=True, exist_ok=True)
    with (chapter / "claims.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    notebook = {
        "nbformat": 4,
        "cells": [
            {"cell_type": "markdown", "source": ["# claim 03.9: prose is not a claim cell"]},
            *(
                {
                    "cell_type": "code",
                    "source": text,
                    "metadata": {"tags": tags},
                    "execution_count": count,
                }
                for text, tags in cells
            ),
        ],
    }
    (chapter / "lecture.ipynb").write_text(json.dumps(notebook))
    return folder


def test_a_sound_course_has_no_problem(tmp_path):
    several = ((GOOD, ["claim"]), (GOOD.replace("== 1", "< 2"), ["claim"]), ("x = 2", []))
    assert claims.audit(course(tmp_path, cells=several)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": ()}, "has no row in a ledger"),
        ({"cells": ()}, "is not executed by any lecture"),
        ({"cells": ((GOOD.replace("assert", "bool"), ["claim"]),)}, "no assert that can fail"),
        ({"cells": ((GOOD.replace("x == 1", "True"), ["claim"]),)}, "no assert that can fail"),
        ({"cells": ((GOOD, ["claim"]), (GOOD, []))}, "lacks the tag"),
        ({"cells": ((GOOD, ["claim"]), ("x = 1\nassert x", ["claim"]))}, "first line must read"),
        ({"cells": ((GOOD, ["claim"]), (GOOD.replace("03.", "3."), ["claim"]))}, "first line"),
        ({"cells": ((GOOD, ["claim"]), (GOOD.replace("03.", "04."), ["claim"]))}, "chapter 04"),
        ({"count": None}, "was not executed"),
        ({"rows": (ROW, ROW)}, "has 2 rows"),
        ({"rows": (ROW, ("3.1", *ROW[1:]))}, "must look like"),
        ({"rows": (ROW, ("04.1", *ROW[1:]))}, "ledger of chapter 03"),
        ({"rows": ((*ROW[:3], "maybe", ""),)}, "outcome 'maybe'"),
        ({"rows": ((*ROW[:3], "does not hold", ""),)}, "needs a note"),
        ({"rows": ((ROW[0], "one", "", "holds", ""),)}, "has no source"),
        ({"rows": (ROW[:4],)}, "not 5 fields"),
        ({"header": ("id", "claim", "source", "outcome", "note")}, "columns"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(tmp_path, change, says):
    found = claims.audit(course(tmp_path, **change))
    assert any(says in problem for problem in found), found


def test_claims_table_and_exit_status(tmp_path, capsys):
    assert claims.main(course(tmp_path / "good")) == 0
    printed = capsys.readouterr().out
    assert "03.1" in printed and "HOLDS" in printed and "Peano" in printed
    assert printed.endswith("1 claim in the ledger: 1 × holds\n")
    assert claims.main(course(tmp_path / "bad", rows=())) == 1
    assert "has no row" in capsys.readouterr().err


def test_table_is_sorted_by_number(tmp_path):
    rows = [("03.10", *ROW[1:]), ("03.2", *ROW[1:])]
    assert [claim.id for claim in claims.load(course(tmp_path, rows=rows))] == ["03.2", "03.10"]


# --- viewers -------------------------------------------------------------------------------------


def plain(fragment):
    return html.unescape(re.sub(r"<[^>]+>", "", fragment))


def test_token_html_escapes_and_shows_the_invisible():
    shown = viewers.token_html(
        ["<script>", " a\n", "\t&", "\ud83d".encode("utf-8", "surrogatepass")]
    )
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert plain(shown) == "<script>·a↵⇥&<ED><A0><BD>"
    assert shown.count("<br>") == 1


def test_token_colors_are_stable():
    def color(fragment, token):
        return re.search(rf"background:(#\w+)[^>]*>{token}<", fragment)[1]

    assert color(viewers.token_html(["a", "b"]), "b") == color(
        viewers.token_html(["c", "a", "b"]), "b"
    )
    assert len({color(viewers.token_html([f"w{i}"]), f"w{i}") for i in range(40)}) > 4


@settings(deadline=None)
@given(st.text(max_size=20))
def test_no_text_breaks_the_token_view(text):
    cut = [bytes([byte]) for byte in text.encode("utf-8", "surrogatepass")]
    shown = viewers.token_html(cut)
    assert shown.count("<span") == shown.count("</span>") == len(cut)


class ByteTokenizer:
    vocab = {i: bytes([i]) for i in range(256)}  # noqa: RUF012

    def encode(self, text):
        return list(text.encode())


class DecodeOnly:
    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_pieces_of_every_kind_of_tokenizer():
    assert viewers.pieces(ByteTokenizer(), "é") == [b"\xc3", b"\xa9"]
    assert viewers.pieces(DecodeOnly(), "é!") == ["é", "!"]
    assert viewers.pieces(str.split, "a b") == ["a", "b"]
    assert viewers.pieces(["a", "b"], "ignored") == ["a", "b"]
    with pytest.raises(ValueError, match="int is no tokenizer"):
        viewers.pieces(3, "a")


def test_compare_tokens_counts():
    shown = plain(viewers.compare_tokens({"bytes": ByteTokenizer(), "words": str.split}, "né a"))
    assert "bytes: 5 tokens, 1.00 bytes each" in shown
    assert "words: 2 tokens, 2.50 bytes each" in shown
    assert "0 tokens" in plain(viewers.compare_tokens({"words": str.split}, ""))


def weights(layers=2, heads=3, t=4, s=4):
    w = torch.rand(layers, heads, t, s, generator=torch.Generator().manual_seed(0))
    w = w * torch.ones(t, s).tril(s - t)
    return w / w.sum(-1, keepdim=True)


def test_attention_figure_draws_the_chosen_head():
    w = weights()
    ax = widgets.attention_figure(w, ["a", " b", "c", "d"], layer=1, head=2).axes[0]
    drawn = ax.images[0].get_array()
    assert np.allclose(drawn.filled(0.0), w[1, 2])
    assert drawn.mask.sum() == 6, "what the mask forbids is not drawn as a small weight"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "·b", "c", "d"]


def test_attention_figure_labels_the_last_queries():
    ax = widgets.attention_figure(weights(t=2), list("abcd")).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c", "d"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"tokens": ["a"]}, "1 tokens"),
        ({"layer": 2}, "layer=2"),
        ({"head": -1}, "head=-1"),
        ({"weights": torch.rand(3)}, "shape"),
        ({"weights": torch.rand(5, 4)}, "4 tokens do not label"),
    ],
)
def test_attention_figure_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says):
        widgets.attention_figure(**{"weights": weights(), "tokens": list("abcd"), **kwargs})


# --- widgets -------------------------------------------------------------------------------------


def bars(n: int = 2, kind: str = "plain"):
    if n == 5:
        raise ValueError("n=5 is <refused>")
    fig, ax = plt.subplots(figsize=(2, 1.5))
    ax.bar(range(n), range(n), color="k" if kind == "plain" else "r")
    return fig


def test_explore_redraws_when_a_control_moves():
    shown = widgets.explore(bars, n=(1, 5), kind=["plain", "red"])
    assert shown.values() == {"n": 2, "kind": "plain"}, "it starts at the view's defaults"
    before = shown.image.value
    assert before == shown.static == widgets.png(bars())
    shown.controls["n"].value = 3
    assert shown.image.value != before and shown.image.value == widgets.png(bars(3))
    shown.controls["kind"].value = "red"
    assert shown.image.value == widgets.png(bars(3, "red"))
    assert shown.static == before
    assert plt.get_fignums() == [], "no figure stays open"


def test_explore_shows_the_message_of_a_refused_value_and_recovers():
    shown = widgets.explore(bars, n=(1, 5))
    shown.controls["n"].value = 5
    assert "&lt;refused&gt;" in shown.message.value and shown.image.value == shown.static
    shown.controls["n"].value = 3
    assert shown.message.value == "" and shown.image.value == widgets.png(bars(3))


def test_moves_within_a_moment_are_folded_into_one_redraw():
    calls = []

    def view(n: int = 1):
        calls.append(n)
        return bars(1)

    async def drag():
        shown = widgets.explore(view, n=(1, 30))
        for value in range(2, 20):
            shown.controls["n"].value = value
        await asyncio.sleep(5 * widgets.DELAY)
        shown.controls["n"].value = 25
        await asyncio.sleep(5 * widgets.DELAY)

    asyncio.run(drag())
    assert calls == [1, 19, 25]


def test_what_is_displayed_holds_the_widget_and_the_picture():
    bundle = widgets.explore(bars, n=(1, 5))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == widgets.png(bars())
    assert bundle["text/plain"] == "interactive figure over n"


def page(bundle):
    """HTML that nbconvert makes of a stored output, without a kernel and without widget state."""
    import nbformat
    from nbconvert import HTMLExporter

    output = nbformat.v4.new_output("display_data", data=bundle)
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    return HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]


def test_a_page_without_a_kernel_shows_the_picture():
    bundle = widgets.explore(bars, n=(1, 5))._repr_mimebundle_()
    assert f"data:image/png;base64,{bundle['image/png']}" in page(bundle).replace("\n", "")
    del bundle["image/png"]
    assert "data:image/png;base64,iVBORw0KGgo" not in re.sub(
        r"(?s)<style.*?</style>", "", page(bundle)
    )
    tokens = widgets.token_view(str.split, "some words")._repr_mimebundle_()
    assert "2 tokens" in page(tokens)


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        ({}, "at least one control"),
        ({"m": (1, 2)}, r"cannot be given \['m'\]"),
        ({"n": (5, 9)}, "n=2, the view's default"),
        ({"n": (3, 1)}, "is no control"),
        ({"kind": ["red", "blue"]}, "kind='plain'"),
        ({"kind": []}, "is no control"),
        ({"n": 4}, "is no control"),
    ],
)
def test_explore_refuses(controls, says):
    with pytest.raises(ValueError, match=says):
        widgets.explore(bars, **controls)


def test_controls_of_every_kind():
    import ipywidgets

    def view(a, b=0.5, c="one", d=True, e="text", f=3):
        return bars(2)

    own = ipywidgets.IntText(value=9)
    shown = widgets.explore(view, a=(1, 4), b=(0.0, 1.0), c={"one": "one"}, d=True, e="text", f=own)
    kinds = [type(control).__name__ for control in shown.controls.values()]
    assert kinds == ["IntSlider", "FloatSlider", "Dropdown", "Checkbox", "Text", "IntText"]
    assert shown.values() == {"a": 1, "b": 0.5, "c": "one", "d": True, "e": "text", "f": 9}


def test_attention_view_moves_by_layer_head_and_mask():
    w = weights()
    shown = widgets.attention_view({"causal": w, "none": w.flip(-1)}, list("abcd"))
    assert list(shown.controls) == ["layer", "head", "mask"]
    seen = {shown.image.value}
    for name, value in (("layer", 1), ("head", 2), ("mask", "none")):
        shown.controls[name].value = value
        seen.add(shown.image.value)
    assert len(seen) == 4
    assert list(widgets.attention_view(w, list("abcd")).controls) == ["layer", "head"]
    with pytest.raises(ValueError, match="one shape"):
        widgets.attention_view({"a": w, "b": w[:1]}, list("abcd"))


def test_token_view_follows_what_is_typed():
    def refuse(text):
        if "!" in text:
            raise ValueError("no <shouting>")
        return text.split()

    shown = widgets.token_view({"words": refuse}, "one two")
    assert shown.html.value == shown.static and "2 tokens" in plain(shown.static)
    shown.text.value = "one two three"
    assert "3 tokens" in plain(shown.html.value)
    shown.text.value = "hey!"
    assert "&lt;shouting&gt;" in shown.html.value


# --- quiz ----------------------------------------------------------------------------------------

ASKED = quiz.read_questions(ROOT / "assets" / "data" / "selfcheck.csv")


def test_the_self_check_has_ten_sound_questions():
    assert len(ASKED) == 10
    letters = [question.answer for question in ASKED]
    assert max(letters.count(letter) for letter in "abcd") <= 4, "no letter gives it away"
    assert all(question.why.endswith(".") for question in ASKED)


def test_grade():
    right = {i: question.answer for i, question in enumerate(ASKED)}
    assert quiz.grade(ASKED, right) == [True] * 10
    wrong = {i: "b" if letter == "a" else "a" for i, letter in right.items()}
    assert quiz.grade(ASKED, wrong) == [False] * 10
    assert quiz.grade(ASKED, {3: right[3], 4: None}) == [None] * 3 + [True] + [None] * 6
    with pytest.raises(ValueError, match="no question 10"):
        quiz.grade(ASKED, {10: "a"})
    with pytest.raises(ValueError, match="'e' is no choice"):
        quiz.grade(ASKED, {0: "e"})


@pytest.mark.parametrize(
    ("choices", "answer"), [(("x", "y"), "c"), (("x", "x"), "a"), (("x",), "a"), (("x", ""), "a")]
)
def test_unsound_questions_are_refused(choices, answer):
    with pytest.raises(ValueError, match="1 \\+ 1"):
        quiz.Question("1 + 1?", choices, answer, "count")


def test_quiz_answers_when_a_button_is_pressed():
    shown = quiz.Quiz(ASKED)
    assert shown.notes[0].value == "" and set(shown.answers().values()) == {None}
    shown.radios[0].value = ASKED[0].answer
    assert "Right." in shown.notes[0].value and "1 of 1 right" in shown.score.value
    shown.radios[1].value = "a" if ASKED[1].answer != "a" else "b"
    assert "Not quite." in shown.notes[1].value and "1 of 2 right" in shown.score.value
    assert shown.notes[2].value == "", "no answer is given away"


def test_the_static_page_folds_every_answer():
    fragment = quiz.static_html(ASKED)
    folded = re.findall(r"<details[^>]*>.*?</details>", fragment)
    assert len(folded) == 10
    unfolded = re.sub(r"<details[^>]*>.*?</details>", "", fragment)
    assert all(html.escape(q.why) in f for q, f in zip(ASKED, folded, strict=True))
    assert not any(html.escape(q.why) in unfolded for q in ASKED)
    assert quiz.Quiz(ASKED)._repr_mimebundle_()["text/html"] == fragment


# --- the map -------------------------------------------------------------------------------------

CHAPTERS = coursemap.read_chapters()


def test_the_map_knows_the_whole_course():
    assert [chapter.number for chapter in CHAPTERS] == [f"{i:02}" for i in range(33)]
    assert len({chapter.part for chapter in CHAPTERS}) == 6
    assert all(chapter.question for chapter in CHAPTERS)


def test_every_chapter_folder_is_on_the_map():
    on_map = {f"{chapter.number}_{chapter.name}" for chapter in CHAPTERS}
    folders = {path.name for path in (ROOT / "chapters").iterdir() if path.is_dir()}
    assert folders <= on_map


def test_way_to_is_closed_and_in_order():
    """Against a fixed point: add what members need until nothing changes."""
    needs = {chapter.number: set(chapter.needs) for chapter in CHAPTERS}
    for goal in needs:
        closure = {goal}
        while closure != (grown := closure.union(*(needs[number] for number in closure))):
            closure = grown
        way = coursemap.way_to(CHAPTERS, goal)
        assert set(way) == closure and way == sorted(way) and way[-1] == goal and way[0] == "00"
    with pytest.raises(ValueError, match="'99'"):
        coursemap.way_to(CHAPTERS, "99")


def test_only_what_is_there_is_called_available(tmp_path):
    assert coursemap.available(CHAPTERS, tmp_path) == set()
    (tmp_path / "03_attention").mkdir()
    assert coursemap.available(CHAPTERS, tmp_path) == set(), "a folder is not yet a lecture"
    (tmp_path / "03_attention" / "lecture.ipynb").write_text("{}")
    assert coursemap.available(CHAPTERS, tmp_path) == {"03"}


def test_a_chapter_cannot_need_a_later_one(tmp_path):
    lines = ["number,name,title,part,needs,question", "00,a,a,p,01,?", "01,b,b,p,,?"]
    (tmp_path / "chapters.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"00 needs \['01'\]"):
        coursemap.read_chapters(tmp_path / "chapters.csv")


def test_the_map_shows_every_chapter_and_its_texts_fit():
    plots.use_style()
    fig = coursemap.map_figure(CHAPTERS, {"00", "03"}, goal="20")
    fig.canvas.draw()
    ax = fig.axes[0]
    boxes = [patch for patch in ax.patches if patch.get_width() > 0.5]
    assert len(boxes) == 33
    white = matplotlib.colors.to_rgb("white")
    filled = [box for box in boxes if box.get_facecolor()[:3] != white]
    assert len(filled) == 2
    faded = [box for box in boxes if box.get_alpha() < 1]
    assert len(faded) == 33 - len(coursemap.way_to(CHAPTERS, "20"))
    for chapter in CHAPTERS:
        text = next(t for t in ax.texts if t.get_text().replace("\n", " ") == chapter.title)
        inside = text.get_window_extent()
        assert any(
            box.get_window_extent().padded(2).containsx(inside.x1)
            and box.get_window_extent().containsx(inside.x0)
            and box.get_window_extent().containsy((inside.y0 + inside.y1) / 2)
            for box in boxes
        ), chapter.title


# --- published figures ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["models.csv", "training_runs.csv"])
def test_published_figures_have_sources_and_plausible_sizes(name):
    with (ROOT / "assets" / "data" / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 12 and len({row["model"] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"20\d\d-[01]\d", row["date"]), row
        assert re.search(r", 20\d\d\b", row["source"]), row
        assert 1e7 < float(row["parameters"]) < 2e12
        tokens = row.get("tokens")
        assert not tokens or 1e11 < float(tokens) < 2e12, "a count 1e4 too large is a misprint"


def test_point_labels_avoid_each_other_and_the_points():
    plots.use_style()
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 10, 14), rng.uniform(0, 10, 14)
    fig, ax = plt.subplots()
    ax.plot(x, y, "o")
    texts = plots.label_points(ax, x, y, [f"model {i}" for i in range(14)])
    renderer = fig.canvas.get_renderer()
    boxes = []
    for text in texts:
        text.update_positions(renderer)
        boxes.append(matplotlib.text.Text.get_window_extent(text, renderer))
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    points = ax.transData.transform(np.column_stack([x, y]))
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_the_style_is_set_and_legible():
    plots.use_style()
    assert matplotlib.rcParams["figure.constrained_layout.use"]
    pixels = matplotlib.rcParams["font.size"] * matplotlib.rcParams["figure.dpi"] / 72
    assert pixels / 2 >= 8, "letters of 8 pixels at half size"
