"""The classroom: what students get, what they hand in, and what their code cannot do."""

import ast
import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from classroom_demo import CHAPTER, MAX, RIGHT, answered, cell, find, hand_in, make_course
from nbformat.v4 import new_code_cell, new_notebook

from classroom import lab, workspace, write_atomically
from classroom.workspace import deliver

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="grading needs Linux")


# --- files


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- work/


@pytest.fixture
def course(tmp_path):
    """A course with two lectures and no assignment, and a function that writes one."""

    def lecture(name, text):
        path = tmp_path / "chapters" / name / "lecture.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    lecture("00_a", "first")
    lecture("01_b", "second")
    return tmp_path, lecture


def contents(course):
    files = (course / "work").glob("[0-9]*/*")
    return {f"{f.parent.name}/{f.name}": f.read_text() for f in files}


def test_lectures_are_copied_and_brought_up_to_date(course):
    folder, lecture = course
    assert deliver(folder) == []
    assert contents(folder) == {"00_a/lecture.ipynb": "first", "01_b/lecture.ipynb": "second"}
    lecture("00_a", "first, again")
    lecture("02_c", "third")
    assert deliver(folder) == []
    assert contents(folder) == {
        "00_a/lecture.ipynb": "first, again",
        "01_b/lecture.ipynb": "second",
        "02_c/lecture.ipynb": "third",
    }


def test_what_a_student_changed_is_kept_and_the_newer_version_put_beside_it(course):
    folder, lecture = course
    deliver(folder)
    mine = folder / "work/00_a/lecture.ipynb"
    mine.write_text("mine")
    assert deliver(folder) == []  # nothing newer: no note, no copy
    lecture("00_a", "v2")
    notes = deliver(folder)
    assert len(notes) == 1 and "lecture.new.ipynb" in notes[0] and "00_a" in notes[0]
    assert mine.read_text() == "mine"
    assert (mine.parent / "lecture.new.ipynb").read_text() == "v2"
    assert deliver(folder) == []  # said once
    lecture("00_a", "v3")  # the copy beside was not touched: it follows
    deliver(folder)
    assert (mine.parent / "lecture.new.ipynb").read_text() == "v3"
    (mine.parent / "lecture.new.ipynb").write_text("also mine")
    lecture("00_a", "v4")
    assert "lecture.new2.ipynb" in deliver(folder)[0]
    assert contents(folder) == {
        "00_a/lecture.ipynb": "mine",
        "00_a/lecture.new.ipynb": "also mine",
        "00_a/lecture.new2.ipynb": "v4",
        "01_b/lecture.ipynb": "second",
    }


def test_a_deleted_file_comes_back_and_an_undone_change_is_no_change(course):
    folder, lecture = course
    deliver(folder)
    mine = folder / "work/00_a/lecture.ipynb"
    mine.unlink()
    shutil.rmtree(folder / "work/01_b")
    deliver(folder)
    assert contents(folder) == {"00_a/lecture.ipynb": "first", "01_b/lecture.ipynb": "second"}
    mine.write_text("mine")
    mine.write_text("first")
    lecture("00_a", "v2")
    assert deliver(folder) == [] and mine.read_text() == "v2"


def test_files_of_the_student_are_never_taken_for_ours(course):
    folder, _ = course
    (folder / "work/00_a").mkdir(parents=True)
    (folder / "work/00_a/lecture.ipynb").write_text("was here before")
    (folder / "work/01_b").mkdir()
    target = folder / "elsewhere"
    target.write_text("elsewhere")
    (folder / "work/01_b/lecture.ipynb").symlink_to(target)
    (folder / "work/00_a/notes.txt").write_text("notes")
    assert len(deliver(folder)) == 2
    assert (folder / "work/00_a/lecture.ipynb").read_text() == "was here before"
    assert (folder / "work/00_a/lecture.new.ipynb").read_text() == "first"
    assert target.read_text() == "elsewhere"
    assert (folder / "work/01_b/lecture.ipynb").is_symlink()
    assert (folder / "work/00_a/notes.txt").read_text() == "notes"


