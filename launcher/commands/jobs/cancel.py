"""`ditmoe cancel`: end a run, with a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="The run's folder, or that of a crew.", metavar="RUN")],
    wait: Annotated[float, typer.Option(min=1, help="Seconds that the run gets to write its checkpoint.")] = 1800,
    now: Annotated[bool, typer.Option("--now", help="End the run at once, without a checkpoint.")] = False,
) -> None:
    """End a run: it saves a checkpoint first. Its waiting jobs leave the queue, and nothing is requeued.

    It works for a run's Slurm jobs and for a run on this machine. Resume the run with the command that started
    it. For a crew it ends the jobs of all its workers, or only those of CREW/slurm/workers-N.

    Examples:
        ditmoe cancel runs/photos
        ditmoe cancel runs/photos --now
    """
    from ditmoe.slurm.cancel import cancel_run
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.status.crews import cancel_workers, is_crew

    if is_crew(run):
        cancel_workers(run, Queue(), typer.echo)
        return
    cancel_run(run, Queue(), 0 if now else wait, typer.echo)
