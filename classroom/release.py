"""Make the student version of assignments: no solutions, no hidden tests.

    python -m classroom.release [01_tokenization ...]

Reads `chapters/NN_name/assignment.ipynb`, writes `build/release/NN_name/assignment.ipynb` and
registers the graded cells in the gradebook, which restores them when a student changed them.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from nbgrader.apps.api import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from nbgrader.nbgraderformat import MetadataValidator, ValidationError
from nbgrader.nbgraderformat.common import SchemaMismatchError
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from classroom import ROOT

_MARKERS = ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS")


def course_config(course: Path = ROOT) -> Config:
    """The settings of `nbgrader_config.py`, for the course in folder `course`."""
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT)).load_config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course / 'build' / 'gradebook.db'}"
    return config


def open_course(course: Path = ROOT, extra: Config | None = None) -> NbGraderAPI:
    """nbgrader in this process, on the course in folder `course`."""
    config = course_config(course)
    config.merge(extra or Config())
    (course / "build").mkdir(exist_ok=True)
    # nbgrader starts `alembic` by name, which is not on the path of an environment that was not
    # activated
    tools, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if tools not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((tools, path))
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def chapters_with_assignment(course: Path = ROOT) -> list[str]:
    """Names of the chapters that have an assignment, in order."""
    return sorted(path.parent.name for path in course.glob("chapters/*/assignment.ipynb"))


def validate(path: Path) -> list[str]:
    """What is wrong with an instructor's notebook, one line each; empty if it can be released.

    Checked: nbgrader's metadata (unique ids, points), solution regions and hidden tests in cells
    of the right kind, and that every solution cell is followed by a graded cell.
    """
    notebook = nbformat.read(path, as_version=4)
    try:
        MetadataValidator().validate_nb(notebook)
    except (ValidationError, SchemaMismatchError) as error:
        return [f"nbgrader metadata: {error}"]
    found, waiting, points = [], None, 0.0
    for index, cell in enumerate(notebook.cells):
        about = cell.metadata.get("nbgrader", {})
        name = f"cell {index} ({about.get('grade_id', 'no grade_id')})"
        solution, grade = about.get("solution", False), about.get("grade", False)
        if "BEGIN SOLUTION" in cell.source and not solution:
            found.append(f"{name}: a solution in a cell that is not marked `solution`")
        if "BEGIN HIDDEN TESTS" in cell.source and not (grade and about.get("locked")):
            found.append(f"{name}: hidden tests in a cell that is not graded and locked")
        for what in ("SOLUTION", "HIDDEN TESTS"):
            begins = len(re.findall(rf"^\s*### BEGIN {what}", cell.source, re.MULTILINE))
            ends = len(re.findall(rf"^\s*### END {what}", cell.source, re.MULTILINE))
            if begins != ends:
                found.append(f"{name}: {begins} BEGIN {what} but {ends} END {what}")
        if solution and not grade:
            if "BEGIN SOLUTION" not in cell.source:
                found.append(f"{name}: a solution cell without `### BEGIN SOLUTION`")
            if waiting:
                found.append(f"{waiting}: no graded cell follows it")
            waiting = name
        elif grade:
            waiting, points = None, points + float(about["points"])
    if waiting:
        found.append(f"{waiting}: no graded cell follows it")
    if not points:
        found.append("nothing in it gives points")
    return found


def leaks(source: Path, released: Path) -> list[str]:
    """Regions of the instructor's notebook that are still in the released one."""
    instructor = nbformat.read(source, as_version=4)
    text = "\n".join(cell.source for cell in nbformat.read(released, as_version=4).cells)
    found = [f"the marker {marker!r}" for marker in _MARKERS if marker in text]
    for cell in instructor.cells:
        for what in ("SOLUTION", "HIDDEN TESTS"):
            pattern = rf"### BEGIN {what}\n(.*?)\n[ \t]*### END {what}"
            for region in re.findall(pattern, cell.source, re.DOTALL):
                if region.strip() and region in text:
                    found.append(f"a region of {what.lower()}: {region.strip().splitlines()[0]!r}")
    return found


def release(chapter: str, course: Path = ROOT) -> Path:
    """Write the student version of one chapter's assignment; return its path.

    Raises `ValueError` that says what is wrong with the instructor's notebook.
    """
    source = course / "chapters" / chapter / "assignment.ipynb"
    if not source.is_file():
        known = ", ".join(chapters_with_assignment(course)) or "none"
        raise ValueError(f"{chapter!r} has no assignment; chapters that have one: {known}")
    if found := validate(source):
        raise ValueError(f"{chapter}/assignment.ipynb:\n  " + "\n  ".join(found))
    result = open_course(course).generate_assignment(chapter, force=True, create=True)
    released = course / "build" / "release" / chapter / "assignment.ipynb"
    if not result["success"] or not released.is_file():
        said = (result.get("error") or "") + (result.get("log") or "") or "nbgrader wrote nothing"
        if "submissions" in said or "removed" in said:
            said = "graded cells were added or removed after grading: move build/gradebook.db away"
        raise ValueError(f"{chapter}: nbgrader refused: {said.strip()}")
    if found := leaks(source, released):
        released.unlink()
        raise ValueError(f"{chapter}: the released version would show " + "; ".join(found))
    return released


def main(chapters: Annotated[tuple[str, ...], tyro.conf.Positional] = ()) -> None:
    """Write the student version of assignments to build/release.

    Args:
        chapters: folder names such as 01_tokenization; all that have an assignment if none is
            named.
    """
    failed = 0
    for chapter in chapters or chapters_with_assignment():
        try:
            print(release(chapter).relative_to(ROOT))
        except ValueError as error:
            failed += 1
            print(error, file=sys.stderr)
    if failed:
        raise SystemExit(f"{failed} assignments were not released")


if __name__ == "__main__":
    tyro.cli(main)
