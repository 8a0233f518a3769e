"""Arguments that several commands take, declared once, with what completes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ditmoe.launcher.configuration.shipped import Kind, description, find_config, shipped

Found = list[tuple[str, str]]
"""Words that an incomplete one may become, each with a line on it."""


def _finder(kind: Kind) -> Callable[[typer.Context, Path | None], Path | None]:
    """What turns the name of a shipped file into its path, while the command line is read."""

    def find(context: typer.Context, given: Path | None) -> Path | None:
        if given is None or context.resilient_parsing:
            return given
        return find_config(given, kind, lambda line: typer.echo(line, err=True))

    return find


def complete_config(incomplete: str) -> Found:
    """The shipped configurations."""
    return _shipped("configuration", incomplete)


def complete_grid(incomplete: str) -> Found:
    """The shipped grids."""
    return _shipped("grid", incomplete)


def _shipped(kind: Kind, incomplete: str) -> Found:
    return [(name, description(path)) for name, path in shipped(kind).items() if name.startswith(incomplete)]


def complete_override(incomplete: str) -> Found:
    """`model.` and the other sections, then their keys, then the choices of a key."""
    from ditmoe.launcher.configuration.keys import all_keys

    name, equals, _ = incomplete.partition("=")
    if equals:
        return [(f"{name}={choice}", "") for key in all_keys() if key.name == name for choice in key.choices]
    return _next_parts(incomplete, "=")


def complete_key(incomplete: str) -> Found:
    """`model.` and the other sections, then their keys."""
    return _next_parts(incomplete, "")


def _next_parts(incomplete: str, end: str) -> Found:
    """Keys, and sections with a dot, that begin so, up to the next dot."""
    from ditmoe.launcher.configuration.keys import all_keys

    found: dict[str, str] = {}
    for key in all_keys():
        if key.name.startswith(incomplete):
            part, dot, _ = key.name[len(incomplete) :].partition(".")
            if dot:
                found.setdefault(f"{incomplete}{part}.", "a section of keys")
            else:
                found[f"{key.name}{end}"] = key.sentence
    return list(found.items())


def config_argument(help: str = "The run's YAML file, or the name of a shipped one (`ditmoe configs`).") -> Any:
    """The argument CONFIG."""
    return typer.Argument(
        help=help, metavar="CONFIG", callback=_finder("configuration"), autocompletion=complete_config
    )


def overrides_argument(help: str, metavar: str = "KEY=VALUE") -> Any:
    """The argument KEY=VALUE."""
    return typer.Argument(help=help, metavar=metavar, autocompletion=complete_override)


ConfigArgument = Annotated[Path, config_argument()]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CONFIG",
        help="A run's YAML file, or the name of a shipped one, that describes the expected network (its"
        " `model`, and its `objective` if it has one).",
        callback=_finder("configuration"),
        autocompletion=complete_config,
    ),
]
GridOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Compare samplers: a YAML file, or the name of a shipped one (`ditmoe configs`). The"
        " file then says how images are drawn; see docs/evaluate.md.",
        callback=_finder("grid"),
        autocompletion=complete_grid,
    ),
]
