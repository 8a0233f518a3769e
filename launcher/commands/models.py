"""`ditmoe models`: parameters and cost of each network of the family."""

import json
from typing import Annotated

import typer


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Presets such as DiT-S/2-32E4A, or quoted patterns such as 'DiT-B/*'. [default: all published]"
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also list dense DiT and patches 4 and 8.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers, as JSON.")] = False,
) -> None:
    """Print each preset's total and activated parameters and its FLOPs per image at 256² and 512².

    Examples:
        ditmoe models
        ditmoe models DiT-S/2-32E4A
        ditmoe models 'DiT-B/*' --json
    """
    from ditmoe.model.count import count, preset_config

    rows = []
    for name in _selection(names or [], every):
        small, large = count(preset_config(name, 256)), count(preset_config(name, 512))
        rows.append((name, small.total, small.activated, small.macs, large.macs))
    if as_json:
        keys = ("preset", "total", "activated", "macs_256", "macs_512")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))
        return
    typer.echo(
        f"{'preset':<16}{'parameters':>12}{'activated':>12}"
        f"{'GFLOPs 256²':>14}{'(GMACs)':>10}{'GFLOPs 512²':>14}{'(GMACs)':>10}"
    )
    for name, total, activated, macs_256, macs_512 in rows:
        typer.echo(
            f"{name:<16}{human(total):>12}{human(activated):>12}"
            f"{2 * macs_256 / 1e9:>14,.1f}{macs_256 / 1e9:>10,.1f}"
            f"{2 * macs_512 / 1e9:>14,.1f}{macs_512 / 1e9:>10,.1f}"
        )
    typer.echo(
        "\nOne forward pass of one image as a 4×32×32 or 4×64×64 latent, 1000 classes, learned sigma.\n"
        "A FLOP is a multiplication or an addition; what the papers print as Gflops are\n"
        "multiply-accumulates (GMACs). Training costs three times as much.\n"
        "Activated: K of the N routed experts of each layer, and everything else."
    )


def human(parameters: int) -> str:
    """A parameter count in millions, or in billions with two digits after the point."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _selection(names: list[str], every: bool) -> list[str]:
    """The presets asked for, in the order asked."""
    from fnmatch import fnmatchcase

    from ditmoe.model.count import family
    from ditmoe.model.errors import UserError
    from ditmoe.model.presets import PUBLISHED, parse_preset

    if not names:
        return family() if every else list(PUBLISHED)
    chosen: list[str] = []
    for name in names:
        if "*" in name or "?" in name:
            matching = [preset for preset in family() if fnmatchcase(preset, name)]
            if not matching:
                raise UserError(f"{name!r} matches no preset; `ditmoe models --all` lists them")
            chosen += matching
        else:
            try:
                parse_preset(name)
            except ValueError as error:
                raise UserError(str(error)) from error
            chosen.append(name)
    return list(dict.fromkeys(chosen))
