"""The batch script of a job, by a pure function: the same request is the same text.

The template is `slurm/templates/job.sbatch`; `@{name}` stands in it for what is filled in. All of a user's values
are quoted, but the preamble of the site file, which is shell.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from textwrap import wrap
from typing import Final

from ditmoe.slurm.job_folder import Job, JobFolder
from ditmoe.slurm.submission.settings import JobSettings
from ditmoe.slurm.submission.values import in_file_name, in_option, in_shell, plain_path

TEMPLATE: Final = Path(__file__).resolve().parents[1] / "templates" / "job.sbatch"
STRANGERS: Final = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
    *("DITMOE_MEETING", "DITMOE_NODE_TASK", "DITMOE_PARENT", "DITMOE_FAILURE_FILE", "DITMOE_HEARTBEATS"),
    *("SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE"),
)
"""Variables that say of a process which rank it is, or bind srun to the processors of another job."""


@dataclass(frozen=True)
class Request:
    """All that a batch script is made of."""

    job: Job
    folder: JobFolder
    """Absolute."""
    settings: JobSettings
    after: str | None = None
    """A dependency as sbatch takes it, such as `afterok:123`, beside that of one job at a time."""


class _Template(Template):
    """Shell is full of dollar signs."""

    delimiter = "@"


def render(request: Request) -> str:
    """The batch script.

    Raises:
        ValueError: a folder's name has what a script cannot have.
    """
    settings, job = request.settings, request.job
    for path in (str(request.folder.path), job.directory, job.python):
        plain_path(path)
    variables = [f"export {name}={in_shell(str(value))}" for name, value in settings.environment.items()]
    template = _Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        options="\n".join(f"#SBATCH --{line}" for line in options_of(request)),
        verb=job.verb,
        script=in_shell(str(request.folder.script)),
        strangers=" \\\n    ".join(wrap(" ".join(STRANGERS), 100)),
        environment="\n".join(variables),
        preamble=settings.preamble.strip("\n"),
        folder=in_shell(str(request.folder.path)),
        python=in_shell(job.python),
    )


def options_of(request: Request) -> Iterator[str]:
    """Options of sbatch, without the two dashes."""
    settings, job = request.settings, request.job
    yield f"job-name={in_option(job.name)}"
    yield f"chdir={in_option(job.directory)}"
    yield f"output={in_option(in_file_name(str(request.folder.path)) + '/output-%j.txt')}"
    yield "open-mode=append"
    yield "requeue"
    yield f"signal=B:USR2@{job.warning}"
    dependencies = ["singleton", *([request.after] if request.after else [])]
    other = settings.sbatch.get("dependency")
    dependencies += [str(other)] if other else []
    yield f"dependency={in_option(','.join(dependencies))}"
    if len(dependencies) > 1:
        yield "kill-on-invalid-dep=yes"  # otherwise it would wait for ever
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.tasks_per_node}"
    yield from _gpus(settings)
    for name in ("cpus_per_task", "mem", "time", "partition", "account", "qos", "constraint"):
        value = getattr(settings, name)
        if value is not None:
            yield f"{name.replace('_', '-')}={in_option(str(value))}"
    for key, value in settings.sbatch.items():
        if key != "dependency" and value is not False:
            yield key if value is None or value is True else f"{key}={in_option(str(value))}"


def _gpus(settings: JobSettings) -> Iterator[str]:
    if not settings.gpus_per_node or settings.gpu_request == "none":
        return
    number = f"{settings.gpu_type}:{settings.gpus_per_node}" if settings.gpu_type else str(settings.gpus_per_node)
    yield f"gres=gpu:{number}" if settings.gpu_request == "gres" else f"gpus-per-node={number}"


def task_start(settings: JobSettings, python: str, directory: str, seen: tuple[str, ...]) -> tuple[str, ...]:
    """What each task is started with, before `-m MODULE`.

    Args:
        python: outside of a container.
        directory: the working directory.
        seen: folders that a container must see, absolute.
    """
    if settings.container is None:
        return (python,)
    if settings.container_runtime == "pyxis":
        return (settings.container_python,)
    gpus = ("--nv",) if settings.gpus_per_node else ()
    binds = tuple(f"--bind={mount}" for mount in (*seen, *settings.container_mounts))
    return (
        "apptainer",
        "exec",
        *gpus,
        *binds,
        f"--pwd={directory}",
        settings.container,
        settings.container_python,
    )


def step_options(settings: JobSettings, directory: str, seen: tuple[str, ...]) -> tuple[str, ...]:
    """Options that srun needs for each step, beside those of the allocation; arguments as of `task_start`."""
    # Since Slurm 22.05 srun does not take it from the job.
    options = () if settings.cpus_per_task is None else (f"--cpus-per-task={settings.cpus_per_task}",)
    if settings.container is None or settings.container_runtime != "pyxis":
        return options
    mounts = ",".join(
        mount if ":" in mount else f"{mount}:{mount}" for mount in (*seen, *settings.container_mounts)
    )
    return (
        *options,
        f"--container-image={settings.container}",
        f"--container-mounts={mounts}",
        f"--container-workdir={directory}",
    )
