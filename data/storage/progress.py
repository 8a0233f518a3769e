"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
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


def show_progress(title: str, total: int) -> Callable[[int], None]:
    """A function that is told how many of `total` are done, and shows it on stderr."""
    if sys.stderr.isatty():
        bar = tqdm(total=total, desc=title, file=sys.stderr)

        def move(done: int) -> None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return move

    said = time.monotonic()

    def say(done: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return say
