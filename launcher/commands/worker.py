"""`ditmoe worker`: make parts for whoever leads a crew."""

from pathlib import Path
from typing import Annotated

import typer

MINUTES = 10.0


def command(
    folder: Annotated[Path, typer.Argument(help="The crew's folder, as in `ditmoe evaluate --crew FOLDER`.")],
    *,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Workers on this machine. [default: one per GPU, or 1]")
    ] = None,
    idle: Annotated[
        float, typer.Option(min=0, metavar="MINUTES", help="End when nobody has led the crew for so long.")
    ] = MINUTES,
) -> None:
    """Work for the commands that lead a crew, one after another: it may start before them, and end at any time.

    Whoever can read the folder's key belongs to the crew: it is made for its owner alone, and must stay so.

    Example: ditmoe worker runs/crew --processes 8
    """
    from ditmoe.data.crew.members import join_crew
    from ditmoe.launcher.local.crew_workers import own_address, worker_environments

    join_crew(
        folder,
        worker_environments(processes),
        own_host=own_address,
        idle_seconds=60 * idle,
        log=lambda line: typer.echo(line, err=True),
    )