def test_interrupted_anywhere_nothing_of_the_student_is_lost(course, monkeypatch):
    """Stop after each write in turn; the run that follows must end as an undisturbed one does."""
    folder, lecture = course
    deliver(folder)
    (folder / "work/01_b/lecture.ipynb").write_text("mine")
    lecture("00_a", "v2")
    lecture("01_b", "v2")
    start = folder / "start"
    shutil.copytree(folder / "work", start)
    whole = deliver(folder) and contents(folder)
    assert whole["00_a/lecture.ipynb"] == "v2" and whole["01_b/lecture.new.ipynb"] == "v2"
    real, stopped = workspace.write_atomically, 0
    for limit in range(100):
        shutil.rmtree(folder / "work")
        shutil.copytree(start, folder / "work")
        count = 0

        def write_or_stop(path, data, limit=limit):
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            real(path, data)

        monkeypatch.setattr(workspace, "write_atomically", write_or_stop)
        try:
            deliver(folder)
        except KeyboardInterrupt:
            stopped += 1
        else:
            break
        monkeypatch.setattr(workspace, "write_atomically", real)
        deliver(folder)
        assert contents(folder) == whole, f"stopped before write {limit}"
    assert stopped >= 6


def test_a_damaged_record_makes_everything_the_students(course):
    folder, lecture = course
    deliver(folder)
    (folder / "work/.delivered.json").write_text('{"files"')
    lecture("00_a", "v2")
    notes = deliver(folder)
    assert "unreadable" in notes[0] and len(notes) == 2
    assert contents(folder)["00_a/lecture.ipynb"] == "first"
    assert contents(folder)["00_a/lecture.new.ipynb"] == "v2"


def test_jupyterlab_is_started_on_work_alone_and_locally(tmp_path):
    (tmp_path / "00_start_here").mkdir()
    (tmp_path / "00_start_here/lecture.ipynb").write_text("{}")
    words = lab.command(tmp_path, browser=False)
    assert f"--ServerApp.root_dir={tmp_path}" in words
    assert "--LabApp.default_url=/lab/tree/00_start_here/lecture.ipynb" in words
    assert "--ServerApp.open_browser=False" in words
    saved = list((tmp_path / ".jupyter").iterdir())
    assert len(saved) == 1 and "toc:plugin" in saved[0].read_text()
    saved[0].write_text("arranged by the student")
    lab.command(tmp_path, browser=True)
    assert saved[0].read_text() == "arranged by the student"


