"""Find the strongest confinement that works on this machine, and verify it from inside.

Nothing is claimed that was not tried: a probe in the sandbox tries to connect, read, write, fork,
allocate and signal, and this side judges by what it can see itself where it can.
"""

import json
import os
import socket
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from classroom import ROOT
from classroom.sandbox import Confinement, Limits, run_confined


def confine(
    limits: Limits,
    masked: tuple[Path, ...] = (),
    secrets: tuple[Path, ...] = (),
    trust: bool = False,
) -> Confinement:
    """The strongest confinement that works here, with what a probe inside it observed.

    `masked` folders are hidden even where something readable contains them; `secrets` are files
    that the probe tries to read; it also tries to write beside them. Raises `RuntimeError` if only
    running student code as root would be left, unless `trust` is set.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"grading needs Linux (WSL will do), not {sys.platform}")
    root, why = os.getuid() == 0, []
    for namespaces, drop_uid in [(True, root), (False, root), *([(False, False)] if root else [])]:
        how = Confinement(limits, namespaces, drop_uid, masked)
        if root and not drop_uid and not trust:
            raise RuntimeError(
                "student code would run as root: " + "; ".join(why) + ". Grade as another user, "
                "in a place that user `nobody` can read, or say --trust-submissions"
            )
        found, remark = _observe(how, secrets)
        if found is not None:
            return replace(how, verified=_judge(how, found))
        why.append(f"with namespaces={namespaces}, another user={drop_uid}: {remark}")
    raise RuntimeError("no kernel can be started under limits: " + "; ".join(why))


def _observe(how: Confinement, secrets: tuple[Path, ...]) -> tuple[dict[str, Any] | None, str]:
    """Run the probe; its observations plus those only the outside can make."""
    name, limits = f"probe-{uuid.uuid4().hex}", how.limits
    folders = {ROOT, ROOT / "minillm", Path(tempfile.gettempdir()), Path.home()}
    folders = sorted(folders | {path.parent for path in secrets})
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        abstract.bind("\0" + name)
        abstract.listen()
        asked = {
            "port": tcp.getsockname()[1],
            "abstract": name,
            "name": name,
            "secrets": [str(path) for path in secrets],
            "folders": [str(folder) for folder in folders],
            "grader": os.getpid(),
            "memory": limits.memory + (1 << 28),
            "processes": limits.processes + 20,
            "file_size": limits.file_size,
        }
        script = Path(__file__).with_name("probe.py").read_text()  # not a file that it can see
        command = [sys.executable, "-I", "-c", script, json.dumps(asked)]
        _, out, remark = run_confined(how, command, timeout=60)
    written = [folder for folder in folders if (folder / name).exists()]
    for folder in written:
        (folder / name).unlink()
    try:
        found = json.loads(out)
    except json.JSONDecodeError:
        return None, remark.strip().splitlines()[-1] if remark.strip() else "it did not start"
    short = replace(how, limits=replace(limits, seconds=1))
    sleeper = [sys.executable, "-I", "-c", "import time; time.sleep(30)"]
    found["stopped"] = "s in all" in run_confined(short, sleeper, timeout=60)[2]
    return found | {"written": [str(folder) for folder in written]}, ""


def _judge(how: Confinement, found: dict[str, Any]) -> tuple[tuple[str, bool, str], ...]:
    """Turn observations into (property, holds, remark)."""
    limits, uid = how.limits, found["uid"]
    lonely = not (found["tcp"] or found["abstract"]) and found["interfaces"] == ["lo"]
    plain = found["capabilities"] == 0 and found["no_new_privileges"]
    other = "another user than yours" if uid != os.getuid() else "your own user id"
    return (
        ("no network", lonely, "a loopback of its own" if lonely else "sockets outside answer"),
        ("no privileges", plain and uid != 0, f"uid {uid}, {other}"),
        ("a user of its own", uid not in (0, os.getuid()), f"uid {uid}"),
        ("cannot read notebooks, grades, others", not found["read"], ", ".join(found["read"])),
        ("writes only in its scratch folder", not found["written"], ", ".join(found["written"])),
        ("sees no process of the grader", not found["sees_grader"], ""),
        ("memory limit", not found["allocates"], f"{limits.memory / 1e9:g} GB"),
        ("process limit", found["forks"] < limits.processes + 20, f"{found['forks']} started"),
        ("file size limit", not found["fills"], f"{limits.file_size / 1e6:g} MB"),
        ("time limit", found["stopped"], f"{limits.seconds:g} s in all, ended from outside"),
    )
