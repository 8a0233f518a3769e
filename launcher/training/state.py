"""What a run says of itself while it goes on: `state.json` of its folder, for who looks at it from outside.

    {"state": "training", "step": 120, "steps": 400000, "images": 30720, "reason": "", "time": …, "host": "n1",
     "pid": 4711, "job": "123", "images_per_second": 812.5, "checkpoint_step": 100, "checkpoint_time": …}

Times are seconds since 1970; `job` is Slurm's, `images_per_second` and the checkpoint's keys null where there are
none. A run that was killed leaves the state that it was in: who reads it looks at its age.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from ditmoe.model.errors import UserError
from ditmoe.model.outside.files import replacing

STATE: Final = "state.json"

Word = Literal["starting", "training", "complete", "stopped", "failed"]


@dataclass(frozen=True)
class RunState:
    """The content of `state.json`."""

    state: Word
    step: int
    """Of the last record or checkpoint."""
    steps: int
    """Of the whole run."""
    images: int | None
    """Seen by `step`; None: it has not loaded the checkpoint yet."""
    reason: str = ""
    """Why it stopped or failed."""
    images_per_second: float | None = None
    """Of the last record."""
    checkpoint_step: int | None = None
    """Of the newest checkpoint that is complete."""
    checkpoint_time: float | None = None
    """When that was complete; of one that an earlier start wrote, when its folder was."""
    time: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str | None = field(default_factory=lambda: os.environ.get("DITMOE_JOB") or os.environ.get("SLURM_JOB_ID"))
    """Of Slurm: `123`, or `123_4` of an element of an array; None: no job."""


class StateFile:
    """Writes the state of a run; rank 0's alone.

    Args:
        run: the run's folder.
        state: to begin with, which is written at once.
    """

    def __init__(self, run: Path, state: RunState) -> None:
        self._path = run / STATE
        self.state = state
        self._write()

    def tell(self, **changes: object) -> None:
        """Change some of the fields, and write all.

        Raises:
            UserError: the file cannot be written, such as on a full disk.
        """
        self.state = replace(self.state, time=time.time(), **changes)  # type: ignore[arg-type]
        self._write()

    def fail(self, reason: str) -> None:
        """Say that the run failed; where the disk is what failed, the state stays as it was."""
        try:
            self.tell(state="failed", reason=reason)
        except UserError:
            return

    def _write(self) -> None:
        # Not synced: it is written at every record, and a loss of power leaves the checkpoints to tell.
        with replacing(self._path, synced=False) as file:
            file.write(json.dumps(asdict(self.state)).encode() + b"\n")
