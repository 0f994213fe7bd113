"""Each assignment: the instructor passes, the released version fails helpfully, mistakes cost.

Starting a kernel and importing PyTorch takes longer than most assignments. So all runs of an
assignment share one kernel, the instructor's first. `%reset` before every other run leaves no name
of the run before it: a task that needs what another task's answer defines is found.
"""

import copy
import runpy
import shutil
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

from classroom.execute import kernel_environment

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENTS = sorted(ROOT.glob("chapters/*/assignment.ipynb"))
each_assignment = pytest.mark.parametrize("path", ASSIGNMENTS, ids=lambda p: p.parent.name)
SECONDS = 60
HELPFUL = ("NotImplementedError", "AssertionError")


def wrong_answers(chapter):
    file = ROOT / "tests" / "wrong_answers" / f"{chapter}.py"
    assert file.is_file(), f"no planted mistakes for {chapter}: {file.name} is missing"
    return runpy.run_path(str(file))["WRONG"]


def about(cell):
    return cell.metadata.get("nbgrader", {})


def tasks_of(notebook):
    """{grade_id of a solution cell: [grade_ids of the graded cells up to the next one]}."""
    tasks, current = {}, None
    for cell in notebook.cells:
        if about(cell).get("solution") and not about(cell).get("grade"):
            current = tasks.setdefault(about(cell)["grade_id"], [])
        elif about(cell).get("grade"):
            assert current is not None, f"{about(cell)['grade_id']} comes before any task"
            current.append(about(cell)["grade_id"])
    return tasks


# --- running


def run(notebooks, folder, tmp_path):
    """Execute notebooks in turn in one kernel, errors allowed.

    For each name of a notebook: {grade_id, or "cell 7" where there is none: None, or (name,
    message) of its error}. Beside it the seconds of the first one, with the kernel's start.
    """
    cells, places, ends = [], [], {}
    for name, notebook in notebooks.items():
        if cells:
            cells.append(new_code_cell("%reset -f"))
            places.append((name, "%reset"))
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                cells.append(new_code_cell(cell.source))
                places.append((name, about(cell).get("grade_id", f"cell {number}")))

    def complete(cell, cell_index):
        ends[places[cell_index][0]] = time.perf_counter()

    start = time.perf_counter()
    client = nbclient.NotebookClient(
        new_notebook(cells=cells),
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout={"ename": "Timeout", "evalue": "60 s", "traceback": []},
        on_cell_complete=complete,
        config=Config(
            KernelManager={"transport": "ipc", "connection_file": str(tmp_path / "kernel.json")}
        ),
    )
    client.execute(env=kernel_environment(str(tmp_path)))
    errors = {name: {} for name in notebooks}
    for (name, which), cell in zip(places, client.nb.cells, strict=True):
        raised = [o for o in cell.get("outputs", []) if o.output_type == "error"]
        errors[name][which] = (raised[0].ename, raised[0].evalue) if raised else None
    return errors, ends[next(iter(notebooks))] - start


def with_answers(notebook, answers):
    """A copy in which solution cells are replaced: {grade_id: source}."""
    changed = copy.deepcopy(notebook)
    unused = set(answers)
    for cell in changed.cells:
        if (name := about(cell).get("grade_id")) in answers:
            cell.source = answers[name]
            unused.discard(name)
    assert not unused, f"planted mistakes for cells that do not exist: {sorted(unused)}"
    return changed


def with_further_mistakes(notebook, wrong):
    """Each task's cells once per mistake behind the first, the right answer never among them.

    The graded cells are renamed: `t1_check#2` judges the mistake `wrong["t1"][2]`.
    """
    cells, group = [], []

    def close():
        name = about(group[0]).get("grade_id") if group else None  # None: before any task
        last = max((i for i, cell in enumerate(group) if about(cell).get("grade")), default=-1)
        for number, source in enumerate(wrong.get(name, [])[1:], start=1):
            for cell in group[: last + 1]:
                cell = new_code_cell(cell.source, metadata=copy.deepcopy(cell.metadata))
                if about(cell).get("grade_id") == name:
                    cell.source = source
                elif about(cell).get("grade"):
                    about(cell)["grade_id"] += f"#{number}"
                cells.append(cell)
        cells.extend(group[last + 1 :])  # what prepares the next task

    for cell in notebook.cells:
        if cell.cell_type == "code":
            if about(cell).get("solution") and not about(cell).get("grade"):
                close()
                group = []
            group.append(cell)
    close()
    return new_notebook(cells=cells)


