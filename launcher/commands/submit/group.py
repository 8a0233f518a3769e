"""`ditmoe submit`: hand a training run, an evaluation, an encoding, a synthesis or workers to Slurm."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ditmoe.launcher.command_line.arguments import ConfigArgument, config_argument, overrides_argument
from ditmoe.launcher.command_line.groups import Commands
from ditmoe.launcher.commands.submit.options import Asked, asks_slurm
from ditmoe.launcher.commands.sweep import FolderOption
from ditmoe.launcher.commands.worker import MINUTES
from ditmoe.model.outside.text import counted

if TYPE_CHECKING:
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.script import Request
    from ditmoe.slurm.submission.settings import JobSettings

app = Commands(
    """Run a command as a job of Slurm; see docs/slurm.md.

    Examples:
        ditmoe submit train photos --nodes 2 --gpus-per-node 8
        ditmoe submit evaluate runs/photos --count 50000 --gpus-per-node 8
    """
)

_PASSED_ON: Final[dict[str, Any]] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What is no option of the job is the verb's own."""


EvaluateOption = Annotated[
    str | None,
    typer.Option(
        metavar="OPTIONS",
        help="Score it in a job that follows, with these options of `ditmoe evaluate`, such as"
        " '--count 5000 --steps 50'; '' for its defaults.",
    ),
]


@app.command("train", short_help="Train, or resume, a run.")
@asks_slurm
def train(
    config: ConfigArgument,
    overrides: Annotated[
        list[str] | None, overrides_argument("Keys to set, such as parallel.expert=4 optim.lr=2e-4.")
    ] = None,
    *,
    evaluate: EvaluateOption = None,
    asked: Asked,
) -> None:
    """Train or resume the run of a configuration as a job, which is requeued until the run is complete.

    With --evaluate a second job then scores the run, on as many nodes.

    Examples:
        ditmoe submit train photos --nodes 2 --gpus-per-node 8 --time 12:00:00
        ditmoe submit train photos optim.lr=2e-4 --nodes 2 --gpus-per-node 8 --dry-run
        ditmoe submit train photos --gpus-per-node 8 --evaluate '--count 5000 --steps 50'
    """
    import shlex
    from dataclasses import replace

    from ditmoe.launcher.commands.submit.other_jobs import following_evaluation
    from ditmoe.launcher.submission.training import training_job
    from ditmoe.launcher.training.progress import read_progress
    from ditmoe.launcher.training.run_folder import RunFolder
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import refuse_second, script_of, submit

    settings = asked.settings()
    job = training_job(config, overrides or [], settings)
    request = job.request
    following = None
    if evaluate is not None:
        following = following_evaluation(job.config.run.dir.absolute(), evaluate, settings)
    if asked.dry_run:
        typer.echo(script_of(request), nl=False)
        for line in ["", *job.verdict]:
            typer.echo(f"# {line}".rstrip())
        if following is not None:
            typer.echo(f"# then: ditmoe {shlex.join(following.job.arguments)}")
        return
    queue = Queue()
    refuse_second(queue, request.job.name, request.folder.path)
    if following is not None:
        refuse_second(queue, following.job.name, following.folder.path)
    RunFolder(job.config.run.dir).check(job.config)
    if read_progress(job.config.run.dir).reached(job.config.train.steps):
        typer.echo(f"{job.config.run.dir}: complete at step {job.config.train.steps:,}; no training is submitted")
    else:
        jobs = submit(request, queue, job.config_text, job.private)
        _report(request, jobs, queue)
        if following is not None:
            following = replace(following, after=f"afterok:{jobs[-1]}")
    if following is not None:
        _report(following, submit(following, queue), queue)


@app.command("sweep", short_help="Train every combination of some keys' values.")
@asks_slurm
def sweep(
    config: Annotated[Path, config_argument("The YAML file of every cell's run, or the name of a shipped one.")],
    overrides: Annotated[
        list[str],
        overrides_argument("Keys to vary, such as optim.lr=1e-4,2e-4, and to set for all.", "KEY=VALUE[,VALUE…]"),
    ],
    *,
    folder: FolderOption = None,
    evaluate: EvaluateOption = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="How many cells run at the same time, at most. [default: all]")
    ] = None,
    asked: Asked,
) -> None:
    """Train every combination of the keys' values as an array of jobs, each on its own nodes; see
    docs/sweep.md.

    Complete cells are left out. `ditmoe sweep … --table` prints a table of the results.

    Examples:
        ditmoe submit sweep photos optim.lr=1e-4,2e-4 --gpus-per-node 8 --at-once 2
    """
    from ditmoe.launcher.commands.submit.other_jobs import following_evaluation
    from ditmoe.launcher.submission.sweep import array_name, array_text, submit_sweep, sweep_jobs
    from ditmoe.launcher.sweep.cells import cells_of, default_folder
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import never_starting

    settings = asked.settings()
    folder = folder or default_folder(config)
    cells = cells_of(config, overrides, folder)
    scoring = {}
    if evaluate is not None:
        scoring = {
            number: following_evaluation(cell.folder.absolute(), evaluate, settings)
            for number, cell in enumerate(cells)
        }
    jobs = sweep_jobs(config, cells, folder, settings, scoring)
    if asked.dry_run:
        requests = {number: job.request for number, job in jobs.training.items()} or scoring
        if requests:
            name = array_name(jobs.folder / "slurm", "training")
            typer.echo(array_text(name, jobs.folder / "slurm", requests, None, at_once), nl=False)
    else:
        queue = Queue()
        submitted = submit_sweep(jobs, queue, at_once)
        for what, job in submitted.items():
            typer.echo(f"submitted job {job}: {what}")
        for line in never_starting(queue, list(submitted.values())):
            typer.echo(f"warning: {line}", err=True)
    typer.echo(
        f"{'# ' * asked.dry_run}{counted(len(cells), 'cell')}, of which {len(cells) - len(jobs.training)} "
        f"are complete"
    )


