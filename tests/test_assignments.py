"""Each assignment: the instructor passes, the released version fails helpfully, mistakes cost.

One execution serves many tasks: starting a kernel and importing PyTorch is what takes time.
"""

import copy
import runpy
import shutil
import time
from pathlib import Path

import nbclient
import nbformat
import pytest
from traitlets.config import Config

from classroom.execute import kernel_environment

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENTS = sorted(ROOT.glob("chapters/*/assignment.ipynb"))
each_assignment = pytest.mark.parametrize("path", ASSIGNMENTS, ids=lambda p: p.parent.name)
SECONDS = 60


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


def run(notebook, folder, tmp_path):
    """Execute with errors allowed; {grade_id: None or (name, message) of its error}, seconds."""
    notebook = nbformat.from_dict(notebook)
    start = time.perf_counter()
    client = nbclient.NotebookClient(
        notebook,
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout={"ename": "Timeout", "evalue": "60 s", "traceback": []},
        config=Config(
            KernelManager={"transport": "ipc", "connection_file": str(tmp_path / "kernel.json")}
        ),
    )
    client.execute(env=kernel_environment(str(tmp_path)))
    errors = {}
    for cell in notebook.cells:
        if name := about(cell).get("grade_id"):
            raised = [o for o in cell.get("outputs", []) if o.output_type == "error"]
            errors[name] = (raised[0].ename, raised[0].evalue) if raised else None
    return errors, time.perf_counter() - start


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


@pytest.mark.slow
@pytest.mark.timeout(300)
@each_assignment
def test_instructor_version_passes(path, tmp_path):
    errors, seconds = run(nbformat.read(path, as_version=4), path.parent, tmp_path)
    assert {name: error for name, error in errors.items() if error} == {}
    # twice the time allowed, since another worker may be using the other core
    assert seconds < 2 * SECONDS, f"{seconds:.0f} s"


@pytest.mark.slow
@pytest.mark.timeout(300)
@each_assignment
def test_released_version_fails_helpfully_and_shows_nothing(path, tmp_path):
    from classroom.release import leaks, release

    chapter = path.parent.name
    (tmp_path / "chapters" / chapter).mkdir(parents=True)
    shutil.copy(path, tmp_path / "chapters" / chapter)
    released = release(chapter, tmp_path)
    assert leaks(path, released) == []
    notebook = nbformat.read(released, as_version=4)
    graded = {name for names in tasks_of(notebook).values() for name in names}
    assert graded == {n for ns in tasks_of(nbformat.read(path, 4)).values() for n in ns}
    errors, _ = run(notebook, path.parent, tmp_path)
    for name in graded:
        assert errors[name] is not None, f"{name} gives points for an empty answer"
        kind, message = errors[name]
        assert kind in ("NotImplementedError", "AssertionError"), f"{name}: {kind}: {message}"
        assert len(message) >= 10, f"{name}: {kind} says only {message!r}"
    for cell in notebook.cells:
        if about(cell).get("solution"):
            assert "your own code" in cell.source, f"{about(cell)['grade_id']} has no stub"


@pytest.mark.slow
@pytest.mark.timeout(300)
@each_assignment
@pytest.mark.parametrize("half", [0, 1])
def test_a_mistake_loses_points_and_only_its_own(path, half, tmp_path):
    """Every other task has its first mistake, the tasks between them the right answer."""
    notebook = nbformat.read(path, as_version=4)
    wrong = wrong_answers(path.parent.name)
    answers = {name: wrong[name][0] for name in list(tasks_of(notebook))[half::2]}
    errors, _ = run(with_answers(notebook, answers), path.parent, tmp_path)
    for task, checks in tasks_of(notebook).items():
        lost = [name for name in checks if errors[name]]
        if task in answers:
            assert lost, f"this mistake in {task} costs nothing:\n{answers[task]}"
        else:
            assert not lost, f"{task} depends on another task: {[errors[n] for n in lost]}"


@pytest.mark.slow
@pytest.mark.timeout(300)
@each_assignment
def test_every_further_mistake_loses_points(path, tmp_path):
    """One run: each task's cells once per mistake, the instructor's answer never among them."""
    notebook = nbformat.read(path, as_version=4)
    wrong = wrong_answers(path.parent.name)
    cells, group, graded = [], [], {}

    def close():
        name = about(group[0]).get("grade_id") if group else None  # None: before any task
        sources = wrong[name][1:] if name else []
        last = max((i for i, cell in enumerate(group) if about(cell).get("grade")), default=-1)
        for number, source in enumerate(sources, start=1):
            for cell in map(copy.deepcopy, group[: last + 1]):
                if about(cell).get("grade_id") == name:
                    cell.source = source
                elif about(cell).get("grade"):
                    about(cell)["grade_id"] += f"#{number}"
                    graded.setdefault((name, number), []).append(about(cell)["grade_id"])
                cells.append(cell)
        cells.extend(group[last + 1 :])  # what prepares the next task

    for cell in notebook.cells:
        if cell.cell_type == "code":
            if about(cell).get("solution") and not about(cell).get("grade"):
                close()
                group = []
            group.append(cell)
    close()
    if not graded:
        return  # each task has one mistake, which the other test has run
    notebook.cells = cells
    errors, _ = run(notebook, path.parent, tmp_path)
    for (task, number), checks in graded.items():
        lost = [errors[name] for name in checks if errors[name]]
        assert lost, f"this mistake in {task} costs nothing:\n{wrong[task][number]}"
        assert all(kind != "NameError" for kind, _ in lost), f"{task}: {lost}"
