"""Run a kernel so that the code in it can harm neither the machine nor anybody's grade.

Only the kernel is confined: the notebook, the gradebook and the grader stay outside and talk to
it through sockets in one folder. `confine.py` finds out what this machine allows.

What no sandbox gives: hidden tests run in the student's own kernel, as they must to call the
student's functions. Code written to deceive can see them while they run, or answer in their name.
"""

import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from jupyter_client.manager import AsyncKernelManager

from classroom import ROOT

STRANGERS = range(61184, 65520)  # user ids that systemd, too, hands out for a moment
SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/sys/devices/system/cpu"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"),
    *("/etc/fonts", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"),
    "/etc/mime.types",
)


@dataclass(frozen=True)
class Limits:
    """What one notebook may use. Sizes in bytes, times in seconds.

    `memory` bounds the private memory of each process (RLIMIT_DATA) and the resident memory of
    all of them together (watched ten times a second). The address space is bounded too, but far
    above: importing PyTorch reserves gigabytes that it never touches.
    """

    seconds: float = 300
    cell_seconds: int = 60
    memory: int = 4_000_000_000
    address_space: int = 64_000_000_000
    processes: int = 128
    file_size: int = 64_000_000
    disk: int = 256_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be positive")

    def of_a_process(self, already: int) -> dict[str, int]:
        """Kernel limits by name; `already` processes of the same user exist and are counted."""
        return {
            "RLIMIT_DATA": self.memory,
            "RLIMIT_AS": self.address_space,
            "RLIMIT_NPROC": self.processes + already,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_CPU": int(self.seconds) + 5,
            "RLIMIT_NOFILE": 1024,
        }


@dataclass(frozen=True)
class Confinement:
    """How a kernel is confined, and what was verified of it: (property, holds, remark)."""

    limits: Limits
    namespaces: bool
    drop_uid: bool
    masked: tuple[Path, ...] = ()
    verified: tuple[tuple[str, bool, str], ...] = ()

    def holds(self, name: str) -> bool:
        """Whether the property called `name` was verified."""
        return any(held for found, held, _ in self.verified if found == name)

    def report(self) -> str:
        """One line per property, for the person who grades."""
        rows = [
            f"  {'holds' if held else 'DOES NOT HOLD':14}{name}{f' ({remark})' if remark else ''}"
            for name, held, remark in self.verified
        ]
        return "\n".join(["confinement of student code, as verified on this machine:", *rows])


