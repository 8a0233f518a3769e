"""What rank 0 does for all while the others wait, however long it takes.

A collective ends with its time-out, also where rank 0 has just not come to it yet. So nobody waits for its work in
a collective: rank 0 gives signs of life in the store, several within a tenth of the time-out, and the others wait
as long as they come. A rank 0 that is gone, or stopped, is noticed after the time-out, as everywhere.
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed import distributed_c10d as c10d

from ditmoe.model.errors import MissingProcessesError

Value = TypeVar("Value")

TIMEOUT: Final = timedelta(minutes=10)
"""Longest wait in a collective: a rank that died without a word ends the others after it."""
SIGNS_PER_TIMEOUT: Final = 20
TOLD_AFTER: Final = 0.1
"""Share of the time-out from which on rank 0 says what it is at."""
_SHORTEST_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 2.0
"""Seconds between two looks of a rank, of which there may be thousands at the store."""

_turns: Counter[str] = Counter()
"""Thread of work → how often rank 0 has worked in it; all ranks count alike."""


@contextmanager
def first_rank_works(what: str, thread: str = "training", timeout: timedelta = TIMEOUT) -> Iterator[bool]:
    """The body does something where True is given, on rank 0; the others wait at its end. All ranks call it.

    Where the body raises, the others go on, and find rank 0 gone at the next collective.

    Args:
        what: rank 0 does, for messages, such as "opens the reports".
        thread: in which all ranks call it in one order.

    Raises:
        MissingProcessesError: on the others: nothing was heard of rank 0 for the time-out.
    """
    if dist.get_world_size() == 1:
        yield True
        return
    _turns[thread] += 1
    place = f"ditmoe/alone/{thread}/{_turns[thread]}"
    # Not a group's collectives, which could not be waited for so long.
    store: Any = c10d._get_default_store()
    if dist.get_rank() != 0:
        yield False
        _wait(store, place, what, timeout.total_seconds())
        return
    ended = threading.Event()
    arguments = (store, place, what, timeout.total_seconds(), ended)
    signs = threading.Thread(target=_give_signs, args=arguments, name="signs of life", daemon=True)
    signs.start()
    try:
        yield True
    finally:
        ended.set()
        signs.join()
        store.set(f"{place}/ended", "")


def from_first_rank(
    make: Callable[[], Value],
    what: str,
    group: ProcessGroup | None = None,
    thread: str = "training",
    timeout: timedelta = TIMEOUT,
) -> Value:
    """What rank 0 makes, on every rank; all call it, and wait as `first_rank_works` has them.

    Args:
        group: of all ranks, to tell it in.
    """
    made: list[Any] = [None]
    with first_rank_works(what, thread, timeout) as works:
        if works:
            made = [make()]
    dist.broadcast_object_list(made, src=0, group=group)
    value: Value = made[0]
    return value


def _give_signs(store: Store, place: str, what: str, timeout: float, ended: threading.Event) -> None:
    begin, told = time.monotonic(), False
    while not ended.wait(timeout / SIGNS_PER_TIMEOUT):
        seconds = time.monotonic() - begin
        store.set(f"{place}/sign", str(seconds))
        if seconds > TOLD_AFTER * timeout and not told:
            told = True
            print(f"rank 0 {what}, for {seconds:.0f} s so far; the others wait", file=sys.stderr, flush=True)


def _wait(store: Any, place: str, what: str, timeout: float) -> None:
    listener = _Listener(store, place)
    # In a thread: a store whose process stands still does not answer either.
    threading.Thread(target=listener.listen, name="listener", daemon=True).start()
    while not listener.ended.wait(timeout / SIGNS_PER_TIMEOUT):
        silent = time.monotonic() - listener.heard
        if silent > timeout:
            raise MissingProcessesError(f"rank 0 {what}: nothing was heard of it for {silent:.0f} s", [0])
    if listener.gone is not None:
        reason = str(listener.gone).partition("\n")[0]
        raise MissingProcessesError(f"rank 0 {what}, and is gone: {reason}", [0]) from listener.gone


class _Listener:
    """Listens for rank 0's signs until it has ended its work, or its store is gone with it."""

    def __init__(self, store: Any, place: str) -> None:
        self._store, self._place = store, place
        self.ended = threading.Event()
        self.heard = time.monotonic()
        """When the last sign came."""
        self.gone: Exception | None = None

    def listen(self) -> None:
        begin, sign = time.monotonic(), b""
        try:
            while not self._store.check([f"{self._place}/ended"]):
                if self._store.check([f"{self._place}/sign"]):
                    last = self._store.get(f"{self._place}/sign")
                    if last != sign:
                        sign, self.heard = last, time.monotonic()
                time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 0.05 * (time.monotonic() - begin))))
        except dist.DistError as error:
            self.gone = error
        self.ended.set()
