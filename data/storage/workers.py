"""Work spread over forked processes whose results come back in order, and whose errors come back as they are.

Torch's DataLoader carries it. It would wrap a worker's exception in a new one with a traceback for its text, so
a UserError travels as a value and is raised again, unchanged, where the results are read.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ditmoe.model.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PARENTS_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""Ask a whole run to stop; its main process decides when its workers do."""


class Failure(NamedTuple):
    """A UserError on its way between processes."""

    message: str


class _Function(Dataset["Result | Failure"], Generic[Item, Result]):
    """A function in the shape of a torch dataset: the "index" is the argument."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self._function = function

    def __getitem__(self, item: Item) -> "Result | Failure":
        try:
            return self._function(item)
        except UserError as error:
            return Failure(str(error))


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, prefetch: int = 4
) -> Iterator[Result]:
    """`map(function, items)`, computed by `workers` forked processes (0: this one), `prefetch` ahead in each.

    `items` may be endless. What `function` returns should be plain data and numpy arrays: they come through a
    pipe, while tensors would need shared memory, which containers are often short of. Closing the iterator ends
    the workers.
    """
    loader: DataLoader[Result | Failure] = DataLoader(
        _Function(function),
        sampler=items,  # the items, of any type; batch_size=None hands them to the function as they are
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # else it draws a number from the global generator
    )
    # Blocked across the fork, so that no signal finds a worker before it has said what it does with it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        results = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for result in results:
            if isinstance(result, Failure):
                raise UserError(result.message)
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch's words for one that is gone
            raise
        raise UserError(
            f"a reading process was killed ({error}); the system does so when memory runs out: use fewer workers"
        ) from error
    finally:
        del results  # ends the workers, without waiting for a garbage collection


def _as_it_is(result: Result) -> Result:
    return result


def _leave_signals_to_parent(_worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach every process; a run that stops in order still needs its workers.

    So a worker ends when its parent closes it, terminates it, or is gone, and at no one else's SIGTERM.
    """

    def obey_the_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    # Both signals are blocked here since before the fork, and in every thread that is started now.
    threading.Thread(target=obey_the_parent, daemon=True).start()