def test_no_display_no_browser(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(lab.platform, "release", lambda: "6.1.0")
    assert not lab.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert lab.has_display()
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setattr(lab.platform, "release", lambda: "5.15-microsoft-standard-WSL2")
    assert lab.has_display()


# --- the sandbox


@pytest.fixture(scope="module")
def confinement(tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("grading needs Linux")
    from classroom.confine import Limits, confine

    folder = tmp_path_factory.mktemp("secrets")
    secret = folder / "gradebook.db"
    secret.write_text("secret")
    limits = Limits(seconds=20, memory=1_000_000_000, processes=40, file_size=1_000_000)
    found = confine(limits, secrets=(secret, ROOT / "pyproject.toml"), trust=True)
    print(found.report())
    return found


def inside(confinement, code, seconds=60):
    """Run Python code in the sandbox: exit status, output, why it was ended."""
    from classroom.sandbox import run_confined

    return run_confined(confinement, [sys.executable, "-I", "-c", code], seconds)


def needs(confinement, *properties):
    for name in properties:
        if not confinement.holds(name):
            pytest.skip(f"not possible on this machine: {name}")


def test_limits_hold_on_every_machine(confinement):
    for name in ("memory limit", "process limit", "file size limit", "time limit"):
        if name == "process limit" and not confinement.holds("no privileges"):
            continue  # the kernel never limits root's processes
        assert confinement.holds(name), confinement.report()


@linux
def test_everything_holds_where_namespaces_work(confinement):
    """An independent program decides whether they do: what cannot be skipped must hold."""
    program = shutil.which("unshare")
    if program is None:
        pytest.skip("no unshare program to ask")
    flags = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--mount-proc"]
    user = [] if os.getuid() == 0 else ["--user"]
    asked = subprocess.run([program, *user, *flags, "true"], capture_output=True)
    if asked.returncode != 0:
        pytest.skip(f"no namespaces on this machine: {asked.stderr.decode().strip()}")
    lacking = [name for name, held, _ in confinement.verified if not held]
    assert set(lacking) <= (set() if os.getuid() == 0 else {"a user of its own"})


def test_ordinary_code_runs(confinement):
    code, out, _ = inside(confinement, "import numpy, torch; print(int(torch.ones(3).sum()))")
    assert (code, out) == (0, "3\n")


def test_exit_status_and_environment(confinement, monkeypatch):
    assert inside(confinement, "raise SystemExit(7)")[0] == 7
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy")
    code, out, _ = inside(confinement, "import os; print(sorted(os.environ), os.getcwd())")
    assert code == 0 and "SECRET_TOKEN" not in out and str(ROOT) in out


def test_network_is_out_of_reach(confinement):
    needs(confinement, "no network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        port = server.getsockname()[1]
        code, out, _ = inside(
            confinement,
            f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 3)\n"
            "except OSError as error:\n    print('refused', type(error).__name__)",
        )
        assert code == 0 and out.startswith("refused")
        with pytest.raises(TimeoutError):
            server.accept()
    own = "import socket; s = socket.create_server(('127.0.0.1', 0)); "
    own += "socket.create_connection(s.getsockname(), 3); print('own loopback')"
    assert inside(confinement, own)[1] == "own loopback\n"


def test_files_of_the_course_are_out_of_reach(confinement):
    needs(confinement, "cannot read notebooks, grades, others")
    code, out, _ = inside(
        confinement,
        "import os, pathlib\n"
        f"root = pathlib.Path({str(ROOT)!r})\n"
        "print(sorted(p.name for p in root.iterdir()))\n"
        "print(len(os.listdir(root / 'build')), len(os.listdir(root / 'build/sandbox')))",
    )
    names, rest = out.splitlines()
    allowed = {Path(sys.prefix).name, "assets", "build", "kernels", "minillm"}
    assert code == 0 and set(ast.literal_eval(names)) <= allowed
    assert rest == "1 1"  # its own folder only


def test_nothing_outside_is_written(confinement, tmp_path):
    needs(confinement, "writes only in its scratch folder")
    for folder in (ROOT, ROOT / "minillm", tmp_path, Path("/tmp"), Path("/usr")):
        name = f"planted-{os.getpid()}-{folder.name}"
        code = f"open({str(folder / name)!r}, 'w').write('x')"
        inside(confinement, code)
        assert not (folder / name).exists()


def test_the_grader_cannot_be_signalled(confinement):
    needs(confinement, "sees no process of the grader")
    target = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        code = "import os, signal\nfor pid in ({0}, os.getppid(), 1):\n    try:\n"
        code += "        os.kill(pid, signal.SIGKILL)\n    except OSError as error:\n"
        code += "        print(type(error).__name__)\nprint('alive')"
        status, out, _ = inside(confinement, code.format(target.pid))
        assert target.poll() is None
        assert status == 0 and out.endswith("alive\n")
    finally:
        target.kill()
        target.wait()


def test_memory_of_one_process_is_limited(confinement):
    code = "try:\n    bytearray(2_000_000_000)\nexcept MemoryError:\n    print('refused')"
    assert inside(confinement, code)[:2] == (0, "refused\n")


def test_memory_of_all_processes_is_watched(confinement):
    code = (
        "import os, time\n"
        "for _ in range(4):\n"
        "    if os.fork() == 0:\n"
        "        x = bytearray(b'1') * 600_000_000\n"
        "        time.sleep(30)\n"
        "time.sleep(30)"
    )
    start = time.monotonic()
    status, _, why = inside(confinement, code)
    assert status == 137 and "GB of memory" in why and time.monotonic() - start < 15


@pytest.mark.slow
def test_a_fork_bomb_ends(confinement):
    needs(confinement, "process limit")
    from classroom.sandbox import run_confined

    short = limited(confinement, seconds=3)
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    start, word = time.monotonic(), f"fork-bomb-{os.getpid()}"
    status, _, why = run_confined(short, [sys.executable, "-I", "-c", bomb, word], 60)
    assert status == 137 and "s in all" in why and time.monotonic() - start < 20
    assert not processes_with(word)


def test_nobody_stays_behind(confinement):
    """A daemon in a session of its own ends with the process that started it."""
    word = f"left-behind-{os.getpid()}"
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)',"
        f" '{word}'])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(0.3)"
    )
    assert inside(confinement, code)[0] == 0
    assert not processes_with(word)


