"""Training the cells of a sweep one after another, each in processes of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ditmoe.data.storage.stopping import was_stopped
from ditmoe.launcher.local.launch import spawn
from ditmoe.launcher.sweep.cells import ReadyCell
from ditmoe.launcher.training.progress import read_progress
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.outside.text import counted

Spawn = Callable[..., int]


def run_cells(
    path: Path,
    cells: Sequence[ReadyCell],
    say: Callable[[str], None],
    evaluate: Callable[[Path], int] | None = None,
    start: Spawn = spawn,
) -> int:
    """Train each cell to its last step, and score it; the exit code.

    What is complete is not started. A cell that fails is told, and the next one follows.

    Args:
        path: the configuration file.
        say: shows a line.
        evaluate: scores a run in processes of its own; their exit code.
        start: as `spawn`.

    Returns:
        0 when all cells are complete and scored; 2 or 1 where some failed, 2 if each by a user's mistake; what the
        command said that was asked to stop.
    """
    failed: dict[str, int] = {}
    for place, ready in enumerate(cells):
        cell, folder = ready.cell, RunFolder(ready.cell.folder)
        heading = f"cell {place + 1} of {len(cells)}, {cell.name}"
        progress = read_progress(cell.folder)
        if progress.reached(ready.config.train.steps):
            say(f"{heading}: complete at step {progress.step:,}")
        else:
            say(f"{heading}: from step {progress.step:,} to {ready.config.train.steps:,}")
            # `--`: an override is never taken for an option.
            code = start(
                ["train", "--", str(path), *cell.overrides],
                ready.processes,
                log_dir=folder.ranks,
                threads=ready.config.launch.threads,
            )
            if was_stopped(code):
                return _stopped(code, heading, say)
            if code:
                failed[cell.name] = code
                say(f"{heading}: failed with exit code {code}; the message is above")
                continue
        if evaluate is not None:
            code = evaluate(cell.folder)
            if was_stopped(code):
                return _stopped(code, heading, say)
            if code:
                failed[cell.name] = code
                say(f"{heading}: could not be scored (exit code {code}); the message is above")
    if not failed:
        return 0
    say(f"{len(failed)} of {counted(len(cells), 'cell')} failed: {', '.join(failed)}")
    return 2 if set(failed.values()) == {2} else 1


def _stopped(code: int, heading: str, say: Callable[[str], None]) -> int:
    say(f"{heading}: stopped; repeat the command to continue with it")
    return code
