"""The files of a job: where they are, how its jobs are called in the queue, and `job.json`, which says what it is.

A training run's job folder is `RUN/slurm/train/`, that of an evaluation `RUN/slurm/evaluate-<8 hex digits of its
arguments>/`; encoding and synthesis, whose folder holds a dataset and nothing else, have `OUT.slurm/` beside it.
Each job of workers that join a crew has its own: `CREW/slurm/workers-N/`.

    submit.sbatch    the batch script; of a training run it is RUN/submit.sbatch
    job.json         what the job runs: `Job`
    config.yaml      the resolved configuration that a training job trains
    code/ditmoe/     the program, copied when the job was submitted; code/COMMIT.json says of which commit
    attempts.jsonl   what was submitted, and each attempt with its end: `ditmoe.slurm.attempts`
    heartbeats/      one file per rank of the attempt that runs
    output-J.txt     what job J printed
    parts-R          of workers: a byte for each part that those of rank R have made
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from ditmoe.data.storage.files import open_regular, replacing
from ditmoe.model.errors import UserError

SCRIPT: Final = "submit.sbatch"
PHASES: Final = {"start": 1800, "step": 600, "save": 1800, "evaluation": 7200}
"""What a rank may be in → seconds after which it counts as hung, unless the submission says otherwise."""
_LONGEST_LABEL: Final = 40
_WORKERS: Final = re.compile(r"workers-([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Job:
    """What a job runs, and on what: the content of `job.json`."""

    name: str
    """In Slurm's queue."""
    verb: str
    """`train`, `evaluate`, `encode`, `synthesize` or `workers`."""
    arguments: tuple[str, ...]
    """Of each task, after `ditmoe`."""
    run: str | None
    """The run folder, absolute, that it trains or evaluates; None: it makes a dataset."""
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    directory: str
    """That paths among the arguments are relative to."""
    python: str
    """The Python of the batch script, outside of any container."""
    task: tuple[str, ...]
    """What a task is started with, before `-m MODULE`: a Python, with the container's program before it."""
    srun: tuple[str, ...]
    """Options that srun needs beside those of the allocation."""
    limits: Mapping[str, float]
    """Phase → seconds without a sign of life after which a rank counts as hung."""
    warning: int
    """Seconds before the time limit at which Slurm sends USR2."""
    chain: int = 1
    """Jobs that were submitted at once, each of which waits for the end of the one before."""
    attempts: int = 3
    """In a row that may bring no new checkpoint, after which the job stops."""
    check: bool = True
    """Whether every attempt begins with a check of its nodes."""


@dataclass(frozen=True)
class JobFolder:
    """The files of a job."""

    path: Path
    script: Path
    """What `sbatch` takes."""

    @property
    def job(self) -> Path:
        """What the job runs."""
        return self.path / "job.json"

    @property
    def config(self) -> Path:
        """The configuration that a training job trains."""
        return self.path / "config.yaml"

    @property
    def code(self) -> Path:
        """The program as it was when the job was submitted: an entry of PYTHONPATH."""
        return self.path / "code"

    @property
    def heartbeats(self) -> Path:
        """Signs of life of the ranks."""
        return self.path / "heartbeats"

    def output(self, job: str) -> Path:
        """What a job of that id printed, or prints."""
        return self.path / f"output-{job}.txt"

    def store(self, job: Job) -> None:
        """Write job.json, for its owner alone: arguments may hold passwords of addresses."""
        with replacing(self.job, private=True) as file:
            file.write(json.dumps(asdict(job), indent=1).encode() + b"\n")


def training_folder(run: Path) -> JobFolder:
    """The job folder of a training run."""
    return JobFolder(run / "slurm" / "train", run / SCRIPT)


def evaluation_folder(run: Path, arguments: Sequence[str]) -> JobFolder:
    """The job folder of one evaluation of a run."""
    digest = hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest()
    path = run / "slurm" / f"evaluate-{digest[:8]}"
    return JobFolder(path, path / SCRIPT)


def dataset_folder(out: Path) -> JobFolder:
    """The job folder of a dataset that is encoded or synthesized."""
    path = out.with_name(f"{out.name}.slurm")
    return JobFolder(path, path / SCRIPT)


def workers_folder(crew: Path, number: int) -> JobFolder:
    """The job folder of workers that join a crew; each submission has a number of its own, from 1."""
    path = crew / "slurm" / f"workers-{number}"
    return JobFolder(path, path / SCRIPT)


def tally_of(job_folder: Path, rank: int) -> Path:
    """The file that has a byte for each part that the workers of a rank have made."""
    return job_folder / f"parts-{rank}"


def parts_made(job_folder: Path) -> int:
    """How many parts the workers of a job have made. OSError where the folder cannot be read."""
    return sum(path.stat().st_size for path in job_folder.glob("parts-*"))


def workers_folders(crew: Path) -> list[JobFolder]:
    """The job folders of workers of a crew, by their numbers."""
    found = {
        int(match[1]): path for path in (crew / "slurm").glob("*") if (match := _WORKERS.fullmatch(path.name))
    }
    return [opened(found[number]) for number in sorted(found)]


def workers_at(place: Path) -> JobFolder | None:
    """The job folder of workers that lies at a place; None: none does."""
    folder = opened(place)
    is_one = place.parent.name == "slurm" and _WORKERS.fullmatch(place.name) is not None
    return folder if is_one and place.is_dir() else None


def opened(path: Path) -> JobFolder:
    """The job folder that lies at a path: one of those above."""
    is_training = path.name == "train" and path.parent.name == "slurm"
    return training_folder(path.parent.parent) if is_training else JobFolder(path, path / SCRIPT)


def job_folders(run: Path) -> list[JobFolder]:
    """The job folders of a run that were ever submitted, its training first."""
    training = training_folder(run)
    others = [path.parent for path in (run / "slurm").glob("evaluate-*/job.json")]
    return [training] * training.job.exists() + [opened(path) for path in sorted(others)]


def job_name(folder: JobFolder) -> str:
    """How the jobs of a job folder are called in the queue: the same for every job that works on it.

    `ditmoe-NAME-<6 hex digits of the run's path>` of a training run, so that another run of that name is told
    apart; other jobs have `ditmoe-JOBFOLDER-…`.
    """
    is_training = folder.path.parent.name == "slurm" and folder.path.name == "train"
    subject = folder.path.parent.parent if is_training else folder.path
    absolute = subject.resolve()
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", absolute.name)[:_LONGEST_LABEL].strip("-.")
    digest = hashlib.sha256(str(absolute).encode(errors="surrogateescape")).hexdigest()
    return "-".join(["ditmoe", *([label] if label else []), digest[:6]])


def read_job(folder: JobFolder) -> Job:
    """What `job.json` says.

    Raises:
        UserError: it is not there, or was not written by this version.
    """
    try:
        with open_regular(folder.job) as file:
            return TypeAdapter(Job).validate_json(file.read())
    except OSError as error:
        raise UserError(
            f"{folder.job}: cannot be read: {error.strerror}; expected what `ditmoe submit` wrote"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{folder.job}: {key} is damaged; repeat the `ditmoe submit` that wrote it") from None