def test_files_are_limited(confinement):
    code = "try:\n    open('big', 'wb').write(bytes(2_000_000))\n"
    code += "except OSError as error:\n    print(error.errno)"
    assert inside(confinement, code)[1] == "27\n"  # EFBIG


def limited(confinement, **changes):
    from dataclasses import replace

    return replace(confinement, limits=replace(confinement.limits, **changes))


def processes_with(word):
    """Processes of this machine that have `word` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_without_namespaces_the_limits_and_the_cleaning_up_remain(confinement):
    """What is left on a machine that allows no namespaces (root keeps its own user here)."""
    from dataclasses import replace

    bare = replace(confinement, namespaces=False, drop_uid=False)
    test_memory_of_one_process_is_limited(bare)
    test_nobody_stays_behind(bare)
    test_files_are_limited(bare)
    status, _, why = inside(limited(bare, seconds=1), "import time; time.sleep(30)")
    assert status == 137 and "s in all" in why


@linux
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can do that")
def test_root_without_namespaces_becomes_another_user(confinement):
    from dataclasses import replace

    from classroom.sandbox import run_confined

    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if system is None:
        pytest.skip("no Python that every user can read")
    bare = replace(confinement, namespaces=False, drop_uid=True)
    code = "import os; print(os.getuid(), os.getgid(), os.getgroups(), open('/proc/self/status')"
    code += ".read().split('CapEff:')[1].split()[0]); open('mine', 'w').write('x')"
    status, out, why = run_confined(bare, [system, "-I", "-c", code], 60)
    uid, gid, *rest = out.split()
    assert status == 0 and rest == ["[]", "0000000000000000"], why
    assert uid == gid and 61184 <= int(uid) < 65520


@linux
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can do that")
def test_a_full_sandbox_leaves_room_in_its_neighbor(confinement):
    """The limit on processes counts per user: each sandbox has a user of its own."""
    import subprocess

    from classroom.sandbox import Jail, run_confined

    few = limited(confinement, processes=20)
    fork = "import os, time\nfor _ in range(15):\n    if not os.fork():\n        time.sleep(60)\n"
    jail = Jail(few)
    command = jail.command([sys.executable, "-I", "-c", fork + "print('full', flush=True)"])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=jail.environment()
    ) as busy:
        try:
            assert busy.stdout.readline() == "full\n"
            status, out, why = run_confined(
                few, [sys.executable, "-I", "-c", fork + "print('room')"], 60
            )
        finally:
            busy.terminate()
    jail.remove()
    assert (status, out) == (0, "room\n"), why


@linux
@pytest.mark.slow
def test_a_kernel_that_cannot_start_is_the_graders_trouble(
    demo, confinement, tmp_path, monkeypatch
):
    """No points are given or taken when the machine is at fault: the row says what happened."""
    from classroom import grade as grading

    hand_in(tmp_path, "ada", answered(demo[1], RIGHT))
    tiny = limited(confinement, memory=1)
    monkeypatch.setattr(grading, "confine", lambda *a, **k: tiny)
    _, remarks, _, _ = grade_all(demo, tmp_path)
    assert "could not be graded" in remarks["ada", "total"]
    assert "did not start" in remarks["ada", "total"]


@linux
def test_the_report_says_what_does_not_hold(confinement, tmp_path):
    """The probe is not a formality: without namespaces it sees what it should not."""
    from dataclasses import replace

    from classroom import confine as module

    secret = tmp_path / "secret"
    secret.write_text("secret")
    bare = replace(confinement, namespaces=False, drop_uid=False)
    found, why = module._observe(bare, (secret,))
    assert found is not None, why
    judged = replace(bare, verified=module._judge(bare, found))
    for name in ("no network", "cannot read notebooks, grades, others", "a user of its own"):
        assert not judged.holds(name), judged.report()
    assert not judged.holds("writes only in its scratch folder")
    assert judged.holds("memory limit") and judged.holds("file size limit")
    assert "DOES NOT HOLD no network" in judged.report() and str(secret) in judged.report()
    assert not list(tmp_path.glob("probe-*")) and not list(ROOT.glob("probe-*"))


@linux
def test_student_code_is_not_run_as_root_unasked(monkeypatch):
    from classroom import confine as module

    monkeypatch.setattr(module.os, "getuid", lambda: 0)
    monkeypatch.setattr(module, "_observe", lambda how, secrets: (None, "forbidden here"))
    with pytest.raises(RuntimeError, match=r"as root.*forbidden here.*--trust-submissions"):
        module.confine(module.Limits())


@pytest.mark.parametrize("name", ["seconds", "memory", "processes"])
def test_limits_are_positive(name):
    from classroom.sandbox import Limits

    with pytest.raises(ValueError, match=rf"{name}=0 must be positive"):
        Limits(**{name: 0})


# --- release


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demonstration course, released: (course, released notebook)."""
    from classroom.release import release

    folder = tmp_path_factory.mktemp("course")
    make_course(folder)
    return folder, release(CHAPTER, folder)


