"""`ditmoe evaluate RUN --seeds 0-2`: the same evaluation with several seeds, and how far the figures spread."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import typer

from ditmoe.launcher.commands.shared_options import Sharing

if TYPE_CHECKING:
    from ditmoe.sampling.evaluation.of_run import EvaluationOptions


def evaluate_with_seeds(options: "EvaluationOptions", seeds: str, sharing: Sharing, again: Sequence[str]) -> None:
    """Evaluate with each seed that is not stored, and show means and deviations.

    Args:
        options: of every evaluation, but for the seed.
        seeds: the option.
        sharing: who makes the parts.
        again: the other options as arguments, without the seed.
    """
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.evaluation.job import requests_of
    from ditmoe.sampling.evaluation.of_crew import made_by
    from ditmoe.sampling.evaluation.results import table
    from ditmoe.sampling.evaluation.row import MARKDOWN_FILE
    from ditmoe.sampling.evaluation.run_job import stored_result
    from ditmoe.sampling.evaluation.seeds import SUMMARY_FILE, evaluate_seeds, folder_of, prepare_seeds, seeds_of
    from ditmoe.sampling.evaluation.stored import keys_of

    jobs = prepare_seeds(options, seeds_of(seeds))
    folder = folder_of(jobs)
    if all([stored_result(job) is not None for job in jobs]):
        found = evaluate_seeds(jobs)
    else:
        # Ranks are told the checkpoint: training may write a newer one before they look.
        ranks = ["evaluate", *again, "--seeds", seeds, "--", str(jobs[0].checkpoint)]
        with (
            sharing.led(folder / "ranks", again=ranks) as crew,
            signs_of_work(folder.parent, jobs[0].cache),
        ):
            if crew is None:
                found = evaluate_seeds(jobs)
            else:
                found = evaluate_seeds(jobs, partial(made_by, crew, options), max(crew.size, 1))
    if this_process().first:
        for line in table(found, *keys_of(found["results"], requests_of(jobs[0]))):
            typer.echo(line)
        for name, file in (("seeds", SUMMARY_FILE), ("row", MARKDOWN_FILE)):
            typer.echo(f"  {name:<8} {folder / file}")
