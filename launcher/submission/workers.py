"""The job of workers that join a crew: one task on each node, which keeps the workers of that node."""

from pathlib import Path

from ditmoe.launcher.submission.request import job_request
from ditmoe.model.errors import UserError
from ditmoe.slurm.attempts import read_attempts
from ditmoe.slurm.job_folder import JobFolder, workers_folder, workers_folders
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings


def workers_job(
    crew: Path, processes: int | None, idle: float, listen: str | None, settings: JobSettings
) -> Request:
    """The job that starts workers for whoever leads a crew, now or later.

    Args:
        crew: its folder; it need not be there yet.
        processes: workers of each node; None: one per GPU, or 1.
        idle: minutes without anybody who leads, after which they end.
        listen: the network interface of each node by which the others of the crew reach it; None: that of the way.
        settings: of the job.

    Raises:
        UserError: the settings do not go with workers.
    """
    gpus = settings.gpus_per_node
    if settings.tasks_per_node not in (None, 1):
        raise UserError(
            f"--tasks-per-node {settings.tasks_per_node}: one task on each node starts its workers; expected none,"
            " and --processes for the number of workers"
        )
    if gpus and processes is not None and processes > gpus:
        raise UserError(
            f"--processes {processes} with --gpus-per-node {gpus}: each worker has a GPU to itself; expected at"
            f" most {gpus}"
        )
    settings = settings.model_copy(update={"tasks_per_node": 1})
    if not gpus and settings.cpus_per_task is None and processes is not None and processes > 1:
        settings = settings.model_copy(update={"cpus_per_task": processes})
    crew = crew.absolute()
    arguments = ["worker", f"--idle={idle:g}"]
    arguments += [] if processes is None else [f"--processes={processes}"]
    arguments += [f"--gpus={gpus}"] if gpus else []
    arguments += [] if listen is None else [f"--listen={listen}"]
    return job_request("workers", (*arguments, "--", str(crew)), _new_folder(crew), settings, crew)


def _new_folder(crew: Path) -> JobFolder:
    """The first job folder of the crew with which nothing was submitted yet: more workers are another job."""
    last = 0
    for folder in workers_folders(crew):
        last = int(folder.path.name.removeprefix("workers-"))
        if not read_attempts(folder.path).submissions:
            return folder
    return workers_folder(crew, last + 1)
