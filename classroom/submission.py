"""Find what students handed in, and bring it into a form that is safe to grade.

A submission is a notebook that somebody else wrote: its metadata may say anything. Everything
that the grader relies on (which cell is graded, its source, its points, its tags) is therefore
taken from the released version; of the student's file only what a student may write is kept.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

MAX_BYTES = 20_000_000
_NAME = re.compile(r"\w[\w.@-]{0,63}")


@dataclass(frozen=True)
class Submission:
    """One notebook of one student."""

    student: str
    chapter: str
    path: Path


def find_submissions(folder: Path, chapters: Iterable[str]) -> tuple[list[Submission], list[str]]:
    """Submissions below `folder`, and a line for each file that is refused or not understood.

    Understood are `student/chapter/assignment.ipynb` and `student_chapter.ipynb`. Links are not
    followed, and a student's name must be a plain file name: letters, digits, `.`, `-`, `_`, `@`,
    not starting with a sign (a spreadsheet would take `=` for a formula).
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    chapters, found, refused = tuple(chapters), {}, []
    for path in sorted(folder.rglob("*.ipynb")):
        parts = path.relative_to(folder).parts
        if ".ipynb_checkpoints" in parts:
            continue
        student, chapter = _name_of(parts, chapters)
        where = "/".join(parts)
        if any(parent.is_symlink() for parent in (path, *path.parents[: len(parts) - 1])):
            refused.append(f"{where!r}: a link, not a file")
        elif chapter not in chapters:
            refused.append(f"{where!r}: not student/chapter/assignment.ipynb of a known chapter")
        elif not _NAME.fullmatch(student) or ".." in student:
            refused.append(f"{where!r}: {student!r} is not a safe name for a student")
        elif path.stat().st_size > MAX_BYTES:
            refused.append(f"{where!r}: {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        elif (student, chapter) in found:
            refused.append(f"{where!r}: {student} handed in {chapter} twice, the first is graded")
        else:
            found[student, chapter] = Submission(student, chapter, path)
    return list(found.values()), refused


def _name_of(parts: tuple[str, ...], chapters: tuple[str, ...]) -> tuple[str, str]:
    """(student, chapter) that a path stands for; an empty chapter if it stands for none."""
    if len(parts) == 3 and parts[2] == "assignment.ipynb":
        return parts[0], parts[1]
    if len(parts) == 1:
        stem = parts[0].removesuffix(".ipynb")
        for chapter in chapters:
            if stem.endswith(f"_{chapter}"):
                return stem.removesuffix(f"_{chapter}"), chapter
    return "", ""


def read_notebook(path: Path) -> NotebookNode:
    """The notebook at `path`; `ValueError` if it is none, however it is broken."""
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises whatever the converter stumbled over
        raise ValueError(f"not a valid notebook ({type(error).__name__})") from None
    return notebook


def merge(student: NotebookNode, released: NotebookNode) -> tuple[NotebookNode, dict[str, str]]:
    """The student's answers in the frame of the released notebook, and remarks by grade_id.

    Order and additional cells stay the student's. Locked cells get their released source back,
    all metadata (a tag could make a check be skipped) comes from the release, a second copy of a
    cell becomes an ordinary one, and a check that was deleted is reported.
    """
    known = {
        cell.metadata.nbgrader["grade_id"]: cell
        for cell in released.cells
        if "nbgrader" in cell.metadata
    }
    cells, seen, remarks = [], set(), {}
    for cell in student.cells:
        about = cell.metadata.get("nbgrader")
        grade_id = about.get("grade_id") if isinstance(about, dict) else None
        original = known.get(grade_id) if isinstance(grade_id, str) else None
        if original is None or grade_id in seen:
            make = new_code_cell if cell.cell_type == "code" else new_markdown_cell
            cells.append(make(cell.source))
            continue
        seen.add(grade_id)
        source = cell.source
        if original.metadata.nbgrader["locked"]:
            if source.strip() != original.source.strip():
                remarks[grade_id] = "this check was changed: the original one was run"
            source = original.source
        make = new_code_cell if original.cell_type == "code" else new_markdown_cell
        metadata = {"nbgrader": dict(original.metadata.nbgrader)}
        cells.append(make(source, metadata=metadata))
    for grade_id, cell in known.items():
        if grade_id not in seen and cell.metadata.nbgrader["grade"]:
            remarks[grade_id] = "this check was deleted: no points"
    return new_notebook(cells=cells, metadata=dict(released.metadata)), remarks
