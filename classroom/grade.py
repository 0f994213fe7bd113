"""Autograde a folder of submissions.

    python -m classroom.grade FOLDER [--trust-submissions]

FOLDER holds `student/NN_name/assignment.ipynb` or `student_NN_name.ipynb`. Writes
`build/grades.csv`, feedback pages below `build/feedback`, and the gradebook `build/gradebook.db`.
A second run grades again and keeps points that were given by hand in nbgrader.
"""

import csv
import io
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import tyro
from nbgrader.api import Gradebook
from nbgrader.apps.api import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute
from sqlalchemy.exc import SAWarning
from traitlets.config import Config

from classroom import ROOT, write_atomically
from classroom.confine import Confinement, Limits, confine
from classroom.confined import ENDED, ConfinedExecute
from classroom.release import chapters_with_assignment, open_course, release
from classroom.submission import (
    Submission,
    find_submissions,
    merge,
    read_notebook,
)

COLUMNS = ("student", "chapter", "task", "points", "max", "seconds", "remark")


@dataclass(frozen=True)
class Row:
    """One graded cell of one submission, or their sum (task `total`)."""

    student: str
    chapter: str
    task: str
    points: float
    max: float
    seconds: float
    remark: str


def grade(
    folder: Path, course: Path = ROOT, limits: Limits | None = None, trust: bool = False
) -> tuple[list[Row], list[str], Confinement]:
    """Grade all submissions below `folder`; rows, refused files, and the confinement used.

    A submission that cannot be graded at all gets a total of 0 with a remark. Raises `ValueError`
    for a folder that is none and for an assignment that cannot be released, `RuntimeError` if
    student code could not be confined.
    """
    found, refused = find_submissions(folder, chapters_with_assignment(course))
    released = {chapter: release(chapter, course) for chapter in {s.chapter for s in found}}
    secrets = [course / "build" / "gradebook.db", *course.glob("chapters/*/*.ipynb")]
    secrets += [submission.path for submission in found[:20]]
    how = confine(
        limits or Limits(),
        masked=tuple(
            path.resolve()
            for path in (*(course / n for n in ("chapters", "build", "tests", "work")), folder)
        ),
        secrets=tuple(path.resolve() for path in secrets if path.is_file()),
        trust=trust,
    )
    api = open_course(course, _configuration(how))
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # nbgrader's own way with its database
        for submission in found:
            rows += _grade_one(api, course, submission, released[submission.chapter])
    return rows, refused, how


def _configuration(how: Confinement) -> Config:
    steps = [
        ConfinedExecute if step is Execute else step
        for step in Autograde.autograde_preprocessors.default_args[0]
    ]
    config = Config()
    config.Autograde.autograde_preprocessors = steps
    config.ConfinedExecute.confinement = how
    config.ConfinedExecute.timeout = how.limits.cell_seconds
    return config


def _grade_one(api: NbGraderAPI, course: Path, submission: Submission, released: Path) -> list[Row]:
    """Autograde one submission and write its feedback page."""
    student, chapter, start = submission.student, submission.chapter, time.perf_counter()
    original = nbformat.read(released, as_version=4)
    graded = [cell.metadata.nbgrader for cell in original.cells if "nbgrader" in cell.metadata]
    most = sum(float(about["points"]) for about in graded if about["grade"])
    try:
        notebook, remarks = merge(read_notebook(submission.path), original)
    except ValueError as error:
        return [Row(student, chapter, "total", 0.0, most, 0.0, str(error))]
    place = course / "build" / "submitted" / student / chapter / "assignment.ipynb"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, nbformat.writes(notebook).encode())
    result = api.autograde(chapter, student, force=True, create=True)
    if not result["success"]:
        said = f"{result.get('error') or ''}\n{result.get('log') or ''}"
        causes = re.findall(r"^ *(\w*Error: .+)$", said, re.MULTILINE)
        remark = _plain(f"could not be graded: {causes[-1] if causes else 'see the gradebook'}")
        return [Row(student, chapter, "total", 0.0, most, time.perf_counter() - start, remark)]
    remarks = _remarks_of_run(course, submission) | remarks
    with Gradebook(api.coursedir.db_url, api.coursedir.course_id) as book:
        notes = book.find_submission_notebook("assignment", chapter, student)
        for cell in notes.grades:
            if cell.auto_score is None and cell.name in remarks:
                cell.auto_score, cell.needs_manual_grade = 0.0, cell.manual_score is not None
        book.db.commit()
        scores = [(c.name, c.score, c.max_score, c.needs_manual_grade) for c in notes.grades]
    api.generate_feedback(chapter, student, force=True)
    order = [about["grade_id"] for about in graded]
    rows = []
    for name, points, most_here, by_hand in sorted(scores, key=lambda s: order.index(s[0])):
        remark = remarks.get(name, "to be graded by hand" if by_hand else "")
        rows.append(Row(student, chapter, name, points, most_here, 0.0, remark))
    seconds = time.perf_counter() - start
    total = sum(row.points for row in rows)
    return [*rows, Row(student, chapter, "total", total, most, seconds, "")]


def _remarks_of_run(course: Path, submission: Submission) -> dict[str, str]:
    """Why the grader ended cells, by grade_id of the check that lost its points through it."""
    path = course / "build" / "autograded" / submission.student / submission.chapter
    notebook = nbformat.read(path / "assignment.ipynb", as_version=4)
    remarks = {}
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        for output in cell.get("outputs", []):
            if name and output.output_type == "error" and output.ename == ENDED:
                remarks[name] = _plain(output.evalue)
            elif name and output.output_type == "error" and output.ename == "CellTimeoutError":
                remarks[name] = "the time limit of a cell was reached"
    return remarks


def _plain(text: str) -> str:
    """One short line that a spreadsheet does not take for a formula."""
    return re.sub(r"[^\w .,:;()/-]", " ", text).lstrip(" =+-@")[:200]


def to_csv(rows: list[Row]) -> str:
    """The rows as csv with a header; points with two digits at most, seconds with one."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        seconds = f"{row.seconds:.1f}" if row.task == "total" else ""
        points = (f"{round(row.points, 2):g}", f"{row.max:g}")
        writer.writerow((row.student, row.chapter, row.task, *points, seconds, row.remark))
    return file.getvalue()


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    trust_submissions: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> None:
    """Autograde a folder of submissions; write build/grades.csv and feedback pages.

    Args:
        folder: holds student/NN_name/assignment.ipynb or student_NN_name.ipynb.
        trust_submissions: run them even where they can only be run as root.
        limits: what one notebook may use.
    """
    try:
        rows, refused, how = grade(folder.resolve(), ROOT, limits, trust_submissions)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    print(how.report())
    for row in rows:
        if row.task == "total":
            remark = f"  {row.remark}" if row.remark else ""
            print(f"{row.student:20} {row.chapter:20} {row.points:g} / {row.max:g}{remark}")
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    if not rows:
        raise SystemExit(f"no submission found in {folder}")
    write_atomically(ROOT / "build" / "grades.csv", to_csv(rows).encode())
    print("points: build/grades.csv   pages for students: build/feedback/")


if __name__ == "__main__":
    tyro.cli(main)
