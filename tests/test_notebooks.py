"""Lectures: fresh, conventional, and they print the same again in a new kernel.

The strict comparison is nbval's, one lecture to a test so that workers share them.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from classroom import execute as ex

ROOT = Path(__file__).resolve().parents[1]
LECTURES = sorted(ROOT.glob("chapters/*/lecture.ipynb"))
NOTEBOOKS = sorted(ROOT.glob("chapters/*/*.ipynb"))
SETUP = """\
import sys
from pathlib import Path

root = next(p for p in Path.cwd().resolve().parents if (p / "minillm").is_dir())
sys.path.insert(0, str(root))  # the course, wherever Jupyter was started"""
CLAIM = re.compile(r"# claim (\d\d)\.\d+: \S.*")


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


each_lecture = pytest.mark.parametrize("path", LECTURES, ids=name_of)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)


def nbval(path, folder, timeout=280):
    """Run nbval on one notebook as `pytest` does, in a process with an environment of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment.pop("MPLBACKEND", None)  # a kernel draws inline
    environment |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # nbval is enough
    (folder / "empty.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "empty.ini")]
    command += [f"--rootdir={path.parent}", "-p", "no:cacheprovider", "-p", "nbval.plugin"]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "120"]
    command += ["--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg"), str(path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=path.parent
    )
    return done.returncode, done.stdout + done.stderr


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


# --- the lectures of the course


def test_there_are_lectures():
    assert LECTURES, "no chapter has a lecture"


@each_lecture
def test_stored_outputs_belong_to_the_code(path):
    assert ex.problems(path.read_text(encoding="utf-8")) == []


@each_notebook
def test_first_cell_finds_the_course(path):
    first = code_cells(nbformat.read(path, as_version=4))[0]
    assert "setup" in first.metadata.get("tags", [])
    assert first.source == SETUP


@each_notebook
def test_denormals_are_flushed_where_torch_is_used(path):
    code = "\n".join(sources(nbformat.read(path, as_version=4), "code"))
    if re.search(r"^\s*(import|from) torch", code, re.MULTILINE):
        first_use = re.search(r"torch\.(?!set_flush_denormal)\w+\(", code)
        flush = code.find("torch.set_flush_denormal(True)")
        assert flush >= 0, "torch.set_flush_denormal(True) is missing"
        assert first_use is None or flush < first_use.start(), f"after {first_use.group()}"


@each_lecture
def test_opening_and_closing_say_what_they_should(path):
    notebook = nbformat.read(path, as_version=4)
    texts = sources(notebook, "markdown")
    number = path.parent.name[:2]
    assert texts[0].startswith(f"# {number}"), "the title begins with the chapter's number"
    assert sum(bool(re.match(r"# ", text)) for text in texts) == 1, "one title"
    opening = " ".join(texts[:3]).lower()
    for what in (r"\?", r"you (can|will)", r"minutes", r"(before|prerequisite|need)"):
        assert re.search(what, opening), f"the opening says nothing like {what!r}"
    headings = [line for text in texts for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) >= 4
    closing = "\n".join(texts[-8:]).lower()
    for what in ("summary", "symbol", "further reading", r"chapter|next"):
        assert re.search(what, closing), f"the closing says nothing like {what!r}"


@each_lecture
def test_code_cells_fit_a_screen(path):
    code = sources(nbformat.read(path, as_version=4), "code")
    long = [source.splitlines()[0] for source in code if len(source.splitlines()) > 20]
    assert not [line for line in long if not line.startswith("import")], "more than 20 lines"


@each_notebook
def test_no_picture_is_fetched_from_elsewhere(path):
    pattern = r"!\[[^\]]*\]\(\s*(?:https?:)?//|<img[^>]+src=['\"]?\s*(?:https?:)?//"
    for source in sources(nbformat.read(path, as_version=4), "markdown"):
        assert not re.search(pattern, source), source[:200]


@each_notebook
def test_claims_are_tagged_and_can_fail(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        tagged = "claim" in cell.metadata.get("tags", [])
        first = cell.source.splitlines()[0] if cell.source else ""
        assert tagged == first.startswith("# claim"), f"tag and first line disagree: {first}"
        if tagged:
            found = CLAIM.fullmatch(first)
            assert found and found.group(1) == path.parent.name[:2], first
            asserts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
            names = [any(isinstance(x, ast.Name) for x in ast.walk(a.test)) for a in asserts]
            assert any(names), f"no assert that looks at a value: {first}"


@pytest.mark.slow
@pytest.mark.timeout(300)
@each_lecture
def test_a_new_kernel_prints_the_same(path, tmp_path):
    code, said = nbval(path, tmp_path)
    assert code == 0, said[-6000:]


# --- the tools, on notebooks made here


def write(path, *cells, tags=()):
    cells = [new_code_cell(c) if isinstance(c, str) else c for c in cells]
    for index, names in tags:
        cells[index].metadata["tags"] = names
    path.write_text(nbformat.writes(new_notebook(cells=cells)))
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A notebook that was executed and stored, as text."""
    path = write(
        tmp_path_factory.mktemp("stored") / "lecture.ipynb",
        new_markdown_cell("# 99 · Example"),
        "print(2 + 2)",
        "",
        "import threading, os\nprint(threading.Lock())\nprint('pid', os.getpid())",
        "import time\nprint(f'{time.perf_counter() % 60:.3f} s, {time.time() % 97:.1f} it/s')",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass",
        "import ipywidgets\nipywidgets.IntSlider()",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
        "2 + 2",
        tags=[(5, ["nbval-ignore-output"]), (6, ["nbval-ignore-output"])],
    )
    ex.store(path)
    return path.read_text()


