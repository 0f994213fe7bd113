"""Hand out the course and open JupyterLab on it.

    python -m classroom.lab [--no-browser] [--copy-only]

JupyterLab sees `work/` only, listens on this machine only, and asks for a token.
"""

import os
import platform
import sys
from pathlib import Path

import tyro

from classroom import ROOT
from classroom.workspace import deliver

HERE = Path(__file__).resolve().parent


def has_display() -> bool:
    """Whether a browser could be opened: a desktop session, macOS, or Windows behind WSL."""
    if sys.platform == "darwin" or os.environ.get("BROWSER"):
        return True
    remote = "SSH_CONNECTION" in os.environ and "DISPLAY" not in os.environ
    windows = "microsoft" in platform.release().lower()
    return not remote and (
        windows or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))
    )


def command(work: Path, browser: bool) -> list[str]:
    """The command that starts JupyterLab on `work`, with a workspace of its own below it."""
    workspaces = work / ".jupyter"
    workspaces.mkdir(exist_ok=True)
    if not list(workspaces.iterdir()):  # later it holds what the student arranged
        from jupyterlab_server.workspaces_handler import WorkspacesManager  # seconds to import

        template = (HERE / "jupyter" / "workspaces" / "course.json").read_text()
        WorkspacesManager(str(workspaces)).save("default", template)
    lectures = sorted(work.glob("[0-9][0-9]_*/lecture.ipynb"))
    page = f"/lab/tree/{lectures[0].relative_to(work).as_posix()}" if lectures else "/lab"
    arguments = [
        f"--config={HERE / 'jupyter_lab_config.py'}",
        f"--ServerApp.root_dir={work}",
        f"--ServerApp.open_browser={browser}",
        f"--LabApp.default_url={page}",
        f"--LabApp.workspaces_dir={workspaces}",
    ]
    if hasattr(os, "getuid") and os.getuid() == 0:
        arguments.append("--allow-root")  # the usual user of a container
    return [sys.executable, "-m", "jupyterlab", *arguments]


def main(browser: bool = True, copy_only: bool = False) -> None:
    """Copy lectures and released assignments into work/, then open JupyterLab on it.

    Args:
        browser: open a browser; without a display the address is printed in any case.
        copy_only: only bring work/ up to date.
    """
    if not (ROOT / "chapters").is_dir():
        raise SystemExit(f"no chapters beside the package in {ROOT}: run this in a clone")
    notes = deliver()
    for note in notes:
        print(f"note: {note}")
    if copy_only:
        print(f"work/ holds {len(list((ROOT / 'work').glob('*/lecture.ipynb')))} lectures")
        return
    browser = browser and has_display()
    if not browser:
        print("Open the address that starts with http://127.0.0.1 in a browser; Ctrl-C twice ends.")
    words = command(ROOT / "work", browser)
    sys.stdout.flush()
    os.execv(words[0], words)  # JupyterLab takes this process's place: Ctrl-C reaches it


if __name__ == "__main__":
    tyro.cli(main)
