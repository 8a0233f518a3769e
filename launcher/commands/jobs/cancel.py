"""`ditmoe cancel`: end a run, with a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="The run's folder, or that of a crew.", metavar="RUN")],
    wait: Annotated[float, typer.Option(min=1, help="Seconds that it has for its checkpoint.")] = 1800,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a checkpoint.")] = False,
) -> None:
    """End a run: it saves a checkpoint first, its jobs that wait leave the queue, and nothing is requeued.

    It works for the jobs of a run, and for a run on this machine. The run can be resumed by the command that
    started it. Of a crew it ends the jobs of its workers, or those of CREW/slurm/workers-N alone.

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
