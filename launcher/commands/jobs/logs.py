"""`ditmoe logs`: what a run printed."""

from pathlib import Path
from typing import Annotated

import typer

QUEUE_SECONDS = 30.0
"""Between two questions to the queue: many users ask it."""


def command(
    run: Annotated[Path, typer.Argument(help="The run's folder, or that of a crew.", metavar="RUN")],
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Keep printing new lines until the run has ended.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="For a run on one machine: show only the output of this rank.")
    ] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines to show.")] = 50,
) -> None:
    """Print the last lines of a run's output: that of its newest job, or its log.

    Examples:
        ditmoe logs runs/photos
        ditmoe logs runs/photos -f -n 200
    """
    import sys
    import time

    from ditmoe.model.errors import UserError
    from ditmoe.slurm.client import Queue, Unseen
    from ditmoe.slurm.status.crews import crew_output, is_crew, read_crew
    from ditmoe.slurm.status.outputs import followed, last_lines, output_of
    from ditmoe.slurm.status.read import is_run, read_snapshots
    from ditmoe.slurm.status.standing import standing

    of_crew = is_crew(run)
    if not of_crew and not is_run(run):
        raise UserError(f"{run}: no run found; expected the folder of one")
    if of_crew and rank is not None:
        raise UserError(f"--rank {rank}: is of a run on one machine; expected none for the workers of a crew")

    def newest() -> Path:
        return crew_output(run) if of_crew else output_of(run, rank)

    path = newest()
    text, size = last_lines(path, lines)
    typer.echo(f"==> {path} <==", err=True)
    typer.echo(text, nl=False)
    if not follow:
        return
    queue, asked, ended, told = Queue(), 0.0, False, False

    def has_ended() -> bool:
        nonlocal asked, ended, told
        if time.monotonic() - asked > QUEUE_SECONDS or not asked:
            if of_crew:
                crew = read_crew(run, queue)
                ended, unseen = crew.is_final, crew.unseen
            else:
                (snapshot,) = read_snapshots([run], queue)
                ended = standing(snapshot).is_final
                unseen = snapshot.queue.problem if isinstance(snapshot.queue, Unseen) else ""
            if unseen and not ended and not told:
                typer.echo(f"the queue does not say when {run} ends: {unseen}. Ctrl-C ends this", err=True)
                told = True
            asked = time.monotonic()
        return ended

    for piece in followed(newest, (path, size), has_ended):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
