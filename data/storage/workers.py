"""Work spread over forked processes whose results come back in order, and whose errors come back as they are.

Each process has a pipe for what it is to do and one for its results, and only the main process has their other
ends: when a worker is killed, whatever it was doing, reading its results ends at once, and when the main process
is gone, the worker ends too.
"""

import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, NamedTuple, TypeVar

import torch

from ditmoe.data.storage.stopping import STOP_SIGNALS
from ditmoe.model.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_END: Final = 5.0
"""Seconds that a process has for what it is doing when its work is no longer wanted."""


class _Failed(NamedTuple):
    """An exception on its way between processes."""

    users: bool
    """Whether it is a UserError."""
    message: str
    """Its text, or the traceback of another."""


class _Worker(NamedTuple):
    """The main process's side of a worker."""

    process: BaseProcess
    items: Connection
    results: Connection


class Crew:
    """Forked processes that compute one function; they wait for what to apply it to.

    Signals that ask for a stop reach every process of a terminal or a batch job; the main process decides when its
    workers end, and they leave them alone.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int) -> None:
        """Fork so many; 0: this process computes by itself."""
        self._function = function
        self._workers: list[_Worker] = []
        # Blocked across the fork, and so in the workers for ever.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for _ in range(workers):
                self._workers.append(_start(function, self._workers))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def in_order(self, items: Iterable[Any], prefetch: int = 4) -> Generator[Any, None, None]:
        """`map(function, items)`, `prefetch` ahead in each process; the end of the iterator ends the processes."""
        if not self._workers:
            yield from map(self._function, items)
            return
        crew, upcoming = self._workers, iter(items)
        try:
            sent = 0
            for done in itertools.count():
                while sent < done + len(crew) * prefetch:
                    try:
                        item = next(upcoming)
                    except StopIteration:
                        upcoming = iter(())
                        break
                    _send(crew[sent % len(crew)], item)
                    sent += 1
                if done == sent:
                    return
                yield _receive(crew[done % len(crew)])
        finally:
            self.close()

    def close(self) -> None:
        """End the processes."""
        crew, self._workers = self._workers, []
        _end(crew)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 4
) -> Generator[Result, None, None]:
    """`map(function, items)`, computed by `workers` forked processes (0: this one), `prefetch` ahead in each.

    `items` may be endless. The processes start with the first result; closing the iterator ends them.

    Raises:
        UserError: as the function raises it, or when the system has ended a worker.
        RuntimeError: the function raised another exception, whose traceback is the text.
    """
    yield from Crew(function, workers).in_order(items, prefetch)


def _start(function: Callable[[Item], Result], crew: list[_Worker]) -> _Worker:
    """Fork a worker; the ends of earlier ones that it would have too are closed in it."""
    context = multiprocessing.get_context("fork")
    its_items, items = context.Pipe(duplex=False)
    results, its_results = context.Pipe(duplex=False)
    others = [end for worker in crew for end in (worker.items, worker.results)]
    process = context.Process(
        target=_work, args=(function, its_items, its_results, [items, results, *others]), daemon=True
    )
    process.start()
    its_items.close()
    its_results.close()
    return _Worker(process, items, results)


def _work(
    function: Callable[[Item], Result], items: Connection, results: Connection, others: list[Connection]
) -> None:
    """Be a worker, until there are no more items or nobody wants the results."""
    for end in others:
        end.close()
    torch.set_num_threads(1)
    # Both threads begin with the signals blocked.
    threading.Thread(target=_obey_the_parent, daemon=True).start()
    outgoing: queue.SimpleQueue[tuple[Result | _Failed] | None] = queue.SimpleQueue()
    # So that the next result is computed while the one before is read, which takes as long as the reader likes.
    sender = threading.Thread(target=_send_all, args=(results, outgoing), daemon=True)
    sender.start()
    with contextlib.suppress(EOFError):
        while True:
            item = items.recv()
            try:
                outgoing.put((function(item),))
            except UserError as error:
                outgoing.put((_Failed(True, str(error)),))
            except Exception:
                outgoing.put((_Failed(False, traceback.format_exc()),))
    outgoing.put(None)
    sender.join()


def _obey_the_parent() -> None:
    """End at the main process's SIGTERM, which the interpreter sends at its own end, and at no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _send_all(results: Connection, outgoing: "queue.SimpleQueue[tuple[Result | _Failed] | None]") -> None:
    try:
        while (result := outgoing.get()) is not None:
            results.send(result[0])
    except BrokenPipeError:  # nobody wants the rest
        os._exit(0)


def _send(worker: _Worker, item: Item) -> None:
    try:
        worker.items.send(item)
    except BrokenPipeError as error:
        raise _gone(worker) from error


def _receive(worker: _Worker) -> Any:
    try:
        result = worker.results.recv()
    except (EOFError, OSError) as error:
        raise _gone(worker) from error
    if isinstance(result, _Failed):
        raise (
            UserError(result.message) if result.users else RuntimeError(f"in a reading process:\n{result.message}")
        )
    return result


def _gone(worker: _Worker) -> UserError:
    worker.process.join(LONGEST_END)
    code = worker.process.exitcode
    if code is not None and code < 0:
        end = f"was killed by {signal.Signals(-code).name}"
    else:
        end = f"ended by itself with exit code {code}"
    return UserError(f"a reading process {end}; the system kills when memory runs out: use fewer workers")


def _end(crew: list[_Worker]) -> None:
    """End the workers: without their pipes they end by themselves, once they are done with what they do."""
    if any(worker.process._parent_pid != os.getpid() for worker in crew):  # type: ignore[attr-defined]
        return  # a fork of the main process, which inherited the iterator
    for worker in crew:
        worker.items.close()
        worker.results.close()
    deadline = time.monotonic() + LONGEST_END
    for worker in crew:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
