"""How far a run is, as its folder says: for whoever follows it from outside."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe.data.storage.files import open_regular
from ditmoe.launcher.configuration.run_config import RunConfig
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.launcher.training.state import STATE
from ditmoe.parallel.checkpoint.folder import newest_checkpoint, step_of


@dataclass(frozen=True)
class Progress:
    """What a run's folder says of the run."""

    config: RunConfig | None
    """It was last started with; None: it has not begun."""
    step: int
    """Of the newest checkpoint, or of the run's own word where that is newer."""
    word: str | None
    """`training`, `complete`, `stopped`, … by the run's own word; None: it says nothing."""
    signed: float
    """When its files were last written, seconds since 1970; 0: there are none."""

    @property
    def complete(self) -> bool:
        """Whether its last checkpoint is there, and nothing more comes."""
        return self.config is not None and self.reached(self.config.train.steps)

    def reached(self, steps: int) -> bool:
        """Whether so many steps are done, and their checkpoint is there: it may be asked for more than before."""
        return self.config is not None and self.step >= steps


def read_progress(run: Path) -> Progress:
    """Look at a run.

    Raises:
        UserError: its configuration is not one of this version.
    """
    folder = RunFolder(run)
    state = _state(run / STATE)
    newest = newest_checkpoint(run)
    saved = 0 if newest is None else step_of(newest) or 0
    word = state.get("state")
    # Until its last checkpoint is complete, a run that has done its last step is not.
    step = saved if word != "complete" else max(saved, _number(state.get("step")))
    return Progress(
        config=folder.stored_config() if folder.config.exists() else None,
        step=step,
        word=word if isinstance(word, str) else None,
        signed=max(map(_written, (run / STATE, folder.stats, folder.log, folder.config, folder.checkpoints))),
    )


def _state(path: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        with open_regular(path) as file:
            state = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
