"""A real browser: JupyterLab as `make lab` starts it, lecture 03, all cells, a slider moved."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from classroom import lab

ROOT = Path(__file__).resolve().parents[1]
LECTURE = ROOT / "chapters/03_attention/lecture.ipynb"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)


def chromium():
    """A browser of this machine, or the one that playwright has downloaded; None without."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        sync_api = pytest.importorskip("playwright.sync_api")
        with sync_api.sync_playwright() as playwright:
            path = playwright.chromium.executable_path
            found = path if os.path.exists(path) else None
    return found


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (value := condition()) is not None:
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture
def server(tmp_path):
    """JupyterLab on a `work/` of its own: (address, token, folder)."""
    # the lecture finds the package by looking upwards
    (tmp_path / "minillm").symlink_to(ROOT / "minillm")
    for name in ("kernels", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    work = tmp_path / "work"
    (work / "03_attention").mkdir(parents=True)
    shutil.copy(LECTURE, work / "03_attention")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = str(tmp_path / name.lower())
    log = open(tmp_path / "jupyter.log", "wb")  # noqa: SIM115 - the server writes into it
    command = [
        *lab.command(work, browser=False),
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"

    def up():
        if process.poll() is not None:
            raise AssertionError((tmp_path / "jupyter.log").read_text()[-3000:])
        request = urllib.request.Request(
            f"{address}/api/status", headers={"Authorization": f"token {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None

    try:
        wait_until(up, 90, "JupyterLab answers")
        yield address, token, work
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        log.close()


@pytest.fixture
def page(server):
    """A browser window on lecture 03, its kernel ready."""
    executable = chromium()
    if executable is None:
        pytest.skip(f"no Chromium found (looked for {', '.join(NAMES)} and playwright's own)")
    sync_api = pytest.importorskip("playwright.sync_api")
    address, token, _ = server
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        try:
            window = browser.new_page(viewport={"width": 1400, "height": 1000})
            window.set_default_timeout(90_000)
            window.goto(f"{address}/lab/tree/03_attention/lecture.ipynb?token={token}")
            window.wait_for_function(
                "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
                "?.status === 'idle'"
            )
            yield window
        finally:
            browser.close()


OUTPUTS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
  return cells.filter(c => c.cell_type === 'code').map(c => ({
    source: c.getSource(), count: c.execution_count,
    outputs: c.getOutputs().map(o => ({
      type: o.output_type, error: o.output_type === 'error' ? `${o.ename}: ${o.evalue}` : null,
      kinds: Object.keys(o.data || {})}))}));
}"""
PICTURE = "img => img.complete && img.naturalWidth > 0 ? img.src : null"


def picture(window):
    """A hash of the picture that the active cell's widget shows, or None while there is none."""
    shown = window.locator(".jp-Cell.jp-mod-active .jupyter-widgets img").first
    source = shown.evaluate(PICTURE) if shown.count() else None
    return hashlib.sha256(source.encode()).hexdigest() if source else None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not LECTURE.exists(), reason="lecture 03 does not exist")
def test_lecture_runs_in_a_browser_and_its_slider_moves_the_figure(page, server, tmp_path):
    assert page.locator(".jp-TableOfContents").first.is_visible(), "the table of contents is open"
    assert page.get_by_text("Would you like to get notified", exact=False).count() == 0

    # wait for the promise: it returns when all cells are done
    page.evaluate(
        "async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }"
    )
    cells = page.evaluate(OUTPUTS)
    errors = [out["error"] for cell in cells for out in cell["outputs"] if out["error"]]
    assert errors == []
    filled = [cell for cell in cells if cell["source"].strip()]
    assert [cell["count"] for cell in filled] == list(range(1, len(filled) + 1))
    assert sum("image/png" in out["kinds"] for cell in filled for out in cell["outputs"]) >= 3

    # cells far away are not drawn: go to the one that has the widget
    index = page.evaluate(
        """() => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          const found = notebook.widgets.findIndex(cell => cell.model.type === 'code' &&
            (cell.model.sharedModel.getOutputs() || []).some(o => o.data &&
              'application/vnd.jupyter.widget-view+json' in o.data &&
              !String(o.data['text/plain'] || '').includes('%|')));
          notebook.activeCellIndex = found;
          return found;
        }"""
    )
    assert index >= 0, "no cell shows a widget"
    page.evaluate(
        """async index => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          await notebook.scrollToItem(index, 'center');
        }""",
        index,
    )
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.wait_for(state="visible")
    before = wait_until(lambda: picture(page), 60, "a figure beside the slider")
    page.screenshot(path=str(tmp_path / "before.png"))
    handle.focus()
    page.keyboard.press("ArrowRight")

    def changed():
        now = picture(page)
        return now if now not in (None, before) else None

    wait_until(changed, 60, "the figure changed")
    page.screenshot(path=str(tmp_path / "after.png"))
