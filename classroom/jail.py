"""Start one command inside limits and Linux namespaces. Run as a script by `sandbox.py`.

    python -I -S jail.py SPEC.json command argument ...

Three processes. The *warden* stays outside, watches time and memory, and kills everything at the
end. The *init* is process 1 of the new process namespace: it builds a file system of its own from
what SPEC lists, gives up every privilege and reaps orphans. The *ward* is the command. Only the
standard library is used, and nothing goes through a shell.
"""

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DEVICES = ("null", "zero", "full", "random", "urandom")
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library; raise `OSError` if it fails."""
    packed = [a.encode() if isinstance(a, str) else a for a in arguments]
    packed = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in packed]
    result = getattr(libc, name)(*packed)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")
    return result


def enter_process_namespace(as_root: bool) -> None:
    """The next child is process 1 of a new process namespace (of a new user's, if not root)."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEWPID | (0 if as_root else NEWUSER))
    if not as_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def bind(source: str, target: Path, writable: bool) -> None:
    """Show `source` at `target`, without set-uid programs, read-only unless `writable`."""
    if os.path.isdir(source):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    call("mount", source, str(target), None, MS_BIND | MS_REC, None)
    # flags that the mount already has are locked in a user namespace: ask for them again
    kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048 | 4096)
    kept = (kept & ~4096) | (1 << 21 if kept & 4096 else 0)  # relatime is numbered differently
    device = 0 if source.startswith("/dev/") else MS_NODEV
    flags = MS_REMOUNT | MS_BIND | MS_NOSUID | device | kept | (0 if writable else MS_RDONLY)
    call("mount", None, str(target), None, flags, None)


