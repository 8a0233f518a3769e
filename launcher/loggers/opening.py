"""The boards that a configuration asks for."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ditmoe.launcher.configuration.sections import LoggerName
from ditmoe.launcher.loggers.aside import BoardAside
from ditmoe.model.errors import UserError

ASIDE: Final[tuple[LoggerName, ...]] = ("wandb", "mlflow")
"""Those of other libraries, which are extras of this package by the same names."""


def check_loggers(names: tuple[LoggerName, ...]) -> None:
    """UserError where a library is not installed."""
    for name in names:
        if name in ASIDE and find_spec(name) is None:
            raise UserError(
                f"train.loggers: {name} is not installed; expected it beside ditmoe: the extra ditmoe[{name}]"
            )


def boards_aside(names: tuple[LoggerName, ...], folder: Path, run: str) -> list[BoardAside]:
    """Those that run in processes of their own, started."""
    return [BoardAside(name, folder, run) for name in ASIDE if name in names]
