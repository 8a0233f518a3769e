"""The cells of a sweep: the product of some keys' values, each a run with a folder of its own."""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ditmoe.data.places.redaction import shown_place
from ditmoe.data.stream.dataset import Dataset, open_dataset
from ditmoe.launcher.configuration.problems import problem_list
from ditmoe.launcher.configuration.resolve import resolve
from ditmoe.launcher.configuration.run_config import RunConfig, load_config
from ditmoe.launcher.processes import process_count
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError

MOST_CELLS: Final = 1000
_LONGEST_NAME: Final = 120


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of its folder: the keys that the sweep varies, and their values."""
    values: Mapping[str, str]
    """Key that the sweep varies → this cell's value, as it was typed."""
    overrides: tuple[str, ...]
    """What follows `ditmoe train CONFIG`."""
    folder: Path
    config: RunConfig


def default_folder(path: Path) -> Path:
    """Where the cells of a configuration file go, unless the user says."""
    return Path("runs") / f"{path.stem}-sweep"


def cells_of(path: Path, overrides: Sequence[str], folder: Path) -> list[Cell]:
    """The cells of a sweep, the last key varying fastest.

    Args:
        path: the configuration file.
        overrides: `KEY=VALUE` for all cells, `KEY=VALUE,VALUE` to vary; commas in brackets, braces and quotes
            belong to a value.
        folder: gets the cells' run folders.

    Raises:
        UserError: no key is varied, one is given twice or is the sweep's own, two cells are the same, or a cell's
            configuration is wrong: all such problems, a line each.
    """
    problems: list[str] = []
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        values = split_values(text)
        if not equals or (len(values) > 1 and "" in (value.strip() for value in values)):
            problems.append(f"{key}{equals}{shown_place(text)}: expected KEY=VALUE or KEY=VALUE,VALUE")
        elif key in choices:
            problems.append(f"{key} is given twice; expected all of its values once: {key}=A,B")
        elif key == "run" or key.startswith("run."):
            problems.append(f"{key}: each cell has a run folder of its own; expected --dir FOLDER for all of them")
        else:
            choices[key] = values
    for key in choices:
        above = [other for other in choices if key.startswith(f"{other}.")]
        problems += [f"{key} is a part of {other}, and both are given; expected one of them" for other in above]
    varied = [key for key, values in choices.items() if len(values) > 1]
    count = 1
    for key in varied:
        count *= len(choices[key])
    if not varied and not problems:
        problems.append("no key has several values; expected such as optim.lr=1e-4,2e-4, or `ditmoe train`")
    if count > MOST_CELLS:
        problems.append(f"the keys make {count:,} cells; expected {MOST_CELLS:,} at most")
    if problems:
        raise UserError(problem_list("sweep", problems))
    return _loaded(path, choices, varied, folder)


def _loaded(path: Path, choices: Mapping[str, Sequence[str]], varied: Sequence[str], folder: Path) -> list[Cell]:
    cells: list[Cell] = []
    problems: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for chosen in itertools.product(*choices.values()):
        pairs = dict(zip(choices, chosen, strict=True))
        values = {key: pairs[key] for key in varied}
        name = name_of(values)
        overrides = (*(f"{key}={value}" for key, value in pairs.items()), f"run.dir={folder / name}")
        try:
            config = load_config(path, list(overrides))
        except UserError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        same = seen.setdefault(repr({**config.plain(), "run": None}), name)
        if same != name:
            problems[f"is the same run as {same}; expected different values"] = [name]
        cells.append(Cell(name, values, overrides, folder / name, config))
    if problems:
        raise UserError("\n".join(_told(problems)))
    return cells


def _told(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Each problem once, with the first of the cells that have it."""
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}"
        for problem, names in problems.items()
    ]


def split_values(text: str) -> list[str]:
    """The values of an override, which commas separate; those in brackets, braces and quotes separate nothing."""
    values, start, depth, quote = [], 0, 0, ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:place])
            start = place + 1
    return [*values, text[start:]]


def name_of(values: Mapping[str, str]) -> str:
    """`optim.lr=1e-4+model.depth=2`: a name for a folder, with a fingerprint where it cannot be spelt out."""
    spelt = "+".join(f"{key}={shown_place(value)}" for key, value in values.items())
    name = re.sub(r"[^A-Za-z0-9._=+-]", "_", spelt)
    told = "+".join(f"{key}={value}" for key, value in values.items())
    if name == told and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class ReadyCell:
    """A cell whose data is there, and whose folder takes it."""

    cell: Cell
    config: RunConfig
    """Resolved."""
    processes: int


def ready(cells: Sequence[Cell]) -> list[ReadyCell]:
    """Check all that `ditmoe train` would check of each cell, before any is started.

    Raises:
        UserError: what is wrong with any of them, such as a run that was started with other settings.
    """
    datasets: dict[str, Dataset] = {}
    found: list[ReadyCell] = []
    problems: dict[str, list[str]] = {}
    for cell in cells:
        config = cell.config
        try:
            key = f"{config.data.model_dump_json()} {config.seed}"
            if key not in datasets:
                datasets[key] = open_dataset(config.data, config.seed)
                datasets[key].check_files()
            processes = process_count(config.launch.processes, config.launch.device)
            resolved = resolve(config, datasets[key].index, processes)
            RunFolder(cell.folder).check(resolved)
        except UserError as error:
            problems.setdefault(str(error), []).append(cell.name)
        else:
            found.append(ReadyCell(cell, resolved, processes))
    if problems:
        raise UserError("\n".join(_told(problems)))
    return found
