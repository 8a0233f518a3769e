"""Signs of life of a watch, for who supervises its job: it waits for days, and scores for hours."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ditmoe.slurm.heartbeats import Heart

LOOK_SECONDS: Final = 10.0
"""Between two looks at how far an evaluation is."""


class Signs:
    """Says that a watch waits, or that the evaluation it has started gets further."""

    def __init__(self, heart: Heart, look: float = LOOK_SECONDS) -> None:
        self._heart = heart
        self._look = look

    def waits(self, step: int) -> None:
        """The run is looked at, which is at this step, and nothing is to be done."""
        self._heart.beat("evaluation", step, "waits for a checkpoint")

    @contextmanager
    def scores(self, folder: Path, step: int) -> Iterator[None]:
        """While the body waits for an evaluation's processes: a sign for each file that they add to its folder."""
        self._heart.beat("evaluation", step, "scores")
        end = threading.Event()
        follower = threading.Thread(target=self._follow, args=(folder, step, end), daemon=True)
        follower.start()
        try:
            yield
        finally:
            end.set()
            follower.join()

    def _follow(self, folder: Path, step: int, end: threading.Event) -> None:
        before = -1
        while not end.wait(self._look):
            found = sum(1 for _ in folder.rglob("*")) if folder.is_dir() else 0
            if found != before:
                self._heart.beat("evaluation", step, "scores")
                before = found