class Jail:
    """The folders and the specification of one confined process. Call `remove` at the end."""

    def __init__(self, confinement: Confinement, files: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="minillm-"))  # short: socket paths are limited
        self.folder.chmod(0o711)  # another user must reach what lies in it
        for name, mode in {"meeting": 0o700, "files": 0o755, "stage": 0o755}.items():
            (self.folder / name).mkdir(mode=mode)
        # below the repository, so that notebooks find the package by looking upwards
        self.cwd = ROOT / "build" / "sandbox" / uuid.uuid4().hex[:12]
        self.confinement = confinement
        self.uid = _stranger() if confinement.drop_uid else os.getuid()
        self.gid = self.uid if confinement.drop_uid else os.getgid()
        if files is not None:
            self._carry(files)
        if not confinement.namespaces:
            shutil.copytree(self.folder / "files", self.cwd)
            if confinement.drop_uid:
                for path in (self.cwd, *self.cwd.iterdir()):
                    os.chown(path, self.uid, self.gid)

    def _carry(self, files: Path) -> None:
        """Take what lies beside the notebook, but no notebook (it may hold tests) and no link."""
        for path in files.iterdir():
            if path.is_file() and not path.is_symlink() and path.suffix != ".ipynb":
                shutil.copyfile(path, self.folder / "files" / path.name)

    def command(self, command: list[str]) -> list[str]:
        """`command`, wrapped: what to start, without a shell."""
        how = self.confinement
        spec = {
            "namespaces": how.namespaces,
            "drop_uid": how.drop_uid,
            "uid": self.uid,
            "gid": self.gid,
            "limits": how.limits.of_a_process(0 if how.namespaces else _threads()[self.uid]),
            "seconds": how.limits.seconds,
            "memory": how.limits.memory,
            "disk": how.limits.disk,
            "readable": _readable(),
            "masked": [str(path) for path in how.masked],
            "cwd": str(self.cwd),
            **{name: str(self.folder / name) for name in ("meeting", "files", "stage", "verdict")},
        }
        (self.folder / "spec.json").write_text(json.dumps(spec))
        script = str(Path(__file__).with_name("jail.py"))
        return [sys.executable, "-I", "-S", script, str(self.folder / "spec.json"), *command]

    def environment(self) -> dict[str, str]:
        """Nothing of the grader's environment but the language: it may hold secrets."""
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.cwd),
            "LOGNAME": "nobody",  # the user id has no name; programs ask here first
            "IPYTHONDIR": str(self.cwd / ".ipython"),
            "MPLCONFIGDIR": str(self.cwd / ".matplotlib"),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NBGRADER_EXECUTION": "autograde",
        }

    def verdict(self) -> str:
        """Why the warden ended the process; empty if it did not."""
        path = self.folder / "verdict"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        """What the warden or the kernel said on standard error."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-2000:].strip() if path.exists() else ""

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.cwd, ignore_errors=True)


def _threads() -> Counter[int]:
    """How many threads each user of this machine has."""
    found: Counter[int] = Counter()
    for task in Path("/proc").glob("[0-9]*"):
        try:
            found[task.stat().st_uid] += len(os.listdir(task / "task"))
        except OSError:
            continue  # it ended meanwhile
    return found


def _stranger() -> int:
    """A user id that nobody has: the limit on processes counts per user, so that two sandboxes of
    one user would take them from each other."""
    taken = {entry.pw_uid for entry in pwd.getpwall()} | set(_threads())
    return secrets.choice([uid for uid in STRANGERS if uid not in taken])


def _readable() -> list[str]:
    """What the confined process sees: the system's programs, Python, and the course's package."""
    course = [ROOT / name for name in ("minillm", "kernels", "assets")]
    python = [Path(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if os.path.isdir(p)]
    # the folder that a script was started in is on the path too, and is nobody's business
    ours = [path for path in python if path.resolve().is_relative_to(ROOT)]
    ours = [path for path in ours if not path.is_relative_to(sys.prefix)]
    python = [p for p in python if p not in ours and not ROOT.is_relative_to(p.resolve())]
    paths = {os.path.abspath(p) for p in (*SYSTEM, *course, *python)}
    paths |= {os.path.realpath(p) for p in (*course, *python)}
    ordered = sorted(paths, key=len)
    return [p for p in ordered if not any(p.startswith(q + "/") for q in ordered)]


class SandboxedKernelManager(AsyncKernelManager):
    """Starts a kernel inside a `Jail`, with the files that lie in folder `files` beside it."""

    def __init__(self, confinement: Confinement, files: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.jail = Jail(confinement, files)
        # what a flood of output may queue up on this side
        self.context.setsockopt(zmq.RCVHWM, 100)
        self.context.setsockopt(zmq.MAXMSGSIZE, 16_000_000)
        self.transport = "ipc"
        self.connection_file = str(self.jail.folder / "meeting" / "k.json")
        self.ip = str(self.jail.folder / "meeting" / "k")

    async def _async_start_kernel(self, **kwargs: Any) -> None:
        with open(self.jail.folder / "log", "wb") as log:
            kwargs |= {
                "cwd": "/",
                "env": self.jail.environment(),
                "stdout": subprocess.DEVNULL,
                "stderr": log,
            }
            await super()._async_start_kernel(**kwargs)

    start_kernel = _async_start_kernel  # type: ignore[assignment]

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return self.jail.command(super().format_kernel_cmd(extra_arguments))

    async def _async_kill_kernel(self, restart: bool = False) -> None:
        """Ask the warden first: it ends what the kernel has started; then by force."""
        if self.provisioner is not None and self.provisioner.process is not None:
            self.provisioner.process.terminate()
            try:
                self.provisioner.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.log.warning("the warden did not answer: killed")
        await super()._async_kill_kernel(restart=restart)

    _kill_kernel = _async_kill_kernel  # type: ignore[assignment]


def run_confined(
    confinement: Confinement, command: list[str], timeout: float
) -> tuple[int, str, str]:
    """Run `command` in a jail of its own: exit status, standard output, why it was ended."""
    jail = Jail(confinement)
    try:
        done = subprocess.run(
            jail.command(command),
            env=jail.environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            start_new_session=True,
        )
        text = done.stdout.decode(errors="replace")
        return done.returncode, text, jail.verdict() or done.stderr.decode(errors="replace")
    finally:
        jail.remove()
