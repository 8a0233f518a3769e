"""A sweep as an array of training jobs, and of the evaluations that follow them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditmoe.launcher.submission.training import TrainingJob, training_job
from ditmoe.launcher.sweep.cells import Cell
from ditmoe.launcher.training.progress import read_progress
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError
from ditmoe.slurm.client import Queue, Unseen
from ditmoe.slurm.job_folder import JobFolder, job_name
from ditmoe.slurm.submission.array import render_array, submit_array
from ditmoe.slurm.submission.script import Request
from ditmoe.slurm.submission.settings import JobSettings
from ditmoe.slurm.submission.submit import unseen_queue


@dataclass(frozen=True)
class SweepJobs:
    """What is to be handed to Slurm; numbers are those of the cells, from 0."""

    folder: Path
    """Of the sweep, absolute."""
    training: dict[int, TrainingJob]
    """Of the cells that are not complete."""
    evaluation: dict[int, Request]
    """Of all cells, or of none."""


def sweep_jobs(
    path: Path, cells: Sequence[Cell], folder: Path, settings: JobSettings, evaluation: Mapping[int, Request]
) -> SweepJobs:
    """The training jobs of a sweep's cells that are not complete, each checked as `ditmoe submit train` does.

    Args:
        path: the configuration file.
        folder: of the sweep.
        settings: of every job.
        evaluation: number of a cell → the job that scores it.

    Raises:
        UserError: what is wrong with any cell.
    """
    settings = settings.model_copy(update={"chain": 1})
    training: dict[int, TrainingJob] = {}
    problems: list[str] = []
    for number, cell in enumerate(cells):
        try:
            job = training_job(path, list(cell.overrides), settings)
            if read_progress(cell.folder).reached(job.config.train.steps):
                continue
            RunFolder(job.config.run.dir).check(job.config)
        except UserError as error:
            problems.append(f"{cell.name}: {error}")
        else:
            training[number] = job
    if problems:
        raise UserError("\n".join(problems))
    return SweepJobs(folder.absolute(), training, dict(evaluation))


def submit_sweep(jobs: SweepJobs, queue: Queue, at_once: int | None) -> dict[str, str]:
    """Hand the arrays to Slurm: what each does → its id.

    Each evaluation waits for the training of its own cell; that of a cell which is complete waits for nothing.

    Args:
        at_once: cells that train, or are scored, at the same time, at most.

    Raises:
        UserError: a job of the sweep, or of one of its cells, is in the queue; a file system or sbatch refuses.
    """
    slurm = jobs.folder / "slurm"
    training = {number: job.request for number, job in jobs.training.items()}
    following = {number: request for number, request in jobs.evaluation.items() if number in training}
    rest = {number: request for number, request in jobs.evaluation.items() if number not in training}
    arrays = {"training": training, "evaluation": following, "evaluation of complete cells": rest}
    names = {what: array_name(slurm, what) for what in arrays}
    _refuse_second(queue, [*names.values()], [*training.values(), *jobs.evaluation.values()])
    configs = {number: (job.config_text, job.private) for number, job in jobs.training.items()}
    found: dict[str, str] = {}
    for what, requests in arrays.items():
        if requests:
            after = f"aftercorr:{found['training']}" if what == "evaluation" else None
            text = array_text(names[what], slurm, requests, after, at_once)
            script = slurm / f"{what.replace(' ', '-')}.sbatch"
            found[what] = submit_array(script, text, requests, configs if what == "training" else {}, queue)
    return found


def array_name(folder: Path, what: str) -> str:
    """How an array of a sweep is called in the queue."""
    path = folder / what.replace(" ", "-")
    return job_name(JobFolder(path, path))


def array_text(
    name: str, folder: Path, requests: Mapping[int, Request], after: str | None, at_once: int | None
) -> str:
    """The script of an array. UserError where the folder's name has what a script cannot have."""
    try:
        return render_array(name, folder, requests, after, at_once)
    except ValueError as error:
        raise UserError(str(error)) from None


def _refuse_second(queue: Queue, arrays: Sequence[str], requests: Sequence[Request]) -> None:
    """UserError where a job of these waits or runs, or the queue does not say whether."""
    found = queue.named(*arrays, *(request.job.name for request in requests))
    if isinstance(found, Unseen):
        raise unseen_queue(found, "the sweep")
    busy = [job for job in found.values() if not job.has_ended]
    if busy:
        first = busy[0]
        raise UserError(
            f"job {first.job} of this sweep is {first.state}{f' and {len(busy) - 1} more' if busy[1:] else ''};"
            " expected none in the queue: wait for its end, or cancel it"
        )