# --- judging: what is wrong with a run, one line each


def not_clean(errors):
    """Of the instructor's version: every cell runs, so every point is given."""
    return [f"the instructor's {name}: {error}" for name, error in errors.items() if error]


def not_helpful(errors, graded):
    """Of the released version: no points, and errors that say what to do."""
    found = []
    for name, error in errors.items():
        if error is None:
            found += [f"{name} gives points for an empty answer"] * (name in graded)
        elif error[0] not in HELPFUL:
            found.append(f"released, {name}: {error[0]}: {error[1]}")
        elif len(error[1]) < 10:
            found.append(f"released, {name}: {error[0]} says only {error[1]!r}")
    return found


def not_its_own(errors, tasks, answers):
    """Of a run with some wrong answers: these lose points, the tasks between them none."""
    found = []
    for task, checks in tasks.items():
        lost = [errors[name] for name in checks if errors[name]]
        if task in answers and not lost:
            found.append(f"this mistake in {task} costs nothing:\n{answers[task]}")
        elif task not in answers and lost:
            found.append(f"{task} depends on another task: {lost}")
    return found


def not_caught(errors, tasks, wrong):
    """Of the run of further mistakes: each loses points, and not for want of a name."""
    found = []
    for task, checks in tasks.items():
        for number, source in list(enumerate(wrong[task]))[1:]:
            lost = [e for e in (errors[f"{name}#{number}"] for name in checks) if e]
            if not lost:
                found.append(f"this mistake in {task} costs nothing:\n{source}")
            elif any(kind == "NameError" for kind, _ in lost):
                found.append(f"{task}, mistake {number}: {lost}")
    return found


# --- the assignments of the course


def test_every_chapter_with_planted_mistakes_has_an_assignment():
    planted = {file.stem for file in (ROOT / "tests/wrong_answers").glob("[0-9]*.py")}
    assert planted == {path.parent.name for path in ASSIGNMENTS}


def test_every_chapter_but_the_first_has_an_assignment():
    lectures = {path.parent.name for path in ROOT.glob("chapters/*/lecture.ipynb")}
    assert lectures - {path.parent.name for path in ASSIGNMENTS} == {"00_start_here"}


@each_assignment
def test_form(path):
    from classroom.release import validate

    assert validate(path) == []
    notebook = nbformat.read(path, as_version=4)
    tasks = tasks_of(notebook)
    assert 4 <= len(tasks) <= 6, f"{len(tasks)} tasks: {list(tasks)}"
    for name, checks in tasks.items():
        assert len(checks) >= 2, f"{name} has {len(checks)} graded cells: no partial credit"
        hidden = [c for c in notebook.cells if about(c).get("grade_id") in checks]
        assert any("BEGIN HIDDEN TESTS" in cell.source for cell in hidden), f"{name}: none hidden"
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.count("<details>") == text.count("</details>") >= 2 * len(tasks), "hint and stuck?"
    assert text.lower().count("minutes") >= len(tasks), "expected minutes for each task"
    assert sum(text.count(dots) for dots in ("●○○", "●●○", "●●●")) >= len(tasks), "difficulty"
    assert all(cell.get("outputs", []) == [] or not _has_error(cell) for cell in notebook.cells)


def _has_error(cell):
    return any(output.output_type == "error" for output in cell.outputs)


@each_assignment
def test_every_task_has_planted_mistakes(path):
    wrong = wrong_answers(path.parent.name)
    tasks = tasks_of(nbformat.read(path, as_version=4))
    assert set(wrong) == set(tasks), "one entry per solution cell"
    for name, sources in wrong.items():
        assert sources and all(isinstance(source, str) for source in sources), name
        for source in sources:
            compile(source, name, "exec")  # a mistake in thought, not in syntax


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A folder to release in: one, since making a new gradebook takes seconds."""
    return tmp_path_factory.mktemp("course")


def released_version(path, course):
    from classroom.release import leaks, release

    folder = course / "chapters" / path.parent.name
    folder.mkdir(parents=True)
    shutil.copy(path, folder)
    released = release(path.parent.name, course)
    assert leaks(path, released) == []
    return nbformat.read(released, as_version=4)


def all_runs(notebook, released, wrong, folder, tmp_path):
    """What is wrong with each run of an assignment, and the seconds of the instructor's."""
    tasks = tasks_of(notebook)
    halves = [{name: wrong[name][0] for name in list(tasks)[half::2]} for half in (0, 1)]
    errors, seconds = run(
        {
            "right": notebook,
            "empty": released,
            "first half wrong": with_answers(notebook, halves[0]),
            "other half wrong": with_answers(notebook, halves[1]),
            "further mistakes": with_further_mistakes(notebook, wrong),
        },
        folder,
        tmp_path,
    )
    graded = {name for checks in tasks.values() for name in checks}
    found = {
        "right": not_clean(errors["right"]),
        "empty": not_helpful(errors["empty"], graded),
        "first half wrong": not_its_own(errors["first half wrong"], tasks, halves[0]),
        "other half wrong": not_its_own(errors["other half wrong"], tasks, halves[1]),
        "further mistakes": not_caught(errors["further mistakes"], tasks, wrong),
    }
    return found, seconds


