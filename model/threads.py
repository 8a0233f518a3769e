"""Sums that round alike: a CPU adds in another order on another number of threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Final, TypeVar

import torch

MOST_THREADS: Final = 8
"""Of `map_in_threads`: each has memory of its own."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread for the body, so that its results do not tell how many there were to
    have."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_of(device: torch.device) -> AbstractContextManager[None]:
    """For work whose results shall not tell who did it: a CPU computes in one thread."""
    return one_thread() if device.type == "cpu" else nullcontext()


def map_in_threads(
    function: Callable[[_Item], _Result], items: Sequence[_Item], device: torch.device | None = None
) -> list[_Result]:
    """A function of each of some items, in their order; on a CPU several at once, torch in one thread for each.

    A process that is forked from one with threads may call it, as long as it has not let torch use threads.
    """
    threads = min(torch.get_num_threads(), len(items), MOST_THREADS)
    if threads < 2 or (device is not None and device.type != "cpu"):
        with one_thread():
            return [function(item) for item in items]
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        return list(pool.map(function, items))
