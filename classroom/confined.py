"""nbgrader's execution step with the kernel in a sandbox: a cell can cost only its own points.

The stock step gives up on a notebook whose kernel dies, and gives full points to a check that was
never run. Here a cell that kills the kernel is noted and skipped on a second run, and a check
without a completed run always carries an error.
"""

import json
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from nbgrader.preprocessors import Execute
from nbgrader.utils import is_grade
from traitlets import Instance

from classroom.sandbox import Confinement, Jail, SandboxedKernelManager

ENDED = "EndedByTheGrader"
RUNS = 5
MAX_OUTPUT = 5_000_000


def _ended(why: str) -> NotebookNode:
    return new_output("error", ename=ENDED, evalue=why, traceback=[f"{ENDED}: {why}"])


class ConfinedExecute(Execute):
    """Execute a submission in the confinement given as configuration."""

    confinement = Instance(Confinement).tag(config=True)

    def preprocess(
        self, nb: NotebookNode, resources: dict[str, Any], km: None = None
    ) -> tuple[NotebookNode, dict[str, Any]]:
        """Run all cells, again from the start without the culprit each time the kernel dies."""
        deadline = time.monotonic() + self.confinement.limits.seconds
        culprits: dict[int, str] = {}
        for _ in range(RUNS):
            left = deadline - time.monotonic()
            if left <= 0 or self._run(nb, resources, culprits, left):
                break
        for index, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and cell.source.strip() and index not in self.completed:
                cell.outputs = [_ended(culprits.get(index, "not run: time or restarts used up"))]
            elif is_grade(cell) and self.muted:
                cell.outputs = [_ended("the kernel no longer reports errors: look at it by hand")]
            if is_grade(cell) and cell.cell_type == "code":
                for output in cell.outputs:
                    if output.output_type == "stream":
                        output.name = "stdout"  # nbgrader gives no points beside a warning
        return nb, resources

    def _run(
        self,
        nb: NotebookNode,
        resources: dict[str, Any],
        culprits: dict[int, str],
        seconds: float,
    ) -> bool:
        """One run in one kernel; False if it died, with the cell that it died in noted."""
        NotebookClient.__init__(self, nb, None)
        self._check_assign_resources(resources)
        self.seconds, self.printed, self.muted = seconds, 0, False
        self.completed: set[int] = set()
        self.jail: Jail | None = None
        running = None
        try:
            with self.setup_kernel():
                for index, cell in enumerate(nb.cells):
                    if cell.cell_type == "code" and cell.source.strip() and index not in culprits:
                        running = index
                        self.execute_cell(cell, index)
                        self.completed.add(index)
                self.muted = not self._reports_errors(nb)
            return True
        except Exception as error:  # a hostile kernel can make nbclient raise anything
            why = self.jail.verdict() if self.jail else ""
            if running is None:
                said = why or (self.jail.log() if self.jail else "")
                raise RuntimeError(f"the kernel did not start: {said or error}") from None
            self.completed.discard(running)
            culprits[running] = f"the kernel was ended: {why or type(error).__name__}"
            return False
        finally:
            if self.jail is not None:
                self.jail.remove()

    def _reports_errors(self, nb: NotebookNode) -> bool:
        """Whether an error raised now still arrives; a crude forgery would swallow it."""
        token = secrets.token_hex(8)
        nb.cells.append(new_code_cell(f"raise RuntimeError({token!r})"))
        try:
            cell = self.execute_cell(nb.cells[-1], len(nb.cells) - 1)
            return any(o.output_type == "error" and token in o.evalue for o in cell.outputs)
        except Exception:
            return False
        finally:
            nb.cells.pop()

    def create_kernel_manager(self) -> SandboxedKernelManager:
        limits = replace(self.confinement.limits, seconds=self.seconds)
        self.km = SandboxedKernelManager(
            confinement=replace(self.confinement, limits=limits),
            files=Path(self.resources["metadata"]["path"]),
            kernel_name="python3",
            config=self.config,
        )
        self.jail = self.km.jail
        return self.km

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> Any:
        """Drop widgets, and output beyond a limit; errors and states always pass."""
        kind = msg["msg_type"]
        if kind.startswith("comm"):
            return None
        if kind not in ("status", "error"):
            self.printed += len(json.dumps(msg["content"], default=str))
            if self.printed > MAX_OUTPUT:
                return None
        return super().process_message(msg, cell, cell_index)
