"""Python's garbage collection between steps, in the same steps on all ranks.

A collection takes up to a second in a process that has imported torch, and comes when enough objects were made: at
another step on each rank, and the other ranks wait for each in turn. So what is there at the start is never looked
at again, and the rest at fixed steps.
"""

import gc
from types import TracebackType
from typing import Final, Self

YOUNG_EVERY: Final = 50
"""Steps between two collections of what is new."""
ALL_EVERY: Final = 1000
"""Steps between two collections of all that came after the start."""


class GarbageCollection:
    """A context manager: inside it Python collects nothing by itself."""

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
        gc.unfreeze()

    def after_step(self, step: int) -> None:
        """Collect, if it is the time for it."""
        if step % ALL_EVERY == 0:
            gc.collect()
        elif step % YOUNG_EVERY == 0:
            gc.collect(1)
