"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES: Final = 10.0


def track(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """Pass `items` on while showing on stderr how far they are."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=f" {unit}", file=sys.stderr)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            print(
                f"{what}: {done:,} of {total:,} {unit} ({done / (now - started):,.1f} per second)",
                file=sys.stderr,
                flush=True,
            )


def show_progress(title: str, total: int = 0) -> Callable[[int], None]:
    """A function that is told how many of `total` are done, and shows it on stderr.

    It says so every ten seconds also where it is told nothing, until all are done, or something else is shown.

    Args:
        total: 0 where there are no parts; the first call says that all is done.
    """
    global _shown_last
    shown = _Bar(title, total) if sys.stderr.isatty() else _Lines(title, total)
    _shown_last = weakref.ref(shown)
    threading.Thread(target=_tick, args=(_shown_last, shown.period), daemon=True, name="progress").start()
    return shown


class _Lines:
    """A plain line now and then."""

    period = SECONDS_BETWEEN_LINES / 10

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._begun = self._said = time.monotonic()
        self.over = False

    def __call__(self, done: int) -> None:
        self._done, self.over = done, done >= self._total
        self.tick()

    def tick(self) -> None:
        """Say it where nothing was said for long enough."""
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        parts = f"{self._done:,} of {self._total:,}, " if self._total else ""
        line = f"{self._title}: {parts}{now - self._begun:.0f} s so far\n"
        print(line, end="", file=sys.stderr, flush=True)  # in one piece: the clock has a thread of its own


class _Bar:
    """A bar of a terminal, whose clock goes on."""

    period = 1.0

    def __init__(self, title: str, total: int) -> None:
        form = None if total else "{desc}: {elapsed}"
        self._bar = tqdm(total=total or None, desc=title, file=sys.stderr, bar_format=form)
        self._total = total
        self.over = False

    def __call__(self, done: int) -> None:
        self._bar.update(done - self._bar.n)
        self.over = done >= self._total
        if self.over:
            self._bar.close()

    def tick(self) -> None:
        """Move the clock."""
        self._bar.refresh()


_shown_last: "weakref.ref[_Lines | _Bar] | None" = None


def _tick(reference: "weakref.ref[_Lines | _Bar]", period: float) -> None:
    """Show what was shown last again and again, as long as anybody holds it."""
    while _shown_last is reference:
        shown = reference()
        if shown is None or shown.over:
            return
        shown.tick()
        del shown
        time.sleep(period)
