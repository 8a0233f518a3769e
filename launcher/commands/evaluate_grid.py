"""`ditmoe evaluate RUN --grid FILE`: compare samplers, each alone and finishing chains, at several costs."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from ditmoe.launcher.commands.shared_options import Sharing
from ditmoe.model.errors import UserError
from ditmoe.model.outside.text import counted

if TYPE_CHECKING:
    from ditmoe.sampling.evaluation.of_run import EvaluationOptions

HOLDING: Final = (
    "run",
    "processes",
    "crew",
    "listen",
    "part_limit",
    "grid",
    "weights",
    "step",
    "data",
    "index",
    "on_error",
    "features",
    "features_path",
    "resize",
    "reference_network",
    "neighbour_images",
    "recogniser",
    "vae",
    "batch",
    "chunk",
    "keep",
    "cache",
    "shared_weights",
)
"""Options of `ditmoe evaluate` that a grid leaves to the command."""


def refuse_options(path: Path, given: Iterable[str]) -> None:
    """UserError naming the options, by their Python names, that the file decides on."""
    refused = [f"--{name.replace('_', '-')}" for name in given if name not in HOLDING]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: set in {path}, the file of --grid, which says how images are drawn; leave out"
        )


def evaluate_grid(options: "EvaluationOptions", path: Path, sharing: Sharing) -> None:
    """Evaluate every cell of a grid that is not stored, and show the table.

    Args:
        options: what holds for every cell.
        path: the file of the grid.
        sharing: who makes the parts.
    """
    from ditmoe.launcher.configuration.grid_file import load_comparison
    from ditmoe.launcher.local.signs import signs_of_work
    from ditmoe.parallel.ranks import this_process
    from ditmoe.sampling.comparison.run import (
        PICTURE_FILE,
        ROWS_FILE,
        TABLE_FILE,
        prepare_comparison,
        run_comparison,
    )
    from ditmoe.sampling.evaluation.of_crew import made_by
    from ditmoe.sampling.integrators.few_steps import noise_warnings

    if not path.is_file():
        raise UserError(f"--grid {path}: no such file; expected the YAML file of a comparison")
    comparison = prepare_comparison(options, load_comparison(path), path.stem)
    process = this_process()
    if process.starts_ranks and process.first:
        _announce(len(comparison.cells), comparison.config.repeats, comparison.left_out)
        for warning in dict.fromkeys(line for cell in comparison.cells for line in noise_warnings(cell.config)):
            typer.echo(f"warning: {warning}", err=True)
    if comparison.finished:
        page = run_comparison(comparison)
    else:
        with (
            sharing.led(comparison.folder / "ranks") as crew,
            signs_of_work(comparison.folder.parent, comparison.jobs[0].cache),
        ):
            if crew is None:
                page = run_comparison(comparison)
            else:
                make_of = partial(made_by, crew, comparison.options)
                page = run_comparison(comparison, make_of, max(crew.size, 1))
    if process.first:
        typer.echo(page)
        for name, file in (("rows", ROWS_FILE), ("table", TABLE_FILE), ("picture", PICTURE_FILE)):
            typer.echo(f"  {name:<8} {comparison.folder / file}")


def _announce(cells: int, repeats: int, left_out: Sequence[str]) -> None:
    typer.echo(counted(cells, "evaluation") + (f" of {counted(repeats, 'seed')}" if repeats > 1 else ""))
    for line in left_out:
        typer.echo(f"left out: {line}")
