"""`ditmoe evaluate RUN --watch`: score checkpoints as they come, each by processes of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ditmoe.launcher.commands.shared_options import Sharing, start_leader
from ditmoe.model.errors import UserError

if TYPE_CHECKING:
    from ditmoe.sampling.evaluation.job import Job
    from ditmoe.sampling.evaluation.of_run import EvaluationOptions


def evaluate_watch(
    options: "EvaluationOptions", sharing: Sharing, again: Sequence[str], every: int, patience: float | None
) -> None:
    """Score the checkpoints of a run until it is complete.

    Args:
        options: of every evaluation; the source is the run.
        sharing: who makes the parts of each; they hold no memory while the watch waits.
        again: the other options as arguments.
        every: score every so-manieth checkpoint, and the last.
        patience: minutes without a sign of the run after which to give up; None: never.
    """
    from ditmoe.parallel.ranks import this_process

    if this_process().ranks > 1:
        raise UserError(
            f"--watch: starts the processes of each evaluation itself, and is one of {this_process().ranks}"
            " (WORLD_SIZE); expected it to be started once, with --processes"
        )
    from ditmoe.launcher.local.signs import Signs
    from ditmoe.launcher.watch.watch import watch_run
    from ditmoe.sampling.evaluation.of_run import prepare_job
    from ditmoe.slurm.heartbeats import FOLDER_VARIABLE, Heart

    sharing.leads(sharing.count())  # what does not go together shows before the first checkpoint is there

    def prepare(checkpoint: Path) -> "Job":
        return prepare_job(replace(options, source=checkpoint))

    def evaluate(job: "Job") -> int:
        # The signs of life are the watch's own: its processes come and go.
        return start_leader(
            ["evaluate", *again], ["--", str(job.checkpoint)], sharing, environment={FOLDER_VARIABLE: ""}
        )

    with Heart.of_this_process(0, 1) as heart:
        code = watch_run(
            options.source,
            prepare,
            evaluate,
            typer.echo,
            every=every,
            patience=None if patience is None else 60 * patience,
            signs=Signs(heart),
        )
    raise typer.Exit(code)
