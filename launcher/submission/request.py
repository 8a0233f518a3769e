"""The request of any job: a verb's arguments, the working directory and this Python."""

import sys
from pathlib import Path

from ditmoe.slurm.job_folder import Job, JobFolder, job_name
from ditmoe.slurm.submission.script import Request, step_options, task_start
from ditmoe.slurm.submission.settings import JobSettings


def job_request(
    verb: str, arguments: tuple[str, ...], folder: JobFolder, settings: JobSettings, *seen: Path
) -> Request:
    """The request of a job that is submitted from the working directory.

    Args:
        verb: for its name in records.
        arguments: after `ditmoe`.
        folder: absolute.
        settings: what is asked for.
        seen: folders that tasks must see, absolute; the first is the run, where there is one.
    """
    directory, python = str(Path.cwd()), settings.python or sys.executable
    needed = tuple(dict.fromkeys((directory, str(folder.path), *map(str, seen))))
    job = Job(
        name=job_name(folder),
        verb=verb,
        arguments=arguments,
        run=str(seen[0]) if seen and verb in ("train", "evaluate") else None,
        nodes=settings.nodes,
        tasks_per_node=settings.tasks,
        gpus_per_node=settings.gpus_per_node,
        directory=directory,
        python=python,
        task=task_start(settings, python, directory, needed),
        srun=step_options(settings, directory, needed),
        limits=settings.limit_seconds,
        warning=settings.warning_seconds,
        chain=settings.chain,
        attempts=settings.attempts,
        check=settings.check,
    )
    return Request(job, folder, settings)