def test_nbgrader_finds_its_tools_in_an_environment_that_was_not_activated(tmp_path, monkeypatch):
    from classroom.release import open_course

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    open_course(tmp_path)
    assert Path(shutil.which("alembic")).parent == Path(sys.executable).parent


@pytest.mark.slow
def test_release_takes_solutions_and_hidden_tests_out(demo):
    _, released = demo
    text = released.read_text()
    for word in ("BEGIN", "own words", "randrange", "x // 2"):
        assert word not in text
    notebook = nbformat.read(released, as_version=4)
    assert "your own code" in notebook.cells[2].source and "Twice x" in notebook.cells[2].source
    assert notebook.cells[4].source == 'assert double(0) == 0, "double(0) is 0"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells.append(cell("assert 1", "t1_double_check", 1)), "Duplicate|duplicate"),
        (lambda cells: cells[3].metadata.nbgrader.pop("points"), "points"),
        (lambda cells: cells[2].metadata.pop("nbgrader"), "not marked `solution`"),
        (lambda cells: cells[4].metadata.pop("nbgrader"), "not graded and locked"),
        (lambda cells: cells.pop(6), "no graded cell follows"),
        (lambda cells: cells[2].update(source="def double(x): ..."), "without `### BEGIN"),
        (lambda cells: cells[2].update(source="### BEGIN SOLUTION\n1"), "0 END SOLUTION"),
    ],
)
def test_release_says_what_is_wrong(change, message, tmp_path):
    from classroom.release import release

    path = make_course(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    change(notebook.cells)
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match=message):
        release(CHAPTER, tmp_path)
    assert not (tmp_path / "build/release").exists()


@pytest.mark.slow
def test_leaks_are_found(demo):
    from classroom.release import leaks

    folder, released = demo
    source = folder / "chapters" / CHAPTER / "assignment.ipynb"
    assert leaks(source, released) == []
    assert len(leaks(source, source)) >= 6


@pytest.mark.slow
def test_unknown_chapters_are_refused(demo):
    from classroom.release import release

    with pytest.raises(ValueError, match=f"'92_none' has no assignment.*{CHAPTER}"):
        release("92_none", demo[0])


