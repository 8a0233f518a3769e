"""`ditmoe keys`: what may stand in a run's configuration."""

from typing import Annotated

import typer

from ditmoe.launcher.command_line.arguments import complete_key


def command(
    prefix: Annotated[
        str,
        typer.Argument(
            help="Show only keys that begin with this, such as optim. or model.h; a whole key shows "
            "its full text.",
            metavar="PREFIX",
            autocompletion=complete_key,
            show_default=False,
        ),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with an object for each key.")
    ] = False,
) -> None:
    """List the keys of a run's configuration: what each accepts, its unit and default, and what it does.

    A number without a unit is a plain number: a factor, a weight, a seed. docs/configuration.md has every key.

    Examples:
        ditmoe keys
        ditmoe keys optim.
        ditmoe keys train.batch
    """
    import json

    from ditmoe.launcher.configuration.keys import all_keys
    from ditmoe.launcher.configuration.overrides import suggestion
    from ditmoe.launcher.configuration.run_config import RunConfig
    from ditmoe.model.errors import UserError

    every = list(all_keys())
    chosen = [key for key in every if key.name == prefix] or [key for key in every if key.name.startswith(prefix)]
    if not chosen:
        path = prefix.removesuffix(".").split(".")
        known = 0
        while any(key.name.startswith(f"{'.'.join(path[: known + 1])}.") for key in every):
            known += 1
        raise UserError(f"{prefix}: no key begins so; {suggestion(RunConfig, path, known)}")
    if as_json:
        typer.echo(json.dumps([key._asdict() for key in chosen], indent=1, ensure_ascii=False))
        return
    whole = len(chosen) == 1
    for key in chosen:
        typer.echo(f"{key.name}: {key.line}")
        for line in key.text.splitlines() if whole else [f"{key.sentence}."]:
            typer.echo(f"    {line}".rstrip())