@pytest.mark.slow
@pytest.mark.timeout(900)
@each_assignment
def test_the_right_answers_none_and_wrong_ones(path, course, tmp_path):
    notebook, wrong = nbformat.read(path, as_version=4), wrong_answers(path.parent.name)
    released = released_version(path, course)
    assert tasks_of(released) == tasks_of(notebook)
    for cell in released.cells:
        if about(cell).get("solution"):
            assert "your own code" in cell.source, f"{about(cell)['grade_id']} has no stub"
    found, seconds = all_runs(notebook, released, wrong, path.parent, tmp_path)
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)
    # twice the time allowed, since another worker may be using the other core
    assert seconds < 2 * SECONDS, f"{seconds:.0f} s"


# --- the tools, on an assignment made here


def made(*cells):
    """A notebook of (source, grade_id or None, graded)."""
    notebook = new_notebook()
    for source, name, grade in cells:
        cell = new_code_cell(source)
        if name:
            cell.metadata["nbgrader"] = {"grade_id": name, "grade": grade, "solution": not grade}
        notebook.cells.append(cell)
    return notebook


@pytest.mark.slow
def test_every_fault_of_an_assignment_is_found(tmp_path):
    """Halves that need a name of the doubles; points for nothing; a mistake that is right."""
    notebook = made(
        ("def double(x):\n    return two * x\n\ntwo = 2", "double", False),
        ("assert double(3) == 6, 'twice three'", "double_check", True),
        ("given = 4", None, False),
        ("def half(x):\n    return x / two", "half", False),
        ("assert half(given) == 2, 'half of four'", "half_check", True),
        ("def third(x):\n    return x / 3", "third", False),
        ("assert third(9) == 3, 'a third of nine'", "third_check", True),
        ("1 / 0", None, False),
    )
    empty = {"double": "def double(x):\n    raise KeyError('your own code')", "half": "half = None"}
    released = with_answers(notebook, empty)
    wrong = {
        "double": ["def double(x):\n    return x", "def double(x):\n    return four"],
        "half": ["def half(x):\n    return 4", "def half(x):\n    return 2"],
        "third": ["def third(x):\n    return 9", "def third(x):\n    return 0"],
    }
    found, _ = all_runs(notebook, released, wrong, tmp_path, tmp_path)
    zero = "ZeroDivisionError"
    assert len(found["right"]) == 1 and zero in found["right"][0]
    said = found["empty"]
    assert len(said) == 4 and "double_check: KeyError" in said[0] and zero in said[3]
    assert "half_check: TypeError" in said[1] and said[2].startswith("third_check gives points")
    # the run before it had defined the name
    assert len(found["first half wrong"]) == 1
    assert "half depends on another task" in found["first half wrong"][0]
    assert "'two' is not defined" in found["first half wrong"][0]
    assert found["other half wrong"] == []
    said = found["further mistakes"]
    assert len(said) == 2 and "double, mistake 1: [('NameError'" in said[0]
    assert said[1].startswith("this mistake in half costs nothing")


@pytest.mark.slow
def test_an_assignment_without_faults_passes(tmp_path):
    notebook = made(
        ("def double(x):\n    return 2 * x", "double", False),
        ("assert double(3) == 6, 'twice three'", "double_check", True),
        ("def half(x):\n    return x / 2", "half", False),
        ("assert half(4) == 2, 'half of four'", "half_check", True),
    )
    wrong = {"double": ["def double(x):\n    return x"], "half": ["def half(x):\n    return x"]}
    stub = "def {}(x):\n    raise NotImplementedError('your own code')"
    released = with_answers(notebook, {name: stub.format(name) for name in wrong})
    found, seconds = all_runs(notebook, released, wrong, tmp_path, tmp_path)
    assert not any(found.values()) and len(found) == 5 and seconds > 0
