"""Run lectures from a clean kernel and store what they printed.

    python -m classroom.execute [--check] [chapters/03_attention/lecture.ipynb ...]

A stored notebook carries a hash of its code cells, so that a test can tell in a millisecond
whether its outputs belong to its code. Nothing is stored of a run that raised.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbclient
import nbformat
import tyro
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from traitlets.config import Config

from classroom import ROOT, write_atomically

MAX_BYTES = 1_000_000
REFUSED = (CellExecutionError, CellTimeoutError, DeadKernelError)
WIDGET = "application/vnd.jupyter.widget-view+json"
_KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
_LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}
_CELL_METADATA = {"tags", "nbgrader", "jupyter", "collapsed", "editable", "deletable"}


@dataclass(frozen=True)
class Timing:
    """How long a run took, and each of its code cells: (seconds, cell index, first line)."""

    seconds: float
    cells: tuple[tuple[float, int, str], ...]

    def slowest(self, n: int = 3) -> tuple[tuple[float, int, str], ...]:
        return tuple(sorted(self.cells, reverse=True)[:n])


def code_hash(notebook: NotebookNode) -> str:
    """SHA-256 over the sources of the code cells, in order (JSON, so that cells cannot merge)."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def execute(notebook: NotebookNode, folder: Path, timeout: int = 120) -> Timing:
    """Run `notebook` in place in a new kernel whose working directory is `folder`.

    Raises `nbclient.exceptions.CellExecutionError` at the first cell that raises, also if it is
    tagged `raises-exception`, and `CellTimeoutError` after `timeout` seconds in one cell.
    """
    started: dict[int, float] = {}
    cells: list[tuple[float, int, str]] = []

    def begin(cell: NotebookNode, cell_index: int) -> None:
        started[cell_index] = time.perf_counter()

    def end(cell: NotebookNode, cell_index: int, **_: object) -> None:
        if cell_index in started and cell.source.strip():
            spent = time.perf_counter() - started[cell_index]
            cells.append((spent, cell_index, cell.source.strip().splitlines()[0]))

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as profile:
        # files, not ports: no other user of this machine can talk to the kernel
        connection = {"transport": "ipc", "connection_file": f"{profile}/kernel.json"}
        client = nbclient.NotebookClient(
            notebook,
            kernel_name="python3",
            config=Config(KernelManager=connection),
            timeout=timeout,
            resources={"metadata": {"path": str(folder)}},
            force_raise_errors=True,
            record_timing=False,
            coalesce_streams=True,
            on_cell_start=begin,
            on_cell_executed=end,
        )
        client.execute(env=kernel_environment(profile))
    return Timing(time.perf_counter() - start, tuple(cells))


def kernel_environment(profile: str) -> dict[str, str]:
    """The environment of a kernel: one thread, and nobody's IPython profile or start-up files."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": profile}
    env.pop("MPLBACKEND", None)  # the kernel picks the inline backend itself
    return env


def clean(notebook: NotebookNode) -> None:
    """Keep of the metadata what the course reads, give stable cell ids, drop widget state.

    Ids are made from a cell's source, so that a cell keeps its id when others move. A widget
    means nothing without its kernel: its view is replaced by a line of text, a progress bar
    vanishes. Outputs that nbval compares keep their text.
    """
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": _KERNELSPEC, "language_info": _LANGUAGE, "minillm": {}}
    )
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in _CELL_METADATA}
        )
        if cell.cell_type == "code":
            compared = "nbval-ignore-output" not in cell.metadata.get("tags", [])
            kept = (_without_widget(output, compared) for output in cell.outputs)
            cell.outputs = [output for output in kept if output is not None]


def _without_widget(output: NotebookNode, compared: bool) -> NotebookNode | None:
    if WIDGET not in output.get("data", {}):
        return output
    del output.data[WIDGET]
    if not compared:
        if re.search(r"\d+%\|", output.data.get("text/plain", "")):
            return None  # tqdm
        output.data = nbformat.from_dict(
            {"text/plain": "(interactive: run this cell to move its sliders)"}
        )
    return output


def store(path: Path, timeout: int = 120) -> Timing:
    """Execute the notebook at `path`, clean it and write it back, atomically.

    Raises what `execute` raises, and `ValueError` if the result breaks a rule of `problems` or
    the file was edited meanwhile; the file on disk is then untouched.
    """
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing ids and the like are about to be cleaned
        notebook = nbformat.reads(before.decode(), as_version=4)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    timing = execute(notebook, path.parent, timeout)
    clean(notebook)
    count = 0
    for cell in notebook.cells:  # an empty cell is not executed; numbers stay 1..n
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            cell.execution_count = count
    notebook.metadata.minillm["code_sha256"] = code_hash(notebook)
    text = nbformat.writes(notebook) + "\n"
    found = problems(text)
    if found:
        raise ValueError(f"{path} was not stored:\n  " + "\n  ".join(found))
    if path.read_bytes() != before:
        raise ValueError(f"{path} changed on disk while it ran: run it again")
    write_atomically(path, text.encode())
    return timing


def problems(text: str) -> list[str]:
    """What is wrong with a stored notebook, one line each; empty if it is fresh and valid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nbformat only warns of missing or repeated ids
            notebook = nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
    except Exception as error:
        return [f"not a valid notebook: {type(error).__name__}: {str(error).splitlines()[0]}"]
    found = []
    if len(text.encode()) > MAX_BYTES:
        found.append(f"{len(text.encode()):,} bytes, more than {MAX_BYTES:,}: smaller figures?")
    stored = notebook.metadata.get("minillm", {}).get("code_sha256")
    if stored is None:
        found.append("was never executed by this command: no code_sha256 in its metadata")
    elif stored != code_hash(notebook):
        found.append("the code changed after the outputs were stored: execute it again")
    cells = [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code"]
    counts = [cell.execution_count for _, cell in cells if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"execution counts are {counts}, not 1..{len(counts)}: not one clean run")
    places = sorted({str(ROOT), str(Path.home()), sys.prefix, sys.base_prefix} - {"/", "/usr"})
    for i, cell in cells:
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"cell {i} stores an error")
        words = json.dumps(cell.outputs)
        # a path of this machine says nothing to a reader, and nbval would compare it
        found += [
            f"cell {i} prints a path of this machine: {p}" for p in places if p + "/" in words
        ]
    if "widgets" in notebook.metadata:
        found.append("widget state in the metadata: it bloats and means nothing without a kernel")
    return found


def main(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    check: bool = False,
    timeout: int = 120,
) -> None:
    """Execute notebooks from a clean kernel and store their outputs.

    Args:
        paths: notebooks; all lectures if none is named.
        check: only verify that the stored outputs are fresh and valid.
        timeout: seconds a cell may take.
    """
    paths = paths or tuple(sorted(ROOT.glob("chapters/*/lecture.ipynb")))
    failed = 0
    for path in (path.resolve() for path in paths):
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        try:
            if check:
                found = problems(path.read_text(encoding="utf-8"))
                if found:
                    raise ValueError(f"{name}:\n  " + "\n  ".join(found))
                print(f"{name}: fresh")
                continue
            timing = store(path, timeout)
            print(f"{name}: {timing.seconds:.1f} s, {path.stat().st_size / 1000:.0f} kB")
            for seconds, index, line in timing.slowest():
                print(f"    {seconds:5.1f} s  cell {index}: {line[:70]}")
        except (
            CellExecutionError,
            CellTimeoutError,
            DeadKernelError,
            ValueError,
            OSError,
        ) as error:
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{failed} of {len(paths)} notebooks failed; they were left as they were")


if __name__ == "__main__":
    tyro.cli(main)