@pytest.mark.slow
def test_students_get_the_released_version_only(tmp_path, monkeypatch):
    from classroom import release as module

    path = make_course(tmp_path)
    assert deliver(tmp_path) == []
    delivered = tmp_path / "work" / CHAPTER / "assignment.ipynb"
    everything = "".join(p.read_text() for p in (tmp_path / "work").rglob("*.ipynb"))
    assert "own words" not in everything and "randrange" not in everything
    assert "your own code" in delivered.read_text()
    assert not (tmp_path / "build").exists()  # the instructor's gradebook is left alone

    def not_again(*_):
        raise AssertionError("released again although nothing changed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "release", not_again)
        assert deliver(tmp_path) == []
    before = delivered.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[6].source = notebook.cells[6].source.replace("5", "7").replace("2", "3")
    nbformat.write(notebook, path)
    assert deliver(tmp_path) == [] and "half(7)" in delivered.read_text()
    notebook.cells.pop()
    nbformat.write(notebook, path)
    notes = deliver(tmp_path)
    assert "could not be released" in notes[0] and "half(7)" in delivered.read_text()
    assert before != delivered.read_bytes()


# --- what is handed in


def test_submissions_are_found_and_unsafe_ones_refused(tmp_path):
    from classroom.submission import find_submissions

    def put(name):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return path

    put("ada/03_attention/assignment.ipynb")
    put("ben_01_tokenization.ipynb")
    put("zoë.o-k@x/01_tokenization/assignment.ipynb")
    put("ada/03_attention/.ipynb_checkpoints/assignment-checkpoint.ipynb")
    put("ada/99_none/assignment.ipynb")
    put("=cmd()/03_attention/assignment.ipynb")
    put("-rf/03_attention/assignment.ipynb")
    put("a..b/03_attention/assignment.ipynb")
    put("stray.ipynb")
    put("ben/01_tokenization/assignment.ipynb")
    (tmp_path / "in/eve/03_attention").mkdir(parents=True)
    (tmp_path / "in/eve/03_attention/assignment.ipynb").symlink_to("/etc/passwd")
    (tmp_path / "in/mal").symlink_to(tmp_path / "in/ada")
    found, refused = find_submissions(tmp_path / "in", ["01_tokenization", "03_attention"])
    names = {(one.student, one.chapter) for one in found}
    assert names == {
        ("ada", "03_attention"),
        ("ben", "01_tokenization"),
        ("zoë.o-k@x", "01_tokenization"),
    }
    said = "\n".join(refused)
    for part in ("=cmd()", "-rf", "a..b", "99_none", "stray", "twice", "a link"):
        assert part in said
    assert len(refused) == 7 and "checkpoint" not in said
    with pytest.raises(ValueError, match="not a folder"):
        find_submissions(tmp_path / "nowhere", [])


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, '{"nbformat": 4}', "\udcff"])
def test_what_is_no_notebook_is_a_clear_error(text, tmp_path):
    from classroom.submission import read_notebook

    path = tmp_path / "assignment.ipynb"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="not a valid notebook"):
        read_notebook(path)


def test_of_a_submission_only_the_answers_are_kept():
    from classroom.submission import merge

    released = new_notebook(
        cells=[
            cell("stub", "t1"),
            cell("assert True", "t1_check", 2),
            cell("assert 1", "t1_more", 1),
        ]
    )
    student = nbformat.from_dict(json.loads(json.dumps(released)))
    student.cells[0].source = "answer"
    student.cells[1].source = "pass"
    student.cells[1].metadata.update(tags=["skip-execution"])
    student.cells[1].metadata.nbgrader.update(points=100, grade=False)
    student.cells[2] = cell("own", "made_up", 50)
    student.cells.append(nbformat.from_dict(json.loads(json.dumps(student.cells[1]))))
    student.cells.append(new_code_cell("helper", metadata={"nbgrader": "no dictionary"}))
    merged, remarks = merge(student, released)
    assert [c.source for c in merged.cells] == ["answer", "assert True", "own", "pass", "helper"]
    assert merged.cells[1].metadata == {"nbgrader": released.cells[1].metadata.nbgrader}
    assert all(not c.metadata for c in merged.cells[2:])
    assert "changed" in remarks["t1_check"] and "deleted" in remarks["t1_more"]
    assert set(remarks) == {"t1_check", "t1_more"}


# --- grading


def grade_all(demo, folder, **limits):
    from classroom.grade import grade, to_csv
    from classroom.sandbox import Limits

    rows, refused, how = grade(folder, demo[0], Limits(**limits), trust=True)
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    points = {(row["student"], row["task"]): float(row["points"]) for row in table}
    remarks = {(row["student"], row["task"]): row["remark"] for row in table}
    return points, remarks, refused, how


