"""`ditmoe status`: where runs stand, and what is wrong with them."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders of them. [default: runs/]", metavar="RUN")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, an object for each run.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until all runs have ended.")
    ] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks of --watch.")] = 30,
) -> None:
    """Show where runs stand: state, job, step, speed, last checkpoint, attempts, expected end, and what is wrong.

    It reads the run folders first, then asks squeue, then sacct where there is one. What cannot be seen from here
    is called unknown.
    """
    import json
    import sys
    import time

    from ditmoe.model.errors import UserError
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.status.read import read_snapshots, runs_below
    from ditmoe.slurm.status.standing import standing
    from ditmoe.slurm.status.text import as_data, as_text

    default = Path("runs")
    chosen = [run for place in runs for run in _runs_of(place)] if runs else runs_below(default)
    if not chosen:
        raise UserError(f"{default}/ has no run; expected run folders: ditmoe status RUN …")
    queue = Queue()
    while True:
        snapshots = read_snapshots(chosen, queue)
        if as_json:
            text = json.dumps([as_data(snapshot) for snapshot in snapshots], indent=None if watch else 1)
        else:
            text = as_text(snapshots)
        if watch and not as_json:
            if sys.stdout.isatty():
                typer.echo("\x1b[H\x1b[2J", nl=False)
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}"
        typer.echo(text)
        if not watch or all(standing(snapshot).is_final for snapshot in snapshots):
            return
        time.sleep(every)


def _runs_of(place: Path) -> list[Path]:
    """The run at a place, or those below it, as of a sweep; the place itself where there is none."""
    from ditmoe.slurm.status.read import is_run, runs_below

    return [place] if is_run(place) else runs_below(place) or [place]
