"""What code in the sandbox can do, found by trying. Its text is run by `confine.py`.

    python -I -c TEXT '{"port": 40000, ...}'

Prints one JSON object of observations; the grader outside judges them. Standard library only.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def reaches(family: int, address: object) -> bool:
    """Whether a socket outside accepts a connection."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as handle:
            handle.settimeout(2)
            handle.connect(address)
            return True
    except OSError:
        return False


def readable(path: str) -> bool:
    """Whether a file can be read, or a folder listed and found to hold something."""
    try:
        return bool(os.listdir(path)) if os.path.isdir(path) else bool(Path(path).read_bytes())
    except OSError:
        return False


def writes(folder: str, name: str) -> bool:
    """Whether a file can be made in `folder`; whoever asked looks for it from outside."""
    try:
        Path(folder, name).write_text("written by the probe")
        return True
    except OSError:
        return False


def sees(pid: int) -> bool:
    """Whether the grader can be signalled (signal 0 does nothing) or its memory map read."""
    try:
        os.kill(pid, 0)
        return True
    except OSError:
        return readable(f"/proc/{pid}/environ")


def forks(most: int) -> int:
    """How many processes can be started, at most `most`; all are ended again."""
    children = []
    try:
        while len(children) < most:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except OSError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)


def allocates(size: int) -> bool:
    try:
        return len(bytearray(size)) == size
    except MemoryError:
        return False


def fills(size: int) -> bool:
    """Whether a file may grow beyond `size` bytes (sparse: nothing is really written)."""
    try:
        with open("probe.bin", "wb") as file:
            file.truncate(size + 1)
        return True
    except OSError:
        return False
    finally:
        Path("probe.bin").unlink(missing_ok=True)


def main() -> None:
    asked = json.loads(sys.argv[1])
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    found = {
        "tcp": reaches(socket.AF_INET, ("127.0.0.1", asked["port"])),
        "abstract": reaches(socket.AF_UNIX, "\0" + asked["abstract"]),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "uid": os.getuid(),
        "capabilities": int(fields["CapEff"], 16) | int(fields["CapPrm"], 16),
        "no_new_privileges": fields.get("NoNewPrivs", "0").strip() == "1",
        "read": [path for path in asked["secrets"] if readable(path)],
        "wrote": [folder for folder in asked["folders"] if writes(folder, asked["name"])],
        "sees_grader": sees(asked["grader"]),
        "allocates": allocates(asked["memory"]),
        "fills": fills(asked["file_size"]),
        "forks": forks(asked["processes"]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
