"""The house: which floor may import which, that folders of a floor import one way, and what is kept apart."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("launcher", "slurm", "sampling", "parallel", "data", "model")
"""From the top down; a floor imports itself and those after it."""

ALLOWED = {"slurm": ("ditmoe.slurm", "ditmoe.model.errors", "ditmoe.model.outside", "ditmoe.data.storage")}
"""Floor → all of ours that it may import, where that is less than the floors below it."""
ALSO_ALLOWED = {
    # A task of the check of nodes meets the others as a rank of a run does. It imports torch, and these, in the
    # function that needs them: the supervisor on the batch node does not.
    "slurm/check.py": ("ditmoe.parallel.processes", "ditmoe.parallel.meeting", "ditmoe.parallel.ranks"),
}
"""Module → what else of ours it may import."""

MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
LONGEST = 400
"""Lines of a module."""
MOST_MODULES = 15
"""Of a folder, `__init__.py` not counted."""

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


@cache
def edges() -> Mapping[str, frozenset[str]]:
    """Module → the modules of this project that it imports; both by their paths."""
    found = {}
    for path in MODULES:
        targets = set()
        for name in imported(path):
            if name.startswith("ditmoe."):
                targets |= _files_of(name.split(".")[1:])
        found[name_of(path)] = frozenset(name_of(target) for target in targets if target != path)
    return found


def _files_of(parts: list[str]) -> set[Path]:
    """The module of a dotted name, which is a module, or something that a module has."""
    for base in (ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])):
        files = {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()}
        if files:
            return files
    return set()


def room(module: str) -> str:
    """The folder of a floor in which a module lies; a module on the floor's ground stands for itself."""
    parts = Path(module).parts
    return module if len(parts) == 2 else "/".join(parts[:2])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    allowed = FLOORS[FLOORS.index(floor) :]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in FLOORS, f"{name_of(path)} imports {name}: write ditmoe.{name}"
        if parts[0] == "ditmoe":
            assert parts[1] in allowed, f"{name_of(path)} imports {name}: {floor} is below {parts[1]}"
            own = (*ALLOWED.get(floor, ("ditmoe",)), *ALSO_ALLOWED.get(name_of(path), ()))
            assert any(f"{name}.".startswith(f"{start}.") for start in own), f"{name_of(path)} imports {name}"
        for library in KEPT_OUT.get(floor, ()):
            assert not f"{name}.".startswith(f"{library}."), f"{name_of(path)} imports {name}"


def assert_one_way(graph: Mapping[str, set[str]], what: str) -> None:
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"{what} import each other: {' ← '.join(error.args[1])}") from None


def test_no_two_files_import_each_other() -> None:
    """Neither directly nor by way of others, and imports for type checkers count."""
    assert_one_way({module: set(targets) for module, targets in edges().items()}, "files")


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_between_the_folders_of_a_floor_run_one_way(floor: str) -> None:
    graph: dict[str, set[str]] = {}
    for module, targets in edges().items():
        if module.startswith(f"{floor}/"):
            rooms = {room(target) for target in targets if target.startswith(f"{floor}/")}
            graph.setdefault(room(module), set()).update(rooms - {room(module)})
    assert_one_way(graph, f"folders of {floor}")


def test_the_graph_is_not_empty() -> None:
    """The tests above would pass on a graph without edges."""
    assert sum(map(len, edges().values())) > 500
    assert "sampling/network/denoiser.py" in edges()["sampling/integrators/flow.py"]
    with pytest.raises(AssertionError, match="files import each other"):
        assert_one_way({"a": {"b"}, "b": {"a"}}, "files")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_have_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < LONGEST, f"{name_of(path)} has {lines} lines"


def test_folders_have_one_idea() -> None:
    for folder in {path.parent for path in MODULES}:
        count = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        assert count <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"


def test_slurm_is_imported_without_torch() -> None:
    """A supervisor of hundreds of processes needs none of it, and starts at once."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in MODULES
        if path.is_relative_to(ROOT / "slurm") and path.name != "__main__.py"
    ]
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(f'ditmoe.{name}')\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, *(name.removesuffix(".__init__") for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_floor_is_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(FLOORS)
    assert not (ROOT / "ditmoe").exists()
