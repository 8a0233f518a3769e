"""Deleting old checkpoints, and what killed writes left, beside training.

Deleting a checkpoint may take long, or fail: a read-only folder, a reader on NFS, somebody's link by the name of a
leftover. None of that stops a run. A failure is reported once, and tried again at the next save and the next
start.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from ditmoe.parallel.checkpoint.folder import PARTIAL, discarded_name

_LEFTOVER: Final = re.compile(r"step-[0-9]{8,18}(\.[a-z]+(-[0-9]+)?)?" + re.escape(PARTIAL))

_AGAIN: Final = "; training goes on, and it is tried again at the next save"


class Removal:
    """Removes checkpoints of a run; on one process alone, the one that holds the run."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "checkpoints"
        self._thread: threading.Thread | None = None
        self._found: SimpleQueue[str] = SimpleQueue()
        self._told: set[str] = set()

    def set_aside(self, path: Path) -> None:
        """Make a checkpoint invisible, so that a kill leaves no half of it; `sweep` then deletes it."""
        try:
            os.rename(path, discarded_name(path))
        except OSError as error:
            self._found.put(f"{path} could not be removed ({error.strerror or error}){_AGAIN}")

    def sweep(self) -> None:
        """Begin to delete all that is set aside or left over; does nothing while an earlier call is still at it.

        No save may be under way.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        leftovers = list(self._leftovers())
        # A daemon: what a program that ends has not deleted, the next start does.
        self._thread = threading.Thread(target=self._delete, args=(leftovers,), name="removal", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until `sweep` has finished, or for so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)

    def problems(self) -> list[str]:
        """What could not be removed since the last call, each problem once in a run."""
        new: list[str] = []
        while True:
            try:
                problem = self._found.get_nowait()
            except Empty:
                return new
            if problem not in self._told:
                self._told.add(problem)
                new.append(problem)

    def _leftovers(self) -> Iterator[Path]:
        """Folders by names of unfinished and discarded checkpoints; anything else by such a name is reported."""
        try:
            found = sorted(path for path in self._folder.iterdir() if _LEFTOVER.fullmatch(path.name))
        except FileNotFoundError:
            return
        except OSError as error:
            self._found.put(f"{self._folder} could not be read ({error.strerror or error})")
            return
        for path in found:
            if path.is_symlink() or not path.is_dir():
                kind = "a link" if path.is_symlink() else "a file"
                self._found.put(f"{path} was left alone: it is {kind}, and no folder of this program")
            else:
                yield path

    def _delete(self, folders: list[Path]) -> None:
        for folder in folders:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._found.put(f"{folder} could not be removed ({error.strerror or error}){_AGAIN}")
