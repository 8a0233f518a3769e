"""`ditmoe configs`: the configurations and grids that come with the program."""

from typing import Annotated

import typer

from ditmoe.launcher.command_line.arguments import Found, complete_config, complete_grid


def _complete(incomplete: str) -> Found:
    return [*complete_config(incomplete), *complete_grid(incomplete)]


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Print this configuration, for you to save and edit.", metavar="NAME", autocompletion=_complete
        ),
    ] = None,
    path: Annotated[bool, typer.Option("--path", help="Print the path of its file.")] = False,
) -> None:
    """List the configurations that come with the program, or print one.

    `ditmoe train NAME`, and every command that takes a configuration, finds them by name from any folder. A
    file of that name in the current folder takes precedence.

    Examples:
        ditmoe configs
        ditmoe configs photos > mine.yaml
        ditmoe configs photos --path
    """
    from ditmoe.launcher.configuration.shipped import FOLDER, description, shipped
    from ditmoe.model.errors import UserError
    from ditmoe.model.outside.nearest import expected_name

    runs, grids = shipped(), shipped("grid")
    if name is not None:
        every = {**grids, **runs}
        if name not in every:
            raise UserError(f"{name}: no shipped configuration; {expected_name(name, every, '`ditmoe configs`')}")
        typer.echo(every[name] if path else every[name].read_text(encoding="utf-8"), nl=path)
        return
    if path:
        typer.echo(FOLDER)
        return
    width = max(map(len, (*runs, *grids)))
    titles = {"Configurations: ditmoe train NAME": runs, "Grids: ditmoe evaluate RUN --grid NAME": grids}
    for title, files in titles.items():
        typer.echo(f"{title}\n")
        for each, file in files.items():
            typer.echo(f"  {each:<{width}}  {description(file)}")
        typer.echo("")
    typer.echo(f"The files are in {FOLDER}.")