@app.command(
    "evaluate",
    context_settings=_PASSED_ON,
    short_help="Score a run.",
    options_metavar="[JOB OPTIONS] {RUN} [ITS OPTIONS]",
)
@asks_slurm
def evaluate(context: typer.Context, *, asked: Asked) -> None:
    """Score a run as a job. Give RUN and the options of `ditmoe evaluate` together with those below.

    Examples:
        ditmoe submit evaluate runs/photos --count 50000 --nodes 2 --gpus-per-node 8
        ditmoe submit evaluate runs/photos --watch --count 5000 --gpus-per-node 1 --time 12:00:00
    """
    from ditmoe.launcher.commands.submit.other_jobs import evaluation_job

    _submit(evaluation_job, context, asked)


@app.command(
    "encode",
    context_settings=_PASSED_ON,
    short_help="Encode images into latents.",
    options_metavar="[JOB OPTIONS] {SHARDS} {OUT} [ITS OPTIONS]",
)
@asks_slurm
def encode(context: typer.Context, *, asked: Asked) -> None:
    """Encode images as a job. Give SHARDS, OUT and the options of `ditmoe data encode` together with those
    below.

    Examples:
        ditmoe submit encode shards/photos shards/latents --vae sd-vae --nodes 4 --gpus-per-node 8
    """
    from ditmoe.launcher.commands.submit.other_jobs import encoding_job

    _submit(encoding_job, context, asked)


@app.command(
    "synthesize",
    context_settings=_PASSED_ON,
    short_help="Draw a dataset.",
    options_metavar="[JOB OPTIONS] {OUT} [ITS OPTIONS]",
)
@asks_slurm
def synthesize(context: typer.Context, *, asked: Asked) -> None:
    """Draw a dataset as a job. Give OUT and the options of `ditmoe data synthesize` together with those below.

    Examples:
        ditmoe submit synthesize shards/drawn --from runs/photos --count 500000 --nodes 4 --gpus-per-node 8
    """
    from ditmoe.launcher.commands.submit.other_jobs import synthesis_job

    _submit(synthesis_job, context, asked)


@app.command("workers", short_help="Start workers for commands that are led elsewhere.")
@asks_slurm
def workers(
    folder: Annotated[
        Path, typer.Argument(help="The crew's folder, as in `ditmoe evaluate --crew FOLDER`.", metavar="CREW")
    ],
    *,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Workers on each node. [default: one per GPU, or 1]")
    ] = None,
    idle: Annotated[
        float,
        typer.Option(min=0, metavar="MINUTES", help="Workers end when nobody has led the crew for this long."),
    ] = MINUTES,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="INTERFACE",
            help="Network interface by which nodes reach each other, such as ib0. [default: the system's route]",
        ),
    ] = None,
    asked: Asked,
) -> None:
    """Start workers as a job: they join the command that leads the crew, now or later; see docs/evaluate.md.

    Repeat the command to add workers: each call is a separate job.

    Examples:
        ditmoe submit workers runs/crew --nodes 4 --gpus-per-node 8 --time 12:00:00
    """
    from ditmoe.launcher.submission.workers import workers_job
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import script_of, submit

    request = workers_job(folder, processes, idle, listen, asked.settings())
    if asked.dry_run:
        typer.echo(script_of(request), nl=False)
        return
    from ditmoe.data.crew.certificate import crew_security

    crew_security(folder)  # before anything waits for a folder that nobody but its owner may enter
    queue = Queue()
    _report(request, submit(request, queue), queue)


def _submit(make: "Callable[[list[str], JobSettings], Request]", context: typer.Context, asked: Asked) -> None:
    from ditmoe.slurm.client import Queue
    from ditmoe.slurm.submission.submit import script_of, submit

    request = make(list(context.args), asked.settings())
    if asked.dry_run:
        typer.echo(script_of(request), nl=False)
        return
    queue = Queue()
    _report(request, submit(request, queue), queue)


def _report(request: "Request", jobs: list[str], queue: "Queue") -> None:
    """What was submitted, where to look, and whether the queue says already that it will not start."""
    from ditmoe.slurm.submission.submit import never_starting

    after = f", then {', '.join(jobs[1:])}, each after the end of the one before" if len(jobs) > 1 else ""
    tasks = counted(request.job.tasks_per_node, "task")
    typer.echo(f"submitted job {jobs[0]}: {counted(request.job.nodes, 'node')} × {tasks}{after}")
    typer.echo(f"  script  {request.folder.script}")
    typer.echo(f"  output  {request.folder.path / f'output-{jobs[0]}.txt'}")
    for line in never_starting(queue, jobs):
        typer.echo(f"warning: {line}", err=True)
