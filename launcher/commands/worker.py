"""`ditmoe worker`: make parts for whoever leads a crew."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.launcher.commands.shared_options import ListenOption

MINUTES = 10.0


def command(
    folder: Annotated[Path, typer.Argument(help="The crew's folder, as in `ditmoe evaluate --crew FOLDER`.")],
    *,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Workers on this machine. [default: one per GPU, or 1]")
    ] = None,
    idle: Annotated[
        float, typer.Option(min=0, metavar="MINUTES", help="End when nobody has led the crew for this long.")
    ] = MINUTES,
    gpus: Annotated[
        int, typer.Option(min=0, help="GPUs that this machine should have; with fewer, no worker starts.")
    ] = 0,
    listen: ListenOption = None,
) -> None:
    """Work for the commands that lead a crew, one after another. A worker may start before them and end at any
    time.

    These commands are evaluate, score, reference make, data encode and data synthesize, with --crew. Whoever
    can read the folder's key belongs to the crew, so only its owner may read it. `ditmoe submit workers`
    starts workers as a Slurm job.

    Examples:
        ditmoe worker runs/crew --processes 8
        ditmoe worker runs/crew --idle 60 --listen ib0
    """
    import os

    from ditmoe.data.crew.members import join_crew
    from ditmoe.data.crew.tasks import TALLY_VARIABLE
    from ditmoe.launcher.local.crew_workers import check_gpus, own_address, worker_environments
    from ditmoe.launcher.local.signals import ending_orderly
    from ditmoe.parallel.ranks import this_process
    from ditmoe.slurm.heartbeats import FOLDER_VARIABLE, Heart
    from ditmoe.slurm.job_folder import tally_of
    from ditmoe.slurm.submission.script import STRANGERS

    process, beats = this_process(), os.environ.get(FOLDER_VARIABLE)
    check_gpus(gpus)
    environments = worker_environments(processes)
    if beats:
        tally = str(tally_of(Path(beats).parent, process.rank))
        environments = [{**each, TALLY_VARIABLE: tally} for each in environments]
    heart = Heart.of_this_process(process.rank, process.ranks)
    for name in STRANGERS:  # a worker is no rank, whatever the task of srun is that started it
        os.environ.pop(name, None)
    with heart, ending_orderly():
        join_crew(
            folder,
            environments,
            own_host=lambda leader: own_address(listen, leader),
            idle_seconds=60 * idle,
            log=lambda line: typer.echo(line, err=True),
            beat=lambda doing: heart.beat("step", doing=doing),
        )