@pytest.mark.slow
def test_store_gives_a_fresh_notebook(stored):
    assert ex.problems(stored) == []
    notebook = nbformat.reads(stored, as_version=4)
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == [1, None, 2, 3, 4, 5, 6, 7]
    assert cells[0].outputs[0].text == "4\n"
    assert cells[4].outputs == [] and "widgets" not in notebook.metadata
    assert cells[5].outputs[0].data == {
        "text/plain": "(interactive: run this cell to move its sliders)"
    }
    assert "image/png" in cells[6].outputs[0].data
    assert set(notebook.metadata) == {"kernelspec", "language_info", "minillm"}
    ids = [c.id for c in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert "version" not in notebook.metadata.language_info  # would differ between machines


@pytest.mark.slow
def test_every_change_of_a_stored_notebook_is_noticed(stored):
    def after(change):
        notebook = nbformat.reads(stored, as_version=4)
        change(notebook, code_cells(notebook))
        return " ".join(ex.problems(nbformat.writes(notebook)))

    def new_source(_, cells):
        cells[0].source += "  # changed"

    def swapped(notebook, _):
        notebook.cells[1], notebook.cells[3] = notebook.cells[3], notebook.cells[1]

    def run_twice(_, cells):
        cells[0].execution_count = 9

    def raised(_, cells):
        cells[0].outputs = [new_output("error", ename="E", evalue="", traceback=[])]

    def large(_, cells):
        cells[0].outputs[0].text = "x" * 1_000_001

    def place(_, cells):
        cells[0].outputs[0].text = f"{ROOT}/chapters"

    def no_hash(notebook, _):
        del notebook.metadata["minillm"]

    def widgets(notebook, _):
        notebook.metadata["widgets"] = {}

    assert after(lambda *_: None) == ""
    assert "code changed" in after(new_source)
    assert "code changed" in after(swapped)
    assert "execution counts" in after(run_twice)
    assert "stores an error" in after(raised)
    assert "bytes" in after(large)
    assert "path of this machine" in after(place)
    assert "never executed" in after(no_hash)
    raw = json.loads(stored)
    raw["cells"][1]["id"] = raw["cells"][0]["id"]
    assert "not a valid notebook" in " ".join(ex.problems(json.dumps(raw)))
    assert "widget state" in after(widgets)
    assert "not a valid notebook" in " ".join(ex.problems("{}"))
    assert "not a valid notebook" in " ".join(ex.problems("no json"))


@pytest.mark.slow
def test_nbval_passes_a_true_output_and_catches_a_planted_one(stored, tmp_path):
    path = tmp_path / "lecture.ipynb"
    path.write_text(stored)
    code, said = nbval(path, tmp_path)
    assert code == 0, said[-4000:]
    path.write_text(stored.replace('"4\\n"', '"5\\n"'))
    code, said = nbval(path, tmp_path)
    assert code == 1 and "1 failed" in said, said[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "error"),
    [("print('before')\nraise ValueError('no')", CellExecutionError), ("%%bash\nexit 1", None)],
)
def test_a_run_that_raised_is_not_stored(bad, error, tmp_path):
    path = write(tmp_path / "lecture.ipynb", "x = 1", bad, tags=[(1, ["raises-exception"])])
    before = path.read_bytes()
    with pytest.raises(error or CellExecutionError):
        ex.store(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_cell_that_does_not_end_is_not_stored(tmp_path):
    path = write(tmp_path / "lecture.ipynb", "while True:\n    pass")
    before = path.read_bytes()
    with pytest.raises(CellTimeoutError):
        ex.store(path, timeout=2)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_the_command_says_what_failed_and_goes_on(tmp_path):
    bad = write(tmp_path / "bad.ipynb", "1 / 0")
    good = write(tmp_path / "good.ipynb", "print('fine')")
    command = [sys.executable, "-m", "classroom.execute"]
    done = subprocess.run(
        [*command, str(bad), str(good)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "1 of 2" in done.stderr and "ZeroDivisionError" in done.stderr
    assert re.search(r"good\.ipynb: \d+\.\d s", done.stdout)
    check = [*command, "--check", str(good)]
    assert subprocess.run(check, cwd=ROOT, timeout=120).returncode == 0
    good.write_text(good.read_text().replace("fine", "otherwise"))
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "code changed" in done.stderr


def test_a_notebook_edited_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    path = write(tmp_path / "lecture.ipynb", "x = 1")

    def edited_meanwhile(notebook, folder, timeout):
        path.write_text(path.read_text() + " ")
        return ex.Timing(0.0, ())

    monkeypatch.setattr(ex, "execute", edited_meanwhile)
    with pytest.raises(ValueError, match="changed on disk"):
        ex.store(path)
    assert path.read_text().endswith(" ")


def test_cell_ids_follow_the_source_not_the_place():
    one = new_notebook(cells=[new_code_cell("a"), new_markdown_cell("b"), new_code_cell("a")])
    two = new_notebook(cells=[new_markdown_cell("new"), *json.loads(json.dumps(one.cells))])
    two = nbformat.from_dict(two)
    ex.clean(one)
    ex.clean(two)
    ids = [cell.id for cell in one.cells]
    assert len(set(ids)) == 3 and [cell.id for cell in two.cells][1:] == ids
    nbformat.validate(one)


def test_hash_separates_cells():
    joined = new_notebook(cells=[new_code_cell("a\nb")])
    apart = new_notebook(cells=[new_code_cell("a"), new_code_cell("b")])
    text = new_notebook(cells=[new_code_cell("a\nb"), new_markdown_cell("words")])
    assert ex.code_hash(joined) != ex.code_hash(apart)
    assert ex.code_hash(joined) == ex.code_hash(text)
