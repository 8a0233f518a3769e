"""The results of a sweep as a table: of each cell its values, how far it is, its loss, and its figures."""

import csv
import hashlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ditmoe.data.places.redaction import shown_place
from ditmoe.data.storage.files import make_folder, open_regular, replacing
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.sweep.cells import Cell
from ditmoe.launcher.training.best import losses
from ditmoe.launcher.training.evaluations import stored_evaluations
from ditmoe.launcher.training.progress import Progress, read_progress
from ditmoe.launcher.training.run_folder import RunFolder

MARKDOWN_FILE: Final = "table.md"
CSV_FILE: Final = "table.csv"
FIGURES: Final = ("fid", "sfid", "kid", "precision", "recall", "inception_score")
"""Of the evaluation of a cell's newest evaluated step."""
_TITLES: Final = {"loss": "loss", "fid": "FID", "sfid": "sFID", "kid": "KID", "inception_score": "Inception Score"}

Row = dict[str, Any]


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """A row for each cell: the values of the sweep's keys, then `state`, `step`, `steps`, `loss`, figures, `run`.

    `loss` is the mean over the records of the last `train.checkpoint_every` steps, as `checkpoint.best_metric` has
    it, and `loss_of` what two losses must have in common to be compared. None stands for what is not there.
    """
    return [_row(cell) for cell in cells]


def _row(cell: Cell) -> Row:
    folder, progress = RunFolder(cell.folder), read_progress(cell.folder)
    config = progress.config or cell.config
    last = _last_step(folder.stats)
    loss = losses(folder.stats, [last], config.train.checkpoint_every).get(last)
    found = sorted(stored_evaluations(folder.evaluations), key=lambda one: (one.step, one.written))
    latest = found[-1] if found else None
    return {
        **{key: shown_place(value) for key, value in cell.values.items()},
        "state": _state(progress),
        "step": max(last, progress.step),
        "steps": config.train.steps,
        "loss": loss,
        "loss_of": None if loss is None else _loss_of(config),
        **{key: None if latest is None else latest.figure(key) for key in FIGURES},
        "evaluated_step": None if latest is None else latest.step,
        "evaluation": None if latest is None else latest.id,
        "settings": None if latest is None else latest.settings_name,
        "run": str(cell.folder),
    }


def _loss_of(config: RunConfig) -> str:
    """The objective, and a fingerprint of it and the images; of these alone, for a place may hold a password."""
    sources = [source.model_dump(mode="json") for source in config.data.sources]
    content = json.dumps([config.objective.model_dump(mode="json"), sources])
    return f"{config.objective.kind}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _state(progress: Progress) -> str:
    """The run's own word is no more than that: how old its newest sign is stands beside it."""
    if progress.complete:
        return "complete"
    if progress.config is None:
        return "not begun"
    word = progress.word or "begun"
    minutes = max(0.0, time.time() - progress.signed) / 60
    return f"{word}, {minutes:.0f} min ago" if word in ("starting", "training", "begun") else word


def _last_step(stats: Path) -> int:
    """Of the last whole record; 0 where there is none."""
    try:
        with open_regular(stats) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut short by a kill
    return 0


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The columns that people look at: those of figures that nobody has are left out."""
    hidden = {"loss_of", "evaluation", "settings", "evaluated_step", "steps"}
    hidden |= {key for key in FIGURES if all(row[key] is None for row in rows)}
    return [key for key in rows[0] if key not in hidden]


def as_text(rows: Sequence[Row]) -> str:
    """The table for a terminal, with what is best and what cannot be compared below it."""
    columns = shown_columns(rows)
    cells = [[_TITLES.get(key, key) for key in columns]] + [[_shown(row, key) for key in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    ]
    return "\n".join([*lines, *remarks(rows)])


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    columns = shown_columns(rows)
    lines = [[_TITLES.get(key, key) for key in columns], ["---"] * len(columns)]
    lines += [[_shown(row, key).replace("|", "\\|") for key in columns] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "".join(f"\n\n{remark}" for remark in remarks(rows)) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Every column with every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def remarks(rows: Sequence[Row]) -> list[str]:
    """Which cells are best, and why figures may not be compared."""
    lines = []
    for key in ("loss", "fid"):
        known = [row for row in rows if row[key] is not None]
        if known:
            best = min(known, key=lambda row: row[key])
            lines.append(f"lowest {_TITLES[key]}: {best[key]:.4g}, {best['run']}")
    losses_of = {row["loss_of"] for row in rows if row["loss_of"] is not None}
    if len(losses_of) > 1:
        lines.append(f"warning: losses of {len(losses_of)} different objectives or images cannot be compared")
    settings = {row["settings"] for row in rows if row["settings"] is not None}
    if len(settings) > 1:
        lines.append(f"warning: FIDs of {len(settings)} different settings or feature networks cannot be compared")
    steps = {row["evaluated_step"] for row in rows if row["evaluated_step"] is not None}
    if len(steps) > 1:
        lines.append(f"warning: the figures are of different steps: {', '.join(map(str, sorted(steps)))}")
    return lines


def write_table(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the table as Markdown and CSV; the files."""
    make_folder(folder)
    files = {MARKDOWN_FILE: as_markdown(rows), CSV_FILE: as_csv(rows)}
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    return [folder / name for name in files]


def _shown(row: Row, key: str) -> str:
    value = row[key]
    if key == "step":
        return f"{value:,} of {row['steps']:,}"
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