@linux
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_class_is_graded(demo, tmp_path):
    """Honest, partly right, empty, tampered with: points, remarks, feedback; and again."""
    from nbgrader.api import Gradebook

    _, released = demo
    hand_in(tmp_path, "ada", answered(released, RIGHT))
    lazy = RIGHT | {"t1_double": "def double(x):\n    return 4 if x == 2 else 0"}
    hand_in(tmp_path, "ben", answered(released, lazy))
    hand_in(tmp_path, "cyd", answered(released, {}))
    tampered = answered(released, {"t2_half": RIGHT["t2_half"]})
    for name in ("t1_double_check", "t1_double_hidden"):
        tampered.cells[find(tampered, name)].metadata["tags"] = ["skip-execution"]
    tampered.cells[find(tampered, "t1_double_check")].source = "pass"
    del tampered.cells[find(tampered, "t2_half_check")]
    hand_in(tmp_path, "dan", tampered)
    script = RIGHT | {
        "t2_half": "from IPython.display import HTML, display\n"
        "display(HTML('<script>alert(1)</script><p>kept</p><img src=x onerror=alert(1)>'))\n"
        + RIGHT["t2_half"],
        "t1_double": "import sys\n\ndef double(x):\n    print('careful', file=sys.stderr)\n"
        "    return 2 * x",
    }
    hand_in(tmp_path, "eve", answered(released, script))
    broken = tmp_path / "fay" / CHAPTER / "assignment.ipynb"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    for _ in range(2):
        points, remarks, refused, _ = grade_all(demo, tmp_path)
        totals = {student: p for (student, task), p in points.items() if task == "total"}
        assert totals == {"ada": 10, "ben": 7, "cyd": 0, "dan": 0, "eve": 10, "fay": 0}
        assert {t: points["ada", t] for t in MAX} == MAX and refused == []
        assert points["ben", "t1_double_check"] == 2 and points["ben", "t1_double_hidden"] == 0
        assert "changed" in remarks["dan", "t1_double_check"]
        assert "deleted" in remarks["dan", "t2_half_check"]
        assert "not a valid notebook" in remarks["fay", "total"]
    with Gradebook(f"sqlite:///{demo[0]}/build/gradebook.db", "minillm") as book:
        notes = book.find_submission_notebook("assignment", CHAPTER, "dan")
        assert not any(grade.needs_manual_grade for grade in notes.grades)
    pages = {p.parent.parent.name: p.read_text() for p in demo[0].glob("build/feedback/*/*/*.html")}
    assert set(pages) == {"ada", "ben", "cyd", "dan", "eve"}
    assert "kept" in pages["eve"]
    for active in ("<script>alert(1)", "<img src=x", "<p>kept"):
        assert active not in pages["eve"]


