"""The floors: which folder may import which, and what keeps them apart."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("launcher", "sampling", "parallel", "data", "model")
"""From the top down; a floor imports itself and those after it."""

MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
LONGEST = 400
"""Lines of a module."""

KEPT_OUT = {
    "model": ("deepspeed", "torch.distributed", "webdataset", "accelerate", "megatron"),
    "data": ("deepspeed", "accelerate", "megatron"),
}
"""Floor → libraries that it has no business with."""


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[FLOORS.index(floor) :]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in FLOORS, f"{name_of(path)} imports {name}: write ditmoe.{name}"
        if parts[0] == "ditmoe":
            assert parts[1] in allowed, f"{name_of(path)} imports {name}: {floor} is below {parts[1]}"
        for library in KEPT_OUT.get(floor, ()):
            assert not f"{name}.".startswith(f"{library}."), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_have_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LONGEST, f"{name_of(path)} has {lines} lines"


def test_every_floor_is_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(FLOORS)
    assert not (ROOT / "ditmoe").exists()
