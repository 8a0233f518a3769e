"""`ditmoe status`: where runs stand, and what is wrong with them."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, folders of them, or crews. [default: runs/]", metavar="RUN"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with an object for each run.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh the display until all runs have ended.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two refreshes of --watch.")] = 30,
) -> None:
    """Show where runs stand: state, job, step, speed, last checkpoint, attempts, expected end, and what is wrong.

    It reads the run folders first, then asks squeue, then sacct if there is one. What it cannot see from here
    is shown as unknown.

    Examples:
        ditmoe status
        ditmoe status runs/photos --watch --every 10
        ditmoe status --json
    """
    import json
    import sys
    import time

    from ditmoe.model.errors import UserError
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.status.crews import crew_data, crew_text, crews_below, is_crew, read_crew
    from ditmoe.slurm.status.read import read_snapshots, runs_below
    from ditmoe.slurm.status.standing import standing
    from ditmoe.slurm.status.text import as_data, as_text

    default = Path("runs")
    crews = [place for place in runs if is_crew(place)] if runs else crews_below(default)
    named = [place for place in runs or () if place not in crews]
    chosen = [run for place in named for run in _runs_of(place)] if runs else runs_below(default)
    if not chosen and not crews:
        raise UserError(f"{default}/ has no run; expected run folders: ditmoe status RUN …")
    queue = Queue()
    while True:
        snapshots, of_crews = read_snapshots(chosen, queue), [read_crew(crew, queue) for crew in crews]
        if as_json:
            data = [*map(as_data, snapshots), *map(crew_data, of_crews)]
            text = json.dumps(data, indent=None if watch else 1)
        else:
            text = "\n".join([*([as_text(snapshots)] if snapshots else []), *map(crew_text, of_crews)])
        if watch and not as_json:
            if sys.stdout.isatty():
                typer.echo("\x1b[H\x1b[2J", nl=False)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}"
        typer.echo(text)
        final = [standing(snapshot).is_final for snapshot in snapshots] + [crew.is_final for crew in of_crews]
        if not watch or all(final):
            return
        time.sleep(every)


def _runs_of(place: Path) -> list[Path]:
    """The run at a place, or those below it, as of a sweep; the place itself where there is none."""
    from ditmoe.slurm.status.read import is_run, runs_below

    return [place] if is_run(place) else runs_below(place) or [place]
