"""The layers of the package only import downward, and the size budget holds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file may import from a lower floor, from its own package, and from config and paths.
FLOOR = {
    **dict.fromkeys(("config", "paths"), -1),
    **dict.fromkeys(("numerics", "accounting", "tokenizers", "data"), 0),
    **dict.fromkeys(("ops", "recompute"), 1),
    **dict.fromkeys(("model",), 2),
    **dict.fromkeys(("train", "infer", "parallel", "peft"), 3),
    **dict.fromkeys(("prompting", "align", "evaluate", "retrieval", "vision"), 4),
    **dict.fromkeys(("zoo",), 5),
    **dict.fromkeys(("recipes", "teach", "chat"), 6),
}


def imported_modules(source: str) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a reader sees where they lead"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(part: str, source: str) -> list[str]:
    """Imports that a file in `minillm.<part>` may not have."""
    found = []
    for name in imported_modules(source):
        words = name.split(".")
        if words[0] == "kernels" and part != "ops":
            found.append(f"{name}: only minillm/ops.py imports kernels")
        if words[0] == "classroom":
            found.append(f"{name}: the package knows nothing of the classroom")
        if words[0] == "minillm" and len(words) > 1:
            other = words[1]
            if other != part and FLOOR[other] >= FLOOR[part]:
                found.append(f"{name}: floor {FLOOR[other]} is not below floor {FLOOR[part]}")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "minillm").parts[0].removesuffix(".py")


SOURCES = sorted(
    p
    for p in (ROOT / "minillm").rglob("*.py")
    if p.parent != ROOT / "minillm" or p.name != "__init__.py"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    assert violations(part_of(path), path.read_text()) == []


def test_an_upward_import_is_found():
    assert violations("model", "from minillm.train import loop")
    assert violations("tokenizers", "import minillm.data.corpora")
    assert violations("model", "import kernels.attention")
    assert not violations(
        "train", "from minillm.model.lm import LM\nfrom minillm.config import ModelConfig"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_the_package(path):
    assert not [n for n in imported_modules(path.read_text()) if n.split(".")[0] == "minillm"]


def test_kernels_package_is_an_empty_name():
    """transformers looks for a package called `kernels`; ours must not look like the other one."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def lines(folder: str) -> dict[str, int]:
    return {
        str(p.relative_to(ROOT)): p.read_text().count("\n") for p in (ROOT / folder).rglob("*.py")
    }


BUDGETS = {"minillm": 8000, "kernels": 2500, "classroom": 2000}


@pytest.mark.parametrize(("folder", "budget"), BUDGETS.items())
def test_size_budget(folder, budget):
    sizes = lines(folder)
    assert sum(sizes.values()) <= budget
    assert {name: n for name, n in sizes.items() if n > 300} == {}