@linux
@pytest.mark.slow
def test_output_is_limited_but_errors_pass():
    from nbclient import NotebookClient

    from classroom.confined import MAX_OUTPUT, ConfinedExecute

    step = ConfinedExecute()
    NotebookClient.__init__(step, new_notebook(cells=[new_code_cell("")]), None)
    step.printed, step.clear_before_next_output = 0, False

    def message(kind, **content):
        head = {"header": {"msg_type": kind}, "parent_header": {"msg_id": "1"}}
        return {"msg_type": kind, "content": content, **head}

    one = step.nb.cells[0]
    for _ in range(3 * MAX_OUTPUT // 100_000):
        step.process_message(message("stream", name="stdout", text="x" * 100_000), one, 0)
    assert MAX_OUTPUT / 2 < sum(len(o.text) for o in one.outputs) <= MAX_OUTPUT
    step.process_message(message("error", ename="E", evalue="v", traceback=[]), one, 0)
    assert one.outputs[-1].output_type == "error"
    step.process_message(message("comm_open", target_name="jupyter.widget", data={}), one, 0)
    assert not step.comm_objects and not step.widget_state


ATTACKS = {
    "bomb": "    import os\n    while True:\n        os.fork()",
    "deaf": "    import signal\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "    while True:\n        pass",
    "dies": "    import os\n    os._exit(0)",
    "flood": "    while True:\n        print('x' * 1_000_000)",
    "hog": "    memory = []\n    while True:\n        memory.append(bytearray(b'1') * 100_000_000)",
    "loop": "    while True:\n        pass",
}


@linux
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_costs_its_own_points_only(demo, confinement, tmp_path, name, monkeypatch):
    from classroom import sandbox

    jails = []

    class Recorded(sandbox.Jail):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            jails.append(self)

    monkeypatch.setattr(sandbox, "Jail", Recorded)
    if name == "bomb":
        needs(confinement, "process limit")
    attack = RIGHT | {"t1_double": f"def double(x):\n{ATTACKS[name]}"}
    hand_in(tmp_path, name, answered(demo[1], attack))
    limits = {"seconds": 120, "cell_seconds": 4, "memory": 1_000_000_000, "processes": 40}
    points, remarks, _, how = grade_all(demo, tmp_path, **limits)
    assert points[name, "t1_double_check"] == 0 and points[name, "t1_double_hidden"] == 0
    assert points[name, "t2_half_check"] == 5, remarks
    assert how.holds("time limit")
    kept = demo[0] / "build" / "autograded" / name / CHAPTER / "assignment.ipynb"
    assert kept.stat().st_size < 8_000_000
    assert len(jails) >= 3  # two for the probe, the kernels
    for jail in jails:
        assert not processes_with(str(jail.folder)), "somebody stayed behind"
        assert not jail.folder.exists() and not jail.cwd.exists()


@linux
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_checks_that_were_never_run_give_no_points(demo, tmp_path):
    """When the time for the whole notebook is over; when errors are swallowed."""
    slow = RIGHT | {"t1_double": "import time\ntime.sleep(60)\n" + RIGHT["t1_double"]}
    hand_in(tmp_path, "slow", answered(demo[1], slow))
    mute = "get_ipython().showtraceback = lambda *a, **k: None\n"
    mute += "import IPython.core.interactiveshell as s\n"
    mute += "s.InteractiveShell.run_code = lambda *a, **k: _done()\n"
    mute += "async def _done():\n    return False\n"
    hand_in(tmp_path, "mute", answered(demo[1], {"t1_double": mute}))
    points, remarks, _, _ = grade_all(demo, tmp_path, seconds=12, cell_seconds=60)
    assert points["slow", "total"] == 0 and "not run" in remarks["slow", "t2_half_check"]
    assert points["mute", "total"] == 0
    assert "no longer reports errors" in remarks["mute", "t2_half_check"]


REAL = sorted(ROOT.glob("chapters/*/assignment.ipynb"))


@linux
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not REAL, reason="no chapter has an assignment")
def test_a_real_assignment_goes_through_the_whole_cycle(tmp_path):
    """Release, hand in the instructor's answers and the empty notebook, grade, feedback."""
    from classroom.release import release

    path = REAL[-1]
    chapter = path.parent.name
    shutil.copytree(path.parent, tmp_path / "chapters" / chapter)
    instructor = nbformat.read(path, as_version=4)
    answers = {
        c.metadata.nbgrader["grade_id"]: c.source
        for c in instructor.cells
        if c.metadata.get("nbgrader", {}).get("solution")
    }
    released = release(chapter, tmp_path)
    for student, notebook in {
        "right": answered(released, answers),
        "empty": answered(released, {}),
    }.items():
        place = tmp_path / "in" / student / chapter
        place.mkdir(parents=True)
        nbformat.write(notebook, place / "assignment.ipynb")
    points, remarks, refused, how = grade_all((tmp_path, released), tmp_path / "in")
    graded = [c.metadata.nbgrader for c in instructor.cells if "nbgrader" in c.metadata]
    most = sum(about["points"] for about in graded if about["grade"])
    assert points["right", "total"] == most > 0, remarks
    assert points["empty", "total"] == 0 and refused == []
    assert len(list(tmp_path.glob("build/feedback/*/*/assignment.html"))) == 2
    print(how.report())
