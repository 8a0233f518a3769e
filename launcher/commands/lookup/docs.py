"""`ditmoe docs`: the pages of the documentation."""

from pathlib import Path
from typing import Annotated, Final

import typer

from ditmoe.launcher.command_line.arguments import Found

FOLDER: Final = Path(__file__).resolve().parents[3] / "docs"
"""In a checkout and in an installed package alike, it lies beside this floor."""


def pages() -> dict[str, Path]:
    """The pages by name, in the order in which the index links them; others follow."""
    import re

    found = {path.stem: path for path in sorted(FOLDER.glob("*.md"))}
    index = found.get("index")
    linked = [] if index is None else re.findall(r"\]\(([\w-]+)\.md", index.read_text(encoding="utf-8"))
    order = dict.fromkeys(["index", *linked, *found])
    return {name: found[name] for name in order if name in found}


def title(path: Path) -> str:
    """The heading of a page."""
    with path.open(encoding="utf-8") as file:
        return next((line.lstrip("#").strip() for line in file if line.startswith("# ")), path.stem)


def _complete(incomplete: str) -> Found:
    return [(name, title(path)) for name, path in pages().items() if name.startswith(incomplete)]


def command(
    page: Annotated[
        str | None, typer.Argument(help="The page to show.", metavar="PAGE", autocompletion=_complete)
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Print the path of its file.")] = False,
    search: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Print the lines of all pages, or of PAGE, that contain these words."),
    ] = None,
) -> None:
    """List the pages of the documentation, or show one: in a pager on a terminal, as plain text into a pipe or
    file.

    The pages belong to the installed version and need no network.

    Examples:
        ditmoe docs
        ditmoe docs training
        ditmoe docs --search micro_batch
    """
    import pydoc
    import sys

    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.nearest import expected_name

    every = pages()
    name = None if page is None else page.removeprefix("docs/").removesuffix(".md")
    if name is not None and name not in every:
        raise UserError(f"{page}: no such page; {expected_name(name, every, '`ditmoe docs`', 'a page')}")
    chosen = every if name is None else {name: every[name]}
    if search is not None:
        lines = [
            f"{each}:{number}: {line.strip()}"
            for each, file in chosen.items()
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            if search.lower() in line.lower()
        ]
        if not lines:
            raise UserError(f"--search {search}: no line has it; expected words of {page or 'some page'}")
        typer.echo("\n".join(lines))
    elif name is None and path:
        typer.echo(FOLDER)
    elif name is None:
        width = max(map(len, every))
        for each, file in every.items():
            typer.echo(f"{each:<{width}}  {title(file)}")
    elif path:
        typer.echo(every[name])
    else:
        text = every[name].read_text(encoding="utf-8")
        if sys.stdout.isatty():
            pydoc.pager(text)
        else:
            typer.echo(text, nl=False)
