"""The ledger of claims: what the literature says, what came out when a lecture executed it.

    python -m minillm.teach.claims

Each chapter keeps `chapters/NN_name/claims.csv` with the columns id, statement, source, outcome
and note; its lecture executes each row in cells tagged `claim` whose first line is

    # claim 03.3: dividing by sqrt(d) keeps the entropy of the weights as d grows

and which hold an assert. `audit` reports every place where ledger and lectures part.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.paths import ROOT

COLUMNS = ("id", "statement", "source", "outcome", "note")
OUTCOMES = ("holds", "holds with conditions", "does not hold")
ID = re.compile(r"\d\d\.[1-9]\d*")
FIRST_LINE = re.compile(r"#\s*claim\s+(\S+?):\s+(\S.*)")


@dataclass(frozen=True)
class Claim:
    """One row of a ledger; `file` is where it stands."""

    id: str
    statement: str
    source: str
    outcome: str
    note: str
    file: str


@dataclass(frozen=True)
class ClaimCell:
    """One cell of a lecture that is tagged `claim`, or whose first line says so."""

    first_line: str
    source: str
    tagged: bool
    executed: bool
    place: str

    @property
    def id(self) -> str | None:
        """The id on the first line; None if that line does not have the agreed form."""
        match = FIRST_LINE.fullmatch(self.first_line)
        return match[1] if match and ID.fullmatch(match[1]) else None


def read_ledger(path: Path) -> list[Claim]:
    """The rows of one `claims.csv`. Raises ValueError for other columns than `COLUMNS`."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames} must be {list(COLUMNS)}")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: not {len(COLUMNS)} fields")
            values = {column: row[column].strip() for column in COLUMNS}
            rows.append(Claim(**values, file=f"{path.parent.name}/{path.name}"))
    return rows


def claim_cells(path: Path) -> list[ClaimCell]:
    """The claim cells of one notebook, in order."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"]).strip()
        first_line = source.splitlines()[0].strip() if source else ""
        tagged = "claim" in cell.get("metadata", {}).get("tags", [])
        if tagged or re.match(r"#\s*claim\b", first_line):
            place = f"{path.parent.name}/{path.name}, cell {number}"
            executed = cell.get("execution_count") is not None
            cells.append(ClaimCell(first_line, source, tagged, executed, place))
    return cells


def can_fail(source: str) -> bool:
    """Whether the code holds an assert of something that is not a constant.

    >>> can_fail("assert x > 1"), can_fail("assert True"), can_fail("print(1)")
    (True, False, False)
    """
    python = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        tree = ast.parse("\n".join(python))
    except SyntaxError:
        return False
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return any(
        any(isinstance(part, ast.Name | ast.Call | ast.Attribute) for part in ast.walk(test))
        for test in tests
    )


def check_rows(claims: Sequence[Claim]) -> list[str]:
    """What is wrong with the rows by themselves, one sentence each."""
    problems = []
    for claim in claims:
        where = f"{claim.file}: claim {claim.id}"
        chapter = claim.file.partition("_")[0]
        if not ID.fullmatch(claim.id):
            problems.append(f"{where}: the id must look like 03.1 or 03.12")
        elif claim.id.partition(".")[0] != chapter:
            problems.append(f"{where}: stands in the ledger of chapter {chapter}")
        if claim.outcome not in OUTCOMES:
            problems.append(f"{where}: outcome {claim.outcome!r} must be one of {OUTCOMES}")
        elif claim.outcome != "holds" and not claim.note:
            problems.append(f"{where}: {claim.outcome!r} needs a note that says where")
        problems += [
            f"{where}: has no {column}"
            for column in ("statement", "source")
            if not getattr(claim, column)
        ]
    counts = Counter(claim.id for claim in claims)
    problems += [f"claim {i} has {n} rows" for i, n in counts.items() if n > 1]
    return problems


def check_cells(cells: Sequence[ClaimCell]) -> list[str]:
    """What is wrong with the cells by themselves, one sentence each."""
    problems = []
    for cell in cells:
        if not cell.tagged:
            problems.append(f"{cell.place}: {cell.first_line!r} lacks the tag `claim`")
        if cell.id is None:
            problems.append(
                f"{cell.place}: the first line must read `# claim 03.1: what is claimed`, "
                f"not {cell.first_line!r}"
            )
        if not can_fail(cell.source):
            problems.append(f"{cell.place}: claim {cell.id} holds no assert that can fail")
        if not cell.executed:
            problems.append(f"{cell.place}: claim {cell.id} was not executed in the stored run")
    return problems


def audit(chapters: Path) -> list[str]:
    """Every problem of the ledgers and lectures below `chapters`; empty when all is well."""
    problems, claims, cells = [], [], []
    for path in sorted(chapters.glob("*/claims.csv")):
        try:
            claims += read_ledger(path)
        except (ValueError, csv.Error) as error:
            problems.append(str(error))
    for path in sorted(chapters.glob("*/lecture.ipynb")):
        found = claim_cells(path)
        cells += found
        problems += [
            f"{cell.place}: claim {cell.id} belongs to chapter {cell.id[:2]}"
            for cell in found
            if cell.id is not None and cell.id[:2] != path.parent.name[:2]
        ]
    problems += check_rows(claims) + check_cells(cells)
    in_ledger = {claim.id for claim in claims}
    executed = {cell.id for cell in cells}
    problems += [
        f"{cell.place}: claim {cell.id} has no row in a ledger"
        for cell in cells
        if cell.id is not None and cell.id not in in_ledger
    ]
    problems += [
        f"{claim.file}: claim {claim.id} is not executed by any lecture"
        for claim in claims
        if claim.id not in executed
    ]
    return problems


def load(chapters: Path) -> list[Claim]:
    """All readable ledger rows below `chapters`, in the order of their ids."""
    rows = [claim for path in chapters.glob("*/claims.csv") for claim in read_ledger(path)]
    return sorted(rows, key=lambda claim: [int(part) for part in claim.id.split(".")])


def table(claims: Sequence[Claim], width: int = 100) -> str:
    """The ledger as text: id, outcome, then statement, source and note, wrapped at `width`."""
    lines = []
    for claim in claims:
        lines.append(f"{claim.id:<6} {claim.outcome.upper()}")
        for label, text in (("", claim.statement), ("source: ", claim.source), ("", claim.note)):
            lines += textwrap.wrap(
                label + text, width, initial_indent=" " * 7, subsequent_indent=" " * 7
            )
    counts = Counter(claim.outcome for claim in claims)
    tally = ", ".join(f"{counts[outcome]} × {outcome}" for outcome in OUTCOMES if counts[outcome])
    noun = "claim" if len(claims) == 1 else "claims"
    return "\n".join([*lines, f"{len(claims)} {noun} in the ledger: {tally or 'none'}"])


def main(chapters: Path | None = None) -> int:
    """Print the ledger, then the problems; 1 if there are any."""
    if chapters is None:
        chapters = ROOT / "chapters"
    problems = audit(chapters)
    with contextlib.suppress(ValueError, csv.Error):  # audit has said so
        print(table(load(chapters), min(100, shutil.get_terminal_size().columns)))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
