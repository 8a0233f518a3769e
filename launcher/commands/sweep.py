"""`ditmoe sweep`: train the product of some keys' values, a run each, and table the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ditmoe.launcher.command_line.arguments import config_argument, overrides_argument
from ditmoe.launcher.command_line.groups import single_command
from ditmoe.launcher.command_line.wrong_usage import words_of

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="FOLDER", help="Folder for the runs, one for each cell. [default: runs/CONFIG-sweep]"
    ),
]


def command(
    config: Annotated[Path, config_argument("The YAML file of every cell's run, or the name of a shipped one.")],
    overrides: Annotated[
        list[str],
        overrides_argument(
            "Keys to vary, such as optim.lr=1e-4,2e-4 model.depth=2,4, and to set for all, such as"
            " train.steps=2000.",
            "KEY=VALUE[,VALUE…]",
        ),
    ],
    folder: FolderOption = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="OPTIONS",
            help="Also score each complete cell, with these options of `ditmoe evaluate`, such as"
            " '--count 5000 --steps 50'; '' for its defaults.",
        ),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Only print the table of results so far; train nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list the cells; start and write nothing.")
    ] = False,
) -> None:
    """Train every combination of the keys' values, one run after another; repeat the command to resume.

    If a cell fails, the others still run, and the exit code is not 0. Commas in brackets, braces and quotes
    belong to a value.

    Examples:
        ditmoe sweep photos optim.lr=1e-4,2e-4 model.depth=2,4 train.steps=5000
        ditmoe sweep photos 'optim.betas=[0.9,0.95],[0.9,0.99]' --evaluate '--count 5000 --steps 50'
        ditmoe sweep photos optim.lr=1e-4,2e-4 --table
    """
    from ditmoe.launcher.sweep.cells import cells_of, default_folder, ready
    from ditmoe.launcher.sweep.run import run_cells
    from ditmoe.launcher.sweep.table import as_text, rows_of, write_table
    from ditmoe.model.errors import UserError
    from ditmoe.parallel.ranks import this_process

    if this_process().started:
        raise UserError("sweep starts the processes of each run itself; expected it outside of torchrun and srun")
    folder = folder or default_folder(config)
    cells = cells_of(config, overrides, folder)
    score = None if evaluate is None else scorer(evaluate)
    code = 0
    if not table:
        checked = ready(cells)
        if dry_run:
            typer.echo(as_text(rows_of(cells)))
            return
        code = run_cells(config, checked, typer.echo, score)
    rows = rows_of(cells)
    typer.echo(as_text(rows))
    if not dry_run:
        for file in write_table(folder, rows):
            typer.echo(f"  {file.suffix[1:]:<4} {file}")
    raise typer.Exit(code)


def scorer(options: str) -> Callable[[Path], int]:
    """What scores a run with the options of `ditmoe evaluate`.

    Raises:
        UserError: they are none of its options, or leave it what a sweep decides.
    """
    import shlex

    from ditmoe.launcher.commands.evaluate import command as evaluate
    from ditmoe.launcher.commands.shared_options import Sharing, start_leader
    from ditmoe.model.errors import UserError

    try:
        arguments = shlex.split(options)
        reader = single_command("evaluate", evaluate)
        with reader.make_context("ditmoe evaluate", [*arguments, "--", "RUN"]) as context:
            given = context.params
    except (typer.TyperException, ValueError) as error:
        words = words_of(error) if isinstance(error, typer.TyperException) else str(error)
        raise UserError(
            f"--evaluate {options!r}: {words.rstrip('.')}; expected options of `ditmoe evaluate`"
        ) from None
    for name in ("watch", "grid", "step"):
        if given[name] not in (None, False):
            raise UserError(
                f"--evaluate {options!r}: --{name} is not for a sweep, which scores each cell's last step"
            )

    sharing = Sharing(given["processes"], given["crew"], given["listen"], given["part_limit"])

    sharing.leads(sharing.count())  # what does not go together shows before anything is trained

    def score(run: Path) -> int:
        return start_leader(["evaluate", *arguments], ["--", str(run)], sharing)

    return score
