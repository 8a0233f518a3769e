"""What every `ditmoe submit` takes: the options of the job, declared once.

A command that is marked `@asks_slurm` gets them in place of its argument `asked`. They are named as the keys of
the site file (`ditmoe.slurm.submission.settings`), where each is described.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ditmoe.launcher.commands.shared_options import with_options

if TYPE_CHECKING:
    from ditmoe.slurm.submission.settings import JobSettings

_JOB_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "nodes": (Annotated[int | None, typer.Option(help="Nodes. [default: 1]")], None),
    "gpus_per_node": (
        Annotated[int | None, typer.Option(help="GPUs of each node. [default: 0, a CPU job]")],
        None,
    ),
    "tasks_per_node": (
        Annotated[int | None, typer.Option(help="Processes of each node. [default: one per GPU, or one]")],
        None,
    ),
    "time": (Annotated[str | None, typer.Option(help="Time limit, such as 30, 12:00:00 or 2-00:00:00.")], None),
    "partition": (Annotated[str | None, typer.Option(help="Partition.")], None),
    "account": (Annotated[str | None, typer.Option(help="Account to charge.")], None),
    "qos": (Annotated[str | None, typer.Option(help="Quality of service.")], None),
    "constraint": (Annotated[str | None, typer.Option(help="Features that nodes must have.")], None),
    "mem": (Annotated[str | None, typer.Option(help="Memory of each node, such as 64G; 0: all.")], None),
    "cpus_per_task": (Annotated[int | None, typer.Option(help="CPUs of each task.")], None),
    "gpu": (
        Annotated[str | None, typer.Option(help="Kind of GPU, as in `ditmoe plan --gpu`, to check memory.")],
        None,
    ),
    "container": (
        Annotated[str | None, typer.Option(help="Container image that tasks run in. [default: no container]")],
        None,
    ),
    "container_runtime": (
        Annotated[str | None, typer.Option(help="apptainer or pyxis. [default: apptainer]")],
        None,
    ),
    "container_mount": (
        Annotated[
            list[str],
            typer.Option(help="Folder to mount in the container: /DATA or /DATA:/WITHIN; may be repeated."),
        ],
        (),
    ),
    "sbatch": (
        Annotated[
            list[str],
            typer.Option(metavar="KEY[=VALUE]", help="Any other option of sbatch; may be repeated."),
        ],
        (),
    ),
    "warning": (
        Annotated[
            int | None,
            typer.Option(
                help="Seconds before the time limit at which the job saves. [default: 300, at most a quarter]"
            ),
        ],
        None,
    ),
    "limit": (
        Annotated[
            list[str],
            typer.Option(
                metavar="PHASE=DURATION",
                help="How long a rank may be silent. [default: start=30m, step=10m, save=30m, evaluation=2h]",
            ),
        ],
        (),
    ),
    "attempts": (
        Annotated[
            int | None,
            typer.Option(help="Stop after this many attempts in a row without a new checkpoint. [default: 3]"),
        ],
        None,
    ),
    "check": (
        Annotated[
            bool | None,
            typer.Option("--check/--no-check", help="Check the nodes before each attempt. [default: check]"),
        ],
        None,
    ),
    "chain": (
        Annotated[
            int | None,
            typer.Option(
                help="Submit this many jobs that run one after the other, for clusters where a job "
                "cannot requeue itself."
            ),
        ],
        None,
    ),
    "site": (
        Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="File with the cluster's defaults. [default: $DITMOE_SITE, ~/.config/ditmoe/site.yaml]",
            ),
        ],
        None,
    ),
    "dry_run": (
        Annotated[
            bool, typer.Option("--dry-run", help="Print the script and the plan; write and submit nothing.")
        ],
        False,
    ),
}
"""Option → its type with its help, and its default."""
_SETTINGS: Final = {"container_mount": "container_mounts", "limit": "limits"}
"""Option that may be repeated → the setting it is a part of."""


@dataclass(frozen=True)
class Asked:
    """What the options of the job were."""

    values: Mapping[str, Any]

    @property
    def dry_run(self) -> bool:
        """Whether nothing is written or submitted."""
        return bool(self.values["dry_run"])

    def settings(self) -> "JobSettings":
        """The settings of the job; UserError naming every option that is wrong.

        What this process's environment says of another job is forgotten: it would become the new job's.
        """
        import os

        from ditmoe.launcher.submission.asked import job_settings
        from ditmoe.slurm.submission.submit import forget_other_jobs

        given = {_SETTINGS.get(name, name): value for name, value in self.values.items()}
        site = given.pop("site")
        del given["dry_run"]
        settings = job_settings(site, given)
        forget_other_jobs(os.environ, settings)
        return settings


def asks_slurm(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a job where it has its argument `asked`."""
    return with_options(_JOB_OPTIONS, "asked", Asked)(command)
