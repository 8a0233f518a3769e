"""Signs of life of commands that work on files, for who supervises their job.

Training counts its steps. Drawing, scoring and encoding take hours and leave files as they go: that these grow is
the sign that the work gets further.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ditmoe.parallel.ranks import this_process
from ditmoe.slurm.heartbeats import FOLDER_VARIABLE, Heart

LOOK_SECONDS: Final = 10.0
"""Between two looks at the files."""


class Signs:
    """Says that a command waits, or that its work gets further."""

    def __init__(self, heart: Heart, look: float = LOOK_SECONDS) -> None:
        self._heart = heart
        self._look = look

    def waits(self, step: int) -> None:
        """The run is looked at, which is at this step, and nothing is to be done."""
        self._heart.beat("evaluation", step, "waits for a checkpoint")

    @contextmanager
    def works(self, *folders: Path, step: int | None = None) -> Iterator[None]:
        """While the body works: a sign each time that the files below these folders have grown."""
        self._heart.beat("evaluation", step, "works")
        end = threading.Event()
        follower = threading.Thread(target=self._follow, args=(folders, step, end), daemon=True)
        follower.start()
        try:
            yield
        finally:
            end.set()
            follower.join(LOOK_SECONDS)  # a folder that hangs does not hold up the end

    def _follow(self, folders: tuple[Path, ...], step: int | None, end: threading.Event) -> None:
        before = None
        while not end.wait(self._look):
            found = [_extent(folder) for folder in folders]
            if found != before:
                self._heart.beat("evaluation", step, "works")
                before = found


@contextmanager
def signs_of_work(*folders: Path) -> Iterator[None]:
    """While the body works on files below these folders: this rank's signs of life, where they are looked for."""
    if not os.environ.get(FOLDER_VARIABLE):
        yield
        return
    process = this_process()
    with Heart.of_this_process(process.rank, process.ranks) as heart, Signs(heart).works(*folders):
        yield


def _extent(folder: Path) -> tuple[int, int]:
    """How many files are below a folder, and their bytes; files come and go meanwhile."""
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
                files += 1
    return files, size
