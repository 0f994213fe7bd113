"""Hand out lectures and released assignments into `work/`, never over what a student changed.

A hash of every version ever delivered is kept in `work/.delivered.json`. A file whose bytes are
one of those versions was not changed and is brought up to date in place; any other file is the
student's, and a newer version goes beside it. Lectures come with their stored outputs, so that
they can be read before anything has run; assignments come without.
"""

import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from classroom import ROOT, write_atomically

STATE = ".delivered.json"


def deliver(course: Path = ROOT, work: Path | None = None) -> list[str]:
    """Bring `work` (default: `course/work`) up to date; return notes for the student.

    May be interrupted anywhere: each file is renamed into place, and what is about to be written
    is recorded first, so that a later run recognises it.
    """
    work = work or course / "work"
    work.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    with _locked(work):
        state = _State(work, notes)
        for lecture in sorted(course.glob("chapters/*/lecture.ipynb")):
            name = f"{lecture.parent.name}/lecture.ipynb"
            notes += _hand_out(work, name, lecture.read_bytes(), state)
        for source in sorted(course.glob("chapters/*/assignment.ipynb")):
            name = f"{source.parent.name}/assignment.ipynb"
            try:
                data = _released(source, work, state)
            except ValueError as error:
                notes.append(f"{name} could not be released and was left as it was: {error}")
                continue
            notes += _hand_out(work, name, data, state)
    return notes


def _hand_out(work: Path, name: str, data: bytes, state: "_State") -> list[str]:
    """Put one file in place, or beside what the student made of it; notes about the latter."""
    path, digest, record = work / name, _sha(data), state.of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = not path.is_symlink() and (not path.exists() or _sha_of(path) in record["known"])
    if mine or (path.is_file() and _sha_of(path) == digest):
        if digest not in record["known"]:
            record["known"].append(digest)
            state.save()  # before writing: an interrupted run leaves a version that is known
        if not path.exists() or _sha_of(path) != digest:
            write_atomically(path, data)
        record["offered"] = digest
        state.save()
        return []
    if record["offered"] == digest:
        return []  # the student has this version, in the file or beside it
    beside = _free_name(path, digest, record["beside"])
    record["beside"].append(digest)
    state.save()
    if not beside.exists() or _sha_of(beside) != digest:
        write_atomically(beside, data)
    record["offered"] = digest
    state.save()
    return [f"{name} has a newer version. Yours was kept; the new one is {beside.name}, beside it."]


def _free_name(path: Path, digest: str, delivered: list[str]) -> Path:
    """`lecture.new.ipynb`, or a numbered one if the student changed what is there."""
    number = 1
    while True:
        tail = ".new" if number == 1 else f".new{number}"
        beside = path.with_name(f"{path.stem}{tail}{path.suffix}")
        ours = not beside.is_symlink() and beside.is_file() and _sha_of(beside) in delivered
        if ours or not (beside.exists() or beside.is_symlink()) or _is(beside, digest):
            return beside
        number += 1


def _released(source: Path, work: Path, state: "_State") -> bytes:
    """The student version of an assignment; made anew only when its source changed."""
    name, digest = f"{source.parent.name}/assignment.ipynb", _sha(source.read_bytes())
    cache = work / ".released" / source.parent.name / "assignment.ipynb"
    record = state.of(name)
    if record.get("source") == digest and cache.is_file() and _is(cache, record.get("made", "")):
        return cache.read_bytes()
    # nbgrader takes seconds to import: only when there is something to do
    from classroom.release import release

    with tempfile.TemporaryDirectory() as folder:  # leaves the instructor's gradebook alone
        copy = Path(folder) / "chapters" / source.parent.name
        copy.mkdir(parents=True)
        shutil.copyfile(source, copy / "assignment.ipynb")
        data = release(source.parent.name, Path(folder)).read_bytes()
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache, data)
    record["source"], record["made"] = digest, _sha(data)
    state.save()
    return data


class _State:
    """`work/.delivered.json`: per file, hashes of all versions delivered and the latest offered."""

    def __init__(self, work: Path, notes: list[str]) -> None:
        self.path = work / STATE
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.files = json.loads(self.path.read_text())["files"]
            except (ValueError, KeyError, TypeError):
                notes.append(f"{STATE} was unreadable: every file that differs is kept as yours")

    def of(self, name: str) -> dict[str, Any]:
        empty = {"known": [], "offered": "", "beside": []}
        return self.files.setdefault(name, empty)

    def save(self) -> None:
        text = json.dumps({"version": 1, "files": self.files}, indent=1, sort_keys=True)
        write_atomically(self.path, text.encode())


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One delivery at a time."""
    with open(work / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha_of(path: Path) -> str:
    return _sha(path.read_bytes())


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and _sha_of(path) == digest
