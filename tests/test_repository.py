"""The repository as a stranger gets it: pinned, installable, small, and free of private matters."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]


def pins(path: Path) -> dict[str, str]:
    """name -> version of every `name==version` line."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line):
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the repository's files")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_requirement_is_pinned_and_locked(path):
    lines = [x for x in path.read_text().splitlines() if x.strip() and not x.startswith("#")]
    wanted, locked = pins(path), pins(ROOT / "requirements.lock")
    assert len(wanted) == len(lines), "every line pins one exact version"
    assert {n: v for n, v in wanted.items() if locked.get(n) != v} == {}, "run `make lock`"


def test_the_running_environment_is_the_pinned_one():
    """The results stored in the lectures come from these versions."""
    import matplotlib
    import torch

    wanted = pins(ROOT / "requirements.txt")
    assert torch.__version__.split("+")[0] == wanted["torch"]
    assert matplotlib.__version__ == wanted["matplotlib"]


def test_a_clone_stays_small():
    size = sum(p.stat().st_size for p in tracked_files())
    assert size < 40e6, f"{size / 1e6:.1f} MB of files: a clone is to stay below 60 MB"


def test_no_file_names_a_package_host_or_somebodys_machine():
    # Put together from pieces, so that this file does not contain what it forbids.
    hosts = [
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "download.pytorch" + ".org",
        "registry.npmjs" + ".org",
    ]
    homes = ["/ro" + "ot/", "/wo" + "rk/main", "/ho" + "me/"]
    text = {".py", ".md", ".txt", ".toml", ".yml", ".json", ".ipynb", ".csv", ".cfg", ".lock", ""}
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked_files()
        if path.suffix in text and path.stat().st_size < 5e6
        for word in hosts + homes
        if word in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_packaging_lists_every_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for top in ("minillm", "kernels")
        for p in (ROOT / top).rglob("*.py")
    }
    assert set(setup["packages"]) == folders | {"minillm.assets"}


@pytest.mark.slow
def test_pip_installs_a_package_that_works_far_from_the_repository(tmp_path):
    target = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    # A copy, because a build leaves files beside the source.
    source = tmp_path / "source"
    for path in tracked_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in {"minillm", "kernels", "assets"} or len(relative.parts) == 1:
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    code = (
        "import minillm, pathlib, sys; from minillm.tokenizers import load_course_tokenizer;"
        "from minillm import zoo; import torch;"
        "assert pathlib.Path(minillm.__file__).is_relative_to(sys.argv[1]), minillm.__file__;"
        "tokenizer = load_course_tokenizer(); text = 'far from home: 你好';"
        "assert tokenizer.decode(tokenizer.encode(text)) == text;"
        "model, _ = zoo.load('storyteller');"
        "print(model(torch.zeros(1, 3, dtype=torch.long)).shape)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=True,
    )
