"""A small course with one assignment, and submissions for it, for the tests of the classroom."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

CHAPTER = "91_demo"
SETUP = """\
import sys
from pathlib import Path

root = next(p for p in Path.cwd().resolve().parents if (p / "minillm").is_dir())
sys.path.insert(0, str(root))  # the course, wherever Jupyter was started"""
DOUBLE = '''\
def double(x: int) -> int:
    """Twice x."""
    ### BEGIN SOLUTION
    return x + x  # the instructor's own words
    ### END SOLUTION'''
DOUBLE_HIDDEN = """\
assert double(0) == 0, "double(0) is 0"
### BEGIN HIDDEN TESTS
import random
for _ in range(20):
    x = random.randrange(10**6)
    assert double(x) == 2 * x, f"double({x})"
### END HIDDEN TESTS"""
HALF = '''\
def half(x: int) -> int:
    """Half of x, rounded down."""
    ### BEGIN SOLUTION
    return x // 2
    ### END SOLUTION'''
RIGHT = {
    "t1_double": "def double(x):\n    return 2 * x",
    "t2_half": "def half(x):\n    return x // 2",
}
MAX = {"t1_double_check": 2, "t1_double_hidden": 3, "t2_half_check": 5}


def cell(source, grade_id, points=None):
    about = {"schema_version": 3, "grade_id": grade_id, "task": False}
    about |= {"solution": points is None, "grade": points is not None, "locked": points is not None}
    if points is not None:
        about["points"] = points
    return new_code_cell(source, metadata={"nbgrader": about})


def make_course(folder):
    """Write the course below `folder`; return the instructor's notebook."""
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# Demo"),
            new_code_cell(SETUP, metadata={"tags": ["setup"]}),
            cell(DOUBLE, "t1_double"),
            cell('assert double(2) == 4, "double(2) is 4"', "t1_double_check", 2),
            cell(DOUBLE_HIDDEN, "t1_double_hidden", 3),
            cell(HALF, "t2_half"),
            cell('assert half(5) == 2, "half(5) is 2"', "t2_half_check", 5),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    path = folder / "chapters" / CHAPTER / "assignment.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    return path


def answered(released, answers):
    """The released notebook with answers: {grade_id: source}."""
    notebook = nbformat.read(released, as_version=4)
    for one in notebook.cells:
        grade_id = one.metadata.get("nbgrader", {}).get("grade_id")
        one.source = answers.get(grade_id, one.source)
    return notebook


def find(notebook, grade_id):
    """Index of the cell with that grade_id."""
    ids = [c.metadata.get("nbgrader", {}).get("grade_id") for c in notebook.cells]
    return ids.index(grade_id)


def hand_in(folder, student, notebook):
    path = folder / student / CHAPTER / "assignment.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    return path