def build_root(spec: dict) -> None:
    """A file system that holds what `spec` lists and nothing else of this machine."""
    stage, size = Path(spec["stage"]), f"size={spec['disk']},mode=1777"
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "tmpfs", str(stage), "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    os.umask(0o022)
    for path in ("/tmp", "/dev/shm"):  # first: the course itself may lie in /tmp
        (stage / path[1:]).mkdir(parents=True)
        call("mount", "tmpfs", str(stage / path[1:]), "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in spec["readable"]:
        if os.path.islink(path):  # /bin -> usr/bin
            (stage / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (stage / path[1:]).symlink_to(os.readlink(path))
        elif os.path.exists(path):
            bind(path, stage / path[1:], writable=False)
    for path in spec["masked"]:  # only there if it lies in something readable
        if (stage / path[1:]).is_dir():
            call("mount", "tmpfs", str(stage / path[1:]), "tmpfs", MS_NOSUID, "size=64k,mode=755")
    for name in DEVICES:
        bind(f"/dev/{name}", stage / "dev" / name, writable=True)
    (stage / "dev/fd").symlink_to("/proc/self/fd")
    cwd = stage / spec["cwd"][1:]
    cwd.mkdir(parents=True, exist_ok=True)
    call("mount", "tmpfs", str(cwd), "tmpfs", MS_NOSUID | MS_NODEV, size)
    bind(spec["meeting"], stage / spec["meeting"][1:], writable=True)
    (stage / "proc").mkdir()
    call("mount", "proc", str(stage / "proc"), "proc", MS_NOSUID | MS_NODEV, None)
    (stage / ".old").mkdir()
    call("syscall", PIVOT_ROOT[platform.machine()], str(stage), str(stage / ".old"))
    os.chdir("/")
    call("umount2", "/.old", MNT_DETACH)
    os.rmdir("/.old")
    call("mount", None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "size=16m")


def raise_loopback() -> None:
    """The new network has a loopback of its own, so that ranks inside can talk to each other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def give_up_privileges(uid: int, gid: int, drop_uid: bool) -> None:
    """Another user if root started us; no capability, and no program gives any back."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails harmlessly without privileges
    if drop_uid:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("II", 0x20080522, 0)  # capability version 3, this process
    call("capset", header, struct.pack("6I", *[0] * 6))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_limits(limits: dict[str, int]) -> None:
    """Limits of each process, hard ones: what is lower already stays."""
    for name, value in {**limits, "RLIMIT_CORE": 0}.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def family(root: int) -> dict[int, int]:
    """Process `root` and all below it, as pid -> anonymous resident bytes."""
    parents, memory = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
                pages = Path(f"/proc/{entry}/statm").read_text().split()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
            memory[int(entry)] = (int(pages[1]) - int(pages[2])) * resource.getpagesize()
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return {pid: memory.get(pid, 0) for pid in members}


def folder_size(path: str) -> int:
    """Bytes in the files of a folder that the ward may write to; each counts 4 kB at least."""
    total = 0
    for folder, folders, files in os.walk(path):
        total += 4096 * (len(folders) + len(files))
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue  # removed meanwhile
    return total


def watch(child: int, spec: dict) -> int:
    """Wait for `child`; end it and all it started at the deadline or beyond the memory limit."""
    deadline = time.monotonic() + spec["seconds"]
    verdict = ""
    while True:
        began = time.monotonic()
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            break
        below = family(os.getpid())
        below.pop(os.getpid())
        if sum(below.values()) > spec["memory"]:
            verdict = f"more than {spec['memory'] / 1e9:.1f} GB of memory"
        elif folder_size(spec["meeting"]) > spec["disk"]:
            verdict = f"more than {spec['disk'] / 1e6:.0f} MB of files"
        elif time.monotonic() > deadline:
            verdict = f"more than {spec['seconds']:.0f} s in all"
        elif spec.get("stopped") or os.getppid() != spec["parent"]:
            verdict = "stopped"
        if verdict:
            Path(spec["verdict"]).write_text(verdict)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        # looking takes long where many processes run: spend a fifth of the time on it at most
        time.sleep(max(0.1, 4 * (time.monotonic() - began)))
    # without a process namespace, what was left behind has become our child: end it too
    while left := set(family(os.getpid())) - {os.getpid()}:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status)


def be_ward(command: list[str], spec: dict) -> None:
    set_limits(spec["limits"])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # ipykernel ends itself when it sees process 1 as its parent, which it always does here
    environment = {k: v for k, v in os.environ.items() if k != "JPY_PARENT_PID"}
    os.chdir(spec["cwd"])
    os.execve(command[0], command, environment)


def be_init(command: list[str], spec: dict) -> int:
    """Process 1 of the namespaces: build the file system, drop privileges, start, reap."""
    carried = {p: Path(spec["files"], p).read_bytes() for p in os.listdir(spec["files"])}
    if spec["namespaces"]:
        call("unshare", NEWNS | NEWNET | NEWIPC | NEWUTS)
        build_root(spec)
        raise_loopback()
    give_up_privileges(spec["uid"], spec["gid"], spec["drop_uid"])
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user clears it: last
    if spec["namespaces"]:
        for name, data in carried.items():
            Path(spec["cwd"], name).write_bytes(data)
    ward = os.fork()
    if ward == 0:
        be_ward(command, spec)
    while True:
        pid, status = os.wait()
        if pid == ward:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main() -> int:
    """The warden. Exit status: the command's, or 125 if the jail could not be built."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    spec["parent"] = os.getppid()
    command = sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the ward
    signal.signal(signal.SIGTERM, lambda *_: spec.update(stopped=True))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if spec["drop_uid"]:
        for path in (spec["meeting"], *Path(spec["meeting"]).iterdir()):
            os.chown(path, spec["uid"], spec["gid"])
    try:
        if spec["namespaces"]:
            enter_process_namespace(as_root=spec["drop_uid"])
    except OSError as error:
        print(f"jail: {error}", file=sys.stderr)
        return 125
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = 125
        try:
            code = be_init(command, spec)
        except (OSError, KeyError) as error:
            print(f"jail: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    code = watch(child, spec)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
