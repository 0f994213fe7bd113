"""Corpora of the running interpreter, and downloads from a real server on this machine."""

import ast
import hashlib
import http.server
import inspect
import os
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from minillm.data import corpora
from minillm.data.download import SOURCES, DownloadError, Source, download, fetch, sha256

ROOT = Path(__file__).resolve().parents[1]


def test_stdlib_is_the_source_of_the_library():
    documents = corpora.stdlib()
    assert 5e6 < sum(map(len, documents)) < 30e6 and len(documents) > 300
    assert documents == corpora.stdlib()
    for module in (ast, inspect, socket):
        assert inspect.getsource(module) in documents
    assert all(document.strip() for document in documents)
    # An independent walk: the same number of files, in the order of their paths.
    top = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, folders, files in os.walk(top):
        folders[:] = [f for f in folders if not f.endswith(("-packages", "__pycache__"))]
        folders[:] = [f for f in folders if f not in ("test", "tests", "idle_test", "pydoc_data")]
        paths += [os.path.join(folder, f) for f in files if f.endswith(".py")]
    names = sorted(os.path.relpath(p, top).replace(os.sep, "/") for p in paths)
    assert (
        0 <= len([n for n in names if os.path.getsize(os.path.join(top, n))]) - len(documents) < 6
    )
    order = [names.index(n) for n in ("ast.py", "email/message.py", "inspect.py", "socket.py")]
    assert order == sorted(order)
    texts = [Path(top, n).read_text("utf-8") for n in ("ast.py", "email/message.py", "socket.py")]
    places = [documents.index(text) for text in texts]
    assert places == sorted(places)


@pytest.mark.slow
def test_pydocs_hold_topics_and_docstrings():
    documents = corpora.pydocs()
    assert 1e6 < sum(map(len, documents)) < 10e6
    from pydoc_data.topics import topics

    assert {text.strip() + "\n" for text in topics.values()} <= set(documents)
    by_module = {d.split("\n", 1)[0]: d for d in documents[len(topics) :]}
    for thing in (ast, ast.parse, ast.NodeVisitor, ast.NodeVisitor.visit):
        assert inspect.getdoc(thing) in by_module["ast"]
    assert "ast.NodeVisitor.visit(self, node)\n\n" in by_module["ast"]
    assert documents == corpora.pydocs()
    documents.clear()  # the caller's copy, not the next caller's corpus
    assert corpora.pydocs()


