"""Fetching shards ahead of their use, in a thread of the process that reads."""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from ditmoe.data.places.faults import ShardFault
from ditmoe.data.places.place import Place
from ditmoe.data.places.transports.base import Ended, Stop
from ditmoe.data.shards.index import ShardEntry
from ditmoe.model.errors import UserError

SECONDS_TO_END: Final = 1.0
"""How long closing waits for the thread; one that still connects ends by itself, and holds nobody up."""

Outcome = int | UserError


class ShardFetcher:
    """The shards of a place, by their number in the index; the next ones are fetched while others are read.

    At most `ahead` shards are held that nobody took yet. Shards of a local place are opened when they are asked
    for. It may be made before a fork: what it needs is started in the process that uses it.
    """

    def __init__(
        self,
        place: Place,
        shards: Sequence[ShardEntry],
        *,
        ahead: int = 2,
        failure_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A shard that could not be had fails at once for `failure_seconds`, and is then tried again."""
        assert ahead > 0
        self._place = place
        self._shards = shards
        self._ahead = ahead
        self._failure_seconds = failure_seconds
        self._clock = clock
        self._thread: _Thread | None = None
        self._failed: dict[int, tuple[float, ShardFault]] = {}

    def prefetch(self, number: int) -> None:
        """Fetch a shard soon, unless that is done or under way or failed lately. Returns at once."""
        if self._place.remote and self._failure(number) is None:
            self._running().prefetch(number)

    def get(self, number: int) -> int:
        """A descriptor of the shard, which the caller closes; a second `get` fetches again.

        Raises:
            ShardFault: it cannot be had, or could not lately.
            UserError: this machine cannot keep it.
        """
        failure = self._failure(number)
        if failure is not None:
            raise failure
        outcome = self._running().take(number) if self._place.remote else None
        try:
            if outcome is None:  # not under way, so it is fetched here rather than behind others
                return self._place.open(self._shards[number])
            if isinstance(outcome, UserError):
                raise outcome
            return outcome
        except ShardFault as fault:
            self._failed[number] = (self._clock(), fault)
            raise

    def drop(self, number: int) -> None:
        """Give back a shard that was prefetched and is not wanted any more."""
        if self._thread is not None:
            outcome = self._running().take(number)
            if isinstance(outcome, int):
                os.close(outcome)

    def close(self) -> None:
        """End what is under way and give back what nobody took. It can be used again."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _failure(self, number: int) -> ShardFault | None:
        if number not in self._failed:
            return None
        when, fault = self._failed[number]
        if self._clock() - when < self._failure_seconds:
            return ShardFault(fault.shard, fault.reason)  # a fresh one: each raise adds to a traceback
        del self._failed[number]
        return None

    def _running(self) -> "_Thread":
        if self._thread is not None and self._thread.process != os.getpid():
            self._thread.forget()
            self._thread = None
        if self._thread is None:
            self._thread = _Thread(lambda number, stop: self._place.open(self._shards[number], stop), self._ahead)
        return self._thread


class _Thread:
    """The thread, and what it shares with the process's own."""

    def __init__(self, fetch: Callable[[int, Stop], int], ahead: int) -> None:
        self.process = os.getpid()
        self._fetch = fetch
        self._ahead = ahead
        self._changed = threading.Condition()
        self._wanted: deque[int] = deque()
        self._under_way: int | None = None
        self._done: OrderedDict[int, Outcome] = OrderedDict()
        self._stop = Stop()
        self._closed = False
        # A daemon: a program that ends does not wait for a server that stalls.
        self._thread = threading.Thread(target=self._work, name="shard-fetcher", daemon=True)
        self._thread.start()

    def prefetch(self, number: int) -> None:
        with self._changed:
            if number not in self._done and number not in self._wanted and number != self._under_way:
                self._wanted.append(number)
                self._changed.notify_all()

    def take(self, number: int) -> Outcome | None:
        """What came of a shard, when it has come; null when it was not begun, and then it will not be."""
        with self._changed:
            if number in self._wanted:
                self._wanted.remove(number)
                return None
            self._changed.wait_for(lambda: number != self._under_way)
            outcome = self._done.pop(number, None)
            self._changed.notify_all()
            return outcome

    def close(self) -> None:
        with self._changed:
            self._wanted.clear()
            self._changed.notify_all()
        self._stop.set()
        self._thread.join(SECONDS_TO_END)
        with self._changed:
            self._closed = True
            self.forget()

    def forget(self) -> None:
        """Close what was fetched; after a fork these are the child's copies of the descriptors."""
        while self._done:
            outcome = self._done.popitem()[1]
            if isinstance(outcome, int):
                os.close(outcome)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stop.is_set() or (self._wanted and len(self._done) < self._ahead)
                )
                if self._stop.is_set():
                    return
                number = self._under_way = self._wanted.popleft()
            outcome: Outcome | None = None
            try:
                outcome = self._fetch(number, self._stop)
            except UserError as error:
                outcome = error
            except Ended:
                return
            finally:
                with self._changed:
                    self._under_way = None
                    if outcome is not None:
                        self._done[number] = outcome
                    if self._closed:  # too late to be given back there
                        self.forget()
                    self._changed.notify_all()
