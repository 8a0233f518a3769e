"""The tables of docs/architecture.md: the folders and modules of each floor, and what of their floor they import.

`python -m tests.floors` writes the imports anew and sorts the rows: a row imports only rows below it. What a
folder holds, and where to begin reading, is written by hand.
"""

import re
from pathlib import Path
from typing import Final

from tests.test_imports import ROOT, edges, room

PAGE: Final = ROOT / "docs" / "architecture.md"
ROW: Final = re.compile(r"^\| `([\w./]+)` \| (.+) \| (?:`([\w./]+)`)? *\| (.*?) *\|$", re.MULTILINE)
"""Folder or module, what it holds, where to begin reading, its imports."""


def rooms() -> dict[str, set[str]]:
    """Folder or module of a floor → those of its floor that it imports, by the code."""
    found: dict[str, set[str]] = {}
    for module, targets in edges().items():
        own = room(module)
        if not own.endswith(("__init__.py", "__main__.py")):
            same_floor = {room(target) for target in targets if target.split("/")[0] == own.split("/")[0]}
            found.setdefault(shown(own), set()).update(shown(target) for target in same_floor - {own})
    return found


def shown(name: str) -> str:
    """A folder with a slash at its end."""
    return name if name.endswith(".py") else f"{name}/"


def rows(page: str) -> dict[str, tuple[str, str, str]]:
    """Folder or module → what it holds, where to begin reading, its imports, as the page has them."""
    return {name: (idea, begin, cell) for name, idea, begin, cell in ROW.findall(page)}


def written(page: str) -> str:
    """The page with the imports that the code has, and each table's rows above those that they import."""
    actual, lines = rooms(), page.splitlines()
    places = [number for number, line in enumerate(lines) if ROW.match(line)]
    waiting = {ROW.match(lines[number])[1]: lines[number] for number in places}  # type: ignore[index]
    for number in places:
        floor = ROW.match(lines[number])[1].split("/")[0]  # type: ignore[index]
        of_floor = [name for name in waiting if name.startswith(f"{floor}/")]
        free = (name for name in of_floor if not any(name in actual.get(other, ()) for other in of_floor))
        name = next(free)
        imports = ", ".join(f"`{target.split('/', 1)[1]}`" for target in sorted(actual.get(name, ())))
        lines[number] = re.sub(r"[^|]*\|$", f" {imports} |", waiting.pop(name))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(PAGE).write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