@pytest.mark.slow
def test_pydocs_imports_nothing_and_repeats_in_another_process():
    code = (
        "import sys, hashlib; from minillm.data import corpora\n"
        "before = set(sys.modules)\n"
        "text = repr(corpora.pydocs() + corpora.stdlib()[:9])\n"
        "harmless = ('encodings', '_sysconfigdata', 'pydoc_data')\n"
        "new = {m for m in set(sys.modules) - before if not m.startswith(harmless)}\n"
        "print(sorted(new))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    text = repr(corpora.pydocs() + corpora.stdlib()[:9])
    assert run.stdout.split("\n")[:2] == ["[]", hashlib.sha256(text.encode()).hexdigest()]
    assert run.stderr == ""  # also no warnings from old sources


def test_a_small_library(tmp_path):
    files = {
        "b/__init__.py": '"""Package b."""\n',
        "b/inner.py": (
            "import antigravity_never_imported\n"
            "try:\n    def f(x, *, y=1):\n        '''Doc of f.'''\n"
            "except E:\n    async def g():\n        '''Doc of g.'''\n"
            "if True:\n    class C:\n        '''Doc of C.'''\n"
            "        def m(self): '''  Doc of m.\n\n            more\n        '''\n"
            "def silent(): pass\n"
        ),
        "a.py": "x = 1\n",
        "empty.py": "\n",
        "test/t.py": "'''no'''\n",
        "b/tests/t.py": "'''no'''\n",
        "site-packages/p.py": "'''no'''\n",
        "_sysconfigdata_x.py": "'''no'''\n",
        "notes.txt": "no",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\n'''é'''\n".encode("latin-1"))
    assert corpora.stdlib(tmp_path) == [
        files["a.py"],
        files["b/__init__.py"],
        files["b/inner.py"],
        "# coding: latin-1\n'''é'''\n",
    ]
    assert corpora.pydocs(tmp_path)[-3:] == [
        "b\n\nPackage b.\n",
        "b.inner.f(x, *, y=1)\n\nDoc of f.\n\nb.inner.g()\n\nDoc of g.\n\n"
        "b.inner.C\n\nDoc of C.\n\nb.inner.C.m(self)\n\nDoc of m.\n\nmore\n",
        "latin\n\né\n",
    ]


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no Python source files under"):
        corpora.stdlib(tmp_path)
    with pytest.raises(ValueError, match="no Python source files under"):
        corpora.pydocs(tmp_path / "missing")


def test_downloaded_corpora_are_split_into_documents(tmp_path):
    for source, text in {
        "tiny_shakespeare": "A:\nOne.\nTwo.\n\nB:\nThree.\n",
        "tinystories": "One day.\n\nEnd.\n<|endoftext|>\nTwo.\n<|endoftext|>\n",
    }.items():
        (tmp_path / SOURCES[source].file).write_text(text)
    assert corpora.tiny_shakespeare(tmp_path) == ["A:\nOne.\nTwo.", "B:\nThree."]
    assert corpora.tinystories(tmp_path) == ["One day.\n\nEnd.", "Two."]


def test_sources_state_where_they_are_from():
    for source in SOURCES.values():
        assert source.url.startswith("https://") and source.license
        assert source.sha256 is None or len(source.sha256) == 64
    with pytest.raises(
        ValueError, match=r"'shakespear'.*tiny_shakespeare.*pydocs, stdlib, stories"
    ):
        download("shakespear")


BYTES = bytes(range(256)) * 1000  # 256,000 bytes
SUM = hashlib.sha256(BYTES).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """A file server with Range, If-Range and ETag, and with the faults a test asks for."""

    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self):
        server = self.server
        server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        fault = server.faults.pop(0) if server.faults else {}
        if "status" in fault:
            self.send_response(fault["status"])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = server.body, 0
        wanted = self.headers.get("Range")
        if wanted and not fault.get("ignore") and self.headers["If-Range"] == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        start = fault.get("start", start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if not fault.get("lengthless"):
            self.send_header("Content-Length", str(fault.get("length", len(body) - start)))
        self.send_header("Connection", "close")
        self.end_headers()
        end = fault.get("cut", len(body))
        step = 4096
        for at in range(start, end, step):
            try:
                self.wfile.write(body[at : min(at + step, end)])
                self.wfile.flush()
            except OSError:
                return
            if fault.get("slow") and server.stop.wait(fault["slow"]):
                return
        if fault.get("stall"):
            server.stop.wait(fault["stall"])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.body, server.etag, server.faults, server.asked = BYTES, '"v1"', [], []
    server.stop = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_download_is_pinned_and_marked_unverified(server, tmp_path, capsys):
    table = {"sample": Source(server.url, "sample.txt", "CC0")}
    path = download("sample", tmp_path, sources=table)
    assert path == tmp_path / "sample.txt" and path.read_bytes() == BYTES
    assert names(tmp_path) == ["sample.txt", "sample.txt.sha256"]
    assert (tmp_path / "sample.txt.sha256").read_text() == f"{SUM}  sample.txt\n"
    out = capsys.readouterr().out
    assert f"sample: 256,000 bytes, sha256 {SUM} (unverified, pinned in sample.txt.sha256)" in out
    assert "license: CC0" in out
    assert download("sample", tmp_path, sources=table) == path
    assert len(server.asked) == 1 and capsys.readouterr().out == ""


def test_known_checksum_is_verified(server, tmp_path, capsys):
    table = {"sample": Source(server.url, "sample.txt", "CC0", sha256=SUM)}
    download("sample", tmp_path, sources=table)
    assert f"sha256 {SUM} (verified)" in capsys.readouterr().out
    assert names(tmp_path) == ["sample.txt"]


def test_pin_refuses_other_bytes(server, tmp_path):
    table = {"sample": Source(server.url, "sample.txt", "CC0")}
    path = download("sample", tmp_path, sources=table)
    path.write_bytes(BYTES[:-1])
    changed = hashlib.sha256(BYTES[:-1]).hexdigest()
    with pytest.raises(
        DownloadError, match=f"was changed: its sha256 is {changed}, expected {SUM}"
    ):
        download("sample", tmp_path, sources=table)
    path.unlink()
    server.body = BYTES[::-1]
    other = hashlib.sha256(BYTES[::-1]).hexdigest()
    with pytest.raises(DownloadError, match=f"{other}, expected {SUM}"):
        download("sample", tmp_path, sources=table)
    assert names(tmp_path) == ["sample.txt.sha256"]


def test_cut_connection_is_resumed(server, tmp_path):
    server.faults = [{"cut": 100_000}, {"cut": 200_000}]
    assert fetch(server.url, tmp_path / "f", SUM, pause=0) == SUM
    assert (tmp_path / "f").read_bytes() == BYTES
    assert server.asked == [
        (None, None),
        ("bytes=100000-", '"v1"'),
        ("bytes=200000-", '"v1"'),
    ]
    assert names(tmp_path) == ["f"]


def test_cut_too_often_is_resumed_by_the_next_call(server, tmp_path):
    server.faults = [{"cut": 60_000}, {"cut": 60_001}]
    with pytest.raises(DownloadError, match=r"cut 2 times.*after 60,001 of 256,000 bytes.*resume"):
        fetch(server.url, tmp_path / "f", attempts=2, pause=0)
    assert names(tmp_path) == ["f.part", "f.part.tag"]
    assert (tmp_path / "f.part").read_bytes() == BYTES[:60_001]
    fetch(server.url, tmp_path / "f")
    assert server.asked[-1] == ("bytes=60001-", '"v1"')
    assert (tmp_path / "f").read_bytes() == BYTES and names(tmp_path) == ["f"]


def test_server_that_ignores_range_sends_everything_anew(server, tmp_path):
    server.faults = [{"cut": 100_000}, {"ignore": True}]
    assert fetch(server.url, tmp_path / "f", pause=0) == SUM
    assert (tmp_path / "f").read_bytes() == BYTES and len(server.asked) == 2


def test_two_versions_are_never_mixed(server, tmp_path):
    server.faults = [{"cut": 100_000}]
    with pytest.raises(DownloadError, match="cut 1 times"):
        fetch(server.url, tmp_path / "f", attempts=1)
    server.body, server.etag = BYTES[::-1], '"v2"'
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BYTES[::-1]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_name_nothing_is_resumed(server, tmp_path, etag):
    server.etag, server.faults = etag, [{"cut": 100_000}]
    fetch(server.url, tmp_path / "f", SUM, pause=0)
    assert server.asked == [(None, None), (None, None)]
    assert (tmp_path / "f").read_bytes() == BYTES


def test_wrong_range_is_refused(server, tmp_path):
    server.faults = [{"cut": 100_000}, {"start": 50_000}]
    with pytest.raises(DownloadError, match=r"asked for bytes 100000-, was sent 'bytes 50000-"):
        fetch(server.url, tmp_path / "f", pause=0)
    assert not (tmp_path / "f").exists()


def test_partial_file_that_does_not_fit_starts_over(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 300_000)
    (tmp_path / "f.part.tag").write_text('"v1"')
    server.faults = [{"status": 416}]
    assert fetch(server.url, tmp_path / "f", pause=0) == SUM


def test_wrong_checksum_removes_the_file(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(DownloadError, match=f"removed: sha256 is {SUM}, expected {wrong}"):
        fetch(server.url, tmp_path / "f", wrong)
    assert names(tmp_path) == []


@pytest.mark.parametrize("length", [300_000, 255_999])
def test_content_length_that_does_not_match(server, tmp_path, length):
    server.faults = [{"length": length}]
    with pytest.raises(DownloadError, match=r"after 256,000 of 300,000|wrong checksum"):
        fetch(server.url, tmp_path / "f", SUM, attempts=1)
    assert not (tmp_path / "f").exists()


def test_no_content_length_is_refused(server, tmp_path):
    server.faults = [{"lengthless": True}]
    with pytest.raises(DownloadError, match="no Content-Length"):
        fetch(server.url, tmp_path / "f")
    assert names(tmp_path) == []


def test_server_errors(server, tmp_path):
    server.faults = [{"status": 503}]
    assert fetch(server.url, tmp_path / "f", pause=0) == SUM
    server.faults = [{"status": 404}]
    with pytest.raises(DownloadError, match="the server answered 404"):
        fetch(server.url, tmp_path / "g")
    assert names(tmp_path) == ["f"] and len(server.asked) == 3


def test_silent_connection_counts_as_cut(server, tmp_path):
    server.faults = [{"cut": 100_000, "stall": 5.0}]
    start = time.monotonic()
    assert fetch(server.url, tmp_path / "f", timeout=0.3, pause=0) == SUM
    assert time.monotonic() - start < 4
    assert server.asked[1][0] == "bytes=100000-"


def test_no_network(tmp_path):
    with socket.socket() as closed:  # bound but not listening: refuses every connection
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        table = {"sample": Source(url, "sample.txt", "CC0")}
        with pytest.raises(DownloadError, match=r"needs a network.*pydocs, stdlib, stories"):
            download("sample", tmp_path / "new", sources=table)
    assert names(tmp_path / "new") == []


def test_only_http(tmp_path):
    with pytest.raises(ValueError, match="only http"):
        fetch((tmp_path / "x").as_uri(), tmp_path / "f")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_disk_full(server, tmp_path):
    (tmp_path / "f.part").symlink_to("/dev/full")  # every write fails with ENOSPC
    with pytest.raises(DownloadError, match=r"cannot write .*No space left.*after 0 of 256,000"):
        fetch(server.url, tmp_path / "f")
    assert not (tmp_path / "f").exists() and not (tmp_path / "f.part").is_symlink()


def _child(code, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", "from pathlib import Path\n" + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.parametrize("room", [100_000, 255_990])  # midway; within the last chunk
def test_disk_that_fills_up(server, tmp_path, room):
    code = f"""
from minillm.data.download import fetch
try:
    fetch({server.url!r}, Path({str(tmp_path / "f")!r}))
except OSError as error:
    print(type(error).__name__, error)
"""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    out, _ = _child(code, preexec_fn=small_files).communicate(timeout=60)
    assert out.startswith("DownloadError cannot write") and "of 256,000 bytes" in out
    assert not (tmp_path / "f").exists() and not (tmp_path / "f.part").exists()


def test_killed_midway_then_resumed(server, tmp_path):
    server.faults = [{"slow": 0.05}]
    part = tmp_path / "f.part"
    call = f"fetch({server.url!r}, Path({str(tmp_path / 'f')!r}))"
    code = f"from minillm.data.download import fetch\n{call}"
    child = _child(code)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 10_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=30)
    held = part.stat().st_size
    assert 10_000 < held < len(BYTES) and not (tmp_path / "f").exists()
    assert fetch(server.url, tmp_path / "f") == SUM
    assert server.asked[-1][0] == f"bytes={held}-"
    assert sha256(tmp_path / "f") == SUM
