"""What a run tells: the terminal, log.txt, stats.jsonl and the loggers. Rank 0 alone reports."""

import io
import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final, Self, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ditmoe.data.storage.files import open_appending, open_regular, replacing
from ditmoe.launcher.configuration.sections import LoggerName
from ditmoe.launcher.local.terminal import is_closed, let_go
from ditmoe.launcher.loggers.board import Board, Outcome, named
from ditmoe.launcher.loggers.opening import boards_aside
from ditmoe.launcher.loggers.tensorboard import TensorBoard
from ditmoe.launcher.training.run_folder import RunFolder
from ditmoe.model.errors import UserError

Value = float | int | str | list[Any] | dict[str, Any] | None


class Reporter:
    """Writes a run's reports from a step on; a context manager.

    Args:
        folder: the run's folder.
        steps: steps of the whole run.
        step: steps that are done; what was reported of later steps, before the resume, is dropped.
        terminal: where lines and the progress bar go.
        loggers: where figures are shown besides.
    """

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        step: int = 0,
        terminal: TextIO | None = None,
        loggers: tuple[LoggerName, ...] = ("tensorboard",),
    ) -> None:
        self._terminal: TextIO | None = terminal or sys.stdout
        folder.path.mkdir(parents=True, exist_ok=True)
        drop_after(folder.stats, step)
        drop_after(folder.sample_keys, step)
        self._folder = folder
        self._files = ExitStack()
        self._log, self._stats = self._open(folder.log), self._open(folder.stats)
        self._keys: TextIO | None = None
        self.outcome: Outcome = "stopped"
        """How the run ends, where it ends without an error."""
        self._boards: list[Board] = [TensorBoard(folder.tensorboard, step)] if "tensorboard" in loggers else []
        self._aside = boards_aside(loggers, folder.boards, folder.path.resolve().name)
        self._thread_failed = threading.excepthook
        threading.excepthook = self._leave_to_next_write
        self._bar: tqdm[Any] | None = None
        if self._terminal.isatty():
            self._bar = tqdm(total=steps, initial=step, file=self._terminal, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if kind is not None:
            self.outcome = "failed"
        if isinstance(error, Exception):
            with suppress(OSError):
                self._write_log(f"ended by an error: {str(error) or type(error).__name__}")
        # What ends the run is told, and not what a full disk says again to the rest of the buffers.
        with suppress(OSError) if kind is not None else nullcontext():
            self.close()

    def close(self) -> None:
        """Finish all files."""
        if self._bar is not None:
            with self._while_read():
                self._bar.close()
        try:
            for board in self._boards:
                board.close(self.outcome)
        finally:
            threading.excepthook = self._thread_failed
            for aside in self._aside:
                left = aside.close(self.outcome)
                if left is not None:
                    self._write_log(left)
        self._files.close()

    def log(self, message: str) -> None:
        """Say something: to the terminal, and to log.txt with the time."""
        self._write_log(message)
        self._tell(message)

    def samples(self, step: int, keys: Sequence[str]) -> None:
        """Write the keys of a step's samples to samples.jsonl."""
        if self._keys is None:
            self._keys = self._open(self._folder.sample_keys)
        self._keys.write(json.dumps({"step": step, "keys": keys}) + "\n")
        self._keys.flush()

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            with self._while_read():
                self._bar.update(steps)

    def record(self, step: int, values: Mapping[str, Value]) -> None:
        """Report a step: a line of stats.jsonl, figures of the loggers, and a line of the log.

        Args:
            step: the step's number, from 1.
            values: numbers by the keys of `NAMES` (`loss`, `images`, …); `expert_load` is `[L][N]` shares, and
                `sources` numbers by source and name; other lists are not drawn. Infinite and undefined numbers
                become null in stats.jsonl.
        """
        record = {"step": step, **{key: _json_value(value) for key, value in values.items()}}
        self._stats.write(json.dumps(record, allow_nan=False) + "\n")
        self._stats.flush()
        shown = named(values)
        for board in self._all_boards():
            board.figures(step, shown)
        for aside in self._aside:
            problem = aside.problem()
            if problem is not None:
                self.log(problem)
        line = _line(step, values)
        self._write_log(line)
        if self._bar is None:
            self._tell(line)
        else:
            loss = values.get("loss")
            self._bar.set_postfix(loss=f"{loss:.4f}" if isinstance(loss, float) else "", refresh=False)

    def image(self, name: str, image_HWC: NDArray[np.uint8], step: int) -> None:
        """Show an image, uint8 `[H, W, C]` with 1 or 3 channels."""
        for board in self._all_boards():
            board.image(name, image_HWC, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Show plain text, such as the configuration."""
        for board in self._all_boards():
            board.text(name, text, step)

    def _all_boards(self) -> list[Board]:
        return [*self._boards, *self._aside]

    def _open(self, path: Path) -> TextIO:
        # Names of files need not be text that UTF-8 has.
        text = io.TextIOWrapper(open_appending(path), encoding="utf-8", errors="backslashreplace")
        return self._files.enter_context(text)

    def _leave_to_next_write(self, failed: threading.ExceptHookArgs) -> None:
        """Print no traceback where TensorBoard's thread cannot write: the next write here raises the same."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._thread_failed(failed)

    def _tell(self, text: str) -> None:
        """Write to the terminal, as long as somebody reads it."""
        with self._while_read():
            if self._bar is not None:
                self._bar.write(text, file=self._terminal)
            elif self._terminal is not None:
                print(text, file=self._terminal, flush=True)

    @contextmanager
    def _while_read(self) -> Iterator[None]:
        """A closed standard output (`| head`, a terminal that is gone) does not end the run; the log says so."""
        try:
            yield
        except OSError as error:
            if not is_closed(error) or self._terminal is None:
                raise
            let_go(self._terminal)
            self._terminal = self._bar = None
            self._write_log(f"nobody reads the standard output any more ({error.strerror}); this log goes on")

    def _write_log(self, message: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write("".join(f"[{stamp}] {line}\n" for line in message.splitlines() or [""]))
        self._log.flush()


def drop_after(path: Path, step: int) -> int:
    """Drop the records of a file after a step, and a last line that a kill cut short; how many it dropped.

    So that the curve of a run that was interrupted has each step once.
    """
    if not path.exists():
        return 0
    try:
        with open_regular(path) as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected the records of a run") from error
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        with replacing(path) as written:
            written.writelines(kept)
    return len(lines) - len(kept)


def _step_of(line: bytes) -> float:
    """Step of a record; infinity where it cannot be read, as after a loss of power."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_value(value: Value) -> Value:
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(step: int, values: Mapping[str, Value]) -> str:
    """`(step=0000100) Train Loss: 0.1234, Train Steps/Sec: 5.20, …`"""
    parts = []
    for key, label, form in _LINE:
        value = values.get(key)
        if isinstance(value, int | float):
            parts.append(f"{label}: {value:{form}}")
    seconds = values.get("step_seconds")
    if isinstance(seconds, int | float) and seconds > 0:
        parts.insert(1, f"Train Steps/Sec: {1 / seconds:.2f}")
    return f"(step={step:07d}) {', '.join(parts)}"


_LINE: Final = (
    ("loss", "Train Loss", ".4f"),
    ("balance_loss", "Balance Loss", ".4f"),
    ("grad_norm", "Grad Norm", ".3f"),
    ("lr", "LR", ".2e"),
    ("images_per_second", "Images/Sec", ".1f"),
    ("data_wait_seconds", "Data Wait (s)", ".3f"),
    ("record_seconds", "Record (s)", ".3f"),
    ("save_seconds", "Save (s)", ".3f"),
    ("preview_seconds", "Preview (s)", ".3f"),
    ("memory_gib", "Memory (GiB)", ".2f"),
    ("mfu", "MFU", ".1%"),
)
