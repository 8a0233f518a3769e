"""A board of another library, which runs in a process of its own: nothing that it does stops or slows training.

This process hands lines to a thread, which writes them to that one; where it does not keep up, or a network hangs,
lines are left out, and where it fails it is told once. What the library prints goes to a file of the run folder.
"""

import base64
import io
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditmoe.data.storage.files import open_appending
from ditmoe.launcher.loggers.board import Outcome
from ditmoe.model.outside.text import counted, printable, without_logins

MOST_WAITING: Final = 1000
"""Lines that wait to be written."""
CLOSE_SECONDS: Final = 20.0
"""That the end of a run waits for a board."""
READ_SECONDS: Final = 1.0
"""That what a process said last is waited for once it has ended."""
PROGRAM: Final = (sys.executable, "-m", "ditmoe.launcher.loggers.beside")


class BoardAside:
    """A `Board` in a process of its own.

    Args:
        kind: `wandb` or `mlflow`.
        folder: where it keeps what it knows of the run, and what it prints.
        run: what the run is called there.
        evaluation: what the evaluations that it shows are called; None: it shows the training.
        program: what is started, before the arguments.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        run: str,
        evaluation: str | None = None,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.kind = kind
        self._work = "training" if evaluation is None else "the watch"
        self._lines: queue.Queue[str | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._problem: str | None = None
        self._told = False
        with open_appending(folder / f"{kind}.txt") as output:
            self._process = subprocess.Popen(
                [*program, kind, str(folder), run, *([] if evaluation is None else [evaluation])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._writer = threading.Thread(target=self._write, daemon=True, name=f"{kind} writer")
        self._writer.start()
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"{kind} reader")
        self._reader.start()

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """As `Board`."""
        self._put(figures=dict(values), step=step)

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        """As `Board`."""
        file = io.BytesIO()
        Image.fromarray(image_HWC.squeeze(2) if image_HWC.shape[2] == 1 else image_HWC).save(file, "png")
        self._put(image=base64.b64encode(file.getvalue()).decode(), name=name, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """As `Board`."""
        self._put(text=text, name=name, step=step)

    def problem(self) -> str | None:
        """What is wrong, the first time that it is asked for after that was seen; None: nothing new."""
        if self._told:
            return None
        ended = self._process.poll() not in (None, 0)
        if ended:
            self._reader.join(READ_SECONDS)
        found = self._problem
        if found is None and self._left_out:
            found = "it does not keep up: records are left out there"
        if found is None and ended:
            found = f"its process ended with exit code {self._process.returncode}"
        self._told = found is not None
        return None if found is None else f"{self.kind}: {found}; {self._work} goes on without it"

    def close(self, outcome: Outcome) -> str | None:
        """Wait a while until all is sent, and end the process; what is left unsent, in words."""
        deadline = time.monotonic() + CLOSE_SECONDS
        self._put(end=outcome)
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if self._told:
                return None
            waiting = counted(self._lines.qsize(), "record")
            return f"{self.kind}: not all was sent within {CLOSE_SECONDS:.0f} s ({waiting} waited)"
        return self.problem()

    def _put(self, **line: Any) -> None:
        try:
            self._lines.put_nowait(json.dumps(line))
        except queue.Full:
            self._left_out += 1

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # it has ended
            while (line := self._lines.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._problem = self._problem or without_secrets(line.decode(errors="replace").strip())


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A message in one line, with `…` in place of logins and of what variables of secrets hold."""
    for name, value in environment.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "…")
    return printable(without_logins(text))
