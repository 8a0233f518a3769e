"""The configurations and grids that come with the program, found by name from any folder.

Nothing heavy is imported: the command line completes these names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from ditmoe.model.errors import UserError
from ditmoe.model.outside.nearest import meant, nearest

FOLDER: Final = Path(__file__).resolve().parents[2] / "configs"
"""In a checkout and in an installed package alike, it lies beside this floor."""
Kind = Literal["configuration", "grid"]


def shipped(kind: Kind = "configuration") -> dict[str, Path]:
    """The files by name, such as `photos`: configurations of runs, or grids of samplers for `evaluate --grid`."""
    folder = FOLDER if kind == "configuration" else FOLDER / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def description(path: Path) -> str:
    """The first line of a file's header."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()


def find_config(given: Path, kind: Kind = "configuration", say: Callable[[str], None] | None = None) -> Path:
    """The file that `CONFIG` stands for: itself, `CONFIG.yaml` in the current folder, or a shipped one.

    Args:
        given: a path, or the name of a shipped file.
        say: is told where a file of the current folder has the name of a shipped one, and wins.

    Raises:
        UserError: it is a name without a folder and suffix, and no such file is here or shipped.
    """
    files = shipped(kind)
    is_name = len(given.parts) == 1
    local = next((path for path in (given, given.with_name(f"{given.name}.yaml")) if path.is_file()), None)
    if local is not None:
        same = files.get(local.stem)
        if is_name and same is not None and say is not None and not local.samefile(same):
            say(f"note: {given} is {local} of the current folder; the shipped {kind} of that name is {same}")
        return local if is_name else given
    if is_name and given.name in files:
        return files[given.name]
    if not is_name or given.exists():
        return given
    expected = f"expected a YAML file, or a {kind} of those that `ditmoe configs` lists"
    if not given.suffix:
        raise UserError(f"{given}: no such file, and no shipped {kind}; {expected}{meant(given.name, files)}")
    if nearest(given.stem, files) is not None:
        raise UserError(f"{given}: no such file; {expected}{meant(given.stem, files)}")
    return given
