"""`ditmoe submit`: hand a training run, an evaluation, an encoding or a synthesis to Slurm."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ditmoe.launcher.commands.submit.options import Asked, asks_slurm
from ditmoe.launcher.commands.words import counted

if TYPE_CHECKING:
    from ditmoe.slurm.submission.script import Request
    from ditmoe.slurm.submission.settings import JobSettings

app = typer.Typer(no_args_is_help=True, help="Hand a verb to Slurm; see docs/slurm.md.")

_PASSED_ON: Final[dict[str, Any]] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What is no option of the job is the verb's own."""


@app.command("train")
@asks_slurm
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Keys to set, such as parallel.expert=4 optim.lr=2e-4.", metavar="KEY=VALUE"),
    ] = None,
    *,
    asked: Asked,
) -> None:
    """Train, or resume, the run of a configuration as a job, which comes back until the run is complete."""
    from ditmoe.launcher.submission.training import training_job
    from ditmoe.launcher.training.run_folder import RunFolder
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import refuse_second, script_of, submit

    job = training_job(config, overrides or [], asked.settings())
    request = job.request
    if asked.dry_run:
        typer.echo(script_of(request), nl=False)
        for line in ["", *job.verdict]:
            typer.echo(f"# {line}".rstrip())
        return
    queue = Queue()
    refuse_second(queue, request.job.name, request.folder.path)
    RunFolder(job.config.run.dir).check(job.config)
    _report(request, submit(request, queue, job.config_text, job.private))


@app.command("evaluate", context_settings=_PASSED_ON)
@asks_slurm
def evaluate(context: typer.Context, *, asked: Asked) -> None:
    """Score a run as a job: RUN and the options of `ditmoe evaluate` follow those below."""
    from ditmoe.launcher.commands.submit.other_jobs import evaluation_job

    _submit(evaluation_job, context, asked)


@app.command("encode", context_settings=_PASSED_ON)
@asks_slurm
def encode(context: typer.Context, *, asked: Asked) -> None:
    """Encode images as a job: SHARDS, OUT and the options of `ditmoe data encode` follow those below."""
    from ditmoe.launcher.commands.submit.other_jobs import encoding_job

    _submit(encoding_job, context, asked)


@app.command("synthesize", context_settings=_PASSED_ON)
@asks_slurm
def synthesize(context: typer.Context, *, asked: Asked) -> None:
    """Draw a dataset as a job: OUT and the options of `ditmoe data synthesize` follow those below."""
    from ditmoe.launcher.commands.submit.other_jobs import synthesis_job

    _submit(synthesis_job, context, asked)


def _submit(make: "Callable[[list[str], JobSettings], Request]", context: typer.Context, asked: Asked) -> None:
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import script_of, submit

    request = make(list(context.args), asked.settings())
    if asked.dry_run:
        typer.echo(script_of(request), nl=False)
        return
    _report(request, submit(request, Queue()))


def _report(request: "Request", jobs: list[str]) -> None:
    """What was submitted, and where to look."""
    after = f", then {', '.join(jobs[1:])}, each after the end of the one before" if len(jobs) > 1 else ""
    tasks = counted(request.job.tasks_per_node, "task")
    typer.echo(f"submitted job {jobs[0]}: {counted(request.job.nodes, 'node')} × {tasks}{after}")
    typer.echo(f"  script  {request.folder.script}")
    typer.echo(f"  output  {request.folder.path / f'output-{jobs[0]}.txt'}")
