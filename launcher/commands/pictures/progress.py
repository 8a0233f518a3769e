"""How far the drawing of images is, step by step: one batch may take minutes."""

import sys
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

from tqdm import tqdm

from ditmoe.data.storage import progress


class DrawingProgress:
    """Shows on stderr how many images are drawn: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, count: int, batch: int, passes: float | None, clock: Callable[[], float] = time.monotonic):
        """Nothing is drawn yet.

        Args:
            passes: rows through the network that an image will take; None: nobody knows, and whole batches count.
        """
        self._count, self._batch, self._passes, self._clock = count, batch, passes, clock
        self._drawn = self._rows = 0
        self._said = clock()
        self._lock = Lock()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            shown = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=count, bar_format=shown, dynamic_ncols=True, file=sys.stderr)
            self._show()

    def drawn(self, images: int) -> None:
        """So many images are finished."""
        with self._lock:
            self._drawn, self._rows = images, 0
            self._show()
        if images == self._count and self._bar is not None:
            self._bar.close()

    def evaluated(self, rows: int) -> None:
        """So many rows of the batch went through the network; any thread may tell."""
        with self._lock:
            self._rows += rows
            self._show()

    def _show(self) -> None:
        under_way = min(self._batch, self._count - self._drawn)
        share = 0.0 if self._passes is None else min(1.0, self._rows / (self._passes * max(1, under_way)))
        done = self._drawn + under_way * share
        if self._bar is not None:
            self._bar.set_description_str(f"{self._drawn:,} of {self._count:,} images", refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._clock() - self._said >= progress.SECONDS_BETWEEN_LINES:
            self._said = self._clock()
            told = f"{self._drawn:,} of {self._count:,} images drawn"
            print(f"{told} ({done / self._count:.0%} of the work)", file=sys.stderr, flush=True)
